"""The edge: an HAProxy of our own before C1, and what its configuration says.

It has two entrances. The *control edge* on loopback shows ``/admin/*``, ``/metrics``,
``/metrics/targets`` and ``/health`` on the port of the deployment guide. With
``composite.security.enable_tls`` there is C1's *public entrance* too: TLS, certificates of clients,
bounds on what one address may do and how long it may take, and an end to whatever two parsers might
understand differently.

The edge adds no trust: who may do what is decided in C1, which also checks again what it is sent.
So the edge can be down without anything else noticing.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hcna_ray.api.bounds import CLIENT_FIELD, BodyLimits
from hcna_ray.config import Settings
from hcna_ray.supervisor.serve_proxy import LAST_FIELD_RULE, haproxy_binary

#: Connections at once to the control edge; scrapers and administrators are few.
_CONTROL_CONNECTIONS_MAX = 256
#: Addresses whose requests are counted; each takes some hundred bytes.
_ADDRESSES_MAX = 100_000
#: Longer than the longest request: Serve ends one after 120 s (``serve_config.yaml``).
_ANSWER_S = 130
#: How long what began before a reload may go on, and how many reloads it may live through.
_OLD_PROCESS = "30m"
_RELOADS_MAX = 4
#: Forward secrecy and authenticated encryption alone, for TLS 1.2; those of TLS 1.3 all have both.
_CIPHERS = ":".join(
    f"ECDHE-{kind}-{cipher}"
    for cipher in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
    for kind in ("ECDSA", "RSA")
)
_CIPHERSUITES = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
_CURVES = "X25519:P-256:P-384"

_METHODS = "GET HEAD POST PUT DELETE PATCH OPTIONS"
#: Nothing that a client sends under these names goes on: they steer Serve, or say who is asking.
#: A name with an underscore is one with a hyphen to some.
_STRIPPED = (
    "del-header x-request- -m beg",
    "del-header x-forwarded -m beg",
    "del-header x-serve- -m beg",
    "del-header x-haproxy- -m beg",
    "del-header x-ssl- -m beg",
    "del-header x-client-cert -m beg",
    "del-header x-hcna- -m beg",
    "del-header _ -m sub",
    "del-header serve-multiplexed-model-id",
    "del-header forwarded",
    "del-header x-real-ip",
    "del-header x-original-url",
    "del-header x-rewrite-url",
    "del-header x-http-method-override",
    "del-header upgrade",
    "del-header http2-settings",
    "del-header proxy",
)
#: Paths that two programs may take for two things. None of C1's is among them.
_AMBIGUOUS_PATHS = (
    # //, a segment . or .. (also percent-encoded, also before a semicolon), a backslash
    r"//|\\|/(\.|%2e){1,2}(/|;|$)",
    # an encoded slash, backslash, percent sign or control character, and what is no encoding
    r"%(2f|5c|25|7f|[01][0-9a-f])|%($|[^0-9a-f]|[0-9a-f]($|[^0-9a-f]))",
)
_LOG = {
    "at": "%Ts.%ms",
    "id": "%ID",
    "client": "%ci",
    "client_port": "%cp",
    "client_name": "%[ssl_c_s_dn(CN),json(utf8s)]",
    "tls": "%sslv",
    "method": "%HM",
    "path": "%[var(txn.path)]",
    "status": "%ST",
    "received_bytes": "%U",
    "sent_bytes": "%B",
    "took_ms": "%Ta",
    "ended": "%ts",
}
#: Of a connection that never came to a request: a handshake that failed, for instance.
_ERROR_LOG = {
    "at": "%Ts.%ms",
    "client": "%ci",
    "client_port": "%cp",
    "error": "%[fc_err_str,json(utf8s)]",
}
_LOG_CHARS_MAX = 16384
_LOG_NUMBERS = ("at", "client_port", "status", "received_bytes", "sent_bytes", "took_ms")


@dataclass(frozen=True, kw_only=True)
class EdgeFiles:
    """What the public entrance needs of the disk. The configuration holds the mark: keep it."""

    #: Private key and certificate, with those between it and its authority.
    pem: Path
    #: What C1 believes the edge by.
    mark: str
    #: Authorities whose client certificates count; None: nobody is asked for one.
    clients: Path | None = None
    #: Lists of those certificates that do not count any more.
    revoked: Path | None = None
    #: Socket to which a line about each request is sent; None: nobody wants it.
    log: Path | None = None


def edge_config(
    settings: Settings, files: EdgeFiles | None = None, *, connections: int = 1024, threads: int = 1
) -> str:
    """Return the HAProxy configuration of the edge.

    Args:
        settings: Of M1.
        files: Of the public entrance; None: there is none.
        connections: That it may hold at once.
        threads: That work for it.
    """
    public = settings.has_edge
    assert public == (files is not None)
    edge = settings.composite.edge
    log = files.log if files is not None and edge.access_log else None
    lines = [
        "# Written at every start; changes here are lost.",
        "global",
        f"    maxconn {_CONTROL_CONNECTIONS_MAX + (connections if public else 0)}",
        f"    nbthread {threads if public else 1}",
        f"    hard-stop-after {_OLD_PROCESS}",
    ]
    if public:
        lines += [
            f"    mworker-max-reloads {_RELOADS_MAX}",
            *(
                [f"    log {_quoted(log)} len {_LOG_CHARS_MAX} format raw local0 info"]
                if log
                else []
            ),
            "    ssl-default-bind-options ssl-min-ver TLSv1.2 no-tls-tickets",
            f"    ssl-default-bind-ciphers {_CIPHERS}",
            f"    ssl-default-bind-ciphersuites {_CIPHERSUITES}",
            f"    ssl-default-bind-curves {_CURVES}",
        ]
    lines += [
        "",
        "defaults",
        "    mode http",
        "    option http-keep-alive",
        "    option abortonclose",
        "    option idle-close-on-response",
        "    option disable-h2-upgrade",
        # A connection to C1 serves one client alone: what one left in it meets no other.
        "    http-reuse never",
        "    timeout connect 2s",
        f"    timeout http-request {_ms(edge.head_s)}",
        f"    timeout http-keep-alive {_ms(edge.idle_s)}",
        f"    timeout client {_ms(edge.silent_s)}",
        f"    timeout server {_ANSWER_S}s",
        *_errors(),
        "",
        *_control(settings),
    ]
    if files is not None:
        lines += ["", *_public(settings, files, connections)]
    lines += ["", "backend composite", f"    server c1 {_at(settings.serve_host)}:"]
    lines[-1] += f"{settings.serve_port}"
    return "\n".join(lines) + "\n"


def edge_command(settings: Settings, *, check: Path | None = None) -> list[str]:
    """Return the command of the edge, in the foreground; or of a look at a configuration.

    With a public entrance a first process stays and starts others that serve: at SIGUSR2 it reads
    its files anew, and who is being served by the old one goes on there.
    """
    if check is not None:
        return [haproxy_binary(), "-c", "-f", str(check)]
    foreground = ["-W", "-db"] if settings.has_edge else ["-db"]
    return [haproxy_binary(), *foreground, "-f", str(settings.run_dir / "edge.cfg")]


# -- entrances -------------------------------------------------------------------------------------


def _control(settings: Settings) -> list[str]:
    missing = "The control port serves /admin/, /metrics, /metrics/targets and /health only."
    return [
        "frontend control",
        f"    bind {_at(settings.control_host)}:{settings.control_port}",
        f"    maxconn {_CONTROL_CONNECTIONS_MAX}",
        "    acl open_path path /metrics /metrics/targets /health",
        "    acl admin_path path_beg /admin/",
        "    acl tricky_path path_sub .. // %",
        _refuse(404, "not_found", missing, "if tricky_path or !open_path !admin_path"),
        *_rules(settings),
        "    http-request set-header X-Forwarded-Proto http",
        f"    http-request {LAST_FIELD_RULE}",
        "    default_backend composite",
    ]


def _public(settings: Settings, files: EdgeFiles, connections: int) -> list[str]:
    edge, security = settings.composite.edge, settings.composite.security
    bind = f"    bind {_at(settings.api_host)}:{settings.api_port} ssl crt {_quoted(files.pem)}"
    bind += " alpn http/1.1"
    if files.clients is not None:
        verify = "required" if security.enable_mtls else "optional"
        bind += f" ca-file {_quoted(files.clients)} verify {verify}"
        if files.revoked is not None:
            bind += f" crl-file {_quoted(files.revoked)}"
    lines = [
        "frontend composite",
        bind,
        f"    maxconn {connections}",
        *(["    log global"] if edge.access_log else []),
        "    option dontlognull",
        f"    log-format '{_log_line(_LOG)}'",
        f"    error-log-format '{_log_line(_ERROR_LOG)}'",
        "    unique-id-format %[uuid]",
        f"    stick-table type ipv6 size {_ADDRESSES_MAX} expire 60s "
        "store conn_cur,http_req_rate(10s)",
        "    tcp-request connection track-sc0 src",
        # Before the handshake, which is what costs.
        "    tcp-request connection reject if "
        f"{{ sc_conn_cur(0) gt {edge.address_connections_max} }}",
        "    http-request set-var(txn.path) path,json(utf8s)",
        # A list for other ports and programs of that name would be none of ours.
        "    http-request set-var(txn.local) bool(true) if "
        "{ req.hdr(host),host_only -m reg -i ^(localhost|127\\..*|\\[::1\\])$ }",
    ]
    if edge.address_requests_per_s:
        lines.append(
            _refuse(
                429,
                "rate_limited",
                "There were too many requests from your address.",
                f"if {{ sc_http_req_rate(0) gt {edge.address_requests_per_s * 10} }}",
                "hdr Retry-After 5",
            )
        )
    lines += [
        # Serve's own HAProxy would tell of Serve there.
        _refuse(404, "not_found", "There is nothing at this path.", "if { path_beg -i /-/ }"),
        *_rules(settings),
        "    http-request set-header X-Forwarded-Proto https",
        "    http-request set-header X-Request-ID %[unique-id]",
        f'    http-request set-header {CLIENT_FIELD.decode()} "{files.mark} %[src]"',
        f"    http-request {LAST_FIELD_RULE}",
        "    http-response set-header X-Content-Type-Options nosniff",
        "    http-response del-header server",
    ]
    if edge.hsts_s:
        lines.append(
            f'    http-response set-header Strict-Transport-Security "max-age={edge.hsts_s}" '
            "unless { var(txn.local) -m found }"
        )
    return [*lines, "    default_backend composite"]


def _rules(settings: Settings) -> list[str]:
    """Return what holds at both entrances: what is refused, what is taken out, what is put in."""
    bodies = BodyLimits.by(settings.limits)
    rules = [
        _refuse(
            405,
            "method_not_allowed",
            f"The methods are {_METHODS}.",
            f"unless {{ method {_METHODS} }}",
        ),
        *(
            _refuse(
                400,
                "malformed_request",
                "The path can be read in two ways.",
                f"if {{ path -m reg -i '{pattern}' }}",
            )
            for pattern in _AMBIGUOUS_PATHS
        ),
        _refuse(
            400,
            "malformed_request",
            "A request has one Host.",
            "unless { req.fhdr_cnt(host) eq 1 }",
        ),
        _refuse(
            400,
            "malformed_request",
            "A request has Content-Length or Transfer-Encoding, and not both.",
            "if { req.fhdr(content-length) -m found } { req.fhdr(transfer-encoding) -m found }",
        ),
        _refuse(
            400,
            "malformed_request",
            "The only Transfer-Encoding is chunked.",
            "if { req.fhdr(transfer-encoding) -m found } "
            "!{ req.fhdr(transfer-encoding) -m str -i chunked }",
        ),
    ]
    rules.append(
        # HAProxy 2.8 counts 2^64 + 2 as 2, and sends on what was written.
        _refuse(
            400,
            "malformed_request",
            "Content-Length is too large a number.",
            "if { req.fhdr(content-length) -m len gt 18 }",
        )
    )
    rules.append(f"    http-request set-var(txn.body_max) int({bodies.default})")
    rules += [
        f"    http-request set-var(txn.body_max) int({limit}) "
        f"if {{ method {method} }} {{ path {path} }}"
        for (method, path), limit in sorted(bodies.by_route.items())
    ]
    rules.append(
        _refuse(
            413,
            "too_large",
            "The body is larger than the limit of this route.",
            "if { req.hdr_val(content-length),sub(txn.body_max) gt 0 }",
        )
    )
    rules += [f"    http-request {rule}" for rule in _STRIPPED]
    rules += [
        "    http-request set-header X-Forwarded-For %[src]",
        # A small body is waited for here, where waiting costs nothing.
        f"    http-request wait-for-body time {_ms(settings.composite.edge.head_s)} "
        "if { method POST PUT PATCH DELETE }",
    ]
    return rules


# -- words -----------------------------------------------------------------------------------------

_ERRORS = (
    (400, "malformed_request", "This is not an HTTP request.", ""),
    (403, "forbidden", "This is not allowed.", ""),
    (408, "request_timeout", "The request did not arrive in time.", ""),
    (413, "too_large", "The request is too large.", ""),
    (500, "internal", "Something went wrong at the edge.", ""),
    (501, "malformed_request", "This is not an HTTP request that is understood here.", ""),
    (502, "moderator_unavailable", "C1 gave no valid answer.", ""),
    (503, "moderator_unavailable", "C1 is not up at the moment.", " hdr Retry-After 2"),
    (504, "outcome_unknown", "C1 did not answer in time.", ""),
)
_TITLES = {
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    413: "Content Too Large",
    429: "Too Many Requests",
    500: "Internal Server Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


def _errors() -> list[str]:
    return [
        f"    http-error status {status} content-type application/problem+json "
        f"string '{_problem(status, code, detail)}'{more}"
        for status, code, detail, more in _ERRORS
    ]


def _refuse(status: int, code: str, detail: str, condition: str, more: str = "") -> str:
    """Return the rule that answers with a problem; the connection ends with it.

    What follows on that connection may be the rest of what was refused, dressed as a request.
    """
    more = f"hdr Connection close {more}".strip()
    return (
        f"    http-request return status {status} content-type application/problem+json "
        f"string '{_problem(status, code, detail)}' {more} {condition}"
    )


def _problem(status: int, code: str, detail: str) -> str:
    """Return problem details as a JSON text that fits between single quotes."""
    body = {
        "type": f"urn:hcna:{code}",
        "title": _TITLES[status],
        "status": status,
        "detail": detail,
        "code": code,
    }
    text = json.dumps(body)
    assert "'" not in text
    return text


def _log_line(wanted: Mapping[str, str]) -> str:
    fields = (
        f'"{name}":{value}' if name in _LOG_NUMBERS else f'"{name}":"{value}"'
        for name, value in wanted.items()
    )
    return "{" + ",".join(fields) + "}"


def _at(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _ms(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"

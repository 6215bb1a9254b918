"""Settings of one machine: read once at start, frozen, every field bounded and described.

One ``hcna.yaml`` holds the three sections ``moderator:``, ``worker:`` and ``composite:`` (each
valid alone) and the ones that tune what lies below them. ``HCNA_<SECTION>__<FIELD>=value`` in the
environment overrides a field. Names end in their unit: ``_s``, ``_ms``, ``_bytes``, ``_gb``.
``store.url`` alone has a second variable, ``DATABASE_URL``, which is the last to be asked.

Ports are configured as plain numbers and used through `Settings.port` and the properties beside it,
which add ``ports.offset``: a second instance beside the first needs only another offset and home.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import socket
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin
from urllib.parse import unquote

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from hcna_ray.core.errors import HcnaError, InvalidName
from hcna_ray.core.naming import NodeName

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

LOOPBACK = "127.0.0.1"

#: Longest settings file that is read; a larger one is a mistake, not a configuration.
FILE_BYTES_MAX = 1 * MIB


class ConfigError(HcnaError, ValueError):
    """The settings cannot be used. The text names field, value, what is allowed and near names."""

    code = "invalid_config"

    def __init__(self, message: str, source: str = "settings") -> None:
        super().__init__(message, source)
        self.message, self.source = message, source

    def __str__(self) -> str:
        return f"{self.source}: {self.message}"


def _check_node_id(value: str) -> str:
    try:
        NodeName.parse(value)
    except InvalidName as error:
        raise ValueError(str(error)) from error
    return value


NodeId = Annotated[str, StringConstraints(max_length=128), AfterValidator(_check_node_id)]
Port = Annotated[int, Field(ge=1, le=65535)]
Host = Annotated[
    str, StringConstraints(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9._:\-]+$")
]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:\-]{0,63}$")]


def _word_of_a_switch(value: Any) -> Any:
    """Return the word that was meant: YAML takes a bare ``on`` for true and ``off`` for false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_word_of_a_switch)]


def _check_network(value: str) -> str:
    try:
        return str(ipaddress.ip_network(value))
    except ValueError as error:
        raise ValueError(f"{value!r} is no network such as 192.168.1.0/24") from error


HookHost = Annotated[
    str,
    StringConstraints(max_length=253, pattern=r"^(\*\.)?[a-z0-9_]([a-z0-9_.:\-]*[a-z0-9_])?$"),
]
HookNetwork = Annotated[str, StringConstraints(max_length=100), AfterValidator(_check_network)]

#: Ways to write that a store is a PostgreSQL server.
POSTGRES_SCHEMES = ("postgresql://", "postgres://")


def _check_store_url(value: str) -> str:
    """Refuse what cannot be meant; the server's own rules are libpq's."""
    if value.startswith("sqlite:///"):
        return value
    if not value.startswith(POSTGRES_SCHEMES):
        raise ValueError("must begin with sqlite:/// or postgresql://")
    if any(letter <= " " or letter == "\x7f" for letter in value):
        raise ValueError("must not hold spaces or control characters; percent-encode them")
    if not value.partition("://")[2].partition("?")[0].partition("/")[2]:
        raise ValueError("must name a database: postgresql://user@host/database")
    return value


StoreUrl = Annotated[
    str, StringConstraints(min_length=1, max_length=2048), AfterValidator(_check_store_url)
]


def without_password(url: str) -> str:
    """Return a store's URL as it may be shown: no password, no parameters, nothing undecided."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "sqlite":
        return url
    rest = rest.partition("?")[0]
    # The last @ ends the credentials: a password that was not escaped may hold others, and /.
    credentials, _, place = rest.rpartition("@")
    user = credentials.partition(":")[0]
    return f"{scheme}://{user}@{place}" if user else f"{scheme}://{place}"


def without_secrets(url: str) -> str:
    """Return a store's URL for a command line: all of it but the passwords."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "sqlite":
        return url
    place, _, options = rest.partition("?")
    credentials, at, host = place.rpartition("@")
    kept = [pair for pair in options.split("&") if pair and not _is_secret(pair.partition("=")[0])]
    user = credentials.partition(":")[0]
    return f"{scheme}://{user}{at}{host}{'?' if kept else ''}{'&'.join(kept)}"


def secrets_of(url: str) -> tuple[str, ...]:
    """Return the passwords in a store's URL, raw and decoded, longest first."""
    found: set[str] = set()
    authority = url.partition("://")[2].partition("?")[0]
    credentials, at, _host = authority.rpartition("@")
    if at:
        found.add(credentials.partition(":")[2])
    for pair in url.partition("?")[2].split("&"):
        name, _, value = pair.partition("=")
        if _is_secret(name):
            found.add(value)
    found |= {unquote(secret) for secret in found}
    return tuple(sorted(filter(None, found), key=len, reverse=True))


def _is_secret(option: str) -> bool:
    """Whether an option of a store's URL is a password; libpq decodes names as well as values."""
    return unquote(option).lower() in ("password", "sslpassword")


def short_name(node_id: str) -> str:
    """Return role and index of a node id: ``HCNA-W1--prod--home--v1.0`` is ``W1``."""
    return NodeName.parse(node_id).short


class _Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# -- the three sections a deployment is described with -----------------------------------------


class NodeSecuritySettings(_Section):
    """How a node proves who it is and how messages between M1 and the workers are wrapped."""

    enable_mtls: bool = Field(
        default=False,
        description=(
            "Show a certificate of your own to the other machines, the one that the three paths "
            "name. Without it the cluster's own authority gives one: both sides always show one."
        ),
    )
    cert_path: Path | None = Field(
        default=None,
        description="Certificate of this node (PEM, with a SAN), for both ends of a connection.",
    )
    key_path: Path | None = Field(
        default=None, description="Private key of this node (PEM, mode 0600)."
    )
    ca_path: Path | None = Field(
        default=None,
        description="Certificate of the authority that signed the nodes' certificates.",
    )
    enable_bpcs: bool = Field(
        default=False,
        description="Encrypt intents and telemetry as messages, on M1 and on each worker.",
    )
    bpcs_key_exchange: Literal["diffie-hellman", "pre-shared"] = Field(
        default="diffie-hellman",
        description="Where the key of the message cipher comes from: agreed on, or keys/bpcs.key.",
    )

    @model_validator(mode="after")
    def _mtls_needs_its_files(self) -> Self:
        missing = [n for n in ("cert_path", "key_path", "ca_path") if getattr(self, n) is None]
        if self.enable_mtls and missing:
            raise ValueError(f"enable_mtls needs {', '.join(missing)} too")
        return self


class CompositeSecuritySettings(_Section):
    """Encryption of the public API."""

    enable_tls: bool = Field(
        default=False,
        description="Serve HTTPS. Without it nothing starts with a public listen_address.",
    )
    cert_path: Path | None = Field(
        default=None,
        description="Certificate of the API (PEM); without it the cluster's authority gives one.",
    )
    key_path: Path | None = Field(
        default=None, description="Private key of the API (PEM, mode 0600)."
    )
    ca_path: Path | None = Field(
        default=None,
        description="Authority whose client certificates are accepted: who shows one must show a "
        "good one. With enable_mtls, and without this path, the cluster's own.",
    )
    enable_mtls: bool = Field(
        default=False, description="Demand a client certificate on the public API."
    )

    @model_validator(mode="after")
    def _files_belong_together(self) -> Self:
        if (self.cert_path is None) != (self.key_path is None):
            missing = "cert_path" if self.cert_path is None else "key_path"
            raise ValueError(f"a certificate of your own needs {missing} too")
        if self.enable_mtls and not self.enable_tls:
            raise ValueError("enable_mtls needs enable_tls: true too")
        return self


class EdgeSettings(_Section):
    """C1's entrance with TLS (``enable_tls``): what one address may do, and how slowly."""

    address_requests_per_s: int = Field(
        default=500,
        ge=0,
        le=1_000_000,
        description="Requests a second from one address, over ten seconds; 0: no bound.",
    )
    address_connections_max: int = Field(
        default=512, ge=1, le=1_000_000, description="Connections at once from one address."
    )
    head_s: float = Field(
        default=10.0,
        ge=1,
        le=300,
        description="A request's head arrives within this, and a small body once more.",
    )
    silent_s: float = Field(
        default=30.0,
        ge=1,
        le=3600,
        description="Whoever neither sends nor takes anything for this long is cut off.",
    )
    idle_s: float = Field(
        default=60.0, ge=0.1, le=3600, description="A connection stays open between two requests."
    )
    hsts_s: int = Field(
        default=365 * 86400,
        ge=0,
        le=10 * 365 * 86400,
        description="Browsers that were here use HTTPS alone for this long; 0: not told.",
    )
    access_log: bool = Field(
        default=True, description="A line about each request in logs/edge.log (JSON)."
    )


class NodeAddress(_Section):
    """Where another node is found."""

    node_id: NodeId = Field(description="Full name of the node.")
    address: Host = Field(description="Host name or IP address.")
    port: Port = Field(default=9443, description="Its control or metrics port.")


class BackendAddress(_Section):
    """Where C1 finds the moderator. On M1 itself this is ``localhost``."""

    address: Host = Field(default="localhost", description="Host name or IP address of M1.")
    port: Port = Field(default=8443, description="Control port of M1.")


class SchedulingSettings(_Section):
    """How much runs at once, for how long, and in which order."""

    max_concurrent_tasks: int = Field(
        default=64, ge=1, le=100_000, description="Attempts started at the same time, all workers."
    )
    task_timeout_seconds: float = Field(
        default=300.0, gt=0, le=30 * 86400, description="Time of one attempt unless its task says."
    )
    max_losses: int = Field(
        default=3, ge=1, le=100, description="Attempts lost with their worker before a task fails."
    )
    ageing_step_s: float = Field(
        default=60.0, ge=0, le=86400, description="Head start that one step of priority is worth."
    )
    wait_max_s: float = Field(
        default=3600.0,
        gt=0,
        le=30 * 86400,
        description="How long a task with on_disconnect=wait waits for its own worker.",
    )
    concurrency_default: int = Field(
        default=1, ge=1, le=100_000, description="Tasks of one concurrency_key at once, by default."
    )
    concurrency_limits: dict[Name, Annotated[int, Field(ge=1, le=100_000)]] = Field(
        default_factory=dict,
        max_length=10_000,
        description="Tasks at once for the concurrency keys named here.",
    )


class ModeratorSettings(_Section):
    """M1: the machine with the Ray head, the moderator, the store and C1."""

    node_id: NodeId = Field(default="HCNA-M1--prod--home--v1.0", description="Full name of M1.")
    listen_address: Host = Field(
        default=LOOPBACK, description="Address for the control plane; public only with mTLS."
    )
    control_port: Port = Field(
        default=8443,
        description="Control edge: /admin/*, /metrics, its targets, /health. Shifted by offset.",
    )
    local_worker: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether M1's machine works too; auto: until another machine has joined.",
    )
    worker_nodes: tuple[NodeAddress, ...] = Field(
        default=(), max_length=1000, description="Workers that are expected to join."
    )
    scheduling: SchedulingSettings = Field(
        default_factory=SchedulingSettings, description="How much runs at once and in which order."
    )
    security: NodeSecuritySettings = Field(
        default_factory=NodeSecuritySettings, description="Certificates of M1, message cipher."
    )

    @property
    def name(self) -> str:
        """Short name, which is also M1's custom resource in Ray: ``M1``."""
        return short_name(self.node_id)


class WorkerResources(_Section):
    """What a worker offers. What is left out is found out on the machine itself."""

    cpu_cores: int | None = Field(
        default=None, ge=1, le=4096, description="Cores to use at most; default all of them."
    )
    memory_gb: float | None = Field(
        default=None, gt=0, le=65536, description="Memory to use at most, in GiB."
    )
    gpu_count: int = Field(default=0, ge=0, le=64, description="GPUs to offer.")
    disk_path: Path | None = Field(
        default=None, description="Working directory of tasks; default data/ in HCNA_HOME."
    )
    custom: dict[Name, Annotated[float, Field(gt=0, le=1e6)]] = Field(
        default_factory=dict, max_length=100, description="Further resources by name."
    )


class WorkerSettings(_Section):
    """One worker: the machine that runs attempts."""

    node_id: NodeId = Field(default="HCNA-W1--prod--home--v1.0", description="Full name of it.")
    listen_address: Host = Field(
        default=LOOPBACK, description="Address of its metrics; public only with mTLS."
    )
    worker_port: Port = Field(
        default=9443, description="Worker's /metrics and /health. Shifted by ports.offset."
    )
    moderator_node: NodeAddress = Field(
        default_factory=lambda: NodeAddress(
            node_id="HCNA-M1--prod--home--v1.0", address="localhost", port=8443
        ),
        description="Where M1 is found.",
    )
    resources: WorkerResources = Field(
        default_factory=WorkerResources, description="What the worker offers."
    )
    labels: dict[Name, Annotated[str, StringConstraints(max_length=128)]] = Field(
        default_factory=dict, max_length=100, description="Labels a task's requires may match on."
    )
    security: NodeSecuritySettings = Field(
        default_factory=NodeSecuritySettings, description="Certificates of the worker, cipher."
    )

    @property
    def name(self) -> str:
        """Short name, which is also the worker's custom resource in Ray: ``W1``."""
        return short_name(self.node_id)


class CompositeSettings(_Section):
    """C1: the HTTP API that everybody else sees."""

    node_id: NodeId = Field(default="HCNA-C1--prod--home--v1.0", description="Full name of C1.")
    listen_address: Host = Field(
        default=LOOPBACK, description="Address of the API; public only with enable_tls."
    )
    api_port: Port = Field(default=8080, description="Port of the API. Shifted by ports.offset.")
    moderator_backend: BackendAddress = Field(
        default_factory=BackendAddress, description="Where C1 finds M1."
    )
    security: CompositeSecuritySettings = Field(
        default_factory=CompositeSecuritySettings, description="TLS of the API."
    )
    hosts: tuple[Host, ...] = Field(
        default=(),
        max_length=100,
        description="Names and addresses by which C1 is called besides those of this machine: in "
        "its certificate, in Host, and as the origin of pages that may use it.",
    )
    edge: EdgeSettings = Field(
        default_factory=EdgeSettings, description="Bounds of the entrance with TLS."
    )

    @property
    def name(self) -> str:
        """Short name: ``C1``."""
        return short_name(self.node_id)


# -- what tunes the machinery below ------------------------------------------------------------


class LeaseSettings(_Section):
    """How long a worker may stay silent before it loses an attempt (``HCNA_LEASE__TTL_S``)."""

    ttl_s: float = Field(
        default=30.0, gt=0, le=3600, description="Life of a lease without a heartbeat."
    )
    heartbeat_s: float = Field(default=5.0, gt=0, le=1200, description="Pause between heartbeats.")
    self_stop_s: float = Field(
        default=20.0,
        gt=0,
        le=3600,
        description="A worker without a confirmed heartbeat for this long stops its attempts.",
    )
    grace_s: float = Field(
        default=5.0,
        ge=0,
        le=600,
        description="After SIGTERM until SIGKILL, and after the end of a lease until the next one.",
    )
    start_s: float = Field(
        default=15.0,
        gt=0,
        le=3600,
        description="An attempt handed to a slot begins within this, or is handed out anew; one "
        "with a process of its own has four times as long. Doubled at each try.",
    )
    gone_after_s: float = Field(
        default=86400.0,
        gt=0,
        le=3650 * 86400,
        description="A worker silent for this long is no longer expected back.",
    )

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if self.ttl_s < 3 * self.heartbeat_s:
            raise ValueError(
                f"ttl_s ({self.ttl_s:g}) must be at least three times heartbeat_s "
                f"({self.heartbeat_s:g}): two lost heartbeats must be survivable"
            )
        if not self.heartbeat_s < self.self_stop_s <= self.ttl_s - self.heartbeat_s:
            raise ValueError(
                f"self_stop_s ({self.self_stop_s:g}) must lie between heartbeat_s "
                f"({self.heartbeat_s:g}) and ttl_s ({self.ttl_s:g}) less heartbeat_s: "
                "a worker stops before its tasks are given to another"
            )
        if self.gone_after_s < self.ttl_s + self.grace_s:
            raise ValueError(
                f"gone_after_s ({self.gone_after_s:g}) must be at least ttl_s + grace_s "
                f"({self.ttl_s + self.grace_s:g}): its leases end first"
            )
        return self


class SlotSettings(_Section):
    """Slots: long-lived processes of a worker in which short tasks run one after the other."""

    base: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Slots kept ready on each worker; default one per CPU, at least 2, at most 8.",
    )
    max: int = Field(
        default=16, ge=1, le=1024, description="Attempts that may run at once beside one slot."
    )
    grant_max: int = Field(
        default=256, ge=1, le=4096, description="Tasks in one grant; one started, the rest granted."
    )
    grant_target_ms: float = Field(
        default=20.0, gt=0, le=10_000, description="Work that a grant should hold, by past times."
    )
    long_ms: float = Field(
        default=50.0,
        gt=0,
        le=60_000,
        description="An item that runs longer has the rest of its grant revoked and re-queued.",
    )
    report_ms: float = Field(
        default=5.0, gt=0, le=1000, description="An outcome leaves its slot within this time."
    )
    exchange_wait_s: float = Field(
        default=20.0, gt=0, le=300, description="Longest that an idle slot's call stays parked."
    )


class LimitSettings(_Section):
    """Every bound on what clients may send, wait for and leave behind."""

    body_bytes: int = Field(default=MIB, ge=KIB, le=GIB, description="Body of one request.")
    batch_items: int = Field(default=10_000, ge=1, le=1_000_000, description="Tasks in a batch.")
    batch_bytes: int = Field(default=64 * MIB, ge=KIB, le=GIB, description="Body of a batch.")
    json_depth: int = Field(default=32, ge=1, le=512, description="Nesting of JSON.")
    artifact_bytes: int = Field(
        default=4 * GIB, ge=KIB, le=4096 * GIB, description="Size of one artifact."
    )
    artifact_part_bytes: int = Field(
        default=8 * MIB, ge=KIB, le=64 * MIB, description="Size of one part of an upload."
    )
    artifact_uploads_max: int = Field(
        default=64,
        ge=1,
        le=100_000,
        description="Uploads that are begun and not yet complete. One owner may have a quarter of "
        "them; another quarter is kept for workers and for keys that see everything.",
    )
    upload_idle_s: float = Field(
        default=86400.0, gt=0, le=30 * 86400, description="An unfinished upload is kept this long."
    )
    artifact_cache_bytes: int = Field(
        default=4 * GIB,
        ge=0,
        le=4096 * GIB,
        description="A worker's copies of artifacts; the least recently used go first.",
    )
    artifact_cache_s: float = Field(
        default=7 * 86400.0,
        gt=0,
        le=3650 * 86400,
        description="A worker's copy that nobody used for this long goes.",
    )
    output_bytes: int = Field(
        default=10 * MIB,
        ge=4 * KIB,
        le=GIB,
        description="What one attempt may print; the rest is cut off, and the cut is marked.",
    )
    outputs_bytes: int = Field(
        default=GIB,
        ge=MIB,
        le=4096 * GIB,
        description="What a worker keeps of that in all; the oldest goes first, and after 7 days.",
    )
    queue_tasks_max: int = Field(
        default=2_000_000, ge=1, le=100_000_000, description="Tasks that have not ended yet."
    )
    queue_bytes_max: int = Field(
        default=8 * GIB, ge=MIB, le=1024 * GIB, description="Payloads of tasks not ended yet."
    )
    schedules_max: int = Field(
        default=10_000, ge=0, le=1_000_000, description="Schedules in all; 0 allows none."
    )
    schedules_of_one_max: int = Field(
        default=1000, ge=0, le=1_000_000, description="Schedules of one owner."
    )
    schedule_bytes: int = Field(
        default=64 * KIB, ge=KIB, le=GIB, description="Payload and metadata of a schedule's task."
    )
    gather_items: int = Field(
        default=20_000, ge=1, le=1_000_000, description="Writes a replica holds for the moderator."
    )
    gather_bytes: int = Field(
        default=128 * MIB, ge=KIB, le=8 * GIB, description="Bytes of those writes."
    )
    writer_items: int = Field(
        default=4096, ge=1, le=1_000_000, description="Changes in one transaction at most."
    )
    resend_s: float = Field(
        default=10.0, gt=0, le=300, description="A replica resends to a lost moderator this long."
    )
    writes_max: int = Field(
        default=4096, ge=1, le=100_000, description="Writing requests in progress in a replica."
    )
    reads_max: int = Field(
        default=512, ge=1, le=100_000, description="Reading requests in progress in a replica."
    )
    waits_max: int = Field(
        default=5000, ge=1, le=100_000, description="Requests that wait for a task in a replica."
    )
    streams_max: int = Field(
        default=1000, ge=1, le=100_000, description="Streams of events and logs in a replica."
    )
    stream_s_max: float = Field(
        default=900.0, gt=0, le=86400, description="A stream is ended then; clients come again."
    )
    stream_send_s_max: float = Field(
        default=10.0, gt=0, le=300, description="A stream that is not read for so long is cut."
    )
    wait_s_max: float = Field(default=60.0, gt=0, le=3600, description="Longest wait of a request.")
    wait_ids_max: int = Field(
        default=10_000, ge=1, le=1_000_000, description="Task ids in one POST /tasks/wait."
    )
    result_bytes: int = Field(
        default=256 * KIB, ge=KIB, le=64 * MIB, description="Result kept inline; else an artifact."
    )
    metadata_bytes: int = Field(
        default=16 * KIB, ge=0, le=MIB, description="Metadata of one task, as JSON."
    )
    depends_on_max: int = Field(
        default=1000, ge=0, le=100_000, description="Tasks that one task may depend on."
    )
    page_items: int = Field(
        default=100, ge=1, le=10_000, description="Items on a page unless said."
    )
    page_items_max: int = Field(default=1000, ge=1, le=10_000, description="Items on a page.")
    disk_free_bytes_min: int = Field(
        default=GIB, ge=0, le=1024 * GIB, description="Below this free space writes are refused."
    )
    retention_s: float = Field(
        default=7 * 86400.0, gt=0, le=3650 * 86400, description="Ended tasks are kept this long."
    )
    idempotency_s: float = Field(
        default=7 * 86400.0,
        gt=0,
        le=3650 * 86400,
        description="Idempotency keys are kept this long after their task was pruned.",
    )
    audit_retention_s: float = Field(
        default=90 * 86400.0,
        ge=3600,
        le=3650 * 86400,
        description="Lines of the audit log are kept this long.",
    )

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if self.page_items > self.page_items_max:
            raise ValueError(f"page_items must not exceed page_items_max ({self.page_items_max})")
        if self.batch_bytes < self.body_bytes:
            raise ValueError(f"batch_bytes must be at least body_bytes ({self.body_bytes})")
        if self.gather_bytes < self.batch_bytes:
            raise ValueError(
                f"gather_bytes must be at least batch_bytes ({self.batch_bytes}): "
                "the largest allowed batch could never be accepted"
            )
        if self.gather_items < self.batch_items:
            raise ValueError(f"gather_items must be at least batch_items ({self.batch_items})")
        return self


class RetrySettings(_Section):
    """What happens after a failed attempt unless task type or submitter say otherwise."""

    max_attempts: int = Field(
        default=1, ge=1, le=1000, description="Attempts in all; 1 means an error ends the task."
    )
    backoff_s: float = Field(default=1.0, ge=0, le=86400, description="Pause before attempt 2.")
    factor: float = Field(default=2.0, ge=1, le=100, description="Growth of the pause.")
    max_backoff_s: float = Field(
        default=300.0, ge=0, le=30 * 86400, description="Longest pause between two attempts."
    )
    jitter: float = Field(
        default=0.1, ge=0, le=1, description="Share of the pause that is drawn at random."
    )
    retry_on: tuple[Name, ...] = Field(
        default=("error", "timeout"),
        max_length=100,
        description="Failure kinds or names of Python exception classes that are tried again.",
    )

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if self.max_backoff_s < self.backoff_s:
            raise ValueError(f"max_backoff_s must be at least backoff_s ({self.backoff_s:g})")
        return self


class WebhookSettings(_Section):
    """Where M1 may send the reports that submitters ask for (``webhook`` of a task), and how often.

    By default any host of the open network, over HTTPS on port 443, and nothing else.
    """

    hosts: tuple[HookHost, ...] = Field(
        default=(),
        max_length=1000,
        description="Only to these hosts; *.example.org means all below. None named: to any.",
    )
    networks: tuple[HookNetwork, ...] = Field(
        default=(),
        max_length=1000,
        description="Private networks that are allowed all the same, such as 192.168.1.0/24.",
    )
    ports: tuple[Port, ...] = Field(
        default=(), max_length=1000, description="Ports beside 443 (and 80 with plain_http)."
    )
    plain_http: bool = Field(default=False, description="Also http://, which anybody can read.")
    ca_path: Path | None = Field(
        default=None, description="Authority (PEM) that is trusted beside those of the machine."
    )
    timeout_s: float = Field(
        default=10.0, gt=0, le=300, description="A receiver that has not answered then has failed."
    )
    backoff_s: tuple[Annotated[float, Field(ge=0, le=30 * 86400)], ...] = Field(
        default=(5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0),
        max_length=100,
        description="Pauses between the tries; after the last one it is given up.",
    )
    at_once: int = Field(default=16, ge=1, le=1000, description="Reports on their way at once.")
    at_once_to_one: int = Field(
        default=4, ge=1, le=1000, description="Of these, to one host and port."
    )


class PortSettings(_Section):
    """Every port of Ray and Serve, pinned, so that a firewall can name them.

    All but GCS and dashboard lie in 10000-10999. ``offset`` is added to each port of an instance,
    the three public ones included. Keep the sum below 32768, where Linux hands out client ports.
    """

    offset: int = Field(
        default=0, ge=0, le=50_000, description="Added to every port of this instance."
    )
    gcs: Port = Field(default=6379, description="Ray's GCS on M1: what workers connect to.")
    dashboard: Port = Field(default=8265, description="Ray dashboard and Jobs API, loopback only.")

    head_node_manager: Port = Field(default=10010, description="Raylet of M1.")
    head_object_manager: Port = Field(default=10011, description="Object transfer of M1.")
    head_agent_http: Port = Field(default=10012, description="Dashboard agent of M1, HTTP.")
    head_agent_grpc: Port = Field(default=10013, description="Dashboard agent of M1, gRPC.")
    head_runtime_env_agent: Port = Field(default=10014, description="Runtime env agent of M1.")
    head_metrics_export: Port = Field(default=10015, description="Ray's Prometheus page of M1.")
    autoscaler_metrics: Port = Field(default=10016, description="Autoscaler's Prometheus page.")
    dashboard_metrics: Port = Field(default=10017, description="Dashboard's Prometheus page.")

    worker_node_manager: Port = Field(default=10020, description="Raylet of the worker.")
    worker_object_manager: Port = Field(default=10021, description="Object transfer of the worker.")
    worker_agent_http: Port = Field(default=10022, description="Dashboard agent, HTTP.")
    worker_agent_grpc: Port = Field(default=10023, description="Dashboard agent, gRPC.")
    worker_runtime_env_agent: Port = Field(default=10024, description="Runtime env agent.")
    worker_metrics_export: Port = Field(default=10025, description="Ray's Prometheus page.")

    serve_fallback_proxy: Port = Field(default=10030, description="Serve's Python proxy.")
    serve_grpc: Port = Field(default=10031, description="Serve's gRPC proxy, unused.")
    haproxy_stats: Port = Field(default=10032, description="Statistics page of Serve's HAProxy.")
    haproxy_metrics: Port = Field(default=10033, description="Prometheus page of Serve's HAProxy.")
    serve_http: Port = Field(
        default=10034, description="C1 behind its edge, with composite.security.enable_tls alone."
    )

    gate: Port = Field(default=10040, description="M1's gate: where machines join (TLS).")

    replica_http_min: Port = Field(default=10100, description="First port of C1's replicas.")
    replica_http_max: Port = Field(default=10149, description="Last port of C1's replicas.")
    replica_grpc_min: Port = Field(
        default=10150, description="First gRPC port of replicas: calls among them, under TLS."
    )
    replica_grpc_max: Port = Field(default=10199, description="Last gRPC port of replicas.")
    head_processes_min: Port = Field(default=10200, description="First port of M1's processes.")
    head_processes_max: Port = Field(default=10399, description="Last port of M1's processes.")
    worker_processes_min: Port = Field(default=10400, description="First port of its processes.")
    worker_processes_max: Port = Field(default=10999, description="Last port of its processes.")

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> Self:
        for name in ("replica_http", "replica_grpc", "head_processes", "worker_processes"):
            first, last = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if last < first + 9:
                raise ValueError(f"{name}_max must be at least {name}_min + 9 ({first + 9})")
        return self


class StoreSettings(_Section):
    """Where tasks are kept."""

    url: StoreUrl | None = Field(
        default=None,
        repr=False,
        description=(
            "sqlite:///absolute/path or postgresql://user:password@host/database; "
            "default DATABASE_URL if that names PostgreSQL, else queue.db in HCNA_HOME."
        ),
    )
    unsafe: bool = Field(
        default=False,
        description="Take a PostgreSQL with fsync or synchronous_commit off: it may lose tasks.",
    )


class RaySettings(_Section):
    """How much memory Ray may take, who reaches it, and how fast the supervisor acts."""

    object_store_bytes: int | None = Field(
        default=None,
        ge=80 * MIB,
        le=1024 * GIB,
        description="Shared memory of each Ray node; default a share of the machine's.",
    )
    temp_dir: Path | None = Field(
        default=None, description="Ray's sessions and sockets; default a short path below /tmp."
    )
    node_address: Host | None = Field(
        default=None,
        description="Address of this machine for the others; default that of the route to them.",
    )
    firewall: Switch = Field(
        default="auto",
        description="Rules for nftables by which only the cluster's machines reach Ray's ports. "
        "auto: where hcna may (root, and nft is there); on: or it does not start; off: none.",
    )
    profile: Literal["standard", "tiny"] = Field(
        default="standard",
        description="tiny, for 2 GB: no dashboard, fewer processes, small object store, one slot.",
    )
    dashboard: bool | None = Field(
        default=None,
        description="Ray's dashboard, Jobs API, state commands; default on, off in profile tiny.",
    )
    logs_bytes_max: int = Field(
        default=512 * MIB,
        ge=MIB,
        le=1024 * GIB,
        description="Old logs are deleted above this: those in HCNA_HOME, and those of Ray.",
    )
    logs_age_s_max: float = Field(
        default=7 * 86400.0,
        ge=60,
        le=3650 * 86400,
        description="Logs that nothing has written to for this long are deleted.",
    )
    check_s: float = Field(
        default=3.0, gt=0, le=300, description="Pause between two looks at C1's /ready."
    )
    restart_backoff_s: float = Field(
        default=1.0, gt=0, le=300, description="Pause before a dead Ray node is started again."
    )
    restart_backoff_max_s: float = Field(
        default=60.0, gt=0, le=3600, description="Longest such pause."
    )
    stop_s: float = Field(
        default=8.0, gt=0, le=600, description="After SIGTERM until SIGKILL when stopping a node."
    )

    @property
    def is_tiny(self) -> bool:
        """Whether this machine has little memory."""
        return self.profile == "tiny"

    @property
    def has_dashboard(self) -> bool:
        """Whether M1 runs Ray's dashboard."""
        return not self.is_tiny if self.dashboard is None else self.dashboard


def _check_endpoint(value: str) -> str:
    """Refuse what cannot be meant: the path of the traces is added, and secrets have a file."""
    _, _, rest = value.partition("://")
    place = rest.partition("/")[0]
    if not place or any(letter in rest for letter in "@?#") or any(c <= " " for c in rest):
        raise ValueError("must be http://host:port or https://host:port, without credentials")
    return value.rstrip("/").removesuffix("/v1/traces")


OtlpEndpoint = Annotated[
    str,
    StringConstraints(max_length=2048, pattern=r"^https?://"),
    AfterValidator(_check_endpoint),
]


class TracingSettings(_Section):
    """Spans of tasks, sent by OTLP to an OpenTelemetry collector. Off without an endpoint."""

    endpoint: OtlpEndpoint | None = Field(
        default=None,
        description="Collector for OTLP over HTTP, such as http://127.0.0.1:4318; /v1/traces is "
        "added. Machines that join take M1's unless they name their own. Without it: no spans.",
    )
    sample_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of the traces that begin at C1 and are recorded. Where a client sends a "
        "traceparent, its sampled flag decides.",
    )
    spool_bytes: int = Field(
        default=64 * MIB,
        ge=MIB,
        le=64 * GIB,
        description="Spans kept on each machine's disk until the collector takes them; beyond "
        "this the oldest go.",
    )
    headers_file: Path | None = Field(
        default=None,
        description="File (mode 0600) with a header a line, such as Authorization: Bearer ..., "
        "sent to the collector.",
    )
    ca_path: Path | None = Field(
        default=None,
        description="Authority (PEM) of the collector's certificate; default the system's.",
    )


def _default_home() -> Path:
    return Path("~/.hcna").expanduser()


class Settings(_Section):
    """All settings of one machine. Made by `load_settings`; pass it on, never read it twice."""

    home: Path = Field(
        default_factory=_default_home, description="State directory; set by HCNA_HOME alone."
    )
    source: Path | None = Field(
        default=None, description="The file these settings came from, if there was one."
    )
    moderator: ModeratorSettings = Field(default_factory=ModeratorSettings, description="M1.")
    worker: WorkerSettings = Field(default_factory=WorkerSettings, description="This worker.")
    composite: CompositeSettings = Field(default_factory=CompositeSettings, description="C1.")
    lease: LeaseSettings = Field(default_factory=LeaseSettings, description="Leases.")
    slots: SlotSettings = Field(default_factory=SlotSettings, description="Slots.")
    limits: LimitSettings = Field(default_factory=LimitSettings, description="Bounds.")
    retry: RetrySettings = Field(default_factory=RetrySettings, description="Default retries.")
    webhooks: WebhookSettings = Field(
        default_factory=WebhookSettings, description="Reports that tasks ask for."
    )
    ports: PortSettings = Field(default_factory=PortSettings, description="Pinned ports.")
    store: StoreSettings = Field(default_factory=StoreSettings, description="The task store.")
    ray: RaySettings = Field(default_factory=RaySettings, description="Ray on this machine.")
    tracing: TracingSettings = Field(default_factory=TracingSettings, description="Traces.")

    @model_validator(mode="after")
    def _every_port_is_used_once(self) -> Self:
        used: dict[int, str] = {}
        for name, port in self._ports():
            if port > 65535:
                raise ValueError(
                    f"ports.offset ({self.ports.offset}) lifts {name} to {port}, above 65535"
                )
            if port in used:
                raise ValueError(f"{name} and {used[port]} are both port {port}")
            used[port] = name
        return self

    def _ports(self) -> Iterator[tuple[str, int]]:
        """Yield (setting, effective port) for every single port and every port of a range."""
        offset = self.ports.offset
        yield "composite.api_port", self.api_port
        yield "moderator.control_port", self.control_port
        yield "worker.worker_port", self.worker_port
        for name in type(self.ports).model_fields:
            if name == "offset" or name.endswith("_max"):
                continue
            first = getattr(self.ports, name)
            last = first
            if name.endswith("_min"):
                name = name.removesuffix("_min")
                last = getattr(self.ports, f"{name}_max")
            for port in range(first, last + 1):
                yield f"ports.{name}", port + offset

    # Effective ports and addresses.

    def port(self, name: str) -> int:
        """Return the port ``name`` of section ``ports`` as it is used: with the offset added."""
        return int(getattr(self.ports, name)) + self.ports.offset

    @property
    def api_port(self) -> int:
        """Port of C1 as used, offset included."""
        return self.composite.api_port + self.ports.offset

    @property
    def control_port(self) -> int:
        """Port of the control edge as used, offset included."""
        return self.moderator.control_port + self.ports.offset

    @property
    def worker_port(self) -> int:
        """Port of the worker's metrics as used, offset included."""
        return self.worker.worker_port + self.ports.offset

    @property
    def has_edge(self) -> bool:
        """Whether an edge with TLS stands before C1."""
        return self.composite.security.enable_tls

    @property
    def api_host(self) -> str:
        """Address that C1 really binds: a loopback one as long as nothing encrypts the API.

        `check_start` refuses any other one before; this holds whoever forgets to ask it.
        """
        asked = self.composite.listen_address
        return asked if self.has_edge else _bindable(asked)

    @property
    def serve_host(self) -> str:
        """Loopback address on which Serve listens for C1, in clear."""
        return _bindable(self.composite.listen_address)

    @property
    def serve_port(self) -> int:
        """Port on which Serve listens for C1: C1's own, or the one behind the edge."""
        return self.port("serve_http") if self.has_edge else self.api_port

    @property
    def control_host(self) -> str:
        """Address that the control edge really binds, see `api_host`."""
        return _bindable(self.moderator.listen_address)

    @property
    def is_public(self) -> bool:
        """Whether C1 is bound to an address that other machines can reach."""
        return not all(map(is_loopback, (self.api_host, self.control_host)))

    @property
    def worker_host(self) -> str:
        """Address that the worker's metrics really bind, see `api_host`."""
        return _bindable(self.worker.listen_address)

    @property
    def ray_address(self) -> str:
        """Address of the Ray cluster for a process on M1, ``host:port``."""
        return f"{LOOPBACK}:{self.port('gcs')}"

    @property
    def api_url(self) -> str:
        """URL of C1 for a client on this machine."""
        return f"http://{self.serve_host}:{self.serve_port}"

    def public_url(self, hostname: str) -> str:
        """URL of C1 for clients on other machines; that for this machine's if nobody else can.

        Args:
            hostname: What to call this machine where the settings give it no name.
        """
        if not self.has_edge:
            return self.api_url
        asked, names = self.composite.listen_address, self.composite.hosts
        name = names[0] if names else asked
        if name in ("0.0.0.0", "::"):
            name = hostname
        return f"https://{f'[{name}]' if ':' in name else name}:{self.api_port}"

    @property
    def control_url(self) -> str:
        """URL of the control edge for a client on this machine."""
        return f"http://{LOOPBACK}:{self.control_port}"

    @property
    def dashboard_url(self) -> str:
        """URL of the Ray dashboard for a browser on this machine."""
        return f"http://{LOOPBACK}:{self.port('dashboard')}"

    # Paths. Nothing is created here.

    @property
    def store_url(self) -> str:
        """URL of the task store: as configured, or ``queue.db`` in the home."""
        return self.store.url or f"sqlite://{self.home / 'queue.db'}"

    @property
    def store_name(self) -> str:
        """The task store as it may be shown and logged: its URL without the password."""
        return without_password(self.store_url)

    @property
    def store_path(self) -> Path | None:
        """File of the SQLite store, or None when the store is a server."""
        scheme, _, rest = self.store_url.partition("://")
        return Path(rest) if scheme == "sqlite" else None

    @property
    def artifacts_dir(self) -> Path:
        """Directory of stored artifacts."""
        return self.home / "artifacts"

    @property
    def keys_dir(self) -> Path:
        """Directory of API keys (hashes) and the owner's own key."""
        return self.home / "keys"

    @property
    def audit_file(self) -> Path:
        """Where the moderator keeps the audit log besides the store."""
        return self.logs_dir / "audit.log"

    @property
    def acts_dir(self) -> Path:
        """Where what was done beside the moderator waits to be put on record."""
        return self.home / "acts"

    @property
    def logs_dir(self) -> Path:
        """Directory of the JSON-lines logs."""
        return self.home / "logs"

    @property
    def run_dir(self) -> Path:
        """Directory of what describes the running instance: pids, locks, ``cluster.json``."""
        return self.home / "run"

    @property
    def moderator_socket(self) -> Path:
        """Where processes on M1's machine reach the moderator; see `hcna_ray.runtime.local_rpc`."""
        return self.run_dir / "moderator.sock"

    @property
    def cluster_dir(self) -> Path:
        """Directory of what makes this machine part of a cluster: members, invites, membership."""
        return self.home / "cluster"

    @property
    def outbox_dir(self) -> Path:
        """Directory of this worker's journals of outcomes that M1 has not confirmed."""
        return self.home / "outbox" / self.worker.name

    @property
    def traces_dir(self) -> Path:
        """Spans that wait for the collector."""
        return self.home / "traces"

    @property
    def data_dir(self) -> Path:
        """Directory below which handlers may read and write files by path."""
        return self.worker.resources.disk_path or self.home / "data"

    def warnings(self) -> tuple[str, ...]:
        """Return what differs from what was asked for, each with what to do about it."""
        found = []
        nodes = (
            ("moderator", self.moderator.listen_address, self.control_host, self.control_port),
            ("worker", self.worker.listen_address, self.worker_host, self.worker_port),
        )
        for section, asked, used, port in nodes:
            if asked not in (used, "localhost"):
                found.append(
                    f"{section}.listen_address is {asked}, but this version answers in clear "
                    f"there, so only {used}:{port} is bound; from another machine use: "
                    f"ssh -L {port}:{used}:{port} <this machine>"
                )
        asked, used = self.composite.listen_address, self.api_host
        if is_loopback(asked) and asked not in (used, "localhost"):
            found.append(
                f"composite.listen_address is {asked}, but without composite.security.enable_tls "
                f"{used}:{self.api_port} is bound"
            )
        if self._store_in_clear():
            found.append(
                f"store.url reaches {self.store_name} without sslmode=require, verify-ca or "
                "verify-full: the password and every task may travel unencrypted; "
                "append ?sslmode=verify-full"
            )
        return tuple(found)

    def check_start(self) -> None:
        """Refuse what M1's machine must not start with: a C1 that others would reach in clear.

        The settings themselves are valid, so that everything but a start goes on working.

        Raises:
            ConfigError: The text names the field and what to do.
        """
        asked, port = self.composite.listen_address, self.api_port
        if self.has_edge or is_loopback(asked):
            return
        raise ConfigError(
            f"composite.listen_address is {asked} without composite.security.enable_tls, so C1 "
            "would answer other machines in clear; set composite.security.enable_tls: true, or "
            "take listen_address out and use from another machine: "
            f"ssh -L {port}:{LOOPBACK}:{port} <this machine>",
            str(self.source) if self.source else "environment",
        )

    def _store_in_clear(self) -> bool:
        """Whether the store is on another machine and its URL does not insist on TLS."""
        if self.store_path is not None:
            return False
        place, _, options = self.store_url.partition("://")[2].partition("?")
        host = place.rpartition("@")[2].partition("/")[0]
        local = host == "" or host.startswith(("127.", "localhost", "[::1]", "%2F", "%2f"))
        return not local and "sslmode=require" not in options and "sslmode=verify" not in options


#: Sections that M1 decides for every machine of the cluster.
_SHARED = ("lease", "slots", "limits", "retry", "ports")
#: What a machine takes of M1's traces unless it names a collector itself; files are each one's own.
_SHARED_TRACING = ("endpoint", "sample_ratio", "spool_bytes")


def names_here(settings: Settings) -> tuple[str, ...]:
    """Return what this machine is called: its name, and those of M1 and C1, in the local domain."""
    nodes = (settings.moderator.node_id, settings.composite.node_id)
    plain = [socket.gethostname(), *(node.partition("--")[0].lower() for node in nodes)]
    return tuple(dict.fromkeys(name for one in plain for name in (one, f"{one}.local")))


def shared_part(settings: Settings) -> dict[str, Any]:
    """Return the settings that must be the same on every machine, as JSON values."""
    data = settings.model_dump(mode="json", include=set(_SHARED), exclude_none=True)
    moderator = {"node_id": settings.moderator.node_id}
    scheduling = settings.moderator.scheduling.model_dump(mode="json")
    tracing = settings.tracing.model_dump(
        mode="json", include=set(_SHARED_TRACING), exclude_none=True
    )
    return {**data, "moderator": {**moderator, "scheduling": scheduling}, "tracing": tracing}


def with_shared(
    settings: Settings, shared: Mapping[str, Any], node_id: str, *, moderator: str
) -> Settings:
    """Return a worker's settings under M1's decisions and the name M1 gave it.

    Args:
        settings: As the machine's own file and environment say.
        shared: What `shared_part` gave on M1.
        node_id: Full name of the worker.
        moderator: Address of M1.

    Raises:
        ConfigError: M1 sent something that this version does not understand.
    """
    data = settings.model_dump(mode="json", exclude={"home", "source"}, exclude_none=True)
    data |= {name: shared[name] for name in _SHARED if name in shared}
    data["moderator"] = {**data["moderator"], **shared.get("moderator", {})}
    if settings.tracing.endpoint is None:
        data["tracing"] = {**data["tracing"], **shared.get("tracing", {})}
    m1 = {"node_id": data["moderator"]["node_id"], "address": moderator}
    m1["port"] = data["moderator"]["control_port"]
    data["worker"] = {**data["worker"], "node_id": node_id, "moderator_node": m1}
    data |= {"home": settings.home, "source": settings.source}
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error), "settings of M1") from None


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach what is bound to the address."""
    return address.startswith("127.") or address in ("localhost", "::1")


def _bindable(address: str) -> str:
    """Return the address to bind: no public one while nothing encrypts what is sent there."""
    return address if address.startswith("127.") else LOOPBACK


# -- loading -----------------------------------------------------------------------------------

#: Fields that a file or the environment may not set.
_INTERNAL = frozenset({"home", "source"})


def load_settings(
    home: Path | None = None,
    path: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Settings:
    """Read the settings of this machine.

    Args:
        home: State directory; default ``HCNA_HOME``, else ``~/.hcna``. It need not exist.
        path: Settings file; default ``HCNA_CONFIG``, else ``hcna.yaml`` in the home if it exists.
        env: Environment to read; default that of this process.

    Raises:
        ConfigError: The named file is missing or not YAML, a key is unknown or given twice, or a
            value is out of bounds. Every wrong field is listed.
    """
    env = os.environ if env is None else env
    home = (home or Path(env.get("HCNA_HOME") or _default_home())).expanduser().absolute()
    named = path or (Path(env["HCNA_CONFIG"]) if env.get("HCNA_CONFIG") else None)
    file = (named or home / "hcna.yaml").expanduser().absolute()
    data: dict[str, Any] = {}
    source: Path | None = None
    if named is not None or file.exists():
        data, source = _read_file(file), file
    _apply_environment(data, env)
    _apply_database_url(data, env)
    label = str(source) if source else "environment"
    try:
        return Settings.model_validate(data | {"home": home, "source": source})
    except ValidationError as error:
        raise ConfigError(_explain(error), label) from None


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses a key given twice: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build one mapping; raise `yaml.MarkedYAMLError` on a repeated key."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a word, not a list or a mapping",
                    problem_mark=key_node.start_mark,
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, label: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"not valid YAML{where}: {problem}", label) from None


def _read_file(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            raw = stream.read(FILE_BYTES_MAX + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"cannot be read: {reason}", str(file)) from None
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8 text", str(file)) from None
    if len(raw) > FILE_BYTES_MAX:
        raise ConfigError(f"is larger than {FILE_BYTES_MAX} bytes", str(file))
    data = _parse_yaml(text, str(file))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            "must be a mapping with sections such as moderator:, worker: and composite:", str(file)
        )
    for key in data:
        if key in _INTERNAL or key not in Settings.model_fields:
            allowed = [name for name in Settings.model_fields if name not in _INTERNAL]
            hint = " (HCNA_HOME sets it)" if key == "home" else _near(str(key), allowed)
            raise ConfigError(f"unknown section {key!r}{hint}", str(file))
    return _without_empty_sections(data, Settings)


def _without_empty_sections(data: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Return ``data`` without sections that hold nothing: ``worker:`` alone means its defaults."""
    kept: dict[str, Any] = {}
    for key, value in data.items():
        below = _model_at(model, key)
        if below is not None and value is None:
            continue
        nested = below is not None and isinstance(value, dict)
        kept[key] = _without_empty_sections(value, below) if nested and below else value
    return kept


def _apply_environment(data: dict[str, Any], env: Mapping[str, str]) -> None:
    """Lay ``HCNA_A__B__C=value`` over ``data``; names without ``__`` are not settings."""
    for variable in sorted(env):
        if not variable.startswith("HCNA_") or "__" not in variable:
            continue
        keys = variable.removeprefix("HCNA_").lower().split("__")
        sections = [name for name in Settings.model_fields if name not in _INTERNAL]
        if keys[0] not in sections or not all(keys):
            raise ConfigError(
                f"unknown section in the name{_near(keys[0], sections)}", f"environment {variable}"
            )
        model: type[BaseModel] | None = Settings
        target = data
        for depth, key in enumerate(keys):
            if model is not None and key not in model.model_fields:
                where = ".".join(keys[:depth])
                hint = _near(key, list(model.model_fields))
                raise ConfigError(f"unknown field {where}.{key}{hint}", f"environment {variable}")
            if depth == len(keys) - 1:
                target[key] = _from_text(env[variable], variable)
                break
            nested = target.setdefault(key, {})
            if not isinstance(nested, dict):
                break  # Not a section in the file: let the check of the whole say so.
            target, model = nested, _model_at(model, key)


def _apply_database_url(data: dict[str, Any], env: Mapping[str, str]) -> None:
    """Take ``DATABASE_URL`` for ``store.url`` where neither file nor ``HCNA_STORE__URL`` says one.

    Other programs use that name too: one that does not name PostgreSQL is theirs.
    """
    url = env.get("DATABASE_URL", "")
    store = data.get("store") or {}
    if url.startswith(POSTGRES_SCHEMES) and isinstance(store, dict) and store.get("url") is None:
        data["store"] = {**store, "url": url}


def _from_text(text: str, variable: str) -> Any:
    """Return the value of a variable: JSON or YAML flow for collections, else the text itself."""
    stripped = text.strip()
    if stripped.startswith(("{", "[")):
        return _parse_yaml(stripped, f"environment {variable}")
    return None if stripped == "null" else text


def _model_at(model: type[BaseModel] | None, key: str) -> type[BaseModel] | None:
    """Return the model of a field, or None when the field holds no model."""
    if model is None or key not in model.model_fields:
        return None
    annotation = model.model_fields[key].annotation
    candidates = [annotation, *get_args(annotation)] if get_origin(annotation) else [annotation]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _near(name: str, allowed: Sequence[str]) -> str:
    """Return `` (did you mean ...?)`` or, without a near name, the list of what is allowed."""
    close = difflib.get_close_matches(name, allowed, n=3, cutoff=0.6)
    if close:
        return f" (did you mean {' or '.join(close)}?)"
    return f" (known: {', '.join(sorted(allowed))})"


def _explain(error: ValidationError) -> str:
    """Render every wrong field: its name, its value, what is allowed, and near names."""
    lines = [_explain_one(detail) for detail in error.errors(include_url=False)]
    return lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines)


def _explain_one(detail: ErrorDetails) -> str:
    location = [part for part in detail["loc"] if part != "[key]"]
    field = ".".join(str(part) for part in location) or "settings"
    message = detail["msg"].removeprefix("Value error, ")
    model: type[BaseModel] | None = Settings
    for part in location[:-1]:
        if not isinstance(part, int):
            model = _model_at(model, part)
    if detail["type"] == "extra_forbidden" and model is not None:
        return f"unknown field {field}{_near(str(location[-1]), list(model.model_fields))}"
    if detail["type"] == "missing":
        return f"{field} is missing"
    if isinstance(detail["input"], BaseModel | dict):
        return f"{field}: {message}"  # a relation between fields: the sentence holds the values
    shown = "***" if location[:2] == ["store", "url"] else repr(detail["input"])
    text = f"{field} = {shown[:200]}: {message[:1].lower()}{message[1:]}"
    allowed = _bounds(model, location)
    return f"{text} ({allowed})" if allowed else text


def _bounds(model: type[BaseModel] | None, location: Sequence[int | str]) -> str:
    """Return what a field allows in words, from its own constraints; '' if it has none."""
    if model is None or not location or str(location[-1]) not in model.model_fields:
        return ""
    info = model.model_fields[str(location[-1])]
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    parts = [
        f"{sign} {getattr(constraint, name):g}"
        for name, sign in signs
        for constraint in info.metadata
        if getattr(constraint, name, None) is not None
    ]
    if info.default is not None and isinstance(info.default, int | float | str):
        parts.append(f"default {info.default}")
    return ", ".join(["allowed: " + parts[0], *parts[1:]]) if parts else ""

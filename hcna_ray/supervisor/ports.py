"""Environment and command lines of the processes below the supervisor. Pure but for one check.

The environment must be equal on every node of a cluster and in every driver: Ray reads much of it
once, in C++, and a node that disagrees about keep-alive times is cut off by the others.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from hcna_ray.config import LOOPBACK, MIB, Settings
from hcna_ray.security.authority import Node
from hcna_ray.supervisor.processes import Marker
from hcna_ray.supervisor.serve_proxy import VARIABLE, serve_proxy_path

#: Settings of Ray that we ship, the same on every node. Detection of a silent node takes
#: period + n * timeout + (n - 1) * period = 25 s at most instead of 65 s. Our own sessions notice
#: sooner; on a busy machine three missed checks are no proof that a node is dead.
RAY_TUNING: Mapping[str, str] = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_raylet_liveness_self_check_interval_ms": "5000",
    # A raylet ends itself if its agent for runtime environments cannot be reached within this time
    # (ray_config_def.h; 30 s by default). On a busy machine Python alone takes that long to start.
    "RAY_agent_register_timeout_ms": "120000",
    # Ray 2.60 refuses another patch level of Python; pickles and protocols do not change with it.
    "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor",
    "RAY_TASK_MAX_RETRIES": "0",  # Attempts are counted by us, under our fence.
    # By default all workers of Ray run at nice 15, the moderator, C1 and the agents among them:
    # on a busy machine they would get a twentieth of a core. Handlers' processes give way instead.
    "RAY_worker_niceness": "0",
    "RAY_memory_usage_threshold": "0.90",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Each Ray process keeps 3 * 32 MiB of its log instead of 6 * 512.
    "RAY_ROTATION_MAX_BYTES": "33554432",
    "RAY_ROTATION_BACKUP_COUNT": "2",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # HAProxy would write a line about each request, for an actor to parse: C1 counts its own.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # Our drain is the moderator's; Ray's would hold up every stop by its full length.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "10",
    # C1's entrance is replaced after three failed checks: in 3 s instead of 30.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # By default it is killed when it does not start within 15 s, and the deployment with it: a slow
    # or busy computer that has just been switched on needs longer.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
}

#: Variables of the caller that would change what Ray does, or that are none of its business.
_DROPPED = (
    "RAY_ADDRESS",
    "RAY_NAMESPACE",
    "RAY_RUNTIME_ENV_HOOK",
    "HCNA_API_KEY",
    "HCNA_BACKUP_PASSPHRASE",
    "HCNA_URL",
    # `ray up` puts these before the start command of the head. The autoscaler starts no node here,
    # and a setting that one node has and the others have not divides a cluster.
    "RAY_enable_autoscaler_v2",
    "RAY_CLOUD_INSTANCE_ID",
    "RAY_NODE_TYPE_NAME",
    "RAY_OVERRIDE_RESOURCES",
    "RAY_OVERRIDE_LABELS",
    "RAY_HEAD_IP",
    "RAY_USE_TLS",
)

#: Open files that the supervisor asks for itself and all below it, if the hard limit allows.
FILES_MAX = 65536

#: Smallest object store that Ray accepts, with a margin.
_OBJECT_STORE_BYTES_MIN = 80 * MIB
_HEAD_OBJECT_STORE_BYTES = 200 * MIB
_WORKER_OBJECT_STORE_BYTES_MAX = 2048 * MIB
_TINY_OBJECT_STORE_BYTES_MAX = 128 * MIB


def ray_tuning_hash() -> str:
    """Return a digest of `RAY_TUNING` and TLS: machines that differ cannot share a cluster."""
    told = {**RAY_TUNING, "RAY_USE_TLS": "1"}
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def marker_of(settings: Settings) -> Marker:
    """Return what marks the processes of this instance; the same at every start of a home."""
    digest = sha256(str(settings.home).encode()).hexdigest()[:16]
    return Marker(home=settings.home, cluster_id=digest, temp_dir=temp_dir_of(settings))


def temp_dir_of(settings: Settings) -> Path:
    """Return Ray's temporary directory. Short: a socket's path has 107 characters at most."""
    return settings.ray.temp_dir or Path(f"/tmp/hcna-{os.getuid()}-{settings.ports.offset}")


def ray_environment(settings: Settings) -> dict[str, str]:
    """Return the variables that every Ray process and every driver of this instance needs."""
    serve = temp_dir_of(settings) / "serve"
    port = settings.port
    proxy = serve_proxy_path(settings.run_dir)
    # Only on M1's machine is it there, and not where programs may not be run from the home.
    program = {VARIABLE: str(proxy)} if os.access(proxy, os.X_OK) else {}
    return {
        **RAY_TUNING,
        **program,
        **_tls(settings),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(settings.keys_dir / "ray.token"),
        "AUTOSCALER_METRIC_PORT": str(port("autoscaler_metrics")),
        "DASHBOARD_METRIC_PORT": str(port("dashboard_metrics")),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(port("serve_fallback_proxy")),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(port("haproxy_stats")),
        "RAY_SERVE_HAPROXY_MAXCONN": str(connections_max(settings, files=_files_max())),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, len(os.sched_getaffinity(0)))),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(port("haproxy_metrics")),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port("replica_http_min")),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port("replica_http_max")),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(port("replica_grpc_min")),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(port("replica_grpc_max")),
        # Serve's HAProxy makes its admin socket world-writable: keep it where only we may enter.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(serve / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(serve / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(serve / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(serve),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(serve / "server-state"),
    }


def _tls(settings: Settings) -> dict[str, str]:
    """Return what makes every gRPC connection of Ray one on which both sides show a certificate.

    Key and certificate are one file, see `hcna_ray.security.authority`. A test that measures what
    this costs may leave it out, on every machine of its cluster: nobody else can.
    """
    if os.environ.get("HCNA_TEST") == "1" and os.environ.get("HCNA_TEST_IN_CLEAR") == "1":
        return {}
    node = Node.of(settings.cluster_dir)
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(node.pem),
        "RAY_TLS_SERVER_KEY": str(node.pem),
        "RAY_TLS_CA_CERT": str(node.trust),
    }


def connections_max(settings: Settings, *, files: int) -> int:
    """Return how many connections Serve's HAProxy may hold: every budget of C1, and some more.

    Each takes two and a half of the ``files`` that a process may open (two sockets, a share
    of a pipe); HAProxy refuses to start beyond that.
    """
    limits = settings.limits
    wanted = limits.waits_max + limits.reads_max + limits.writes_max + 1024
    return max(64, min(wanted, (files - 512) * 2 // 5))


def process_environment(
    settings: Settings, base: Mapping[str, str], *, node: str | None = None
) -> dict[str, str]:
    """Return the whole environment of a child: ``base``, ours, and the mark of the instance.

    The child reads the settings in force from ``run/settings.yaml``; overrides in ``base`` are
    already in there and are dropped, so that all processes of an instance agree. So is the address
    of the store: with its password it would be in the environment of every process of Ray.
    """
    kept = {
        name: value
        for name, value in base.items()
        if name not in _DROPPED
        and not (name.startswith("HCNA_") and "__" in name)
        and not (name == "DATABASE_URL" and value == settings.store.url)
    }
    kept |= ray_environment(settings) | marker_of(settings).environment()
    kept["HCNA_CONFIG"] = str(settings.run_dir / "settings.yaml")
    kept["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), kept.get("PATH", os.defpath)))
    kept["PYTHONUNBUFFERED"] = "1"
    if settings.ray.is_tiny:  # 5 % less memory for some contention between threads.
        kept |= {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "131072"}
    if node is not None:
        kept["HCNA_NODE"] = node
    return kept


def object_store_bytes(
    *, configured: int | None, head: bool, memory: int, shared: int, tiny: bool = False
) -> int:
    """Return the size of a node's object store.

    Args:
        configured: ``ray.object_store_bytes``, which wins.
        head: M1 moves little: no task runs there.
        memory: Memory of the machine in bytes.
        shared: Free bytes in ``/dev/shm``; what exceeds it lands on disk, slowly.
        tiny: Whether memory is short (``ray.profile``).
    """
    if configured is not None:
        return configured
    wish = _HEAD_OBJECT_STORE_BYTES if head else min(_WORKER_OBJECT_STORE_BYTES_MAX, memory // 10)
    if tiny:
        wish = _OBJECT_STORE_BYTES_MIN if head else min(wish, _TINY_OBJECT_STORE_BYTES_MAX)
    return max(_OBJECT_STORE_BYTES_MIN, min(wish, shared * 2 // 5))


def head_command(settings: Settings, *, address: str, memory: int, shared: int) -> list[str]:
    """Return the command of M1: a head that takes no tasks.

    Args:
        settings: Of this machine.
        address: This machine's address for the others.
        memory: Its memory, bytes.
        shared: Free bytes in ``/dev/shm``.
    """
    port = settings.port
    store = object_store_bytes(
        configured=settings.ray.object_store_bytes,
        head=True,
        memory=memory,
        shared=shared,
        tiny=settings.ray.is_tiny,
    )
    return [
        *_ray_start(settings, "head", address),
        "--head",
        f"--port={port('gcs')}",
        "--num-cpus=0",
        "--num-gpus=0",
        "--memory=1",  # No room for tasks: what the worker has would count twice.
        f"--resources={json.dumps({settings.moderator.name: 1})}",
        f"--object-store-memory={store}",
        f"--include-dashboard={str(settings.ray.has_dashboard).lower()}",
        f"--dashboard-host={LOOPBACK}",
        f"--dashboard-port={port('dashboard')}",
        # The autoscaler's monitor, which starts no node here but is what `ray status` asks.
        *(["--no-monitor"] if settings.ray.is_tiny else []),
    ]


def worker_command(
    settings: Settings, *, head: str, address: str, cpus: int, memory: int, shared: int
) -> list[str]:
    """Return the command of the worker: the machine's CPUs and a resource of its own name.

    Args:
        settings: Of this machine.
        head: Ray's address on M1, ``host:port``.
        address: This machine's address for the others.
        cpus: Cores that may be used.
        memory: Memory of the machine, bytes.
        shared: Free bytes in ``/dev/shm``.
    """
    offered = settings.worker.resources
    store = object_store_bytes(
        configured=settings.ray.object_store_bytes,
        head=False,
        memory=memory,
        shared=shared,
        tiny=settings.ray.is_tiny,
    )
    resources = {settings.worker.name: 1.0, **offered.custom}
    command = [
        *_ray_start(settings, "worker", address, log_monitor=head != settings.ray_address),
        f"--address={head}",
        f"--num-cpus={min(cpus, offered.cpu_cores or cpus)}",
        f"--num-gpus={offered.gpu_count}",
        f"--resources={json.dumps(resources)}",
        f"--object-store-memory={store}",
    ]
    if offered.memory_gb is not None:
        command.append(f"--memory={int(min(offered.memory_gb * 1024 * MIB, memory))}")
    return command


def _ray_start(
    settings: Settings, role: str, address: str, *, log_monitor: bool = True
) -> list[str]:
    """Return the part of the command that both kinds of node share.

    Args:
        settings: Of this machine.
        role: ``head`` or ``worker``.
        address: This machine's address for the others.
        log_monitor: Whether this node sends what Ray's workers print to drivers: one on a machine
            is enough, and none of our own tasks needs it.
    """
    port = settings.port
    log_monitor = log_monitor and not settings.ray.is_tiny
    return [
        sys.executable,
        "-m",
        "hcna_ray.supervisor.ray_start",
        "--block",
        f"--include-log-monitor={str(log_monitor).lower()}",
        f"--node-ip-address={address}",
        f"--temp-dir={temp_dir_of(settings)}",
        "--disable-usage-stats",
        "--log-color=false",
        f"--node-manager-port={port(f'{role}_node_manager')}",
        f"--object-manager-port={port(f'{role}_object_manager')}",
        f"--dashboard-agent-listen-port={port(f'{role}_agent_http')}",
        f"--dashboard-agent-grpc-port={port(f'{role}_agent_grpc')}",
        f"--runtime-env-agent-port={port(f'{role}_runtime_env_agent')}",
        f"--metrics-export-port={port(f'{role}_metrics_export')}",
        f"--min-worker-port={port(f'{role}_processes_min')}",
        f"--max-worker-port={port(f'{role}_processes_max')}",
    ]


def single_ports(settings: Settings, *, worker_only: bool = False) -> dict[int, str]:
    """Return every port that is one process's own, with the setting that moves it.

    Args:
        settings: Of this machine.
        worker_only: Leave out what only M1's machine listens on.
    """
    used = {
        settings.api_port: "composite.api_port",
        settings.control_port: "moderator.control_port",
        settings.worker_port: "worker.worker_port",
    }
    for name in type(settings.ports).model_fields:
        if name != "offset" and not name.endswith(("_min", "_max")):
            used[settings.port(name)] = f"ports.{name}"
    if worker_only:
        used = {
            p: name for p, name in used.items() if name.startswith(("ports.worker_", "worker."))
        }
    return used


def taken_ports(settings: Settings, *, worker_only: bool = False) -> dict[int, str]:
    """Return the ports of `single_ports` on which something listens now."""
    ports = single_ports(settings, worker_only=worker_only)
    return {port: name for port, name in ports.items() if not is_free(port)}


def accepts(port: int, *, host: str = LOOPBACK, timeout_s: float = 1.0) -> bool:
    """Whether something accepts connections on the port; on this machine unless ``host`` says."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return True
    except OSError:
        return False


def _files_max() -> int:
    """Return how many files a process may open once its soft limit is raised to the hard one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, FILES_MAX)


def is_free(port: int) -> bool:
    """Whether nothing listens on the port, on any address of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True

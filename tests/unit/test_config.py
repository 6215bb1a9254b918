"""Settings: the guide's three files as they stand, overrides, bounds, and errors that help."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from hcna_ray.config import (
    ConfigError,
    Settings,
    TracingSettings,
    load_settings,
    shared_part,
    short_name,
    with_shared,
    without_password,
)

MODERATOR_FILE = """\
moderator:
  node_id: "HCNA-M1--prod--home--v1.0"
  listen_address: "0.0.0.0"  # Listen on all interfaces
  control_port: 8443          # M1 control API
  worker_nodes:
    - node_id: "HCNA-W1--prod--home--v1.0"
      address: "hcna-w1.local"
      port: 9443
  scheduling:
    max_concurrent_tasks: 10
    task_timeout_seconds: 300
  security:
    enable_mtls: true
    cert_path: "/opt/hcna-m1/certs/m1.crt"
    key_path: "/opt/hcna-m1/certs/m1.key"
    ca_path: "/opt/hcna-m1/certs/ca.crt"
"""

WORKER_FILE = """\
worker:
  node_id: "HCNA-W1--prod--home--v1.0"
  listen_address: "0.0.0.0"
  worker_port: 9443
  moderator_node:
    node_id: "HCNA-M1--prod--home--v1.0"
    address: "hcna-m1.local"
    port: 8443
  resources:
    cpu_cores: 8          # Max cores to use
    memory_gb: 12         # Max RAM to allocate
    disk_path: "/data"    # Working directory for tasks
  security:
    enable_mtls: true
    cert_path: "/opt/hcna-w1/certs/w1.crt"
    key_path: "/opt/hcna-w1/certs/w1.key"
    ca_path: "/opt/hcna-w1/certs/ca.crt"
"""

COMPOSITE_FILE = """\
composite:
  node_id: "HCNA-C1--prod--home--v1.0"
  listen_address: "0.0.0.0"
  api_port: 8080           # Public API port (HTTP for testing, HTTPS for prod)
  moderator_backend:
    address: "localhost"   # M1 on same host
    port: 8443
  security:
    enable_tls: false      # Set to true for production with proper cert
"""


def load(tmp_path: Path, text: str = "", **env: str) -> Settings:
    file = tmp_path / "hcna.yaml"
    file.write_text(text)
    return load_settings(home=tmp_path, env=env)


def test_without_a_file_everything_has_a_default(tmp_path: Path) -> None:
    settings = load_settings(env={"HCNA_HOME": str(tmp_path)})

    assert settings.home == tmp_path
    assert settings.source is None
    assert settings.moderator.scheduling.max_concurrent_tasks == 64
    assert settings.lease.ttl_s == 30
    assert settings.warnings() == ()


def test_the_moderators_file_loads_as_it_stands(tmp_path: Path) -> None:
    settings = load(tmp_path, MODERATOR_FILE)

    moderator = settings.moderator
    assert moderator.name == "M1"
    assert moderator.scheduling.max_concurrent_tasks == 10
    assert moderator.scheduling.task_timeout_seconds == 300
    assert moderator.worker_nodes[0].address == "hcna-w1.local"
    assert moderator.security.cert_path == Path("/opt/hcna-m1/certs/m1.crt")
    assert settings.source == tmp_path / "hcna.yaml"


def test_the_workers_file_loads_as_it_stands(tmp_path: Path) -> None:
    settings = load(tmp_path, WORKER_FILE)

    assert settings.worker.name == "W1"
    assert settings.worker.resources.cpu_cores == 8
    assert settings.worker.resources.memory_gb == 12
    assert settings.data_dir == Path("/data")
    assert settings.worker.moderator_node.address == "hcna-m1.local"


def test_the_composites_file_loads_as_it_stands(tmp_path: Path) -> None:
    settings = load(tmp_path, COMPOSITE_FILE)

    assert settings.composite.name == "C1"
    assert settings.composite.moderator_backend.address == "localhost"
    assert settings.api_port == 8080


def test_the_three_files_may_be_one(tmp_path: Path) -> None:
    settings = load(tmp_path, MODERATOR_FILE + WORKER_FILE + COMPOSITE_FILE)

    assert (settings.moderator.name, settings.worker.name, settings.composite.name) == (
        "M1",
        "W1",
        "C1",
    )


@pytest.mark.parametrize("method", ["diffie-hellman", "pre-shared"])
def test_the_message_cipher_is_part_of_security(tmp_path: Path, method: str) -> None:
    text = f"moderator:\n  security:\n    enable_bpcs: true\n    bpcs_key_exchange: {method}\n"

    assert load(tmp_path, text).moderator.security.bpcs_key_exchange == method


def test_a_public_address_without_tls_starts_nothing_and_is_never_bound(tmp_path: Path) -> None:
    settings = load(tmp_path, COMPOSITE_FILE)

    with pytest.raises(
        ConfigError, match=r"^\S+/hcna.yaml: composite.listen_address is"
    ) as refusal:
        settings.check_start()

    assert "set composite.security.enable_tls: true" in str(refusal.value)
    assert "ssh -L 8080:127.0.0.1:8080" in str(refusal.value)
    assert settings.api_host == "127.0.0.1"
    assert not settings.is_public
    assert settings.public_url("m1.local") == settings.api_url == "http://127.0.0.1:8080"


def test_with_tls_a_public_address_is_bound_and_serve_stays_on_loopback(tmp_path: Path) -> None:
    settings = load(tmp_path, COMPOSITE_FILE.replace("enable_tls: false", "enable_tls: true"))

    assert (settings.api_host, settings.api_port) == ("0.0.0.0", 8080)
    assert (settings.serve_host, settings.serve_port) == ("127.0.0.1", 10034)
    assert settings.api_url == "http://127.0.0.1:10034"
    settings.check_start()
    assert settings.is_public
    assert settings.warnings() == ()
    assert settings.public_url("m1.local") == "https://m1.local:8080"


@pytest.mark.parametrize(
    ("address", "hosts", "expected"),
    [
        ("192.168.1.10", "[]", "https://192.168.1.10:8080"),
        ("'::'", "[]", "https://m1.local:8080"),
        ("'fd00::1'", "[]", "https://[fd00::1]:8080"),
        ("0.0.0.0", "[c1.example.org, other]", "https://c1.example.org:8080"),
    ],
)
def test_what_to_call_it_from_elsewhere(
    tmp_path: Path, address: str, hosts: str, expected: str
) -> None:
    security = "security: {enable_tls: true}"
    text = f"composite: {{listen_address: {address}, hosts: {hosts}, {security}}}"

    assert load(tmp_path, text).public_url("m1.local") == expected


@pytest.mark.parametrize(
    ("address", "warns"), [("127.0.0.1", 0), ("127.0.0.7", 0), ("localhost", 0), ("'::1'", 1)]
)
def test_what_is_here_alone_needs_no_tls(tmp_path: Path, address: str, warns: int) -> None:
    settings = load(tmp_path, f"composite: {{listen_address: {address}}}")

    settings.check_start()

    assert not settings.is_public
    assert len(settings.warnings()) == warns


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "'::1'"])
def test_tls_on_loopback_is_not_public(tmp_path: Path, address: str) -> None:
    text = f"composite: {{listen_address: {address}, security: {{enable_tls: true}}}}"

    assert not load(tmp_path, text).is_public


def test_a_public_address_of_m1_is_not_bound(tmp_path: Path) -> None:
    settings = load(tmp_path, MODERATOR_FILE)

    assert settings.control_host == "127.0.0.1"
    (warning,) = settings.warnings()
    assert "moderator.listen_address is 0.0.0.0, but" in warning
    assert "ssh -L 8443:127.0.0.1:8443" in warning


def test_certificates_between_the_machines_make_nothing_public(tmp_path: Path) -> None:
    """``/metrics`` is open where nobody else can ask: what counts is what is really bound."""
    for text in (MODERATOR_FILE, COMPOSITE_FILE, ""):
        assert load(tmp_path, text).is_public is False
    assert load(tmp_path, MODERATOR_FILE).moderator.security.enable_mtls
    assert load(tmp_path, "moderator: {listen_address: 127.0.0.7}\n").is_public is False


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        "lease: {ttl_s: 60, heartbeat_s: 2}\n",
        HCNA_LEASE__TTL_S="45",
        HCNA_MODERATOR__SCHEDULING__MAX_CONCURRENT_TASKS="7",
        HCNA_MODERATOR__SCHEDULING__CONCURRENCY_LIMITS="{gpu: 2}",
        HCNA_WORKER__SECURITY__ENABLE_BPCS="true",
        HCNA_URL="http://example.invalid",  # Not a setting: no double underscore.
    )

    assert settings.lease.ttl_s == 45
    assert settings.lease.heartbeat_s == 2
    assert settings.moderator.scheduling.max_concurrent_tasks == 7
    assert settings.moderator.scheduling.concurrency_limits == {"gpu": 2}
    assert settings.worker.security.enable_bpcs is True


def test_the_file_may_be_named(tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text("ports: {offset: 3}\n")

    settings = load_settings(env={"HCNA_HOME": str(tmp_path), "HCNA_CONFIG": str(file)})

    assert settings.ports.offset == 3


def test_the_offset_moves_every_port(tmp_path: Path) -> None:
    plain, moved = load(tmp_path), load(tmp_path, HCNA_PORTS__OFFSET="20000")

    assert moved.api_port == plain.api_port + 20000
    assert moved.control_port == plain.control_port + 20000
    assert moved.worker_port == plain.worker_port + 20000
    assert moved.port("gcs") == 26379
    assert moved.ray_address == "127.0.0.1:26379"
    assert moved.api_url == "http://127.0.0.1:28080"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("moderatr: {}", ["unknown section 'moderatr'", "did you mean moderator?"]),
        ("home: /x", ["unknown section 'home'", "HCNA_HOME"]),
        ("moderator: {schedulng: {}}", ["moderator.schedulng", "did you mean scheduling?"]),
        ("worker: {zzz: 1}", ["worker.zzz", "known: labels, listen_address"]),
        ("lease: {ttl_s: -3}", ["lease.ttl_s = -3", "> 0", "<= 3600", "default 30"]),
        ("lease: {ttl_s: 14}", ["lease:", "ttl_s (14)", "three times heartbeat_s (5)"]),
        ("lease: {self_stop_s: 26}", ["self_stop_s (26)", "ttl_s (30)"]),
        ("lease: {ttl_s: .nan}", ["lease.ttl_s"]),
        ("lease: {ttl_s: 30, ttl_s: 40}", ["not valid YAML in line 1", "'ttl_s' is given twice"]),
        ("lease: [1", ["not valid YAML"]),
        ("- 1", ["must be a mapping"]),
        ("lease: !!python/object/apply:os.getcwd []", ["not valid YAML"]),
        ("moderator: {node_id: w1}", ["moderator.node_id = 'w1'", "HCNA-W1--prod--home--v1.0"]),
        ("moderator: {security: {enable_mtls: true}}", ["enable_mtls needs cert_path, key_path"]),
        ("composite: {security: {cert_path: /c.pem}}", ["of your own needs key_path too"]),
        ("composite: {security: {key_path: /c.key}}", ["of your own needs cert_path too"]),
        ("composite: {security: {enable_mtls: true}}", ["enable_mtls needs enable_tls: true"]),
        ("composite: {hosts: ['a b']}", ["composite.hosts", "'a b'"]),
        ("composite: {edge: {head_s: 0}}", ["composite.edge.head_s = 0", ">= 1"]),
        ("worker: {moderator_node: {address: x}}", ["worker.moderator_node.node_id is missing"]),
        ("ports: {gcs: 8080}", ["ports.gcs", "composite.api_port", "8080"]),
        ("ports: {worker_processes_max: 65000, offset: 1000}", ["above 65535"]),
        ("ports: {replica_http_max: 10101}", ["replica_http_max must be at least"]),
        ("limits: {gather_items: 5}", ["gather_items must be at least batch_items (10000)"]),
        ("retry: {backoff_s: 400}", ["max_backoff_s must be at least backoff_s (400)"]),
        ("store: {url: 'mysql://u:secret@h/d'}", ["store.url = ***", "postgresql://"]),
        ("store: {url: 'postgresql://u:secret@h'}", ["store.url = ***", "must name a database"]),
        ("store: {url: 'postgresql://u:sec ret@h/d'}", ["percent-encode"]),
    ],
)
def test_a_mistake_is_refused_with_what_helps(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)

    message = str(caught.value)
    for part in [*expected, "hcna.yaml"]:
        assert part in message
    assert "secret" not in message


SERVER = "postgresql://hcna:s%40cret@db.example:5433/tasks?sslmode=verify-full"


def test_the_store_may_be_a_server(tmp_path: Path) -> None:
    settings = load(tmp_path, f"store: {{url: '{SERVER}'}}")

    assert settings.store_url == SERVER
    assert settings.store_path is None
    assert settings.store_name == "postgresql://hcna@db.example:5433/tasks"
    for shown in (repr(settings), str(settings), repr(settings.store), str(settings.store)):
        assert "s%40cret" not in shown


@pytest.mark.parametrize(
    ("text", "env", "expected"),
    [
        ("", {}, "sqlite"),
        ("", {"DATABASE_URL": "postgresql://a/d"}, "postgresql://a/d"),
        ("", {"DATABASE_URL": "postgres://a/d"}, "postgres://a/d"),
        # The file is more particular than a name that many programs read.
        (
            "store: {url: 'postgresql://b/d'}",
            {"DATABASE_URL": "postgresql://a/d"},
            "postgresql://b/d",
        ),
        ("store: {url: 'sqlite:///x'}", {"DATABASE_URL": "postgresql://a/d"}, "sqlite:///x"),
        (
            "store: {url: 'postgresql://b/d'}",
            {"DATABASE_URL": "postgresql://a/d", "HCNA_STORE__URL": "postgresql://c/d"},
            "postgresql://c/d",
        ),
        ("store: {unsafe: true}", {"DATABASE_URL": "postgresql://a/d"}, "postgresql://a/d"),
        # Somebody else's.
        ("", {"DATABASE_URL": "mysql://a/d"}, "sqlite"),
        ("", {"DATABASE_URL": ""}, "sqlite"),
    ],
)
def test_the_store_is_found_in_this_order(
    tmp_path: Path, text: str, env: dict[str, str], expected: str
) -> None:
    (tmp_path / "hcna.yaml").write_text(text)

    settings = load_settings(home=tmp_path, env=env)

    wanted = f"sqlite://{tmp_path / 'queue.db'}" if expected == "sqlite" else expected
    assert settings.store_url == wanted


def test_a_wrong_database_url_is_refused_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must name a database") as caught:
        load_settings(home=tmp_path, env={"DATABASE_URL": "postgresql://u:secret@h"})

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///a/b", "sqlite:///a/b"),
        ("postgresql://u:p@h:1/d", "postgresql://u@h:1/d"),
        ("postgresql://u:p/q@r@h/d?password=x", "postgresql://u@h/d"),
        ("postgresql:///d?user=u&password=x", "postgresql:///d"),
        ("postgresql://h1,h2/d", "postgresql://h1,h2/d"),
    ],
)
def test_a_store_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        (SERVER, False),
        ("postgresql://u@db.example/d", True),
        ("postgresql://u@db.example/d?sslmode=prefer", True),
        ("postgresql://u@127.0.0.1/d", False),
        ("postgresql://u@localhost:5433/d", False),
        ("postgresql:///d?host=/run/postgresql", False),
    ],
)
def test_a_server_reached_in_clear_is_warned_of(tmp_path: Path, url: str, warned: bool) -> None:
    settings = load(tmp_path, f"store: {{url: '{url}'}}")

    found = [warning for warning in settings.warnings() if "sslmode" in warning]

    assert bool(found) is warned
    assert not [warning for warning in found if "s%40cret" in warning]


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("HCNA_PORT__OFFSET", "did you mean ports?"),
        ("HCNA_PORTS__OFST", "unknown field ports.ofst (did you mean offset?)"),
        ("HCNA_PORTS__", "unknown section in the name"),
    ],
)
def test_a_wrong_variable_is_refused(tmp_path: Path, variable: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(home=tmp_path, env={variable: "1"})

    assert variable in str(caught.value)
    assert expected in str(caught.value)


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "lease: {ttl_s: x}\nretry: {jitter: 2}\n")

    assert "lease.ttl_s = 'x'" in str(caught.value)
    assert "retry.jitter = 2" in str(caught.value)


def test_a_named_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(home=tmp_path, path=tmp_path / "none.yaml", env={})


def test_a_section_with_nothing_in_it_means_its_defaults(tmp_path: Path) -> None:
    settings = load(tmp_path, "worker:\ncomposite:\n  security:\n")

    assert settings.worker == Settings().worker


def test_settings_cannot_be_changed() -> None:
    lease: Any = Settings().lease

    with pytest.raises(ValidationError, match="frozen"):
        lease.ttl_s = 1.0


def test_settings_and_errors_survive_pickling(tmp_path: Path) -> None:
    settings = load(tmp_path, MODERATOR_FILE)
    error = ConfigError("bad", "here")

    assert pickle.loads(pickle.dumps(settings)) == settings
    assert str(pickle.loads(pickle.dumps(error))) == "here: bad"


def test_every_field_has_a_sentence() -> None:
    def check(model: type[BaseModel], where: str) -> None:
        for name, info in model.model_fields.items():
            assert info.description, f"{where}.{name}"
            assert not (info.is_required() and where.count(".") == 1), f"{where}.{name}"
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                check(info.annotation, f"{where}.{name}")

    check(Settings, "settings")


@pytest.mark.parametrize(
    ("node_id", "short"),
    [("HCNA-W1--prod--home--v1.0", "W1"), ("HCNA-M12", "M12"), ("LAT-X3--lab", "X3")],
)
def test_the_short_name_is_role_and_index(node_id: str, short: str) -> None:
    assert short_name(node_id) == short


# -- traces ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318"),
        ("http://tempo.local:4318/", "http://tempo.local:4318"),
        ("https://otlp.example.com/v1/traces", "https://otlp.example.com"),
        ("https://example.com/otlp/v1/traces/", "https://example.com/otlp"),
    ],
)
def test_a_collectors_address_is_its_base(written: str, kept: str) -> None:
    assert TracingSettings(endpoint=written).endpoint == kept


@pytest.mark.parametrize(
    "written",
    ["localhost:4318", "grpc://x:4317", "http://", "http://me:secret@x:4318", "http://x?a=b", ""],
)
def test_what_is_no_collectors_address_is_refused(written: str) -> None:
    with pytest.raises(ValidationError):
        TracingSettings(endpoint=written)


def test_a_machine_that_joins_takes_m1s_collector_unless_it_has_its_own(tmp_path: Path) -> None:
    m1 = Settings(
        home=tmp_path,
        tracing=TracingSettings(endpoint="http://m1:4318", headers_file=tmp_path / "h"),
    )
    shared = shared_part(m1)
    plain = with_shared(Settings(home=tmp_path), shared, "HCNA-W2--test", moderator="m1")
    own = with_shared(
        Settings(home=tmp_path, tracing=TracingSettings(endpoint="http://own:4318")),
        shared,
        "HCNA-W2--test",
        moderator="m1",
    )
    older = with_shared(
        Settings(home=tmp_path),
        {name: part for name, part in shared.items() if name != "tracing"},
        "HCNA-W2--test",
        moderator="m1",
    )

    assert plain.tracing == TracingSettings(endpoint="http://m1:4318")  # Files are each one's own.
    assert own.tracing.endpoint == "http://own:4318"
    assert older.tracing == TracingSettings()

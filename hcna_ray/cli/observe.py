"""``observe``: Prometheus and Grafana shown this cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.markup import escape

from hcna_ray.cli.terminal import (
    AsJson,
    CommandFailed,
    ExitCode,
    Json,
    UsageProblem,
    print_json,
    talk,
)

if TYPE_CHECKING:
    from hcna_ray.config import Settings
    from hcna_ray.observability.grafana import Change
    from hcna_ray.supervisor.observers import Observer, Observers, Wanted

observe_app = typer.Typer(
    help="Metrics and dashboards: Prometheus, Alertmanager and Grafana, shown this cluster.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

#: Where they are unless somebody says otherwise.
GRAFANA_URL, PROMETHEUS_URL = "http://127.0.0.1:3000", "http://127.0.0.1:9090"
ALERTMANAGER_URL = "http://127.0.0.1:9093"
EVERY_S = 15
HOW_TO = "docs/how-to/monitor.md"
#: How the key of a Prometheus is made, in a file that nobody else may read.
MAKE_KEY = "(umask 077; hcna keys create prometheus --role viewer > prometheus.key)"
_KEY_FILE_BYTES_MAX = 4096

PrometheusUrl = Annotated[str, typer.Option(help="Where Prometheus is.")]
AlertmanagerUrl = Annotated[str, typer.Option(help="Where Alertmanager is.")]
C1Url = Annotated[
    str, typer.Option(help="Where Prometheus reaches C1; default that of this machine.")
]
Every = Annotated[
    int, typer.Option(min=1, max=120, help="Seconds between two looks of Prometheus.")
]
KeyFile = Annotated[
    Path | None,
    typer.Option(help="File with a key of role viewer, where C1 is not on loopback."),
]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.add_typer(observe_app, name="observe")


@observe_app.command()
def up(
    grafana: Annotated[
        str | None, typer.Option(help="Where Grafana is.", show_default=GRAFANA_URL)
    ] = None,
    prometheus: Annotated[
        str | None, typer.Option(help="Where Prometheus is.", show_default=PROMETHEUS_URL)
    ] = None,
    alertmanager: Annotated[
        str | None, typer.Option(help="Where Alertmanager is.", show_default=ALERTMANAGER_URL)
    ] = None,
    webhook: Annotated[
        str | None,
        typer.Option(help="Who is told of alerts; with it Alertmanager is started too."),
    ] = None,
    loki: Annotated[
        str | None, typer.Option(help="Where Grafana reaches Loki, if there is one.")
    ] = None,
    c1: Annotated[
        str | None,
        typer.Option(help="Where Prometheus reaches C1; default that of this machine."),
    ] = None,
    key_file: Annotated[
        str | None,
        typer.Option(
            metavar="<path>", help="File with a key of role viewer, where C1 is not on loopback."
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=120,
            help="Seconds between two looks of Prometheus.",
            show_default=str(EVERY_S),
        ),
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(
            help="Grafana's user, if there is no token; see GRAFANA_PASSWORD.",
            show_default="admin",
        ),
    ] = None,
    without_grafana: Annotated[
        bool | None,
        typer.Option(
            "--without-grafana/--with-grafana", help="Prometheus (and Alertmanager) alone."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start Prometheus and Grafana where they are installed and not running; harmless twice.

    An option that is not given is as it was the last time; --webhook "" and the like undo one.
    Gives Grafana the data source, folders, dashboards (ours, and Ray's own) and alert rules. The
    key of one that was not started here is a service account's token in GRAFANA_TOKEN, or a
    password in GRAFANA_PASSWORD: words of a command line can be read by everybody on the machine.
    What is started here goes on until hcna observe down.
    """
    from hcna_ray.config import load_settings
    from hcna_ray.observability import monitoring
    from hcna_ray.supervisor.membership import read_membership
    from hcna_ray.supervisor.observers import ALERTMANAGER, Observer, Observers
    from hcna_ray.supervisor.ports import temp_dir_of

    for url in filter(None, (grafana, prometheus, alertmanager, webhook, loki, c1)):
        _must_be_address(url)
    if grafana and without_grafana is None:
        without_grafana = False
    settings = load_settings()
    observers = Observers(settings.home / "observe")
    wanted, kept = _as_before(
        observers,
        grafana=grafana,
        prometheus=prometheus,
        alertmanager=alertmanager,
        webhook=webhook,
        loki=loki,
        c1=c1,
        key_file=str(Path(key_file).absolute()) if key_file else key_file,
        every=every,
        user=user,
        without_grafana=without_grafana,
    )
    joined = read_membership(settings.cluster_dir)
    if joined is not None and not wanted.c1:
        raise CommandFailed(
            f"this machine is {joined.name}; C1 is on M1",
            f"hcna observe up, on {joined.m1_addresses[0]}; or here with --c1 ADDRESS",
            ExitCode.REFUSED,
        )
    _must_open_c1(settings, wanted)
    observers.remember(wanted)
    changed = observers.write(
        monitoring.files(
            c1_url=wanted.c1 or settings.api_url,
            prometheus_url=wanted.prometheus,
            alertmanager_url=wanted.alertmanager,
            webhook_url=wanted.webhook or monitoring.WEBHOOK_URL,
            loki_url=wanted.loki or monitoring.LOKI_URL,
            logs=str(settings.logs_dir),
            key_file=wanted.key_file or None,
            every_s=wanted.every,
        )
    )
    changes: list[Change] = []
    with _trouble():
        found = [observers.prometheus(wanted.prometheus, changed=changed)]
        if wanted.webhook:
            found.append(observers.alertmanager(wanted.alertmanager, changed=changed))
        elif observers.down(ALERTMANAGER):  # It would tell its old webhook of alerts for ever.
            url = wanted.alertmanager
            found.append(Observer(name=ALERTMANAGER.name, url=url, outcome="stopped"))
        there = None if wanted.without_grafana else observers.grafana(wanted.grafana)
    if there is not None:
        found.append(there)
        if there.outcome != "missing":
            auth = _grafana_key(observers, there, wanted.user)
            rays = temp_dir_of(settings) / "session_latest/metrics/grafana/dashboards"
            changes = _provision(
                wanted.grafana,
                auth,
                prometheus_url=wanted.prometheus,
                loki_url=wanted.loki,
                every_s=wanted.every,
                rays=monitoring.rays_dashboards(rays),
            )
    _tell(observers.folder, found, changes, kept, as_json=as_json)


@observe_app.command()
def down(as_json: AsJson = False) -> None:
    """Stop what hcna observe up has started. Its data and options stay."""
    from hcna_ray.config import load_settings
    from hcna_ray.supervisor.observers import Observers

    with _trouble():
        stopped = Observers(load_settings().home / "observe").down()
    if as_json:
        print_json({"stopped": stopped})
        return
    for name in stopped:
        typer.echo(f"stopped  {name}")
    if not stopped:
        talk().print("nothing of it was running. Next: hcna observe up")


@observe_app.command()
def files(
    folder: Annotated[Path, typer.Argument(help="Where to write them.")],
    c1: C1Url = "",
    prometheus: PrometheusUrl = PROMETHEUS_URL,
    alertmanager: AlertmanagerUrl = ALERTMANAGER_URL,
    webhook: Annotated[
        str, typer.Option(help="Who is told of alerts, for Alertmanager.")
    ] = "http://127.0.0.1:9099/alerts",
    loki: Annotated[
        str, typer.Option(help="Where Grafana and Alloy reach Loki.")
    ] = "http://127.0.0.1:3100",
    key_file: KeyFile = None,
    every: Every = EVERY_S,
    as_json: AsJson = False,
) -> None:
    """Write what Prometheus, Alertmanager, Grafana, Loki and Alloy read when set up by files."""
    from hcna_ray.config import load_settings
    from hcna_ray.observability import monitoring

    settings = load_settings()
    written = monitoring.files(
        c1_url=c1 or settings.api_url,
        prometheus_url=prometheus,
        alertmanager_url=alertmanager,
        webhook_url=webhook,
        loki_url=loki,
        logs=str(settings.logs_dir),
        key_file=_absolute(key_file),
        every_s=every,
    )
    for name, text in written.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if as_json:
        print_json({"folder": str(folder), "files": sorted(written)})
        return
    for name in sorted(written):
        typer.echo(str(folder / name))
    talk().print(
        f"Next: prometheus --config.file={escape(str(folder / 'prometheus.yml'))}", soft_wrap=True
    )


# -- what is wanted --------------------------------------------------------------------------------


def _as_before(observers: Observers, **given: str | int | None) -> tuple[Wanted, dict[str, Any]]:
    """Return what is wanted, and what of it is so because it was the last time.

    Args:
        observers: They know what that was.
        given: Options of this run. ``None`` was not given; an empty word undoes an option.
    """
    from hcna_ray.supervisor.observers import Wanted

    usual = asdict(Wanted())
    said: dict[str, Any] = {
        name: usual[name] if value == "" else value
        for name, value in given.items()
        if value is not None
    }
    with _trouble():
        before = observers.remembered()
    kept = {name: value for name, value in before.told().items() if name not in said}
    return replace(before, **said), kept


def _must_open_c1(settings: Settings, wanted: Wanted) -> None:
    """Refuse what would have Prometheus stand before a closed door, with nobody the wiser.

    C1 itself is asked. Where it does not answer, the settings say what it will do here.
    """
    from hcna_ray.supervisor.observers import is_here, shows_figures

    if not is_here(wanted.prometheus):
        return  # Who runs it there has a configuration, and a key, of his own.
    key = _key_in(wanted.key_file) if wanted.key_file else ""
    at = wanted.c1 or settings.api_url
    shows = shows_figures(at, key)
    if shows is None and not (wanted.c1 or key):
        shows = not settings.is_public
    if shows is not False:
        return
    if key:
        raise CommandFailed(
            f"C1 at {at} does not take the key in {wanted.key_file} (--key-file)",
            f"hcna keys list, on M1; {MAKE_KEY} makes one, under another name if that is taken",
            ExitCode.REFUSED,
        )
    raise CommandFailed(
        f"C1 at {at} shows its figures to holders of a key alone, and there is no --key-file",
        f"{MAKE_KEY}, on M1, then hcna observe up --key-file prometheus.key",
        ExitCode.REFUSED,
    )


def _key_in(path: str) -> str:
    """Return the key in a file, read as Prometheus reads it."""
    try:
        with Path(path).open("rb") as file:
            key = file.read(_KEY_FILE_BYTES_MAX).decode("ascii").strip()
    except OSError as error:
        raise UsageProblem(f"--key-file {path}: {error.strerror}", MAKE_KEY) from None
    except UnicodeDecodeError:
        key = ""
    if not key or not key.isprintable() or " " in key:
        raise UsageProblem(f"--key-file {path} holds no key", MAKE_KEY)
    return key


# -- keys ------------------------------------------------------------------------------------------


Auth = str | tuple[str, str]


def _grafana_key(observers: Observers, there: Observer, user: str) -> Auth:
    """Return what opens Grafana: a key that was told, or that of the one that was started here."""
    token = os.environ.get("GRAFANA_TOKEN", "")
    password = os.environ.get("GRAFANA_PASSWORD", "")
    if token or password:
        return token or (user, password)
    own = observers.grafana_password
    if there.outcome == "found" or own is None:
        raise UsageProblem(
            f"Grafana at {there.url} was not started here, and neither GRAFANA_TOKEN nor "
            "GRAFANA_PASSWORD is set",
            "export GRAFANA_TOKEN=..., a service account's token from Grafana's own pages",
        )
    return "admin", own


def _provision(url: str, auth: Auth, **options: Any) -> list[Change]:
    from hcna_ray.observability.grafana import GrafanaTrouble, provision

    try:
        return provision(url, auth, **options)
    except GrafanaTrouble as error:
        raise CommandFailed(str(error), f"see {HOW_TO}", ExitCode.UNREACHABLE) from None


@contextmanager
def _trouble() -> Iterator[None]:
    from hcna_ray.supervisor.observers import ObserverFailed

    try:
        yield
    except ObserverFailed as error:
        raise CommandFailed(str(error), f"look there, or see {HOW_TO}") from None


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _must_be_address(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageProblem(
            f"{url!r} is not an address such as {PROMETHEUS_URL}", "hcna observe up --help"
        )


# -- telling ---------------------------------------------------------------------------------------


def _tell(
    folder: Path,
    found: list[Observer],
    changes: list[Change],
    kept: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    wanting = [one for one in found if one.then]
    if as_json:
        told: Json = {
            "folder": str(folder),
            "programs": [asdict(one) for one in found],
            "changes": [asdict(one) for one in changes],
            "kept": {name: _shown(value) for name, value in kept.items()},
        }
        print_json(told)
    else:
        for one in found:
            typer.echo(f"{one.outcome:8} {one.name:12} {one.url}")
        for change in changes:
            typer.echo(f"{change.outcome:8} {change.kind:12} {change.name}")
        if kept:
            said = ", ".join(_as_option(name, value) for name, value in kept.items())
            talk().print(f"As the last time: {escape(said)}", soft_wrap=True)
        grafana = next((one for one in found if one.name == "Grafana"), None)
        if grafana is not None and grafana.outcome in ("started", "running"):
            password = folder / "grafana.password"
            talk().print(f"Sign in as admin, password in {escape(str(password))}", soft_wrap=True)
        if changes and grafana is not None:
            at = escape(grafana.url.rstrip("/"))
            talk().print(f"Next: {at}/d/hcna-overview", soft_wrap=True)
    if wanting:
        what = {"missing": "is not there", "foreign": "does not scrape this cluster"}
        first = wanting[0]
        raise CommandFailed(
            f"{first.name} at {first.url} {what[first.outcome]}", first.then, ExitCode.UNREACHABLE
        )


def _as_option(name: str, value: Any) -> str:
    """Return an option as it would be typed."""
    word = f"--{name.replace('_', '-')}"
    return word if value is True else f"{word} {_shown(value)}"


def _shown(value: Any) -> Any:
    """Return a value without what of a webhook's address is a secret: all behind its host."""
    parts = urlsplit(value) if isinstance(value, str) else None
    if parts is None or parts.scheme not in ("http", "https"):
        return value
    host = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return value if value.rstrip("/") == host else f"{host}/..."

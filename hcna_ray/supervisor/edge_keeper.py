"""The files of the edge: made before it starts, looked at while it runs.

In ``cluster/``::

    edge.pem            private key and certificate of the public entrance
    edge-clients.pem    authorities whose client certificates count there
    edge.mark           secret by which C1 believes what the edge says of a client's address

The certificate comes from the cluster's authority, or from the files that the settings name; these
are read anew when they change. Whoever renews them, certbot for instance, need not tell anybody.
"""

from __future__ import annotations

import ipaddress
import os
import resource
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from hcna_ray.config import Settings
from hcna_ray.core.errors import HcnaError
from hcna_ray.durable import write_private
from hcna_ray.security.authority import (
    ensure_revocations,
    ensure_server,
    ensure_trust,
)
from hcna_ray.security.certs import SERVER
from hcna_ray.security.edge_mark import ensure_edge_mark
from hcna_ray.security.keys import load_keys
from hcna_ray.security.own_certs import load_authorities, load_own
from hcna_ray.supervisor.edge import EdgeFiles, edge_command, edge_config
from hcna_ray.supervisor.edge_log import log_socket
from hcna_ray.supervisor.node_certs import addresses_here, names_of, write_if_changed
from hcna_ray.supervisor.ports import FILES_MAX, connections_max

#: What the certificate of the public entrance is called in the authority's list.
NAME = "C1"
_CHECK_S = 20.0
_THREADS_MAX = 4
_DUE = timedelta(hours=1)


class EdgeRefused(HcnaError):
    """The edge must not be opened like this. The text names the setting and what to do."""

    code = "edge_refused"


@dataclass
class EdgeKeeper:
    """Makes the edge's files. Invariant: ``run/edge.cfg`` is one that HAProxy takes."""

    settings: Settings
    addresses: Callable[[], tuple[str, ...]] = addresses_here
    #: How the files looked when they were read: path, time, size, inode.
    _stamped: tuple[tuple[str, int, int, int], ...] = ()
    #: What was in them, as far as the edge reads it.
    _used: tuple[bytes, ...] | None = None
    #: When they are looked at even if none has changed: certificates and lists grow old.
    _due: datetime | None = None

    @property
    def config_path(self) -> Path:
        """Where the configuration is."""
        return self.settings.run_dir / "edge.cfg"

    def prepare(self, *, now: datetime, starting: bool = True) -> bool:
        """Make everything that the edge needs; whether it is other than the last time.

        Args:
            now: The time, aware.
            starting: Whether the edge is about to start; later a key may come any time.

        Raises:
            CertificateBroken: The authority cannot be used.
            OwnCertificateRefused: The settings name files that cannot be used.
            EdgeRefused: Nobody could use what would be public, or HAProxy refuses to start so.
        """
        settings = self.settings
        if not settings.has_edge:
            write_if_changed(self.config_path, edge_config(settings))
            return self._is_other()
        stamps = self._stamps()
        if starting and settings.is_public:
            self._check_keys(now)
        pem = self._certificate(now)
        clients, revoked = self._clients(now)
        text = edge_config(
            settings,
            EdgeFiles(
                pem=pem,
                mark=ensure_edge_mark(settings.cluster_dir),
                clients=clients,
                revoked=revoked,
                log=log_socket(settings),
            ),
            connections=connections_max(settings, files=_files_max()),
            threads=min(_THREADS_MAX, len(os.sched_getaffinity(0))),
        )
        new = self.config_path.with_name("edge.cfg.new")
        write_private(new, text)
        try:
            self._check(new)
            write_if_changed(self.config_path, text)
        finally:
            new.unlink(missing_ok=True)
        # Only now: what failed is tried again at the next look.
        self._due, self._stamped = now + _DUE, stamps
        return self._is_other()

    def refresh(self, *, now: datetime) -> bool:
        """Look whether a file has changed, and then prepare; whether the edge must read anew.

        Raises:
            HcnaError: As `prepare`; the edge goes on with what it has.
        """
        if not self.settings.has_edge:
            return False
        if self._due is not None and now < self._due and self._stamps() == self._stamped:
            return False
        return self.prepare(now=now, starting=False)

    def _check_keys(self, now: datetime) -> None:
        if any(key.state(now.timestamp()) == "good" for key in load_keys(self.settings.keys_dir)):
            return
        raise EdgeRefused(
            f"composite.listen_address is {self.settings.composite.listen_address}, and no key "
            "opens C1: nobody could use it; make one with hcna keys create NAME --role admin, or "
            "take listen_address out of the settings"
        )

    def _certificate(self, now: datetime) -> Path:
        settings, security = self.settings, self.settings.composite.security
        path = settings.cluster_dir / "edge.pem"
        if security.cert_path is not None:
            assert security.key_path is not None
            own = load_own(
                security.cert_path,
                security.key_path,
                None,
                addresses=settings.composite.hosts,
                purposes=(SERVER,),
                now=now,
            )
            write_if_changed(path, own.pem)
            return path
        names, addresses = list(names_of(NAME)), list(self.addresses())
        for host in (*settings.composite.hosts, settings.composite.listen_address):
            _sort_in(host, names, addresses)
        ensure_server(settings.cluster_dir, path, NAME, names=names, addresses=addresses, now=now)
        return path

    def _clients(self, now: datetime) -> tuple[Path | None, Path | None]:
        settings, security = self.settings, self.settings.composite.security
        directory = settings.cluster_dir
        path = directory / "edge-clients.pem"
        if security.ca_path is not None:
            write_if_changed(path, load_authorities(security.ca_path, now=now))
            return path, None
        if not security.enable_mtls:
            return None, None
        ensure_trust(directory, now=now)
        stems = ("ca.old.pem", "ca.pem")
        parts = [directory / stem for stem in stems if (directory / stem).exists()]
        write_if_changed(path, "".join(part.read_text(encoding="ascii") for part in parts))
        return path, ensure_revocations(directory, now=now)

    def _check(self, config: Path) -> None:
        command = edge_command(self.settings, check=config)
        ran = subprocess.run(command, capture_output=True, timeout=_CHECK_S, check=False)
        if ran.returncode != 0:
            said = ran.stderr.decode("utf-8", "replace").strip().splitlines()
            raise EdgeRefused(
                f"HAProxy refuses the edge's configuration: {' '.join(said)[:1000]}; "
                "look at composite.listen_address and composite.security"
            )

    def _stamps(self) -> tuple[tuple[str, int, int, int], ...]:
        """Return how the files look that others may change."""
        security, directory = self.settings.composite.security, self.settings.cluster_dir
        paths = [security.cert_path, security.key_path, security.ca_path]
        paths += [directory / name for name in ("ca.pem", "ca.old.pem", "crl.pem")]
        paths += [directory / "edge.pem", directory / "edge-clients.pem"]
        found = []
        for path in paths:
            if path is None:
                continue
            try:
                stat = path.stat()
            except OSError:
                continue
            found.append((str(path), stat.st_mtime_ns, stat.st_size, stat.st_ino))
        return tuple(found)

    def _is_other(self) -> bool:
        """Remember what the edge reads now; whether it is other than what it read before."""
        directory = self.settings.cluster_dir
        names = ("edge.pem", "edge-clients.pem", "crl.pem")
        paths = [self.config_path, *(directory / name for name in names)]
        before = self._used
        self._used = tuple(path.read_bytes() if path.exists() else b"" for path in paths)
        return self._used != before


def _sort_in(host: str, names: list[str], addresses: list[str]) -> None:
    """Put a host among the names or the addresses; the address of all is none."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        names.append(host.lower())
        return
    if not address.is_unspecified:
        addresses.append(str(address))


def _files_max() -> int:
    """Return how many files the edge may open."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, FILES_MAX)

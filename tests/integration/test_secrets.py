"""Secrets of the running cluster are used in every way there is, and turn up nowhere.

What is planted and where it is looked for: `tests.support.session_canaries`. The same is looked for
once more when the session ends, after everything that the other tests did.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from hcna_ray.client import Client
from hcna_ray.security.keys import create_key
from tests.integration.conftest import Cluster
from tests.support import session_canaries

pytestmark = pytest.mark.cluster

HCNA = Path(sys.executable).parent / "hcna"


def test_secrets_that_are_used_are_in_no_log_process_database_or_backup(
    cluster: Cluster, client: Client, tmp_path: Path
) -> None:
    settings, canaries = cluster.settings, cluster.canaries
    key = create_key(settings.keys_dir, name="canary-used", role="submitter", now=1.0)
    canaries.add("API key that was used and shown wrong", key)
    with httpx.Client(base_url=cluster.url, timeout=30, trust_env=False) as http:
        right = {"Authorization": f"Bearer {key}"}
        assert http.get("/workers", headers=right).status_code == 200
        # Refused in each way in which a key can be: the refusal is logged, the key must not be.
        assert http.get("/admin/audit", headers=right).status_code == 403
        for headers in (
            {"Authorization": f"Basic {key}"},
            {"Authorization": key},
            {"X-API-Key": f"{key}x"},
            right | {"X-API-Key": key},
        ):
            assert http.get("/workers", headers=headers).status_code == 401
    client.submit("echo", {"message": "while secrets are watched"}).result(timeout_s=60)
    passphrase = canaries.plant("passphrase of hcna backup")
    made = subprocess.run(
        [str(HCNA), "backup", "--with-keys", "--to", str(tmp_path)],
        env=cluster.env | {"HCNA_BACKUP_PASSPHRASE": passphrase},
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr.decode()
    assert canaries.within(made.stdout + made.stderr) == []
    hits = session_canaries.in_processes(settings, canaries)
    hits += session_canaries.in_files(settings, canaries)
    hits += canaries.in_folders([tmp_path])
    assert hits == []
    assert len(canaries) >= 11
    assert {"private key in ca.key", "private key in node.pem"} <= set(canaries.names())


def test_what_runs_handlers_was_looked_at(cluster: Cluster, client: Client) -> None:
    """A search that finds no process would find no secret either."""
    client.submit("echo", {}).result(timeout_s=60)
    handlers = session_canaries.handlers_of(cluster.settings)
    assert handlers
    for pid in handlers:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"RAY_" not in environ
        assert b"HCNA_CONFIG" not in environ

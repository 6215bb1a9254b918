"""Artifacts, up and down, beside a plain HTTP copy of the same bytes on the same machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.children import Trouble, free_port, listening
from benchmarks.visits import Size, Visit
from hcna_ray.client import Client

BYTES = 128 * 2**20
CHUNK = 2**20
ROUNDS = 5


def measure(seen: Visit, size: Size) -> None:
    """Copy a file to and from C1 and a plain server, in turn."""
    del size
    target = seen.target
    folder = target.folder / "copies"
    folder.mkdir()
    key = next(line for line in target.job.headers if line.startswith("Authorization"))
    port = free_port()
    server = target.children.start(
        "plain", [sys.executable, "-m", "benchmarks.plain_copy", str(port), str(folder)]
    )
    del server
    target.children.until(lambda: listening(port), "the start of the plain server")
    url = f"http://127.0.0.1:{target.job.port}"
    took: dict[str, list[float]] = {}
    with Client(url, key.rsplit(" ", 1)[1]) as client:
        for _ in range(ROUNDS):
            with seen.metered():
                _one_round(client, took, folder, port, key)
    for name, samples in took.items():
        samples.sort()
        seen.figures[f"{name}_mb_s"] = BYTES / 1e6 / samples[len(samples) // 2]
    shutil.rmtree(folder)


def _one_round(
    client: Client, took: dict[str, list[float]], folder: Path, port: int, key: str
) -> None:
    source, got = folder / "source", folder / "got"
    with source.open("wb") as file:  # New bytes: those of the last round are there already.
        for _ in range(BYTES // CHUNK):
            file.write(os.urandom(CHUNK))
    _timed(took, "upload", lambda: client.upload(source))
    digest = client.upload(source).sha256
    artifact = f"{client.url}/artifacts/{digest}"
    _timed(took, "client_download", lambda: client.download(digest, got))
    _timed(took, "download", lambda: _curl(artifact, key))
    _timed(took, "plain_upload", lambda: _curl_up(source, port))
    _timed(took, "plain_download", lambda: _curl(f"http://127.0.0.1:{port}/source"))
    if got.stat().st_size != BYTES:
        raise Trouble("what was downloaded is not what was uploaded")


def _timed(took: dict[str, list[float]], name: str, copy: Callable[[], object]) -> None:
    begun = time.perf_counter()
    copy()
    took.setdefault(name, []).append(time.perf_counter() - begun)


def _curl(url: str, header: str = "X-Plain: 1") -> None:
    command = ["curl", "--silent", "--fail", "--output", "/dev/null", "--header", header, url]
    subprocess.run(command, check=True)


def _curl_up(source: Path, port: int) -> None:
    command = ["curl", "--silent", "--fail", "--output", "/dev/null", "--upload-file", str(source)]
    subprocess.run([*command, f"http://127.0.0.1:{port}/target"], check=True)

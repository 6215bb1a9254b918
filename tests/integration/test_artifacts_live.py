"""Files: up in parts, through a worker, and down again, bit for bit."""

from __future__ import annotations

import hashlib
import random
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from hcna_ray.client import Client, NotFound, TaskFailed
from hcna_ray.security.keys import create_key, revoke_key
from tests.integration.conftest import Cluster

MIB = 1024 * 1024
PART = 8 * MIB


def some_bytes(size: int, seed: int) -> bytes:
    """Return bytes that half compress."""
    rng = random.Random(seed)
    noise = rng.randbytes(size // 2)
    return (noise + b"all work and no play " * (size // 42 + 1))[:size]


def put(
    http: httpx.Client, data: bytes, sha256: str, first: int, total: int
) -> tuple[int, dict[str, Any]]:
    """Send one part and return status and answer."""
    span = f"bytes {first}-{first + len(data) - 1}/{total}"
    reply = http.put(
        "/artifacts", params={"sha256": sha256}, content=data, headers={"Content-Range": span}
    )
    return reply.status_code, reply.json()


def ask(http: httpx.Client, sha256: str, total: int) -> tuple[int, dict[str, Any]]:
    """Ask how much is there."""
    headers = {"Content-Range": f"bytes */{total}"}
    reply = http.put("/artifacts", params={"sha256": sha256}, headers=headers)
    return reply.status_code, reply.json()


def test_twenty_megabytes_in_parts(http: httpx.Client) -> None:
    data = some_bytes(20 * MIB, seed=1)
    digest = hashlib.sha256(data).hexdigest()

    answers = [
        put(http, data[first : first + PART], digest, first, len(data))
        for first in range(0, len(data), PART)
    ]

    assert [status for status, _ in answers] == [202, 202, 201]
    assert [body.get("received") for _, body in answers] == [8 * MIB, 16 * MIB, None]
    assert answers[-1][1] == {"sha256": digest, "size": len(data), "uri": f"/artifacts/{digest}"}
    assert hashlib.sha256(http.get(f"/artifacts/{digest}").content).hexdigest() == digest
    assert ask(http, digest, len(data)) == (201, answers[-1][1])


def test_an_upload_goes_on_where_it_was_cut(http: httpx.Client, cluster: Cluster) -> None:
    data = some_bytes(10 * MIB, seed=2)
    digest = hashlib.sha256(data).hexdigest()
    assert put(http, data[: 4 * MIB], digest, 0, len(data))[0] == 202

    # The next part breaks off in the middle.
    def half() -> Any:
        yield data[4 * MIB : 5 * MIB]
        raise ConnectionResetError("the cable was pulled")

    span = {
        "Content-Range": f"bytes {4 * MIB}-{8 * MIB - 1}/{len(data)}",
        "Content-Length": str(4 * MIB),
    }
    with (
        httpx.Client(base_url=cluster.url, headers=http.headers, trust_env=False) as broken,
        pytest.raises(ConnectionResetError),
    ):
        broken.put("/artifacts", params={"sha256": digest}, content=half(), headers=span)

    status, there = ask(http, digest, len(data))
    assert (status, there["received"]) == (202, 4 * MIB)
    status, refused = put(http, data[6 * MIB :], digest, 6 * MIB, len(data))
    assert (status, refused["code"], refused["received"]) == (409, "offset_mismatch", 4 * MIB)
    assert put(http, data[4 * MIB :], digest, 4 * MIB, len(data))[0] == 201
    assert http.get(f"/artifacts/{digest}").content == data


def test_the_client_resumes_by_itself(client: Client, http: httpx.Client, tmp_path: Path) -> None:
    data = some_bytes(12 * MIB, seed=3)
    digest = hashlib.sha256(data).hexdigest()
    put(http, data[:PART], digest, 0, len(data))
    told: list[tuple[int, int]] = []

    stored = client.upload(data, lambda done, total: told.append((done, total)))

    assert (stored.sha256, stored.size) == (digest, len(data))
    assert told[0][0] >= PART, "what was there is not sent again"
    assert told[-1] == (len(data), len(data))
    assert client.download(digest, tmp_path / "copy").read_bytes() == data


def test_bytes_that_are_not_what_was_promised_are_not_kept(http: httpx.Client) -> None:
    data = some_bytes(3 * MIB, seed=4)
    promised = hashlib.sha256(b"something else").hexdigest()

    assert put(http, data[: 2 * MIB], promised, 0, len(data))[0] == 202
    status, refused = put(http, data[2 * MIB :], promised, 2 * MIB, len(data))

    assert (status, refused["code"]) == (422, "digest_mismatch")
    assert http.get(f"/artifacts/{promised}").status_code == 404
    status, there = ask(http, promised, len(data))
    assert (status, there["received"]) == (202, 0)
    missing = http.get(f"/artifacts/{hashlib.sha256(data).hexdigest()}")
    assert missing.json()["code"] == "artifact_not_found"


def test_parts_of_an_artifact(http: httpx.Client) -> None:
    data = some_bytes(100_000, seed=5)
    reply = http.put("/artifacts", content=data)
    assert reply.status_code == 201
    url = reply.headers["location"]

    def part(span: str) -> tuple[int, bytes, str | None]:
        got = http.get(url, headers={"Range": span})
        return got.status_code, got.content, got.headers.get("content-range")

    assert part("bytes=0-9") == (206, data[:10], "bytes 0-9/100000")
    assert part("bytes=99990-") == (206, data[-10:], "bytes 99990-99999/100000")
    assert part("bytes=-5") == (206, data[-5:], "bytes 99995-99999/100000")
    assert part("bytes=50-2000000") == (206, data[50:], "bytes 50-99999/100000")
    beyond = http.get(url, headers={"Range": "bytes=100000-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, "bytes */100000")
    assert beyond.json()["code"] == "range_not_satisfiable"
    head = http.head(url)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "100000", b"")
    etag = head.headers["etag"]
    assert http.get(url, headers={"If-None-Match": etag}).status_code == 304


def test_an_artifact_is_stored_once_however_often_it_is_sent(
    http: httpx.Client, cluster: Cluster
) -> None:
    data = b"the same bytes"
    first = http.put("/artifacts", content=data)
    again = http.put("/artifacts", content=data)

    assert first.json() == again.json()
    digest = hashlib.sha256(data).hexdigest()
    files = [path for path in (cluster.settings.home / "artifacts").rglob(f"*{digest[2:]}*")]
    assert len(files) == 1
    assert files[0].stat().st_mode & 0o077 == 0


def test_there_and_back_through_the_worker(client: Client, tmp_path: Path) -> None:
    data = some_bytes(20 * MIB, seed=6)
    (tmp_path / "plain").write_bytes(data)
    plain = client.upload(tmp_path / "plain")

    packed = client.submit("drgfc.compress", {"artifact": plain.sha256, "level": 3})
    made = packed.result(timeout_s=120)
    restored = client.submit("drgfc.decompress", {"artifact": made["artifact"]})
    again = restored.result(timeout_s=120)

    assert made["input_sha256"] == plain.sha256
    assert made["input_bytes"] == len(data)
    assert made["output_bytes"] < len(data) * 0.6
    assert made["ratio"] == round(made["input_bytes"] / made["output_bytes"], 4)
    assert again["output_sha256"] == again["artifact"] == plain.sha256
    copy = client.download(again["artifact"], tmp_path / "copy")
    assert copy.read_bytes() == data


def test_a_task_reads_what_its_submitter_may(
    client: Client, cluster: Cluster, tmp_path: Path
) -> None:
    """Names are no secrets, and a worker that has the bytes asks all the same."""
    keys_dir, names = cluster.settings.keys_dir, [f"{n}-{uuid.uuid4().hex[:8]}" for n in "ab"]
    clear = [create_key(keys_dir, name=n, role="submitter", now=time.time()) for n in names]
    data = some_bytes(MIB, seed=8)
    try:
        with Client(cluster.url, clear[0]) as anna, Client(cluster.url, clear[1]) as ben:
            sent = anna.upload(data).sha256
            made = anna.submit("drgfc.compress", {"artifact": sent}).result(timeout_s=60)
            said = []
            for who, name in ((ben, sent), (ben, made["artifact"]), (ben, "0" * 64)):
                task = who.submit("drgfc.decompress", {"artifact": name})
                with pytest.raises(TaskFailed) as failure:
                    task.result(timeout_s=60)
                assert failure.value.kind == "rejected"
                said.append(failure.value.message.replace(name, "N"))
            assert said[0] == said[1] == said[2]
            assert said[0].startswith("payload.artifact: there is no artifact 'N'")

            again = anna.submit("drgfc.decompress", {"artifact": made["artifact"]})
            assert again.result(timeout_s=60)["artifact"] == sent
            assert anna.download(made["artifact"], tmp_path / "a").stat().st_size > 0
            with pytest.raises(NotFound):
                ben.download(made["artifact"], tmp_path / "b")
            ben.upload(data)  # Whoever has the bytes himself has them.
            ben.submit("drgfc.compress", {"artifact": sent}).result(timeout_s=60)
        # The house sees everything.
        client.submit("drgfc.decompress", {"artifact": made["artifact"]}).result(timeout_s=60)
    finally:
        for name in names:
            revoke_key(keys_dir, name, now=time.time())


def test_large_results_of_a_batch_become_artifacts(http: httpx.Client, client: Client) -> None:
    texts = ["x" * 300_000, "small", "y" * 400_000]
    tasks = [{"task_type": "echo", "payload": {"text": text}} for text in texts]
    sent = http.post("/tasks/batch", json={"tasks": tasks}).json()

    results = [client.attach(one["task_id"]).result(timeout_s=60) for one in sent["results"]]

    assert results[1]["text"] == "small"
    for text, result in zip(texts[::2], results[::2], strict=True):
        whole = http.get(f"/artifacts/{result['artifact']['sha256']}")
        assert len(whole.content) == result["artifact"]["size"] > 256 * 1024
        assert whole.json()["text"] == text


def test_there_and_back_between_files_of_the_worker(client: Client, cluster: Cluster) -> None:
    folder = cluster.settings.data_dir / "there-and-back"
    folder.mkdir()
    data = some_bytes(3 * MIB, seed=7)
    (folder / "in.bin").write_bytes(data)
    steps: list[tuple[str, dict[str, Any]]] = [
        ("drgfc.compress", {"input_file": str(folder / "in.bin"), "output_file": "%s/out.drgfc"}),
        ("drgfc.decompress", {"input_file": "%s/out.drgfc", "output_file": "%s/back.bin"}),
    ]
    for task_type, payload in steps:
        # Relative to the worker's disk path, or below it: both are fine.
        paths = {name: text.replace("%s", folder.name) for name, text in payload.items()}
        client.submit(task_type, paths).result(timeout_s=60)

    assert (folder / "back.bin").read_bytes() == data
    assert sorted(path.name for path in folder.iterdir()) == ["back.bin", "in.bin", "out.drgfc"]


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../secret", "a/../../secret", "/data-of-others/x", "a\0b", " "]
)
@pytest.mark.parametrize("field", ["input_file", "output_file"])
def test_a_path_outside_the_workers_disk_is_refused(
    http: httpx.Client, path: str, field: str
) -> None:
    payload = {"input_file": "in.txt", "output_file": "out.drgfc", field: path}
    reply = http.post("/tasks", json={"task_type": "drgfc.compress", "payload": payload})

    assert (reply.status_code, reply.json()["code"]) == (422, "invalid_payload")
    assert [one["field"] for one in reply.json()["errors"]] == [f"payload.{field}"]


def test_a_link_out_of_the_workers_disk_leads_nowhere(
    client: Client, cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    link = cluster.settings.data_dir / "way-out"
    link.symlink_to(tmp_path)
    try:
        for payload in (
            {"input_file": "way-out/secret.txt"},
            {"input_file": "way-out/secret.txt", "output_file": "stolen"},
        ):
            with pytest.raises(TaskFailed) as failure:
                client.submit("drgfc.compress", payload).result(timeout_s=30)
            assert failure.value.kind == "rejected"
            assert "symbolic link" in failure.value.message
    finally:
        link.unlink()
    assert not (cluster.settings.data_dir / "stolen").exists()

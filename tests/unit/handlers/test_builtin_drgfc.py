"""``drgfc.compress`` and ``drgfc.decompress``: bit for bit, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from hcna_ray.core.models import Outcome
from hcna_ray.handlers import HandlerLimits, HandlerOutcome, InvalidPayload, Registry, run_handler

MIB = 1 << 20
Run = Callable[..., HandlerOutcome]


@pytest.fixture
def run(context: Any, registry: Registry) -> Run:
    def start(way: str, payload: dict[str, object], **changes: Any) -> HandlerOutcome:
        raw = json.dumps(payload).encode()
        return run_handler(registry.get(f"drgfc.{way}"), raw, context(f"drgfc.{way}", **changes))

    return start


def result_of(outcome: HandlerOutcome) -> dict[str, Any]:
    assert outcome.error is None, outcome.error
    found: dict[str, Any] = json.loads(outcome.result or b"")
    return found


def rejection_of(outcome: HandlerOutcome) -> str:
    assert outcome.error is not None
    assert (outcome.error.kind, outcome.error.retryable) == ("rejected", False), outcome.error
    return outcome.error.message


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


@pytest.fixture(scope="module")
def mixed() -> bytes:
    """5 MB, half of it noise and half of it text."""
    rng = random.Random(5)
    noise = rng.randbytes(2_500_000)
    words = [b"lorem", b"ipsum", b"dolor", b"sit", b"amet", b"\n"]
    text = b" ".join(rng.choices(words, k=600_000))[:2_500_000]
    return noise + text


def test_a_file_comes_back_bit_for_bit(run: Run, disk: Path, effects: Any, mixed: bytes) -> None:
    (disk / "my_file.txt").write_bytes(mixed)

    packed = result_of(
        run(
            "compress",
            {"input_file": str(disk / "my_file.txt"), "output_file": str(disk / "my_file.drgfc")},
        )
    )
    restored = result_of(
        run("decompress", {"input_file": "my_file.drgfc", "output_file": "again.txt"})
    )

    assert (disk / "again.txt").read_bytes() == mixed
    assert packed["input_sha256"] == restored["output_sha256"] == hashlib.sha256(mixed).hexdigest()
    assert packed["output_sha256"] == restored["input_sha256"]
    assert packed["output_bytes"] == (disk / "my_file.drgfc").stat().st_size
    assert packed["ratio"] == restored["ratio"] == round(len(mixed) / packed["output_bytes"], 4)
    assert packed["ratio"] > 1.5
    assert packed["mb_per_s"] > 0
    assert packed["output_file"] == str(disk / "my_file.drgfc")
    assert packed["artifact"] is None
    percents = [percent for percent, _ in effects.progress]
    assert len(percents) > 8
    assert percents[-1] == 100
    assert names(disk) == ["again.txt", "my_file.drgfc", "my_file.txt"]


def test_an_artifact_comes_back_bit_for_bit(
    run: Run, context: Any, effects: Any, tmp_path: Path, mixed: bytes
) -> None:
    (tmp_path / "up").write_bytes(mixed)
    uploaded = context().artifact(tmp_path / "up")

    packed = result_of(run("compress", {"artifact": uploaded.sha256, "level": 1}))
    restored = result_of(run("decompress", {"artifact": packed["artifact"]}))

    assert restored["artifact"] == uploaded.sha256
    assert packed["output_file"] is None
    assert effects.artifacts[1].name.endswith(".drgfc")


def test_a_worker_without_a_disk_path_takes_artifacts(
    run: Run, context: Any, tmp_path: Path
) -> None:
    (tmp_path / "up").write_bytes(b"hello")
    uploaded = context().artifact(tmp_path / "up")

    assert result_of(run("compress", {"artifact": uploaded.sha256}, disk_path=None))["artifact"]


@pytest.mark.parametrize("content", [b"", b"a", b"\0" * 3_000_000])
@pytest.mark.parametrize("level", [1, 19])
def test_odd_contents_and_both_ends_of_the_scale(
    run: Run, disk: Path, content: bytes, level: int
) -> None:
    (disk / "in").write_bytes(content)

    run("compress", {"input_file": "in", "output_file": "packed", "level": level})
    restored = result_of(run("decompress", {"input_file": "packed", "output_file": "out"}))

    assert (disk / "out").read_bytes() == content
    assert restored["output_bytes"] == len(content)
    frame = zstandard.get_frame_parameters((disk / "packed").read_bytes())
    assert (frame.has_checksum, frame.content_size) == (True, len(content))


def test_an_existing_output_is_replaced_whole(run: Run, disk: Path) -> None:
    (disk / "in").write_bytes(b"new")
    (disk / "out").write_bytes(b"old" * 1000)

    result_of(run("compress", {"input_file": "in", "output_file": "out"}))

    assert zstandard.decompress((disk / "out").read_bytes()) == b"new"


@pytest.fixture
def packed(run: Run, disk: Path, mixed: bytes) -> bytes:
    """A compressed file of some hundred kilobytes."""
    (disk / "source").write_bytes(mixed[:300_000])
    result_of(run("compress", {"input_file": "source", "output_file": "packed"}))
    content = (disk / "packed").read_bytes()
    (disk / "source").unlink()
    (disk / "packed").unlink()
    return content


def flip(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda good: b"", "not a file"),
        (lambda good: b"plain text, not compressed at all", "not a file"),
        (lambda good: good[:10], ""),
        (lambda good: good[:-1], "cut short"),
        (lambda good: good[: len(good) // 2], "cut short"),
        (lambda good: good + b"x", "after its end"),
        (lambda good: good + good, "after its end"),
        (lambda good: flip(good, len(good) - 1), "checksum"),
        (lambda good: flip(good, len(good) // 2), "damaged"),
        (lambda good: zstandard.ZstdCompressor().compress(b"x" * 100), "lacks"),
        (
            lambda good: zstandard.ZstdCompressor(
                write_content_size=False, write_checksum=True
            ).compress(b"x" * 100),
            "lacks",
        ),
    ],
    ids=range(11),
)
def test_a_file_that_is_not_whole_is_refused_and_leaves_nothing(
    run: Run, disk: Path, packed: bytes, spoil: Callable[[bytes], bytes], why: str
) -> None:
    (disk / "bad").write_bytes(spoil(packed))

    message = rejection_of(run("decompress", {"input_file": "bad", "output_file": "out"}))

    assert message.startswith("payload.input_file: ")
    assert why in message
    assert names(disk) == ["bad"]


def test_trailing_data_is_seen_wherever_a_piece_ends(run: Run, disk: Path) -> None:
    for size in range(4050, 4110, 7):  # The decompressor is fed 4096 bytes at a time.
        content = random.Random(size).randbytes(size)
        good = zstandard.ZstdCompressor(write_checksum=True).compress(content)
        (disk / "good").write_bytes(good)
        (disk / "bad").write_bytes(good + b"x")
        result_of(run("decompress", {"input_file": "good", "output_file": "out"}))
        assert (disk / "out").read_bytes() == content
        rejection_of(run("decompress", {"input_file": "bad", "output_file": "out"}))


def test_a_bomb_is_refused_before_a_byte_is_written(run: Run, disk: Path) -> None:
    bomb = zstandard.ZstdCompressor(write_checksum=True).compress(b"\0" * 50_000_000)
    assert len(bomb) < 5000
    (disk / "bomb").write_bytes(bomb)
    asked = {"input_file": "bomb", "output_file": "out"}

    by_payload = rejection_of(run("decompress", {**asked, "max_output_bytes": 49_999_999}))
    by_worker = rejection_of(
        run("decompress", asked, limits=HandlerLimits(output_bytes_max=1_000_000))
    )

    assert "payload.max_output_bytes" in by_payload
    assert "1000000 allowed" in by_worker
    assert names(disk) == ["bomb"]


def test_a_bomb_that_lies_about_its_size_is_refused(run: Run, disk: Path) -> None:
    bomb = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(b"\0" * 50_000_000))
    true_size = (50_000_000).to_bytes(4, "little")
    at = bomb.index(true_size)
    bomb[at : at + 4] = (1_000_000).to_bytes(4, "little")
    (disk / "bomb").write_bytes(bomb)

    rejection_of(
        run("decompress", {"input_file": "bomb", "output_file": "out", "max_output_bytes": 2 * MIB})
    )
    assert names(disk) == ["bomb"]


def test_a_full_disk_is_an_error_that_may_pass(run: Run, disk: Path) -> None:
    (disk / "in").write_bytes(b"x" * 1000)
    limits = HandlerLimits(disk_reserve_bytes=1 << 62)

    outcome = run("compress", {"input_file": "in", "output_file": "out"}, limits=limits)

    assert outcome.error is not None
    assert (outcome.error.kind, outcome.error.type) == ("error", "OSError")
    assert outcome.error.retryable
    assert "No space" in outcome.error.message or "wanted" in outcome.error.message
    assert names(disk) == ["in"]


@pytest.mark.parametrize("way", ["compress", "decompress"])
def test_cancelling_stops_between_chunks_and_leaves_nothing(
    run: Run, disk: Path, effects: Any, mixed: bytes, way: str
) -> None:
    content = (
        mixed
        if way == "compress"
        else zstandard.ZstdCompressor(write_checksum=True).compress(mixed)
    )
    (disk / "in").write_bytes(content)
    effects.cancel_after = 2

    outcome = run(way, {"input_file": "in", "output_file": "out"})

    assert outcome == HandlerOutcome(outcome=Outcome.CANCELLED)
    assert len(effects.progress) == 3
    assert names(disk) == ["in"]


@pytest.mark.parametrize("size", [2 * MIB, 9 * MIB])
def test_an_input_that_changes_meanwhile_is_an_error_that_may_pass(
    run: Run, disk: Path, effects: Any, mixed: bytes, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (disk / "in").write_bytes(mixed)
    monkeypatch.setattr(
        effects, "send_progress", lambda percent, message: os.truncate(disk / "in", size)
    )

    outcome = run("compress", {"input_file": "in", "output_file": "out"})

    assert outcome.error is not None
    assert outcome.error.message == "the input changed while it was read; try again"
    assert outcome.error.retryable
    assert names(disk) == ["in"]


def test_what_a_killed_attempt_left_is_removed(run: Run, disk: Path) -> None:
    (disk / "in").write_bytes(b"x")
    digest = hashlib.sha256(b"out").hexdigest()[:12]
    (disk / f".hcna-{digest}-task-1-3.1.partial").write_bytes(b"half")
    (disk / f".hcna-{digest}-task-2-3.1.partial").write_bytes(b"of another task")

    result_of(run("compress", {"input_file": "in", "output_file": "out"}, attempt=2))

    assert names(disk) == [f".hcna-{digest}-task-2-3.1.partial", "in", "out"]


def test_only_regular_files_below_the_disk_are_read(run: Run, disk: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    (disk / "link").symlink_to(secret)
    (disk / "loop").symlink_to("loop")
    (disk / "directory").mkdir()
    os.mkfifo(disk / "fifo")
    said = {
        path: rejection_of(run("compress", {"input_file": path, "output_file": "out"}))
        for path in (str(secret), "link", "loop", "directory", "fifo", "missing", "a" * 300)
    }

    assert "is outside the worker's disk path" in said[str(secret)]
    assert "symbolic link" in said["link"]
    assert "does not exist on this worker" in said["missing"]
    for path in ("directory", "fifo", "loop", "a" * 300):
        assert "not a regular file" in said[path]
    assert "out" not in names(disk)


def test_a_fifo_does_not_block(run: Run, disk: Path) -> None:
    os.mkfifo(disk / "fifo")
    worker = threading.Thread(
        target=run, args=("compress", {"input_file": "fifo", "output_file": "out"}), daemon=True
    )
    worker.start()
    worker.join(timeout=10)
    assert not worker.is_alive()


def test_an_output_must_have_a_place(run: Run, disk: Path, tmp_path: Path) -> None:
    (disk / "in").write_bytes(b"x")
    (disk / "directory").mkdir()
    (disk / "same").symlink_to("in")
    os.link(disk / "in", disk / "twin")
    (disk / "out").symlink_to(tmp_path / "elsewhere")

    def said(output: str) -> str:
        return rejection_of(run("compress", {"input_file": "in", "output_file": output}))

    assert "is a directory; name a file" in said("directory")
    assert "does not exist on this worker; create it" in said("no/such/directory/out")
    assert "is the input itself" in said("same")
    assert "is the input itself" in said("twin")
    assert "symbolic link" in said("out")
    assert not (tmp_path / "elsewhere").exists()


def test_a_missing_artifact_is_rejected(run: Run) -> None:
    message = rejection_of(run("decompress", {"artifact": "0" * 64}))
    assert "payload.artifact: there is no artifact" in message
    assert "PUT /artifacts" in message


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({}, "payload"),
        ({"input_file": "a", "artifact": "0" * 64}, "payload"),
        ({"input_file": "a", "output_file": "a"}, "payload"),
        ({"input_file": "../a"}, "payload.input_file"),
        ({"input_file": "a", "output_file": ""}, "payload.output_file"),
        ({"artifact": "A" * 64}, "payload.artifact"),
        ({"input_file": "a", "level": 0}, "payload.level"),
        ({"input_file": "a", "level": 20}, "payload.level"),
        ({"input_file": "a", "level": "3"}, "payload.level"),
        ({"input_file": "a", "max_output_bytes": 1}, "payload.max_output_bytes"),
    ],
)
def test_a_payload_is_refused_early(
    registry: Registry, payload: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidPayload) as caught:
        registry.get("drgfc.compress").validate_payload(payload)
    assert [name for name, _ in caught.value.problems] == [field]

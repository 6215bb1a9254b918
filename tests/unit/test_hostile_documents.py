"""Hostile files, archives and documents, each read by the code that reads such in the product.

Every row must be refused by the error that its reader names, must write nothing outside of where
its reader works, and must bring nothing of the document to life: no object is unpickled, no program
is started, nobody is called.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import sys
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from hcna_ray.api import strict_json
from hcna_ray.api.problems import BadRequest
from hcna_ray.config import ConfigError, load_settings
from hcna_ray.core.errors import HcnaError, Invalid, NotFound
from hcna_ray.core.models import Token
from hcna_ray.handlers import ArtifactRef, TaskContext, load_registry, run_handler
from hcna_ray.runtime import wire
from hcna_ray.security.keys import KeyFileBroken, load_keys
from hcna_ray.store.artifacts import ArtifactStore
from hcna_ray.store.backup import BackupDamaged, inspect
from hcna_ray.supervisor.backup import restore
from hcna_ray.supervisor.invites import BadCode, decode_code
from hcna_ray.supervisor.launcher import LauncherConfigBroken, read_config
from hcna_ray.supervisor.membership import MembersBroken, read_members
from tests.support.builders import T0
from tests.support.figures import note

MIB = 1 << 20
DEEP = 200_000

# -- what hostile documents are made of ------------------------------------------------------------


class Bomb:
    """What whoever unpickles it becomes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


PICKLE = pickle.dumps(Bomb())
YAML_CALL = b"!!python/object/apply:os.mkdir ['made-by-yaml']\n"


def laughs(levels: int = 40) -> bytes:
    """Aliases of aliases: 2 to the power of ``levels`` strings when written out."""
    lines = ["a0: &a0 [ha, ha]"]
    lines += [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, levels)]
    return "\n".join(lines).encode()


def tar_of(*members: tarfile.TarInfo | tuple[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=form) as tar:
        for one in members:
            if isinstance(one, tarfile.TarInfo):
                tar.addfile(one)
                continue
            info = tarfile.TarInfo(one[0])
            info.size = len(one[1])
            tar.addfile(info, io.BytesIO(one[1]))
    return raw.getvalue()


def special(name: str, kind: bytes, link: str = "", *, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    info.devmajor, info.devminor = 1, 5
    return info


def zip_of(*names: str, link: bool = False, size: int = 4) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o120777 if link else 0o100600) << 16
            archive.writestr(info, b"../../x" if link else bytes(size))
    return raw.getvalue()


def frame_of(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def promising(size: int) -> bytes:
    """A frame with a checksum that promises ``size`` bytes in one segment, and holds one."""
    magic, descriptor = b"\x28\xb5\x2f\xfd", bytes([0b11100100])
    return magic + descriptor + size.to_bytes(8, "little") + b"\x09\x00\x00x" + bytes(4)


HEAD = ("hcna-backup", b'{"product":"hcna-ray","format":1,"kind":"worker"}')


def archive_of(*members: tarfile.TarInfo | tuple[str, bytes], **options: Any) -> bytes:
    """An archive that begins like ours."""
    return frame_of(tar_of(HEAD, *members, **options))


def archive_with(manifest: dict[str, Any], *members: tuple[str, bytes]) -> bytes:
    """An archive whose manifest says what we like, with the right sum over it."""
    raw = json.dumps(
        {
            "format": 1,
            "product": "hcna-ray",
            "version": "1",
            "kind": "worker",
            "node_id": "HCNA-W1--prod--home--v1.0",
            "created_at": T0,
            **manifest,
        }
    ).encode()
    total = hashlib.sha256(raw).hexdigest().encode() + b"\n"
    return archive_of(*members, ("manifest.json", raw), ("manifest.sha256", total))


def leading_to(path: str, member: str = "data-long/00000001") -> bytes:
    """An archive in which a plain member's bytes belong to ``path``."""
    digest = hashlib.sha256(b"evil").hexdigest()
    entry = {"member": member, "size": 4, "sha256": digest, "path": path}
    return archive_with({"entries": [entry]}, (member, b"evil"))


# -- who reads them --------------------------------------------------------------------------------


class Refused(HcnaError):
    """A handler refused its input for good."""

    code = "refused"


class Place:
    """Where a row happens: a worker's disk, a home, and what must stay as it is.

    Is `hcna_ray.handlers.context.Effects` too, as far as handlers of files need it.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "home"
        self.disk, self.scratch = root / "disk", root / "scratch"
        self.outside, self.files = root / "outside", root / "files"
        for one in (self.disk, self.scratch, self.outside, self.files):
            one.mkdir()
        (self.outside / "secret").write_bytes(b"not to be read, and not to be written")

    def given(self, raw: bytes, name: str = "document") -> Path:
        path = self.files / name
        path.write_bytes(raw)
        return path

    def artifacts(self) -> ArtifactStore:
        return ArtifactStore(
            self.root / "artifacts",
            artifact_bytes_max=MIB,
            part_bytes_max=MIB,
            uploads_max=4,
            upload_idle_s=60.0,
            disk_free_bytes_min=0,
            now=lambda: T0,
            disk_free=lambda _: 1 << 40,
        )

    def send_progress(self, percent: float | None, message: str) -> None:
        """Nobody looks."""

    def save_checkpoint(self, data: bytes) -> None:
        raise AssertionError(data)

    def put_artifact(self, path: Path, name: str | None) -> ArtifactRef:
        raise AssertionError(f"{path} would have been stored")

    def get_artifact(self, sha256: str) -> Path:
        return self.artifacts().path(sha256)

    def is_cancelled(self) -> bool:
        return False

    def handle(self, task_type: str, **payload: Any) -> None:
        """Run a handler; raise `Refused` with what it says."""
        context = TaskContext(
            task_id="task-1",
            task_type=task_type,
            token=Token(1, 1),
            worker="W1",
            node_id="W1",
            effects=self,
            disk_path=self.disk,
            scratch_root=self.scratch,
        )
        raw = json.dumps(payload).encode()
        outcome = run_handler(load_registry().get(task_type), raw, context)
        if outcome.error is not None:
            assert not outcome.error.retryable, outcome.error
            raise Refused(outcome.error.message)


def unpacked(place: Place, raw: bytes) -> None:
    """An artifact, or any file of a worker, that drgfc.decompress is to restore."""
    (place.disk / "in").write_bytes(raw)
    place.handle("drgfc.decompress", input_file="in", output_file="out", max_output_bytes=MIB)


def restored(place: Place, raw: bytes) -> None:
    """An archive that hcna restore is given."""
    path = place.given(raw, "backup.tar.zst")
    with pytest.raises(BackupDamaged):
        inspect(path)
    settings = load_settings(home=place.home, env={})
    try:
        restore(settings, path, now=T0)
    finally:
        assert not place.home.exists()


def configured(place: Place, raw: bytes) -> None:
    """A settings file."""
    load_settings(home=place.home, path=place.given(raw), env={})


def launched(place: Place, raw: bytes) -> None:
    """What Ray's launcher wrote on a machine."""
    read_config(place.given(raw))


def parsed(_place: Place, raw: bytes) -> None:
    """The body of a request."""
    strict_json.parse(raw)


def keyed(place: Place, raw: bytes) -> None:
    """The file of API keys."""
    place.given(raw, "keys.json")
    load_keys(place.files)


def joined(place: Place, raw: bytes) -> None:
    """The list of machines that have joined."""
    place.given(raw, "members.json")
    read_members(place.files)


def invited(_place: Place, raw: bytes) -> None:
    """A join code."""
    decode_code(raw.decode("utf-8", "surrogateescape"))


def asked(_place: Place, raw: bytes) -> None:
    """What an agent or a slot sends M1, and M1 them."""
    for unpack in (wire.unpack_exchange, wire.unpack_reports, wire.unpack_grant):
        with pytest.raises((msgspec.MsgspecError, RecursionError)):
            unpack(raw)
    raise Refused("three times")


def compressed(place: Place, path: str) -> None:
    """A name that drgfc.compress is to read."""
    place.handle("drgfc.compress", input_file=path, output_file="out")


def written(place: Place, path: str) -> None:
    """A name that drgfc.compress is to write to."""
    place.handle("drgfc.compress", input_file="in", output_file=path)


def made(place: Place, path: str) -> None:
    """A directory that qegg.generate is to write to."""
    place.handle("qegg.generate", grid_level=0, output_dir=path)


def fetched(place: Place, name: str) -> None:
    """The name of an artifact in a URL, or in a handler's hands."""
    store = place.artifacts()
    for look in (store.path, store.find, store.open):
        with pytest.raises(NotFound):
            look(name)
    with pytest.raises(HcnaError):
        place.handle("drgfc.decompress", artifact=name, output_file="out")
    with pytest.raises(Invalid):
        store.append(name, offset=0, size=4, pieces=[b"evil"])
    store.put(b"evil", name)


# -- the table -------------------------------------------------------------------------------------

Read = Callable[[Place, Any], None]
#: What stands for a path of the place itself.
OUT, DISK = "{outside}", "{disk}"


@dataclass(frozen=True)
class Row:
    """A document, who reads it, and how it is refused."""

    name: str
    read: Read
    given: bytes | str
    refusal: type[Exception]


def rows(read: Read, refusal: type[Exception], **given: bytes | str) -> list[Row]:
    return [
        Row(f"{read.__name__}: {name.replace('_', ' ')}", read, one, refusal)
        for name, one in given.items()
    ]


LINK, HARD, CHAR = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE
A_KEY = b'{"schema":2,"keys":[{"name":"a","role":"%s","sha256":"%s","created_at":1}]}'

ROWS: list[Row] = [
    *rows(
        unpacked,
        Refused,
        nothing=b"",
        pickle=PICKLE,
        yaml_with_a_call=YAML_CALL,
        zip_that_slips=zip_of("../../outside/evil", "/outside/evil"),
        zip_with_a_link=zip_of("link", link=True),
        zip_bomb=zip_of("zeros", size=64 * MIB),
        gzip_bomb=gzip.compress(bytes(64 * MIB)),
        tar_with_a_link=tar_of(special("link", LINK, "../outside")),
        bomb_that_says_so=frame_of(bytes(64 * MIB)),
        frame_that_promises_a_pebibyte=promising(1 << 50),
        frame_that_promises_more_than_it_holds=promising(3),
        frame_of_unknown_size=zstandard.ZstdCompressor().compressobj().flush(),
        two_frames=frame_of(b"one") + frame_of(b"two"),
        skippable_frame=b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip",
        frame_cut_off=frame_of(bytes(range(256)) * 16)[:-9],
        frame_with_a_wrong_sum=frame_of(b"x" * 4096)[:-4] + b"evil",
    ),
    *rows(
        restored,
        BackupDamaged,
        pickle=PICKLE,
        zip_that_slips=zip_of("../evil"),
        plain_tar=tar_of(HEAD),
        tar_gz=gzip.compress(tar_of(HEAD)),
        nothing_but_the_header=archive_of(),
        symbolic_link=archive_of(special("data/link", LINK, "/etc")),
        link_and_a_file_below_it=archive_of(
            special("data/link", LINK, "/etc"), ("data/link/evil", b"evil")
        ),
        hard_link=archive_of(special("data/hard", HARD, "/etc/passwd")),
        device=archive_of(special("data/null", CHAR)),
        block_device=archive_of(special("data/disk", tarfile.BLKTYPE)),
        fifo=archive_of(special("data/fifo", tarfile.FIFOTYPE)),
        directory=archive_of(special("data/folder", tarfile.DIRTYPE)),
        sparse_file=archive_of(special("data/sparse", tarfile.GNUTYPE_SPARSE)),
        absolute_name=archive_of(("/etc/evil", b"evil")),
        name_with_dots=archive_of(("data/../../evil", b"evil")),
        name_with_a_dot=archive_of(("data/./evil", b"evil")),
        name_with_nothing_in_it=archive_of(("data//evil", b"evil")),
        name_of_a_secret=archive_of(("keys/keys.json", b"{}")),
        long_name=archive_of((f"data/{'x/' * 80}evil", b"evil")),
        pax_header_that_renames=archive_of(("data/" + "ü" * 120, b""), form=tarfile.PAX_FORMAT),
        member_twice=archive_of(("data/a", b"one"), ("data/a", b"two")),
        settings_of_a_gigabyte=archive_of(special("config/hcna.yaml", b"0", size=1 << 30)),
        member_of_a_terabyte=archive_of(special("data/bomb", b"0", size=1 << 40)),
        manifest_nested_deep=archive_of(
            ("manifest.json", b"[" * DEEP),
            ("manifest.sha256", hashlib.sha256(b"[" * DEEP).hexdigest().encode()),
        ),
        manifest_that_leads_up=leading_to("../evil"),
        manifest_that_leads_to_the_root=leading_to("/etc/evil"),
        manifest_with_nul=leading_to("a\0b"),
        manifest_with_a_folder_outside=archive_with({"folders": [{"path": "..", "mode": 511}]}),
        manifest_of_no_time=archive_with({"created_at": 1e300}),
    ),
    *rows(
        configured,
        ConfigError,
        call=b"worker: " + YAML_CALL,
        name_of_python=b"worker: !!python/name:os.system\n",
        module_of_python=b"worker: !!python/module:antigravity\n",
        tuple_of_python=b"worker: !!python/tuple [1]\n",
        billion_laughs=laughs(),
        billion_laughs_in_a_field=laughs().replace(b"a0: &a0", b"worker: &a0"),
        circle=b"worker: &w [*w]\n",
        nested_deep=b"worker: " + b"[" * DEEP,
        key_twice=b"worker: {}\nworker: {}\n",
        key_that_is_a_list=b"? [a]\n: b\n",
        nul=b"worker:\0 {}\n",
        not_utf8=b"worker: \xff\n",
        half_a_surrogate=b'worker: {node_id: "\\ud800"}\n',
        infinity=b"lease: {ttl_s: .inf}\n",
        not_a_number=b"lease: {ttl_s: .nan}\n",
        huge_number=b"lease: {ttl_s: 1" + b"0" * 5000 + b"}\n",
        two_documents=b"worker: {}\n---\nworker: {}\n",
        json_pickle=b'{"py/object": "os.system"}',
        megabytes=b"#" * (16 * MIB),
        node_id_that_climbs=b"worker: {node_id: ../../evil}\n",
    ),
    *rows(
        launched,
        LauncherConfigBroken,
        call=b"provider: " + YAML_CALL,
        nested_deep=b"provider: " + b"[" * DEEP,
        nul=b"provider:\0",
        not_utf8=b"provider: \xff",
        a_list=b"[]",
    ),
    *rows(
        parsed,
        BadRequest,
        pickle=PICKLE,
        nested_deep=b'{"a":' * DEEP,
        nan=b'{"a":NaN}',
        infinity=b'{"a":-Infinity}',
        too_large_for_a_double=b'{"a":1e999}',
        too_large_for_an_integer=b'{"a":' + b"9" * 100_000 + b"}",
        negative_and_too_large=b'{"a":-9223372036854775809}',
        key_twice=b'{"a":1,"a":2}',
        key_twice_in_disguise=b'{"a":1,"\\u0061":2}',
        raw_nul=b'{"a":"\0"}',
        nul_behind=b'{"a":1}\0',
        half_a_surrogate=b'{"a":"\\ud83d"}',
        halves_the_wrong_way_round=b'{"a":"\\ude00\\ud83d"}',
        surrogate_as_bytes=b'{"a":"\xed\xa0\xbd"}',
        overlong_slash=b'{"a":"\xc0\xaf"}',
        five_byte_character=b'{"a":"\xf8\x88\x80\x80\x80"}',
        byte_order_mark=b'\xef\xbb\xbf{"a":1}',
        utf16='{"a":1}'.encode("utf-16"),
        utf7=b"+AHs-",
        digits_of_another_script='{"a":\u0661}'.encode(),
        other_quotes="{\u201ca\u201d:1}".encode(),
        zero_in_front=b'{"a":01}',
        plus_sign=b'{"a":+1}',
        hexadecimal=b'{"a":0x10}',
        comment=b'{"a":1}//',
        two_documents=b"{}{}",
        line_separator_as_blank='{"a":\u20281}'.encode(),
    ),
    *rows(
        keyed,
        KeyFileBroken,
        pickle=PICKLE.hex().encode(),
        nested_deep=b"[" * DEEP,
        a_list=b"[]",
        role_of_nobody=A_KEY % (b"root", b"a" * 64),
        digest_too_short=A_KEY % (b"admin", b"a"),
        schema_to_come=b'{"schema":99,"keys":[]}',
    ),
    *rows(
        joined,
        MembersBroken,
        nested_deep=b"[" * DEEP,
        a_list=b"[]",
        strange_field=b'{"schema":1,"members":[{"__class__":"os.system"}]}',
    ),
    *rows(
        invited,
        BadCode,
        megabyte=b"HCNA-" + b"A" * MIB,
        nul=b"HCNA-\0",
        digits_of_another_script="HCNA-\u0661\u0662".encode(),
        half_a_surrogate=b"HCNA-\xed\xa0\xbd",
        nothing_in_it=b"HCNA-",
    ),
    *rows(
        asked,
        Refused,
        nothing=b"",
        pickle=PICKLE,
        nested_deep=b"\x91" * DEEP,
        map_of_four_billion=b"\xdf\xff\xff\xff\xff",
        text_of_four_gigabytes=b"\xdb\xff\xff\xff\xff",
        extension=b"\xc7\x04\x00evil",
        json=b'{"worker":"W1"}',
    ),
    *rows(
        compressed,
        Refused,
        absolute=f"{OUT}/secret",
        climbing="../outside/secret",
        climbing_from_below="a/../../outside/secret",
        climbing_with_slashes=f"{DISK}//..//outside/secret",
        link=f"{DISK}/link",
        link_on_the_way=f"{DISK}/way/secret",
        link_to_itself="loop",
        device="null",
        fifo="fifo",
        folder="folder",
        nul="in\0.txt",
        empty="",
        blank=" ",
        too_long="x" * 5000,
        name_too_long="x" * 300,
        environment_of_a_process="/proc/self/environ",
    ),
    *rows(
        written,
        Refused,
        absolute=f"{OUT}/evil",
        climbing="../outside/evil",
        link=f"{DISK}/link",
        link_on_the_way="way/evil",
        link_to_nowhere="dangling",
        folder="folder",
        itself="in",
        itself_by_another_name="./in",
        hard_link_to_itself="same",
        nul="a\0b",
        missing_folder="none/evil",
    ),
    *rows(
        made,
        Refused,
        absolute=f"{OUT}/evil",
        climbing="../outside/evil",
        link_on_the_way="way/evil",
        file="in",
        nul="a\0b",
    ),
    *rows(
        fetched,
        Invalid,
        climbing="../../outside/secret",
        absolute="/etc/passwd",
        folder_of_parts="parts",
        folder_of_owners="owners",
        dot=".",
        nul="\0" * 64,
        one_too_many="a" * 65,
        line_break="a" * 64 + "\n",
        digits_of_another_script="\u0661" * 64,
        wide_letters="\uff41" * 64,
        sign_of_kelvin="\u212a" * 64,
        climbing_and_as_long="../" * 21 + "x",
    ),
]

# -- what must not happen --------------------------------------------------------------------------

#: Events of the interpreter that none of these documents may bring about.
FORBIDDEN = frozenset(
    {
        "pickle.find_class",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "subprocess.Popen",
        "socket.connect",
    }
)
_heard: list[str] | None = None
#: Threads that were there before: what an earlier test has left running is not the document's.
_others: frozenset[int | None] = frozenset()


def _listen(event: str, _args: tuple[Any, ...]) -> None:
    if _heard is not None and event in FORBIDDEN and threading.get_ident() not in _others:
        _heard.append(event)


sys.addaudithook(_listen)  # For good: a hook cannot be taken back. It hears only while asked to.


@contextmanager
def listening() -> Iterator[list[str]]:
    global _heard, _others
    _others = frozenset(one.ident for one in threading.enumerate()) - {threading.get_ident()}
    _heard = heard = []
    try:
        yield heard
    finally:
        _heard = None


def everything_in(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return every file below a folder: what kind, how many names, and what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(folder))] = (stat.st_mode, stat.st_nlink, content)
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(tmp_path)
    disk, working = place.disk, tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)  # A relative name that is followed would end there.
    (disk / "link").symlink_to(place.outside / "secret")
    (disk / "way").symlink_to(place.outside)
    (disk / "loop").symlink_to("loop")
    (disk / "dangling").symlink_to(place.outside / "evil")
    (disk / "null").symlink_to("/dev/null")
    (disk / "folder").mkdir()
    (disk / "in").write_bytes(b"x")
    (disk / "same").hardlink_to(disk / "in")
    os.mkfifo(disk / "fifo")
    return place


@pytest.fixture(scope="module")
def refused() -> Iterator[Counter[str]]:
    """How many were refused, by who reads them, with nothing changed; said when all is over."""
    refused: Counter[str] = Counter()
    yield refused
    given = Counter(row.read.__name__ for row in ROWS)
    readers = ", ".join(f"{refused[name]}/{count} {name}" for name, count in given.items())
    note(
        f"measured: hostile artifacts and documents: {refused.total()} of {len(ROWS)} refused, "
        f"nothing written outside, nothing brought to life: {readers}"
    )


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_hostile_document_is_refused_and_changes_nothing(
    row: Row, place: Place, refused: Counter[str]
) -> None:
    load_registry()  # Loads libraries, which is no doing of the document.
    given = row.given
    if isinstance(given, str):
        given = given.replace(OUT, str(place.outside)).replace(DISK, str(place.disk))
    kept = ("outside", "working", "scratch", "home")
    before = {name: everything_in(place.root / name) for name in kept}
    on_disk = set(os.listdir(place.disk))

    with listening() as heard, pytest.raises(row.refusal) as caught:
        row.read(place, given)

    assert 0 < len(str(caught.value)) < 3000
    assert heard == []
    assert {name: everything_in(place.root / name) for name in kept} == before
    assert set(os.listdir(place.disk)) == on_disk
    stored = [path for path in (place.root / "artifacts").rglob("*") if path.is_file()]
    assert stored == []
    refused[row.read.__name__] += 1


def test_the_table_is_long_and_names_each_row_once() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    archives = [row for row in ROWS if row.read in (unpacked, restored)]
    assert len(archives) >= 30
    assert len(ROWS) >= 100


def test_the_pickle_of_the_table_is_a_live_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with listening() as heard:
        pickle.loads(PICKLE)
    assert (tmp_path / "unpickled").is_dir()
    assert "pickle.find_class" in heard

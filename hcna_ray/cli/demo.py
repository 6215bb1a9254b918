"""``hcna demo``: real work from a client through C1 and M1 to W1 and back, checked as it goes.

Every claim it prints was measured in this run and is a `Check`; the exit code is 0 only if all of
them held. It speaks to C1 through the client (and once through curl, as any user would), leaves no
files behind, and can be run again at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from hcna_ray.cli import render
from hcna_ray.cli.terminal import AsJson, CommandFailed, ExitCode, Json, open_client, print_json
from hcna_ray.client import Client, TaskHandle, TaskRequest, TaskView, Worker
from hcna_ray.client.models import explain

#: Longest wait for any one part of the demo, seconds.
PART_TIMEOUT_S = 180.0
#: Size of the file that travels, and the seed it is made from.
FILE_MEGABYTES = 54
FILE_SEED = 20_260_211
_PIECE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Check:
    """One claim of the demo and whether it held."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Expected:
    """One of the 20 tasks and how it must end."""

    request: TaskRequest
    status: str = "completed"
    attempts_min: int = 1


@dataclass(slots=True)
class Demo:
    """One run: where to print, what was found."""

    client: Client
    out: Console
    scratch: Path
    megabytes: int
    checks: list[Check] = field(default_factory=list)
    report: Json = field(default_factory=dict)

    def check(self, name: str, ok: bool, detail: str = "") -> None:
        """Record a claim, and say so at once if it did not hold."""
        self.checks.append(Check(name, ok, detail))
        if not ok:
            self.out.print(f"[red]did not hold:[/red] {escape(name)}: {escape(detail)}")

    def title(self, text: str) -> None:
        """A heading."""
        self.out.print(f"\n[bold]{escape(text)}[/bold]")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    megabytes: Annotated[
        int, typer.Option(min=1, max=4000, help="Size of the file that travels, 10^6 bytes.")
    ] = FILE_MEGABYTES,
    as_json: AsJson = False,
) -> None:
    """Run real work through C1 and check what comes back."""
    out = Console(highlight=False, stderr=as_json, soft_wrap=False)
    if not out.is_terminal:
        out = Console(highlight=False, stderr=as_json, width=160)
    started = time.monotonic()
    with (
        open_client(retry_for_s=20) as client,
        tempfile.TemporaryDirectory(prefix="hcna-demo-") as scratch,
    ):
        tour = Demo(client, out, Path(scratch), megabytes)
        worker = meet(tour)
        run_seed_curls(tour)
        run_mixed_tasks(tour)
        send_a_file(tour, worker)
        make_a_mesh(tour)
        ask_why(tour)
    took_s = time.monotonic() - started
    failed = [check for check in tour.checks if not check.ok]
    out.print(
        f"\n{len(tour.checks) - len(failed)} of {len(tour.checks)} checks held, {took_s:.1f} s"
    )
    same_in_two_languages(tour)
    if as_json:
        tour.report["checks"] = [asdict(check) for check in tour.checks]
        tour.report["ok"] = not failed
        tour.report["took_s"] = round(took_s, 3)
        print_json(tour.report)
    if failed:
        names = "; ".join(check.name for check in failed)
        raise CommandFailed(f"the demo failed: {names}", "hcna status")


# -- who is there ----------------------------------------------------------------------------------


def meet(tour: Demo) -> Worker:
    """Say where C1 is and wait for nobody: a worker must be online already."""
    health = tour.client.health()
    tour.out.print(f"[bold]C1[/bold] {escape(tour.client.url)}  {render.word(health.status)}")
    workers = tour.client.workers()
    tour.out.print(render.worker_table(workers))
    online = sorted(
        (worker for worker in workers if worker.state == "online"),
        key=lambda worker: (worker.name != "W1", worker.name),
    )
    tour.report["url"] = tour.client.url
    tour.report["workers"] = [worker.raw for worker in workers]
    tour.check("M1 is connected", health.moderator_connected, health.status)
    if not online:
        raise CommandFailed("no worker is online", "hcna workers")
    return online[0]


# -- the seed's curls ------------------------------------------------------------------------------


def run_seed_curls(tour: Demo) -> None:
    """The three requests of the deployment guide's section 5.3, as any client would send them."""
    tour.title("Three requests, as in the guide")
    url = tour.client.url
    body = '{"task_type": "echo", "payload": {"message": "Hello, HCNA-3!"}}'
    send = _curl(tour) if shutil.which("curl") else _instead_of_curl(tour)
    answers: list[Json] = []

    def show(words: Sequence[str]) -> Json:
        tour.out.print(f"[cyan]$ {escape(shlex.join(['curl', *words]))}[/cyan]", soft_wrap=True)
        answer = send(words)
        tour.out.print(escape(json.dumps(answer, ensure_ascii=False)), soft_wrap=True)
        answers.append({"curl": shlex.join(["curl", *words]), "answer": answer})
        return answer

    health = show([f"{url}/health"])
    tour.check("GET /health says healthy", health.get("status") == "healthy", str(health))
    words = ["-X", "POST", f"{url}/tasks", "-H", "Content-Type: application/json", "-d", body]
    told = show(words)
    task_id = str(told.get("task_id", ""))
    tour.check("POST /tasks is accepted", task_id.startswith("task-"), str(told))
    if task_id:
        tour.client.wait(task_id, PART_TIMEOUT_S)
        view = show([f"{url}/tasks/{task_id}"])
        result = view.get("result") or {}
        tour.check(
            "GET /tasks/{id} shows the echo",
            view.get("status") == "completed" and result.get("message") == "Hello, HCNA-3!",
            str(view),
        )
    tour.report["curls"] = answers


def _curl(tour: Demo) -> Callable[[Sequence[str]], Json]:
    """Real curl. The key is in a file only we can read, never among the process's arguments."""
    config = tour.scratch / "curl.cfg"
    key = (tour.client.api_key or "").replace("\\", "\\\\").replace('"', '\\"')
    descriptor = os.open(config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f'header = "Authorization: Bearer {key}"\n')

    def send(words: Sequence[str]) -> Json:
        command = ["curl", "-sS", "--max-time", "30", "--config", str(config), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise CommandFailed(f"curl: {done.stderr.strip()}", "hcna status")
        return _object(done.stdout)

    return send


def _instead_of_curl(tour: Demo) -> Callable[[Sequence[str]], Json]:
    """The same requests through httpx, for a machine without curl; says so."""
    tour.out.print("curl is not installed here, so httpx sends the same requests")
    headers = {"Authorization": f"Bearer {tour.client.api_key or ''}"}

    def send(words: Sequence[str]) -> Json:
        url = next(word for word in words if "://" in word)
        content = words[-1] if "-d" in words else None
        method = "POST" if content else "GET"
        return _object(httpx.request(method, url, headers=headers, content=content).text)

    return send


def _object(text: str) -> Json:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CommandFailed(f"C1 answered {text[:80]!r}", "hcna status", ExitCode.UNREACHABLE)
    return value


# -- twenty tasks ----------------------------------------------------------------------------------


def mixed_tasks(text_sha256: str) -> list[Expected]:
    """Twenty tasks of six types; one must be retried to complete, one must fail."""
    tasks = [Expected(TaskRequest(task_type="echo", payload={"n": n})) for n in range(6)]
    tasks += [Expected(TaskRequest(task_type="test.ping")) for _ in range(3)]
    for tenths in (1, 2, 3, 4):
        payload = {"seconds": tenths / 10}
        tasks.append(Expected(TaskRequest(task_type="sleep", payload=payload)))
    for level in (1, 3, 9):
        small: Json = {"artifact": text_sha256, "level": level}
        tasks.append(Expected(TaskRequest(task_type="drgfc.compress", payload=small)))
    for kind in ("glb", "obj"):
        mesh: Json = {"grid_level": 1, "output_formats": [kind]}
        tasks.append(Expected(TaskRequest(task_type="qegg.generate", payload=mesh)))
    # Too long for one attempt: it times out, and the next attempt goes on from its checkpoint.
    nap = TaskRequest(
        task_type="sleep",
        payload={"seconds": 1.5, "steps": 15, "resume": True},
        timeout_s=1.0,
        retry={"max_attempts": 5, "backoff_s": 0.1, "retry_on": ["timeout"]},
        metadata={"demo": "times out once, then completes"},
    )
    tasks.append(Expected(nap, attempts_min=2))
    # Not a file that drgfc.compress made: refused by the handler, kept as failed with its reason.
    wrong: Json = {"artifact": text_sha256}
    tasks.append(Expected(TaskRequest(task_type="drgfc.decompress", payload=wrong), "failed"))
    return tasks


def run_mixed_tasks(tour: Demo) -> None:
    """Submit twenty tasks at once, watch them end, compare with what had to happen."""
    tour.title("Twenty tasks")
    text = b"".join(b"line %d of a text that compresses well\n" % n for n in range(5000))
    expected = mixed_tasks(tour.client.upload(text).sha256)
    started = time.monotonic()
    handles = tour.client.submit_many([item.request for item in expected])
    views: dict[str, TaskView] = {handle.id: handle.view for handle in handles}

    def picture(partial: bool) -> Group:
        ended = sum(view.ended for view in views.values())
        bar = ProgressBar(total=len(views), completed=ended, width=40)
        left = f"{ended} of {len(views)} ended"
        table = _mixed_table(views.values())
        return Group(table, bar, left) if partial else Group(table)

    live = Live(picture(True), console=tour.out, refresh_per_second=8, transient=True)
    with live if tour.out.is_terminal else _Quiet():
        for view in tour.client.as_completed(handles, PART_TIMEOUT_S):
            views[view.task_id] = tour.client.get(view.task_id)  # With its attempts.
            live.update(picture(True))
    took_s = time.monotonic() - started
    tour.out.print(picture(False))
    tour.out.print(f"all 20 ended in {took_s:.1f} s")
    for handle, item in zip(handles, expected, strict=True):
        view = views[handle.id]
        ok = view.status == item.status and len(view.attempts) >= item.attempts_min
        name = f"{view.task_type} ends {item.status}"
        name += f" after {item.attempts_min} attempts or more" if item.attempts_min > 1 else ""
        tour.check(name, ok, f"{view.task_id} {view.status}, {len(view.attempts)} attempts")
    tour.report["tasks"] = [
        {
            "task_id": view.task_id,
            "task_type": view.task_type,
            "status": view.status,
            "worker": view.worker,
            "duration_ms": view.duration_ms,
            "attempts": len(view.attempts),
        }
        for view in views.values()
    ]


class _Quiet:
    """Stands in for a live display where there is no terminal."""

    def __enter__(self) -> None: ...

    def __exit__(self, *args: object) -> None: ...


def _mixed_table(views: Iterable[TaskView]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("task", "type", "worker", "status", "ran", "attempts", ""):
        table.add_column(name, no_wrap=True)
    for view in views:
        note = f"{view.error.kind}: {view.error.message}" if view.error else ""
        table.add_row(
            escape(view.task_id),
            escape(view.task_type),
            escape(view.worker or ""),
            render.word(view.status),
            render.duration(view.duration_ms),
            str(len(view.attempts) or ""),
            escape(note[:40]),
        )
    return table


# -- a file there and back -------------------------------------------------------------------------


def make_file(path: Path, megabytes: int) -> str:
    """Write a file, half noise and half text, the same every time; returns its SHA-256."""
    luck = random.Random(FILE_SEED)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in range(megabytes):
            if piece % 2:
                content = luck.randbytes(_PIECE_BYTES)
            else:
                line = b"%08d: the quick brown fox jumps over the lazy dog\n" % luck.getrandbits(26)
                content = (line * (_PIECE_BYTES // len(line) + 1))[:_PIECE_BYTES]
            digest.update(content)
            file.write(content)
    return digest.hexdigest()


def send_a_file(tour: Demo, worker: Worker) -> None:
    """Upload, compress on the worker, decompress, download, compare."""
    tour.title(f"A file of {tour.megabytes} MB: up, compressed on {worker.name}, restored, down")
    source, restored = tour.scratch / "original.bin", tour.scratch / "restored.bin"
    sha256 = make_file(source, tour.megabytes)
    size = source.stat().st_size
    tour.out.print(f"made        {render.megabytes(size)}, SHA-256 {sha256}")

    sent_from: list[int] = []
    started = time.monotonic()
    artifact = tour.client.upload(source, lambda done, total: sent_from.append(done))
    up_s = time.monotonic() - started
    had_it = sent_from[0] == size
    speed = "C1 had it already" if had_it else f"{size / 1e6 / up_s:.0f} MB/s"
    tour.out.print(f"upload      {up_s:.2f} s, {speed}")

    packed = _on_worker(tour, "drgfc.compress", {"artifact": artifact.sha256}, worker.name)
    plain = _on_worker(tour, "drgfc.decompress", {"artifact": packed["artifact"]}, worker.name)

    started = time.monotonic()
    tour.client.download(plain["artifact"], restored)
    down_s = time.monotonic() - started
    with restored.open("rb") as file:
        back = hashlib.file_digest(file, "sha256").hexdigest()
    tour.out.print(f"download    {down_s:.2f} s, {size / 1e6 / down_s:.0f} MB/s")
    tour.out.print(f"restored    {render.megabytes(restored.stat().st_size)}, SHA-256 {back}")
    tour.check("the restored file has the original's SHA-256", back == sha256, back)
    tour.check("compression made it smaller", packed["output_bytes"] < size, str(packed))
    tour.report["file"] = {
        "bytes": size,
        "sha256": sha256,
        "restored_sha256": back,
        "upload_s": round(up_s, 3),
        "upload_skipped": had_it,
        "download_s": round(down_s, 3),
        "compress": packed,
        "decompress": plain,
    }


def _on_worker(tour: Demo, task_type: str, payload: Json, name: str) -> Json:
    handle = tour.client.submit(
        task_type, payload, requires={"worker": name}, timeout_s=PART_TIMEOUT_S
    )
    result = handle.result(PART_TIMEOUT_S)
    where = handle.view.worker
    tour.out.print(
        f"{task_type.removeprefix('drgfc.'):<12}{render.megabytes(result['input_bytes'])} -> "
        f"{render.megabytes(result['output_bytes'])} on {where}, ratio {result['ratio']}, "
        f"{result['mb_per_s']:.0f} MB/s, task {handle.id}"
    )
    tour.check(f"{task_type} ran on {name}", where == name, str(where))
    return result


# -- a mesh ----------------------------------------------------------------------------------------


def make_a_mesh(tour: Demo) -> None:
    """Generate a mesh on a worker, fetch it, load it with a library that never saw it made."""
    import trimesh

    tour.title("A mesh of grid_level 4, as GLB")
    payload: Json = {"grid_level": 4, "output_formats": ["glb"]}
    handle = tour.client.submit("qegg.generate", payload)
    result = handle.result(PART_TIMEOUT_S)
    (made,) = (file for file in result["files"] if file["format"] == "glb")
    path = tour.client.download(made["sha256"], tour.scratch / "mesh.glb")
    mesh = trimesh.load(path, force="mesh")
    if not isinstance(mesh, trimesh.Trimesh):
        raise CommandFailed(f"{path.name} holds no mesh", f"hcna task {handle.id}")
    vertices, faces = len(mesh.vertices), len(mesh.faces)
    tour.out.print(
        f"{handle.id} on {handle.view.worker} in {render.duration(handle.view.duration_ms)}: "
        f"{path.stat().st_size} bytes, loaded again: {vertices} vertices, {faces} faces"
    )
    ok = faces == result["faces"] and vertices == result["vertices"]
    told = f"{vertices} and {faces}, told {result['vertices']} and {result['faces']}"
    tour.check("trimesh loads the mesh that was promised", ok and faces > 0, told)
    tour.report["mesh"] = {
        "task_id": handle.id,
        "sha256": made["sha256"],
        "bytes": made["bytes"],
        "vertices": vertices,
        "faces": faces,
    }


# -- a task nobody can run -------------------------------------------------------------------------


def ask_why(tour: Demo) -> None:
    """Submit what no worker can run, ask why it waits, take it back."""
    tour.title("A task that cannot be placed")
    handle = tour.client.submit("echo", {}, requires={"worker": "W9", "gpu": 1})
    tour.out.print(f"[cyan]$ hcna why {handle.id}[/cyan]")
    view = handle.refresh()
    told = explain(view)
    tour.out.print(render.explanation(told))
    reason = view.pending_reason
    tour.check(
        "it stays queued and C1 says why and what would help",
        view.status in ("queued", "scheduled") and reason is not None and bool(reason.fix),
        f"{view.status}: {reason}",
    )
    after = _cancelled(tour, handle)
    tour.out.print(f"then cancelled: {render.word(after.status)}")
    tour.check("it can be cancelled", after.status == "cancelled", after.status)
    tour.report["why"] = told.to_json()


def _cancelled(tour: Demo, handle: TaskHandle) -> TaskView:
    handle.cancel("shown by the demo")
    return tour.client.wait(handle.id, 30.0)


# -- now you ---------------------------------------------------------------------------------------


def same_in_two_languages(tour: Demo) -> None:
    """The last lines: what to type to do it yourself."""
    tour.title("The same yourself")
    lines = [
        'eval "$(hcna env)"',
        'curl -H "Authorization: Bearer $HCNA_API_KEY" "$HCNA_URL/tasks" '
        """-d '{"task_type": "echo", "payload": {"message": "hello"}}'""",
        'python -c "from hcna_ray.client import Client; '
        "print(Client().submit('echo', {'message': 'hello'}).result())\"",
    ]
    for line in lines:
        tour.out.print(escape(line), soft_wrap=True)
    tour.report["same"] = lines

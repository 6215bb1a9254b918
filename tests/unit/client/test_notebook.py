from __future__ import annotations

import subprocess
import sys

import httpx
import pytest

from hcna_ray.client import Client, ClusterStatus, WaitTimeout
from hcna_ray.client.notebook import Picture, table, track, watch
from tests.support.fake_c1 import FakeC1
from tests.support.fake_time import FakeTime


def test_a_task_shows_its_bar_worker_and_times(client: Client, c1: FakeC1) -> None:
    handle = client.submit("hold")
    c1.tasks[handle.id].update(
        status="running", progress={"percent": 40, "message": "step 4", "at": None}
    )
    html = handle._repr_html_()
    assert "40 %" in html
    assert "step 4" in html
    c1.finish(handle.id, "completed", result={"processed_by": "HCNA-W1--prod--home--v1.0"})
    html = handle._repr_html_()
    assert "100 %" in html
    assert "W1" in html


def test_nothing_of_a_task_is_trusted(client: Client, c1: FakeC1) -> None:
    evil = "<script>alert('x')</script>"
    handle = client.submit("hold")
    c1.tasks[handle.id].update(
        task_type=evil,
        status="running",
        progress={"percent": 1e9, "message": evil, "at": None},
    )
    html = handle._repr_html_()
    assert "<script" not in html
    assert "width:100%" in html


def test_a_cell_is_honest_when_c1_is_away(client: Client, c1: FakeC1) -> None:
    handle = client.submit("hold")
    c1.script.extend([httpx.ConnectError("refused"), httpx.ConnectError("refused")])
    assert "as last seen" in handle._repr_html_()
    html = client._repr_html_()
    assert "unreachable" in html
    assert "hcna up" in html


def test_the_client_shows_machines_queue_and_links(client: Client, c1: FakeC1) -> None:
    html = client._repr_html_()
    assert "healthy" in html
    assert "W1" in html
    assert "http://c1.test/docs" in html


def test_a_wrong_key_is_said_and_health_still_shown(c1: FakeC1) -> None:
    html = Client("http://c1.test", "wrong", transport=c1.transport())._repr_html_()
    assert "healthy" in html
    assert "unauthorized" in html


def test_a_link_is_only_made_of_http() -> None:
    html = Client("javascript:alert(1)", "k")._repr_html_()
    assert "href" not in html


def test_the_client_imports_neither_ray_nor_the_server() -> None:
    code = (
        "import sys, hcna_ray.client\n"
        "found = {'ray', 'fastapi', 'pydantic', 'typer'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- the helpers of `hcna_ray.client.notebook` -----------------------------------------------------


class Paper:
    """Keeps every picture."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []
        self.closed = False

    def draw(self, picture: Picture) -> None:
        self.pictures.append(picture)

    def close(self) -> None:
        self.closed = True


def test_a_bar_counts_what_comes_and_how_fast(time: FakeTime) -> None:
    paper = Paper()

    for _ in track(range(4), label="naps", canvas=paper, clock=time.clock):
        time.sleep(0.5)

    assert [one.text for one in paper.pictures] == [
        " 25 % naps 1 of 4",
        " 50 % naps 2 of 4, 4.0 a second",
        " 75 % naps 3 of 4, 3.0 a second",
        "100 % naps 4 of 4, 2.7 a second",
        "100 % naps 4 of 4, 2.0 a second",
    ]
    assert "width:25%" in paper.pictures[0].html
    assert paper.closed


def test_a_bar_is_not_drawn_for_every_item(time: FakeTime) -> None:
    paper = Paper()

    assert len(list(track(iter(range(1000)), canvas=paper, clock=time.clock))) == 1000

    assert [one.text for one in paper.pictures] == ["1", "1000"]


def test_a_bar_says_where_it_stopped(time: FakeTime) -> None:
    paper = Paper()
    bar = track(range(10), canvas=paper, clock=time.clock)

    next(bar)
    bar.close()  # type: ignore[attr-defined]

    assert paper.pictures[-1].text == " 10 % 1 of 10"
    assert paper.closed


def test_watch_shows_tasks_until_all_have_ended(client: Client, c1: FakeC1, time: FakeTime) -> None:
    handles = [client.submit("hold"), client.submit("hold")]
    paper = Paper()

    def pause(seconds: float) -> None:
        time.sleep(seconds)
        held = [one for one in handles if not c1.tasks[one.id]["finished_at"]]
        c1.finish(held[0].id, "completed", result={})

    views = watch(handles, canvas=paper, clock=time.clock, sleep=pause)

    assert [view.task_id for view in views] == [handle.id for handle in handles]
    assert [one.text for one in paper.pictures] == [
        "2 tasks: 2 queued",
        "2 tasks: 1 completed, 1 queued",
        "2 tasks: 2 completed",
    ]
    assert paper.pictures[-1].html.count("completed on W1") == 2


def test_watch_gives_up_when_told_to(client: Client, time: FakeTime) -> None:
    paper = Paper()
    handle = client.submit("hold")

    with pytest.raises(WaitTimeout, match=handle.id):
        watch([handle], timeout_s=1, canvas=paper, clock=time.clock, sleep=time.sleep)

    assert paper.closed


def test_watch_refuses_what_nobody_can_look_at(client: Client) -> None:
    handle = client.submit("hold")
    with pytest.raises(ValueError, match="track"):
        watch([handle] * 201)


def test_tasks_and_workers_become_rows_and_a_frame(client: Client, c1: FakeC1) -> None:
    done = client.submit("echo", {"n": 1})
    done.wait()
    waiting = client.submit("hold")

    rows = table([done, waiting.view])
    frame = rows.frame()

    assert list(frame["status"]) == ["completed", "queued"]
    assert frame["ran_ms"][0] == 4
    assert str(frame["accepted_at"].dtype).endswith("UTC]")
    assert "completed" in rows._repr_html_()
    (worker,) = table(client.workers())
    assert (worker["worker"], worker["state"], worker["cpu"]) == ("W1", "online", 2)


def test_an_empty_table_says_so() -> None:
    assert "nothing" in table([])._repr_html_()
    assert len(table([]).frame()) == 0


def test_a_task_a_worker_and_an_answer_show_themselves(client: Client) -> None:
    handle = client.submit("echo", {}, requires={"gpu": 1})
    assert "queued" in client.get(handle.id)._repr_html_()
    assert "join a worker" in client.why(handle.id)._repr_html_()
    assert "HCNA-W1" in client.worker("W1")._repr_html_()


def test_without_a_notebook_a_terminal_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    list(track([1, 2], label="naps"))
    shown = capsys.readouterr().err
    assert "naps 2 of 2" in shown
    assert shown.endswith("\n")

    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    list(track([1, 2], label="naps"))
    assert capsys.readouterr().err == ""


def test_the_helpers_import_what_they_need_when_they_need_it() -> None:
    code = (
        "import sys, hcna_ray.client.notebook\n"
        "found = {'IPython', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_status_is_one_value(client: Client, c1: FakeC1) -> None:
    client.submit("hold")
    status = client.status()
    assert status.count("queued") == 1
    assert status.totals is not None
    assert status.totals["accepted"] == 1
    assert [worker.name for worker in status.workers] == ["W1"]
    assert (status.store_readable, status.moderator_waits_for_store) == (True, False)
    older = {name: value for name, value in status.raw.items() if name != "store_readable"}
    assert ClusterStatus.from_json(older).store_readable

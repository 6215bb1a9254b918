"""The page in Chromium: what a person sees, and drives.

Pictures of it are kept in ``build/page``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from hcna_ray.api.admission import Sort
from hcna_ray.core.errors import RateLimited, StoreUnavailable
from hcna_ray.core.models import FailureKind
from hcna_ray.security.keys import ApiKey
from tests.page.browser import PHONE, WIDE, Browser
from tests.page.house import OPERATOR_KEY, VIEWER_KEY, House, a_house
from tests.support.c1 import ADMIN_KEY, USER_KEY
from tests.support.live import eventually


@pytest.fixture(autouse=True)
def no_complaint(browser: Browser) -> Iterator[None]:
    """The console says nothing, but where a test expects it and looks by itself."""
    yield
    assert browser.complaints() == []


def submit(house: House, key: str = ADMIN_KEY, **task: object) -> str:
    """Submit a task as some other client does."""
    reply = httpx.post(
        f"{house.url}/tasks",
        json={"task_type": "echo", **task},
        headers={"Authorization": f"Bearer {key}"},
    )
    assert reply.status_code == 202, reply.text
    return str(reply.json()["task_id"])


def runs(house: House, *task_ids: str) -> None:
    eventually(lambda: set(task_ids) <= set(house.running()), 20.0, f"{task_ids} run")


def failed_task(house: House) -> str:
    task_id = submit(house)
    runs(house, task_id)
    house.fail(task_id, "the disk was full")
    return task_id


def test_sign_in_submit_and_watch_it_finish(browser: Browser, house: House) -> None:
    browser.sign_in(ADMIN_KEY)
    browser.press("Submit", "nav a")
    browser.type(
        '{"message": "Hello, HCNA-3!", "n": 12345678901234567890}', "textarea[name=payload]"
    )
    browser.press("Submit")
    browser.see("running", ".badge")
    browser.see("Sent to W1", ".story")
    browser.see("Heartbeat of W1", ".story")

    house.complete(*house.running(), result=b'{"said":"Hello, HCNA-3!","n":12345678901234567890}')

    browser.see("completed", ".badge")  # Nothing was pressed, and nothing loaded anew.
    story = browser.text(".story")
    assert re.search(
        r"Accepted.*Sent to W1.*Started on W1.*Completed on W1 after", story, re.DOTALL
    ), story
    assert browser.text("pre").count("12345678901234567890") == 2  # To the last digit.
    assert browser.find("#spoken").get_property("textContent") == "The task is completed."


def test_events_bring_it_at_once(browser: Browser, house: House) -> None:
    browser.sign_in(ADMIN_KEY)
    browser.see("Told of changes as they happen.", "footer")

    task_id = submit(house)
    browser.see(task_id, "tbody")
    runs(house, task_id)
    browser.see("running", "tbody")
    house.complete(task_id)
    browser.see("Nothing waits and nothing runs.")


def test_while_c1_has_no_room_for_another_stream_it_is_asked_again_and_again(
    opened: Browser, tmp_path: Path
) -> None:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    with a_house(tmp_path / "home", streams_max=1) as house:
        opened.url = house.url
        with httpx.stream("GET", f"{house.url}/events", headers=headers):
            opened.sign_in(ADMIN_KEY)
            opened.see("Asks every two seconds.", "footer")
            opened.see(submit(house), "tbody")
        opened.see("Told of changes as they happen.", "footer")
        assert all("503" in one for one in opened.complaints())
        opened.leave()


def test_a_wrong_key_is_refused_in_words(browser: Browser) -> None:
    browser.open()
    browser.find("#key").send_keys("hcna_nobody")
    browser.press("Sign in")
    browser.see("the key is not valid", "#key-problem")
    assert browser.driver.execute_script("return sessionStorage.length") == 0
    (complaint,) = browser.complaints()  # That of the refused request itself.
    assert "401" in complaint


def test_the_key_is_in_this_tab_alone_and_goes_with_signing_out(browser: Browser) -> None:
    browser.sign_in(ADMIN_KEY)
    kept = "return JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie])"
    assert json.loads(browser.driver.execute_script(kept)) == [{"hcna.key": ADMIN_KEY}, {}, ""]
    browser.open("#/tasks")
    browser.driver.refresh()  # Loaded anew, it is still signed in.
    browser.see("Tasks", "h1")
    browser.press("Sign out")
    browser.find("#key")
    assert json.loads(browser.driver.execute_script(kept)) == [{}, {}, ""]


def test_a_failed_task_is_replayed(browser: Browser, house: House) -> None:
    task_id = failed_task(house)
    browser.sign_in(ADMIN_KEY)
    browser.see("Failed (1)", "nav")
    browser.press("Failed (1)", "nav a")
    browser.see("the disk was full", "tbody")
    browser.picture("failed")
    browser.press(f"Replay {task_id}")
    browser.see(f"{task_id} runs again.", ".notice")
    browser.see("Nothing has failed.")
    runs(house, task_id)
    house.complete(task_id)
    browser.open(f"#/tasks/{task_id}")
    browser.see("Completed", ".story")
    story = browser.text(".story")
    told = r"Failed on W1.*ValueError: the disk was full.*Replayed.*Sent to W1.*Completed on W1"
    assert re.search(told, story, re.DOTALL), story


def test_all_that_failed_is_replayed_after_a_question(browser: Browser, house: House) -> None:
    ids = [failed_task(house) for _ in range(3)]
    browser.sign_in(ADMIN_KEY)
    browser.open("#/failed")
    browser.press("Replay all")
    browser.press("Replay", "dialog button")
    browser.see("3 tasks run again.", ".notice")
    runs(house, *ids)


def test_w1_is_drained_and_given_work_again(browser: Browser, house: House) -> None:
    task_id = submit(house)
    runs(house, task_id)
    browser.sign_in(OPERATOR_KEY)
    browser.press("Drain W1")
    browser.press("Leave it", "dialog button")
    browser.press("Drain W1")
    browser.picture("drain")
    browser.press("Drain W1", "dialog button")
    browser.see("W1 is being drained.", ".notice")
    browser.see("draining", "[data-machine=W1]")
    waiting = submit(house)
    browser.open(f"#/tasks/{waiting}")
    browser.see("Waits", ".story")
    browser.see("What helps", ".story")
    browser.open("#/")
    browser.press("Give W1 work again")
    browser.see("online", "[data-machine=W1]")
    runs(house, task_id, waiting)


def test_a_queue_is_paused_and_resumed(browser: Browser, house: House) -> None:
    submit(house, queue="night")
    browser.sign_in(OPERATOR_KEY)
    browser.press("Pause queue night")
    browser.see("paused", "tr[data-row=night]")
    task_id = submit(house, queue="night")
    browser.open(f"#/tasks/{task_id}")
    browser.see("The queue 'night' is paused", ".story .why")
    browser.press("hcna queues resume night", ".story .fix a")  # It leads to the button.
    browser.press("Resume queue night")
    browser.see("open", "tr[data-row=night]")
    runs(house, task_id)


def test_a_task_is_cancelled_with_its_reason(browser: Browser, house: House) -> None:
    task_id = submit(house, run_at="2031-01-01T00:00:00Z")
    browser.sign_in(ADMIN_KEY)
    browser.open(f"#/tasks/{task_id}")
    browser.press("Cancel")
    browser.find("dialog input[name=reason]").send_keys("not needed any more")
    browser.press("Cancel the task", "dialog button")
    browser.see("cancelled", ".badge")
    browser.see("Was cancelled: not needed any more.", ".story .why")


def test_w1_falls_silent_is_shown_so_and_what_it_ran_is_requeued(
    browser: Browser, house: House
) -> None:
    task_id = submit(house)
    runs(house, task_id)
    browser.sign_in(ADMIN_KEY)
    browser.see("online", "[data-machine=W1]")
    house.silence(12.0)
    browser.see("unreachable", "[data-machine=W1]")
    words = browser.text("[data-machine=W1]")
    age = re.search(r"last known (\d+) s ago", words)
    assert age is not None, words
    assert 12 <= int(age[1]) < 30
    browser.picture("unreachable")
    house.silence(60.0)
    browser.see("asleep", "[data-machine=W1]")

    house.back()

    browser.see("online", "[data-machine=W1]")
    runs(house, task_id)
    browser.open(f"#/tasks/{task_id}")
    browser.see("Lost on W1", ".story")
    house.complete(task_id)
    browser.see("Completed", ".story")
    story = browser.text(".story")
    told = r"Sent to W1.*Lost on W1.*W1 was silent for.*Requeued.*Sent to W1.*Completed on W1"
    assert re.search(told, story, re.DOTALL), story
    browser.picture("story")


def test_while_m1_is_away_it_says_so_and_refuses_in_words(browser: Browser, house: House) -> None:
    submit(house, queue="night")
    browser.sign_in(ADMIN_KEY)
    browser.see("answers", "[data-machine=M1]")
    house.stop_moderator()
    browser.see("M1 does not answer", ".banner")
    browser.see("last known", "[data-machine=M1]")
    browser.see("not known", "[data-machine=W1]")
    assert "Running" not in browser.text("[data-machine=W1]")  # Nobody knows what it runs.
    browser.press("Pause queue night")
    browser.see("Refused: moderator did not answer", ".notice")
    house.start_moderator()
    browser.see_no("M1 does not answer")
    browser.see("answers", "[data-machine=M1]")
    # The browser writes down every answer that is a refusal; nothing else is wrong.
    assert all("503" in one for one in browser.complaints())


def test_while_c1_is_out_of_reach_what_is_shown_has_its_age(browser: Browser) -> None:
    browser.sign_in(ADMIN_KEY)
    browser.see("online", "[data-machine=W1]")
    browser.offline(True)
    browser.see("C1 is unreachable, last known", ".banner")
    browser.see("unreachable", "[data-machine=C1]")
    browser.see("not known", "[data-machine=W1]")
    browser.picture("c1-unreachable")
    browser.offline(False)
    browser.see_no("C1 is unreachable")
    browser.see("online", "[data-machine=W1]")
    assert all("ERR_INTERNET_DISCONNECTED" in one for one in browser.complaints())


# -- refused for now -------------------------------------------------------------------------------


def test_while_the_store_cannot_be_read_it_says_so_and_how_old_the_rest_is(
    browser: Browser, house: House
) -> None:
    task_id = submit(house, queue="night", run_at="2031-01-01T00:00:00Z")
    browser.sign_in(ADMIN_KEY)
    browser.see(task_id, "tbody")
    house.lose_store()
    told = "Refused: the store cannot be read (OSError)"
    browser.see(told, ".refusal")
    browser.see("Code store_unavailable. What is refused is shown as last known", ".refusal")
    browser.see(" s ago. C1 is asked again by itself.", ".refusal")
    assert len(browser.all(".refusal")) == 1  # Once, however many paths are refused.
    assert told in browser.find("#spoken").get_property("textContent")
    assert task_id in browser.text("tbody")
    browser.see("C1 cannot read the task store", ".banner")
    browser.see("Which tasks there are is not known now", ".empty")
    assert "No task has been submitted yet" not in browser.text()
    browser.see("answers", "[data-machine=M1]")  # It has its own way to the store.
    for where in ("#/tasks", "#/failed", f"#/tasks/{task_id}"):
        browser.open(where)
        browser.see("The store cannot be read (OSError).", "main .empty")
        browser.see("Nothing is known of it yet.", ".refusal")
        assert "Asking C1" not in browser.text("main")
    house.find_store()
    browser.see("Waits", ".story")
    browser.see_no("Refused")
    browser.see_no("cannot read")
    assert browser.find("#spoken").get_property("textContent").startswith("C1 gives what")
    browser.open("#/")
    browser.see(task_id, "tbody")
    assert all("503" in one for one in browser.complaints())


def test_that_m1_waits_for_its_store_is_not_told_as_silence(browser: Browser, house: House) -> None:
    browser.sign_in(ADMIN_KEY)
    browser.see("answers", "[data-machine=M1]")
    house.c1.moderator.refuses = StoreUnavailable("M1 cannot open its task store", 5)
    browser.see("M1 waits for its task store", ".banner")
    browser.see("waits", "[data-machine=M1] .badge")
    browser.see("for its task store; last known", "[data-machine=M1]")
    browser.see("not known", "[data-machine=W1]")
    assert "M1 does not answer" not in browser.text()
    house.c1.moderator.refuses = None
    browser.see("answers", "[data-machine=M1]")
    browser.see_no("M1 waits")


def fill_up(house: House) -> Callable[[], None]:
    """Let C1 have no room for another read; return what makes room again."""
    admission = house.c1.services.admission
    before = admission.budgets
    admission.budgets = {**before, Sort.READ: 0}
    return partial(setattr, admission, "budgets", before)


def break_workers(house: House) -> Callable[[], None]:
    """Let C1 stumble over what it asks M1; return what mends it."""
    cache = house.c1.services.cache

    async def stumble() -> None:
        raise RuntimeError("a bug")

    cache.glance = stumble  # type: ignore[method-assign,assignment]
    return partial(delattr, cache, "glance")


def use_up(house: House) -> Callable[[], None]:
    """Let every key have made all the requests that it may; return what lets it make more."""
    keys = house.c1.keys
    verify = keys.verify

    def spent(_: ApiKey) -> None:
        raise RateLimited("the key may make 3 requests a second", 1)

    def with_a_rate(presented: str) -> ApiKey | None:
        key = verify(presented)
        return key and replace(key, rate=3.0)

    house.c1.services.rates.take = spent  # type: ignore[method-assign]
    keys.verify = with_a_rate  # type: ignore[method-assign]
    return partial(delattr, keys, "verify")


@pytest.mark.parametrize(
    ("befalls", "status", "words"),
    [
        (fill_up, "503", "Code overloaded."),
        (break_workers, "500", "Code internal."),
        (use_up, "429", "Code rate_limited."),
    ],
    ids=["overloaded", "internal", "rate_limited"],
)
def test_what_is_refused_for_now_keeps_its_age_and_is_asked_again(
    browser: Browser,
    house: House,
    befalls: Callable[[House], Callable[[], None]],
    status: str,
    words: str,
) -> None:
    browser.sign_in(ADMIN_KEY)
    browser.see("online", "[data-machine=W1]")
    over = befalls(house)
    browser.see(words, ".refusal")
    browser.see("What is refused is shown as last known", ".refusal")
    browser.see("not known", "[data-machine=W1]")
    assert "Running" not in browser.text("[data-machine=W1]")
    assert "C1 is unreachable" not in browser.text()
    for scheme, size in (("light", PHONE), ("dark", WIDE)):
        browser.scheme(scheme)
        browser.size(size)
        assert browser.barriers() == []
        assert browser.cut_off() == []
        browser.picture(f"refused-{status}-{scheme}")
    over()
    browser.see_no("Refused")
    browser.see("online", "[data-machine=W1]")
    assert all(status in one for one in browser.complaints())


def test_a_key_is_kept_while_c1_cannot_be_asked_whose_it_is(browser: Browser, house: House) -> None:
    browser.sign_in(ADMIN_KEY)
    over = fill_up(house)
    browser.driver.refresh()
    browser.see("Code overloaded. Your key is kept, and C1 is asked again", "#key-problem")
    assert browser.kept() == {"hcna.key": ADMIN_KEY}
    browser.size(PHONE)
    assert browser.barriers() == []
    assert browser.cut_off() == []
    browser.picture("key-kept")
    over()
    browser.see("Machines", "h2")  # Nothing was typed.

    browser.cut("*/whoami")
    browser.driver.refresh()
    browser.see("C1 does not answer. Your key is kept", "#key-problem")
    assert browser.kept() == {"hcna.key": ADMIN_KEY}
    browser.cut()
    browser.see("Machines", "h2")
    assert all("503" in one or "ERR_BLOCKED" in one for one in browser.complaints())


def test_a_kept_key_is_forgotten_when_told_or_when_it_is_none(browser: Browser) -> None:
    browser.cut("*/whoami")
    browser.open()
    browser.find("#key").send_keys(ADMIN_KEY, Keys.ENTER)
    browser.see("Your key is kept", "#key-problem")
    browser.press("Forget the key")
    browser.see_no("Your key is kept")
    assert browser.kept() == {}
    assert browser.focused() == "API key"

    browser.type("hcna_nobody", "#key")
    browser.press("Sign in")
    browser.see("Your key is kept", "#key-problem")
    browser.cut()
    browser.see("the key is not valid", "#key-problem")
    assert browser.kept() == {}
    assert "Forget the key" not in browser.buttons()
    assert all("401" in one or "ERR_BLOCKED" in one for one in browser.complaints())


def test_another_key_takes_the_place_of_one_that_is_kept(browser: Browser) -> None:
    browser.cut("*/whoami")
    browser.open()
    browser.find("#key").send_keys("hcna_nobody", Keys.ENTER)
    browser.see("Your key is kept", "#key-problem")
    browser.cut()
    browser.type(VIEWER_KEY, "#key")
    browser.keys(Keys.ENTER)
    browser.see("watcher, viewer", ".who")
    assert browser.kept() == {"hcna.key": VIEWER_KEY}
    assert all("401" in one or "ERR_BLOCKED" in one for one in browser.complaints())


def test_what_no_request_can_carry_is_no_key(browser: Browser) -> None:
    browser.open()
    browser.find("#key").send_keys("ключ", Keys.ENTER)
    browser.see("the key is not valid", "#key-problem")
    assert browser.kept() == {}


# -- why ---------------------------------------------------------------------------------------


def waits_for_a_gpu(house: House) -> str:
    return submit(house, requires={"gpu": 1})


def waits_behind_a_dependency(house: House) -> str:
    return submit(house, depends_on=[submit(house, run_at="2031-01-01T00:00:00Z")])


def fails(house: House) -> str:
    return failed_task(house)


def is_refused(house: House) -> str:
    task_id = submit(house)
    runs(house, task_id)
    house.fail(task_id, "the album has no pictures", FailureKind.REJECTED)
    return task_id


def is_lost(house: House) -> str:
    task_id = submit(house)
    for _ in range(3):
        runs(house, task_id)
        house.back()
    return task_id


def is_slow(house: House) -> str:
    task_id = submit(house, timeout_s=100)
    runs(house, task_id)
    house.later(95.0)
    return task_id


def says_nothing_more(house: House) -> str:
    task_id = submit(house)
    runs(house, task_id)
    house.progress(task_id, 40.0, "page 4 of 10")
    house.later(70.0)
    return task_id


def is_with_a_silent_worker(house: House) -> str:
    task_id = submit(house)
    runs(house, task_id)
    house.silence(12.0)
    return task_id


@pytest.mark.parametrize(
    ("befalls", "code", "sentence", "fix"),
    [
        (waits_for_a_gpu, "unplaceable", "needs gpu", "Join a worker with"),
        (waits_behind_a_dependency, "waiting_dependencies", "Waits for 1 of the 1 task", "Look at"),
        (fails, "error", "after 1 attempt: ValueError: the disk was full", "hcna task retry"),
        (is_refused, "rejected", "the album has no pictures", "Change what its message names"),
        (is_lost, "lost", "after 3 attempts", "hcna workers shows who is there"),
        (is_slow, "near_timeout", "of at most 2 min", "a larger timeout_s"),
        (says_nothing_more, "no_progress", "40 % page 4 of 10; that was", "hcna task cancel"),
        (is_with_a_silent_worker, "worker_silent", "Ran on W1, which", "hcna workers says how"),
    ],
    ids=lambda one: one.__name__ if callable(one) else "",
)
def test_why_is_told_in_the_story_on_a_phone_too(
    browser: Browser,
    house: House,
    befalls: Callable[[House], str],
    code: str,
    sentence: str,
    fix: str,
) -> None:
    """What the page says is what C1 says: the code, the sentence, and what helps."""
    task_id = befalls(house)
    browser.sign_in(ADMIN_KEY)
    browser.size(PHONE)
    browser.open(f"#/tasks/{task_id}")
    browser.see(sentence, ".story li:last-child .why")
    browser.see(fix, ".story li:last-child .fix")
    assert browser.text(".story li:last-child .code") == f"Code {code}"
    told = httpx.get(
        f"{house.url}/tasks/{task_id}", headers={"Authorization": f"Bearer {ADMIN_KEY}"}
    ).json()["why"]
    assert told["code"] == code
    helps = browser.text(".story li:last-child .fix")
    assert helps.lower() == f"What helps: {told['fix']}.".lower()
    assert browser.barriers() == []
    assert browser.cut_off() == []
    browser.picture(f"why-{code}")


def test_a_command_that_helps_leads_to_what_does_the_same_on_the_page(
    browser: Browser, house: House
) -> None:
    failed = failed_task(house)
    lost = is_with_a_silent_worker(house)
    browser.sign_in(ADMIN_KEY)
    browser.open(f"#/tasks/{failed}")
    browser.press(f"hcna task retry {failed}", ".fix a")
    assert browser.focused() == "Replay"
    browser.keys(Keys.ENTER)
    browser.see(f"{failed} runs again.", ".notice")
    browser.open(f"#/tasks/{lost}")
    browser.press("hcna workers", ".fix a")
    browser.see("unreachable", "[data-machine=W1]")


def test_a_refusal_says_what_helps_and_its_code(browser: Browser, house: House) -> None:
    browser.sign_in(ADMIN_KEY)
    browser.open("#/submit")
    browser.type('{"message": "hello"}', "textarea[name=payload]")
    browser.type("no such name!", "input[name=queue]")
    browser.press("Submit")
    browser.see("Refused: ", ".notice")
    browser.see("What helps: change the fields that errors names", ".notice")
    browser.see("Code invalid_request.", ".notice")
    assert all("422" in one for one in browser.complaints())


def test_a_viewer_sees_no_button_and_an_outline(browser: Browser, house: House) -> None:
    task_id = failed_task(house)
    queued = submit(house, queue="night", run_at="2031-01-01T00:00:00Z")
    browser.sign_in(VIEWER_KEY)
    browser.see(queued, "tbody")
    assert browser.buttons() == ["Sign out"]
    assert "Submit" not in browser.text("nav")
    for where in ("#/tasks", "#/failed", f"#/tasks/{task_id}", f"#/tasks/{queued}"):
        browser.open(where)
        browser.see(task_id if "failed" in where else "task", "h1, tbody")
        assert browser.buttons() == ["Sign out"], where
    browser.open(f"#/tasks/{task_id}")
    browser.see("You see an outline")
    assert "the disk was full" not in browser.text()
    browser.see("The handler raised, and no attempt is left", ".story .why")  # In general.
    assert browser.text(".story .code") == "Code error"
    assert browser.all(".story .fix a") == []  # It would lead to a button that is not there.


def test_a_submitter_works_with_its_own_and_drives_no_machine(
    browser: Browser, house: House
) -> None:
    theirs, own = submit(house), submit(house, USER_KEY)
    browser.sign_in(USER_KEY)
    browser.see(own, "tbody")
    assert theirs not in browser.text()
    assert browser.buttons() == ["Sign out"]
    browser.open(f"#/tasks/{theirs}")
    browser.see("it is not yours to see")
    browser.open(f"#/tasks/{own}")
    browser.see("Cancel", "button")
    assert all("404" in one for one in browser.complaints())


def test_what_a_submitter_writes_is_text(browser: Browser, house: House) -> None:
    bad = "<img src=x onerror=alert(1)><script>alert(1)</script>"
    task_id = submit(house, payload={"message": bad}, metadata={bad: bad})
    runs(house, task_id)
    house.fail(task_id, bad)
    browser.sign_in(ADMIN_KEY)
    for where in ("#/failed", f"#/tasks/{task_id}"):
        browser.open(where)
        browser.see(bad)


def test_all_of_it_by_keyboard(browser: Browser) -> None:
    """Tab, Enter and Escape alone; after every change of view its heading has the focus."""
    browser.sign_in(ADMIN_KEY)
    assert browser.focused() == "Overview"
    browser.tab_to("Submit")
    browser.keys(Keys.ENTER)
    browser.see("Submit a task", "h1")
    assert browser.focused() == "Submit a task"
    browser.tab_to("Submit")
    browser.keys(Keys.ENTER)
    browser.see("Sent to W1", ".story")
    assert browser.focused().startswith("Task ")
    browser.open("#/")
    browser.see("Machines", "h2")
    browser.tab_to("Drain W1")
    browser.keys(Keys.ENTER)
    browser.find("dialog[open]")
    browser.keys(Keys.ESCAPE)
    assert browser.focused() == "Drain W1"


def test_nothing_is_cut_off_on_smaller_screens(browser: Browser, house: House) -> None:
    failed = failed_task(house)
    running = submit(house)
    submit(house, queue="q" * 64, requires={"gpu": 1})
    runs(house, running)
    browser.sign_in(ADMIN_KEY)
    for where in ("#/", "#/tasks", "#/failed", "#/submit", f"#/tasks/{failed}"):
        browser.open(where)
        browser.see_no("Asking C1", "main")
        for width in (320, 768, 1000):
            browser.size((width, 800))
            assert browser.cut_off() == [], (where, width)


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_barrier_in_any_view_on_any_screen(
    browser: Browser, house: House, scheme: str, size: tuple[int, int]
) -> None:
    failed = failed_task(house)
    lost, running = submit(house), submit(house, queue="night", payload={"album": "spring"})
    waiting = submit(house, queue="q" * 64, requires={"gpu": 1})
    done = submit(house)
    runs(house, lost, running, done)
    house.complete(done)
    browser.size(size)
    browser.scheme(scheme)
    name = f"{scheme}-{'phone' if size == PHONE else 'wide'}"
    browser.open()
    browser.find("#key")
    browser.picture(f"{name}-sign-in")
    assert browser.barriers() == []
    browser.sign_in(ADMIN_KEY)
    browser.see(running, "tbody")
    views = {
        "overview": ("#/", "Overview"),
        "tasks": ("#/tasks", "Tasks"),
        "failed": ("#/failed", "Failed tasks"),
        "submit": ("#/submit", "Submit a task"),
        "task-waiting": (f"#/tasks/{waiting}", waiting),
        "task-running": (f"#/tasks/{running}", running),
        "task-failed": (f"#/tasks/{failed}", failed),
    }
    for view, (where, title) in views.items():
        browser.open(where)
        browser.see(title, "h1")
        browser.see_no("Asking C1", "main")
        browser.picture(f"{name}-{view}", whole=True)
        assert browser.barriers() == [], view
        assert browser.cut_off() == [], view
    house.silence(60.0)
    browser.open("#/")
    browser.see("unreachable", "[data-machine=W1]")
    assert browser.barriers() == []

"""What ``hcna certs rotate`` and ``revoke`` do on M1: ask the gate, and see it through.

While M1 is down there is nothing to restart: the files are changed, and members take over what is
new when they find M1 again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from hcna_ray.config import Settings
from hcna_ray.core.errors import HcnaError
from hcna_ray.security.acts import leave
from hcna_ray.supervisor.c1_calls import ask_c1
from hcna_ray.supervisor.checks import open_own_gate
from hcna_ray.supervisor.gate_protocol import PRESENT_S, GateRefused, Json
from hcna_ray.supervisor.invites import revoke_invites_of
from hcna_ray.supervisor.membership import read_members, remove_member
from hcna_ray.supervisor.node_certs import ensure_m1_node
from hcna_ray.supervisor.rounds import begin, complete, read_round, take_over
from hcna_ray.supervisor.state import read_supervisor

_POLL_S = 0.5


class RotationFailed(HcnaError):
    """It did not come to its end. ``fix`` says what helps."""

    code = "rotation_failed"

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message, fix)
        self.message, self.fix = message, fix

    def __str__(self) -> str:
        return self.message


class Rotation:
    """One command's work; each call returns when what it asked for has come about."""

    def __init__(
        self,
        settings: Settings,
        *,
        on_step: Callable[[str], None],
        wait_s: float,
        sleep: Callable[[float], None] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Prepare.

        Args:
            settings: Of M1.
            on_step: Told each step in a few words.
            wait_s: Longest wait for one step.
            sleep: Waits.
            monotonic: Clock for waiting.
            now: Wall clock.
        """
        self._settings, self._say, self._wait_s = settings, on_step, wait_s
        self._sleep, self._monotonic, self._now = sleep, monotonic, now
        #: Restarts of Ray on all machines that it took.
        self.restarts = 0

    @property
    def round(self) -> int:
        """The number of the present round of credentials."""
        return read_round(self._settings.cluster_dir).number

    def one(self, name: str) -> None:
        """Give one machine another certificate; its worker restarts with it.

        Raises:
            RotationFailed: There is no such machine, it is away, or it did not come back.
        """
        if name == self._settings.moderator.name:
            self.all("token")
            return
        self._need_m1()
        before = self._ask("POST", "/v1/rotate", {"what": "node", "name": name})["serial"]
        if not before:
            raise RotationFailed(f"{name} is away", f"hcna certs rotate {name}, when it is back")

        def renewed() -> bool:
            members = self._ask("GET", "/v1/members")["members"]
            serial = next((each["serial"] for each in members if each["name"] == name), "")
            return serial not in ("", before) and self._online(name)

        self._until(renewed, f"{name} did not come back with another certificate")
        self._say(f"{name} has another certificate")

    def each(self) -> None:
        """Give all machines another certificate, one after the other; M1 with a restart."""
        if self._runs():
            here = self._ask("GET", "/v1/members")["members"]
            for member in here:
                if member["own_certificate"]:
                    self._say(f"{member['name']} shows a certificate of your own, and goes on")
                elif self._is_here(member):
                    self.one(member["name"])
                else:
                    self._say(f"{member['name']} is away: it gets another one when it is back")
            self.all("token")
        else:
            ensure_m1_node(self._settings, now=self._utc(), anew=True)

    def authority(self) -> None:
        """Have another authority sign from now on, and give up the old one if nobody needs it.

        Raises:
            RotationFailed: It cannot begin now, or did not come to its end.
        """
        self.all("authority")
        if self._runs():
            members = self._ask("GET", "/v1/members")["members"]
            away = [each["name"] for each in members if each["round"] != self.round]
        else:
            away = [one.name for one in read_members(self._directory)]
        if away:
            self._say(
                f"{', '.join(away)} was away and knows only the old authority, which counts until: "
                "hcna certs rotate --finish"
            )
        else:
            self.all("finish")

    def all(self, what: str, *, force: bool = False) -> None:
        """Restart Ray everywhere with other credentials.

        Args:
            what: ``token``, ``authority`` or ``finish``.
            force: Finish although a member knows no other authority.

        Raises:
            RotationFailed: It cannot begin now, or did not come to its end.
        """
        if not self._runs():
            self._change_files(what, force=force)
            return
        working = [name for name in self._workers() if self._online(name)]
        asked = self._ask("POST", "/v1/rotate", {"what": what, "force": force})
        number = asked["round"]
        self._say("Ray restarts on all machines with other credentials")
        self.restarts += 1

        def restarted() -> bool:
            told = self._ask("GET", "/v1/members")
            done = told["round"]["number"] >= number and not told["round"]["pending"]
            here = [each for each in told["members"] if self._is_here(each)]
            taken = all(each["round"] == number for each in here)
            return bool(done and told["ready"] and taken) and all(map(self._online, working))

        self._until(restarted, "not all is up again")
        self._say("all is up again")

    def remove(self, name: str) -> None:
        """Take a member off the list, so that its supervisor stops and nobody lets it in.

        The join code that it came with is void as well: it knows it, and might come again.
        """
        for member in read_members(self._directory):
            if member.name == name:
                revoke_invites_of(self._directory, member.machine_id)
        if self._runs():
            self._ask("POST", "/v1/leave", {"name": name, "forget": True}, timeout_s=60.0)
        else:
            remove_member(self._directory, name)
            leave(self._settings.acts_dir, "member.removed", name)
        self._say(f"{name} is no member any more")

    # -- shared -------------------------------------------------------------------------------

    @property
    def _directory(self) -> Any:
        return self._settings.cluster_dir

    def _change_files(self, what: str, *, force: bool) -> None:
        directory, keys_dir = self._directory, self._settings.keys_dir
        # What was cut off comes first: members may have its number already.
        complete(directory, keys_dir)
        if what == "finish" and read_members(directory) and not force:
            raise RotationFailed(
                "M1 is down, so nobody can say whether every member knows the new authority",
                "hcna up, then hcna certs rotate --finish",
            )
        begin(directory, keys_dir, what, now=self._now())
        leave(self._settings.acts_dir, "credentials.rotated", what, detail="M1 was down")
        take_over(directory, keys_dir)
        ensure_m1_node(self._settings, now=self._utc(), anew=True)

    def _runs(self) -> bool:
        return read_supervisor(self._settings.run_dir) is not None

    def _need_m1(self) -> None:
        if not self._runs():
            raise RotationFailed("M1 is down", "hcna up, then the same again")

    def _ask(
        self, method: str, path: str, body: Json | None = None, timeout_s: float = 20.0
    ) -> Json:
        try:
            channel, authorization = open_own_gate(self._settings)
            try:
                return channel.request(
                    method, path, authorization=authorization, body=body, timeout_s=timeout_s
                )
            finally:
                channel.close()
        except GateRefused as error:
            raise RotationFailed(str(error), error.fix or "hcna certs list") from None
        except OSError as error:
            raise RotationFailed(f"M1's gate does not answer ({error})", "hcna status") from None

    def _workers(self) -> list[str]:
        status, answer = ask_c1(self._settings, "GET", "/workers")
        return [str(each["name"]) for each in answer.get("workers", ())] if status == 200 else []

    def _online(self, name: str) -> bool:
        status, answer = ask_c1(self._settings, "GET", f"/workers/{name}")
        return status == 200 and answer.get("state") == "online"

    @staticmethod
    def _is_here(member: Json) -> bool:
        age = member["last_beat_age_s"]
        return age is not None and age < PRESENT_S

    def _until(self, look: Callable[[], bool], failure: str) -> None:
        end = self._monotonic() + self._wait_s
        while not look():
            if self._monotonic() >= end:
                raise RotationFailed(f"{failure} within {self._wait_s:g} s", "hcna status")
            self._sleep(_POLL_S)

    def _utc(self) -> datetime:
        return datetime.fromtimestamp(self._now(), UTC)

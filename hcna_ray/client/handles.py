"""Handles: a task you can hold on to. The id is all they need, so any process can make one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from hcna_ray.client.errors import HcnaClientError
from hcna_ray.client.events import TaskEvent
from hcna_ray.client.html import task_html
from hcna_ray.client.models import Json, Progress, TaskView

if TYPE_CHECKING:
    from hcna_ray.client.aio import AsyncClient
    from hcna_ray.client.sync import Client


class _Handle:
    """What is known of one task without asking: as of the last answer."""

    def __init__(self, view: TaskView) -> None:
        self._view = view

    @property
    def id(self) -> str:
        """The task's id; `Client.attach` turns it into a handle again, from any process."""
        return self._view.task_id

    @property
    def view(self) -> TaskView:
        """The whole last answer."""
        return self._view

    @property
    def status(self) -> str:
        """Status as last seen; `refresh` asks."""
        return self._view.status

    @property
    def progress(self) -> Progress | None:
        """Progress as last seen; `refresh` asks."""
        return self._view.progress

    @property
    def ended(self) -> bool:
        """Whether the task had ended when last seen."""
        return self._view.ended

    def _see(self, view: TaskView) -> TaskView:
        self._view = view
        return view

    def _result(self) -> Json:
        problem = self._view.problem()
        if problem:
            raise problem
        return self._view.result or {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self._view.task_type} {self.status}>"


class TaskHandle(_Handle):
    """A task, through a `Client`."""

    def __init__(self, client: Client, view: TaskView) -> None:
        super().__init__(view)
        self._client = client

    def refresh(self) -> TaskView:
        """Ask C1 where the task stands."""
        return self._see(self._client.get(self.id))

    def wait(self, timeout_s: float | None = None) -> TaskView:
        """Wait for the end, whatever it is. Raises `WaitTimeout` after ``timeout_s``."""
        if not self.ended or (self._view.status == "completed" and self._view.result is None):
            self._see(self._client.wait(self.id, timeout_s))
        return self._view

    def events(self, *, after: str | None = None) -> Iterator[TaskEvent]:
        """What has happened and what happens, until the task has ended; see `Client.events`."""
        return self._client.events(self.id, after=after)

    def logs(self, *, attempt: int | None = None, follow: bool = False) -> Iterator[bytes]:
        """What its handler has printed; see `Client.logs`."""
        return self._client.logs(self.id, attempt=attempt, follow=follow)

    def result(self, timeout_s: float | None = None) -> Json:
        """Wait for the end and return the result object.

        Raises:
            TaskFailed: With the failure's kind, message and number of attempts.
            TaskCancelled: Somebody cancelled it.
            TaskExpired: Its ``expires_at`` passed before a start.
            WaitTimeout: ``timeout_s`` seconds passed; the task goes on.
        """
        self.wait(timeout_s)
        return self._result()

    def cancel(self, reason: str = "") -> TaskView:
        """Cancel the task. Raises `Conflict` if it had ended."""
        return self._see(self._client.cancel(self.id, reason))

    def _repr_html_(self) -> str:
        stale = ""
        if not self.ended:
            try:
                self._see(self._client.glance(self.id))
            except HcnaClientError as error:
                stale = str(error)
        return task_html(self._view, stale=stale)


class AsyncTaskHandle(_Handle):
    """A task, through an `AsyncClient`."""

    def __init__(self, client: AsyncClient, view: TaskView) -> None:
        super().__init__(view)
        self._client = client

    async def refresh(self) -> TaskView:
        """Ask C1 where the task stands."""
        return self._see(await self._client.get(self.id))

    async def wait(self, timeout_s: float | None = None) -> TaskView:
        """As `TaskHandle.wait`."""
        if not self.ended or (self._view.status == "completed" and self._view.result is None):
            self._see(await self._client.wait(self.id, timeout_s))
        return self._view

    def events(self, *, after: str | None = None) -> AsyncIterator[TaskEvent]:
        """As `TaskHandle.events`."""
        return self._client.events(self.id, after=after)

    def logs(self, *, attempt: int | None = None, follow: bool = False) -> AsyncIterator[bytes]:
        """As `TaskHandle.logs`."""
        return self._client.logs(self.id, attempt=attempt, follow=follow)

    async def result(self, timeout_s: float | None = None) -> Json:
        """As `TaskHandle.result`."""
        await self.wait(timeout_s)
        return self._result()

    async def cancel(self, reason: str = "") -> TaskView:
        """As `TaskHandle.cancel`."""
        return self._see(await self._client.cancel(self.id, reason))

    def _repr_html_(self) -> str:
        # A repr cannot await, so this shows what was last seen and says so.
        stale = "" if self.ended else "await refresh() to ask again"
        return task_html(self._view, stale=stale)

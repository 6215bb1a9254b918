"""What follows from steps: dependents settled, keys released, attempts stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hcna_ray.core.events import (
    Command,
    DependencySettled,
    KeyReleased,
    ReleaseConcurrency,
    ReleaseOrdering,
    SettleDependents,
    StopAttempt,
)
from hcna_ray.core.models import Hold, Task
from hcna_ray.runtime.dispatcher import Dispatcher
from hcna_ray.runtime.turn import Turn
from hcna_ray.store.base import TaskStore

#: Dependents settled in one batch; the rest follows in the next ones, from a durable order.
SETTLE_MAX = 1000
#: Durable orders taken up by one batch.
ORDERS_MAX = 16


class Aftermath:
    """Carries out commands inside the batch that caused them, or leaves a durable order."""

    def __init__(
        self, store: TaskStore, dispatcher: Dispatcher, stop: Callable[[StopAttempt], None]
    ) -> None:
        """Name the helpers.

        Args:
            store: Where dependents and orders are.
            dispatcher: Lets held tasks of a concurrency key go.
            stop: Passes an order to a worker's agent.
        """
        self._store, self._dispatcher, self._stop = store, dispatcher, stop
        #: Whether durable orders wait to be carried out.
        self.unfinished = False

    def reset(self) -> None:
        """Look whether the store holds orders."""
        self.unfinished = bool(self._store.settlements(1))

    def take_orders(self, turn: Turn) -> None:
        """Take up durable orders that earlier batches left."""
        if not self.unfinished:
            return
        orders = self._store.settlements(ORDERS_MAX)
        for order in orders:
            turn.ledger.dropped_settlements.append(order.number)
            command = SettleDependents(task_id=order.task_id, completed=order.completed)
            turn.ledger.commands.append(command)
        self.unfinished = len(orders) == ORDERS_MAX

    def follow_up(self, turn: Turn) -> None:
        """Carry out the commands of this batch's steps, which may lead to further steps."""
        ledger = turn.ledger
        budget = SETTLE_MAX
        position = 0
        #: Ended tasks of which is known whether anybody waits for them.
        asked: set[str] = set()
        waited_for: set[str] = set()
        while position < len(ledger.commands):
            command = ledger.commands[position]
            position += 1
            match command:
                case SettleDependents():
                    if command.task_id not in asked:
                        ids = _ended(ledger.commands[position - 1 :])
                        asked.update(ids)
                        waited_for |= self._waited_for(turn, ids)
                    if command.task_id in waited_for:
                        budget -= self._settle(turn, command, budget)
                case ReleaseOrdering():
                    self._release_ordering(turn, command.key)
                case ReleaseConcurrency():
                    self._dispatcher.release_concurrency(ledger, command.key, turn.now)
                case StopAttempt():
                    self._stop(command)
        ledger.commands.clear()

    def _waited_for(self, turn: Turn, ids: list[str]) -> set[str]:
        """Return those for which somebody waits: one question for all that ended together."""
        here = {parent for _, parents in turn.ledger.dependencies for parent in parents}
        return self._store.waited_for(ids) | here.intersection(ids)

    def _settle(self, turn: Turn, command: SettleDependents, budget: int) -> int:
        """Settle up to ``budget`` dependents; leave a durable order for the rest."""
        ledger = turn.ledger
        children = self._store.dependents(command.task_id, max(budget, 0) + 1)
        # The store does not know yet what this batch added or dropped.
        for child_id, parents in ledger.dependencies:
            if command.task_id in parents and child_id not in children:
                children.append(child_id)
        dropped = {
            child
            for parent, gone in ledger.dropped_dependents
            if parent == command.task_id
            for child in gone
        }
        children = [child for child in children if child not in dropped]
        if not children:
            return 0
        now, later = children[: max(budget, 0)], children[max(budget, 0) :]
        ledger.load(now)
        for child_id in now:
            child = ledger.get(child_id)
            if child is not None:
                event = DependencySettled(
                    at=turn.now, dependency_id=command.task_id, completed=command.completed
                )
                ledger.step(child, event)
        if now:
            ledger.dropped_dependents.append((command.task_id, now))
        if later:
            ledger.pushed_settlements.append((command.task_id, command.completed))
            self.unfinished = True
        return len(now)

    def settle_before_replay(self, turn: Turn, task: Task) -> None:
        """Reject now whoever still waits to hear of the failure: later it would be untrue."""
        command = SettleDependents(task_id=task.id, completed=False)
        self._settle(turn, command, 1 << 40)
        if self.unfinished:
            orders = self._store.settlements(1 << 30)
            own = [order.number for order in orders if order.task_id == task.id]
            turn.ledger.dropped_settlements += own

    def _release_ordering(self, turn: Turn, key: str) -> None:
        """Let the key's next task go, unless one of its tasks is out already.

        The lowest sequence is not always the one that is out: a replayed task stands before it.
        """
        line = turn.ordering_line(self._store, key)
        if line and all(task.hold & Hold.ORDERING for task in line):
            turn.ledger.step(line[0], KeyReleased(at=turn.now, hold=Hold.ORDERING))


def _ended(commands: Iterable[Command]) -> list[str]:
    return [one.task_id for one in commands if isinstance(one, SettleDependents)]

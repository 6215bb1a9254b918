"""Ray's faces: actors and tasks that forward calls and hold no rules.

``moderator`` runs on M1, ``agent:W1`` on each worker; both are detached and restarted by Ray for
ever. An agent submits every Ray task of its worker and so owns it: when the agent dies its work
dies, when the moderator dies nothing else does.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ulid import ULID

from hcna_ray import failpoints
from hcna_ray.config import Settings, load_settings
from hcna_ray.core.audit import ENTRIES_MAX, clipped
from hcna_ray.core.clock import SystemClock
from hcna_ray.core.envelopes import Intent
from hcna_ray.core.errors import HcnaError, NotFound, StoreUnavailable, WorkerNameTaken
from hcna_ray.core.models import AuditEntry, Token
from hcna_ray.core.naming import is_short_name
from hcna_ray.handlers import load_registry
from hcna_ray.handlers.context import remove_stale_scratch
from hcna_ray.observability import logs
from hcna_ray.observability.traces import TracesPlan, open_traces
from hcna_ray.runtime import acts, wire, worker_page
from hcna_ray.runtime.agent import AgentSettings, WorkerAgent
from hcna_ray.runtime.artifacts import ArtifactServer, prune_cache
from hcna_ray.runtime.attempts import (
    node_id_of,
    run_heavy,
    run_slot,
    scratch_root,
)
from hcna_ray.runtime.audit_log import AuditLogThread
from hcna_ray.runtime.feed import ChangeFeed
from hcna_ray.runtime.keyring import cipher_of, guard_of
from hcna_ray.runtime.local_rpc import LocalServer
from hcna_ray.runtime.messages import (
    AttemptKey,
    Changes,
    Goodbye,
    Grant,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Offer,
    ReplayQuery,
    Report,
    SlotGone,
    SubmitBatch,
    in_brief,
)
from hcna_ray.runtime.moderator import Moderator, Outbound
from hcna_ray.runtime.orders import OrderDesk
from hcna_ray.runtime.output import OutputSettings, outputs_of, prune_outputs, read_output
from hcna_ray.runtime.policy import Policy
from hcna_ray.runtime.ray_link import (
    ARTIFACTS,
    MODERATOR,
    NAMESPACE,
    AgentModeratorLink,
    agent_name,
)
from hcna_ray.runtime.refusals import Refusals
from hcna_ray.runtime.requests import (
    Cancel,
    Delivered,
    ForgetWorker,
    MarkSchedule,
    MarkWorker,
    NodeSeen,
    NodesSeen,
    Note,
    PauseQueue,
    PutSchedule,
    Query,
    Reports,
    Request,
    Retry,
    RetryMany,
    RunSchedule,
    SendIntent,
)
from hcna_ray.runtime.schedules import KeyAuthority
from hcna_ray.runtime.webhooks import Courier, Deliverer, Verdict, WebhookThread, own_addresses
from hcna_ray.runtime.writer import WriterThread
from hcna_ray.security.key_ring import FileKeyRing
from hcna_ray.security.orders import OrderSigner
from hcna_ray.security.outbound import ensure_master
from hcna_ray.store.base import TaskReader, TaskStore
from hcna_ray.store.factory import open_reader, open_store

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Share of a node's own custom resource that pins something to it.
PIN = 0.001
#: Calls an async actor serves at once: one per slot of every worker, one per replica, and room.
CONCURRENT_CALLS = 20_000
#: One attempt to open a store that is away; there are as many as it takes.
OPEN_WAIT_S = 2.0
#: Objects made between two looks of the garbage collector, and looks at the young for one at the
#: older ones, and for one at the oldest.
COLLECTOR = (20_000, 50, 100)
#: Pause between two looks at the cluster for nodes without an agent.
ENSURE_AGENTS_S = 2.0
#: Pause between two looks whether refusals that were held back are to be put on record.
RECORD_S = 10.0
#: Pause between two looks at a worker's artifact cache.
HOUSEKEEPING_S = 3600.0
#: Pause before a worker's agent is asked for again; it costs nothing when there is one.
AGENT_AGAIN_S = 15.0


def _look_for_garbage_less_often() -> None:
    """Leave alone what is here for good, and look at the rest once for many tasks, not for each.

    Every task is some tens of objects that live until its batch is committed and hold no cycles; by
    default the collector walks them some forty times for a batch of a thousand.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR)


class _Face:
    """``call(method, args, kwargs)`` for an actor: expected errors travel as values."""

    async def call(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, Any]:
        """Answer a call; see `hcna_ray.runtime.ray_link`."""
        try:
            return "ok", await getattr(self, f"do_{method}")(*args, **kwargs)
        except HcnaError as error:
            return "error", error


class ModeratorActor(_Face):
    """Ray's face of `Moderator`: bridges the event loop and the writer thread."""

    def __init__(self) -> None:
        """Open the store and rebuild; see `Moderator`."""
        settings = load_settings()
        logs.configure(
            settings.logs_dir / "moderator.log", fields={"node": settings.moderator.name}
        )
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._clock = SystemClock()
        self._background: set[asyncio.Task[None]] = set()
        #: Both are there as soon as the store is open.
        self._reader: TaskReader | None = None
        self._reading = ThreadPoolExecutor(1, "reading")
        self._feed: ChangeFeed | None = None
        self._audit_log: AuditLogThread | None = None
        self._webhooks: WebhookThread | None = None
        self._orders = OrderDesk(
            OrderSigner(settings.cluster_dir),
            cipher_of(settings, settings.moderator.security),
            elapsed=self._clock.elapsed,
        )
        self._traces = open_traces(
            TracesPlan.of(settings, "hcna-moderator", settings.moderator.node_id)
        )
        if self._traces is not None:
            self._traces.start()
        self._writer = WriterThread(
            self._build,
            self._clock,
            publish=self._publish,
            items_max=settings.limits.writer_items,
        )
        # An actor whose constructor fails is gone; one that waits for its store can say so.
        self._writer.begin()
        self._spawn(self._serve_locally())
        self._spawn(self._ensure_agents())
        self._spawn(self._keep_record())

    def _build(self) -> Moderator:
        store = open_store(self._settings, wait_s=OPEN_WAIT_S)
        try:
            moderator = self._build_on(store)
            reader = open_reader(self._settings)
            self._feed = ChangeFeed(reader.last_fact())
            self._reader = reader
            self._audit_log = AuditLogThread(
                self._settings.audit_file, lambda: open_reader(self._settings)
            )
            self._webhooks = WebhookThread(self._build_deliverer)
        except BaseException:
            store.close()  # Or the next attempt would find it held by this one.
            raise
        _look_for_garbage_less_often()
        log.info("the moderator serves", extra={"action": "moderator.ready", "pid": os.getpid()})
        return moderator

    def _build_on(self, store: TaskStore) -> Moderator:
        draw = random.SystemRandom()
        # Beside artifacts and logs, and beside the tasks themselves unless a server keeps those.
        disk = (self._settings.store_path or self._settings.home / "queue.db").parent
        return Moderator(
            store,
            Policy.from_settings(self._settings),
            clock=self._clock,
            jitter=lambda: draw.uniform(-1.0, 1.0),
            free_bytes=lambda: shutil.disk_usage(disk).free,
            pid=os.getpid(),
            store_name=self._settings.store_name,
            authority=KeyAuthority(
                FileKeyRing(self._settings.keys_dir, self._clock).all,
                lambda: open_reader(self._settings),
            ),
        )

    def _build_deliverer(self) -> Deliverer:
        settings, draw = self._settings.webhooks, random.SystemRandom()
        courier = Courier(
            settings,
            ensure_master(self._settings.keys_dir),
            self._clock,
            own_addresses=own_addresses,
        )

        async def tell(verdict: Verdict) -> None:
            request = Delivered(delivery=verdict.delivery, outcome=verdict.outcome)
            asked = asyncio.run_coroutine_threadsafe(self._ask(request), self._loop)
            await asyncio.wrap_future(asked)

        return Deliverer(
            settings,
            open_reader(self._settings),
            courier.take,
            tell,
            self._clock,
            jitter=lambda: draw.uniform(-1.0, 1.0),
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _publish(self, outbound: Outbound) -> None:
        if outbound.audited and self._audit_log is not None:
            self._audit_log.tell()
        if outbound.hooked and self._webhooks is not None:
            self._webhooks.tell()
        if outbound.notes and self._traces is not None:
            self._traces.tell(outbound.notes)
        if outbound.answers or outbound.last_fact:
            self._loop.call_soon_threadsafe(self._deliver, outbound)

    def _deliver(self, outbound: Outbound) -> None:
        for pending, answer in outbound.answers:
            pending.resolve(answer)
        if self._feed is not None:
            self._feed.publish(outbound.last_fact, outbound.ended)

    async def _serve_locally(self) -> None:
        """Answer processes on this machine on a socket too."""
        try:
            await LocalServer(self._settings.moderator_socket, self.call).run()
        except OSError as error:
            log.warning(
                "no socket for processes on this machine: they call through Ray",
                extra={"action": "local.failed", "error": str(error)},
            )

    async def _ask(self, request: Request) -> Any:
        future: asyncio.Future[object] = self._loop.create_future()

        def resolve(answer: object) -> None:
            if not future.done():
                future.set_result(answer)

        failpoints.hit("actor.call.received")
        self._writer.submit(request, resolve)
        answer = await future
        failpoints.hit("actor.call.decided")
        if isinstance(answer, BaseException):
            raise answer
        return answer

    # -- C1 --------------------------------------------------------------------------------------

    async def do_submit(self, batch: SubmitBatch) -> Any:
        """Accept tasks; answer with `in_brief`."""
        return in_brief(batch, await self._ask(batch))

    async def do_cancel(self, task_id: str, *, reason: str, principal: str) -> Any:
        """Stop a task."""
        return await self._ask(Cancel(task_id=task_id, reason=reason, principal=principal))

    async def do_retry(self, task_id: str, *, principal: str) -> Any:
        """Replay a failed task."""
        return await self._ask(Retry(task_id=task_id, principal=principal))

    async def do_retry_many(self, query: ReplayQuery, *, principal: str) -> Any:
        """Replay failed tasks by filter."""
        found = await self._read(
            lambda reader: reader.page(query.where, before_seq=None, limit=query.limit + 1)
        )
        ids = tuple(task.id for task in found[: query.limit])
        more = len(found) > query.limit
        return await self._ask(RetryMany(query=query, ids=ids, more=more, principal=principal))

    async def _read(self, look: Callable[[TaskReader], list[T]]) -> list[T]:
        if self._reader is None:
            raise StoreUnavailable("M1 has not opened its task store yet", 5)
        # On one thread: a reader is for one at a time, also if who asked goes away meanwhile.
        return await self._loop.run_in_executor(self._reading, look, self._reader)

    async def do_changes(self, after: int, wait_s: float) -> Changes:
        """Return what ended after a fact number."""
        if self._feed is None:
            raise StoreUnavailable("M1 has not opened its task store yet", 5)
        return await self._feed.after(after, wait_s)

    async def do_written(self, after: int, wait_s: float) -> Changes:
        """Return once there is history after a fact number."""
        if self._feed is None:
            raise StoreUnavailable("M1 has not opened its task store yet", 5)
        return await self._feed.written(after, wait_s)

    async def do_workers(self) -> Any:
        """Return every worker."""
        return await self._ask(Query(name="workers"))

    async def do_worker_views(self) -> Any:
        """Return the snapshot that explanations need."""
        return await self._ask(Query(name="worker_views"))

    async def do_status(self) -> Any:
        """Return the moderator's own condition."""
        return await self._ask(Query(name="status"))

    async def do_set_worker(
        self, name: str, action: str, *, deadline_s: float | None, principal: str
    ) -> Any:
        """Drain, cordon or uncordon."""
        return await self._ask(
            MarkWorker(name=name, action=action, deadline_s=deadline_s, principal=principal)
        )

    async def do_forget_worker(self, name: str, *, force: bool, principal: str) -> Any:
        """Strike a worker off the record."""
        return await self._ask(ForgetWorker(name=name, force=force, principal=principal))

    async def do_send_intent(
        self, dst: str, intent: str, payload: dict[str, Any], *, principal: str, wait_s: float
    ) -> dict[str, Any]:
        """Pass an intent to a node and return its answer."""
        node_id = self._settings.moderator.node_id
        now = self._clock.now()
        envelope = Intent(
            msg_id=_new_id(),
            ts=now,
            src=node_id,
            dst=dst,
            payload=payload,
            trace={},
            intent=intent,
        )
        if dst in (node_id, self._settings.moderator.name):
            if intent != "test.ping":
                raise NotFound("intent", intent)
            answer: dict[str, Any] = {"pong": True, "node_id": node_id, "at": now}
        else:
            answer = await self._ask(
                SendIntent(
                    envelope=envelope.to_dict(), worker=dst, principal=principal, wait_s=wait_s
                )
            )
        if "error" in answer:
            raise NotFound("intent", intent)
        return {"msg_id": envelope.msg_id, "dst": dst, "intent": intent, "answer": answer}

    async def do_pause_queue(self, name: str, paused: bool, *, principal: str) -> Any:
        """Pause or resume a queue."""
        return await self._ask(PauseQueue(queue=name, paused=paused, principal=principal))

    async def do_change_schedule(self, order: PutSchedule | MarkSchedule) -> Any:
        """Create, change, pause, resume or delete a schedule."""
        return await self._ask(order)

    async def do_run_schedule(self, order: RunSchedule) -> Any:
        """Submit a schedule's task now."""
        return await self._ask(order)

    async def do_audit(self, *entries: AuditEntry) -> Any:
        """Add audit lines."""
        return await self._ask(Note(entries=tuple(map(clipped, entries[:ENTRIES_MAX]))))

    # -- workers ---------------------------------------------------------------------------------

    async def do_hello(self, hello: Hello) -> Any:
        """Register a worker."""
        async with self._noted(hello.worker):
            self._orders.check_hello(hello)
        try:
            welcome = await self._ask(hello)
        except WorkerNameTaken as error:
            await self._note_refusal(hello.worker, "worker.refused", str(error))
            raise
        async with self._noted(hello.worker):
            await self._orders.ready()
            return self._orders.welcome(hello, welcome)

    async def do_heartbeat(self, beat: Heartbeat) -> Any:
        """Renew a session; what does not open asks for a hello, by which it will."""
        try:
            opened = self._orders.open_heartbeat(beat)
        except HcnaError as error:
            await self._note_refusal(beat.worker, "worker.refused", str(error))
            if not self._orders.has_heard(beat.worker, beat.incarnation):
                raise  # Another key, another cipher: a hello would change nothing.
            opened = None
        return HeartbeatReply(known=False) if opened is None else await self._ask(opened)

    async def do_exchange(self, raw: bytes) -> bytes:
        """Take outcomes, hand out leases."""
        exchange = wire.unpack_exchange(raw)
        try:
            exchange = self._orders.open_answers(exchange)
        except HcnaError as error:
            await self._note_refusal(exchange.worker, "worker.refused", str(error))
            # The worker keeps its answers, and sends them again after the hello.
            return wire.pack_grant(Grant(seq=exchange.seq, hello=True))
        grant = await self._ask(exchange)
        await self._orders.ready(grant)
        return wire.pack_grant(self._orders.send(exchange, grant))

    async def do_order_refused(self, worker: str, count: int, why: str) -> bool:
        """Put on record that a worker has refused orders that claimed to be ours.

        Returns:
            Whether that is done; else the worker keeps the count, and tells it again.
        """
        action = "order.refused"
        if not self._orders.refusals.may_tell(worker, action):
            return False
        return await self._record(Refusals(worker, action, count, why))

    @asynccontextmanager
    async def _noted(self, worker: str) -> AsyncIterator[None]:
        """Put on record that a worker's message is refused."""
        try:
            yield
        except HcnaError as error:
            await self._note_refusal(worker, "worker.refused", str(error))
            raise

    async def _note_refusal(self, worker: str, action: str, why: str) -> None:
        """Put a refusal on record, now or together with others of its kind."""
        self._orders.refusals.add(worker, action, 1, why)
        await self._record_due()

    async def _record_due(self) -> None:
        for line in self._orders.refusals.due():
            if not await self._record(line):
                self._orders.refusals.add(*line)

    async def _record(self, line: Refusals) -> bool:
        worker, action, count, why = line
        detail = why if count == 1 else f"{count} times; the last time: {why}"
        log.error("%s: %s: %s", worker, action, detail, extra={"action": action, "worker": worker})
        entry = AuditEntry(
            at=self._clock.now(),
            principal=worker,
            action=action,
            target="",
            outcome="refused",
            detail=detail,
        )
        try:
            await self._ask(Note(entries=(clipped(entry),)))
        except HcnaError:  # It is in the log; a store that is away must not hide it.
            return False
        return True

    async def _keep_record(self) -> None:
        """Put on record what was held back, and what was done by commands and by the gate."""
        while True:
            await asyncio.sleep(RECORD_S)
            await self._record_due()
            try:
                await acts.take_up(self._settings.acts_dir, self._newest_lines, self.do_audit)
            except OSError:
                log.exception(
                    "acts cannot be read, will look again", extra={"action": "acts.failed"}
                )

    async def _newest_lines(self, limit: int) -> list[AuditEntry]:
        return [
            line.entry for line in await self._read(lambda r: r.audit(before=None, limit=limit))
        ]

    async def do_report(self, raw: bytes) -> Any:
        """Take reports between two exchanges."""
        worker, incarnation, reports = wire.unpack_reports(raw)
        return await self._ask(Reports(worker=worker, incarnation=incarnation, reports=reports))

    async def do_slot_gone(self, gone: SlotGone) -> Any:
        """Take back what a dead slot held."""
        return await self._ask(gone)

    async def do_goodbye(self, bye: Goodbye) -> Any:
        """Let a worker go that was stopped in good order."""
        return await self._ask(bye)

    async def _ensure_agents(self) -> None:
        """Give every worker node that joins an agent, pinned to it.

        Also again and again: Ray gives up on an actor whose constructor failed once.
        """
        asked: dict[tuple[str, str], float] = {}
        while True:
            try:
                nodes = await asyncio.to_thread(cluster_nodes)
                now = self._clock.elapsed()
                alive = [node for node in nodes if node["Alive"]]
                seen = tuple(
                    NodeSeen(name, str(node["NodeID"]), str(node["NodeManagerAddress"]))
                    for node in alive
                    for name in workers_of(node)
                )
                await self._ask(NodesSeen(nodes=seen))
                for node in alive:
                    for name in workers_of(node):
                        key = (node["NodeID"], name)
                        if now - asked.get(key, -AGENT_AGAIN_S) >= AGENT_AGAIN_S:
                            start_agent(name)
                            asked[key] = now
            except Exception:
                log.warning(
                    "could not look for workers",
                    exc_info=True,
                    extra={"action": "moderator.ensure_agents"},
                )
            await asyncio.sleep(ENSURE_AGENTS_S)


class NodeAgent(_Face):
    """Ray's face of `WorkerAgent`: one per worker, owner of all its Ray tasks."""

    def __init__(self, worker: str) -> None:
        """Register with the moderator and start the slots.

        The settings are those of the machine it runs on, which need not be M1's.
        """
        settings = load_settings()
        home = str(settings.home)
        logs.configure(settings.logs_dir / "worker.log", fields={"node": worker})
        self._settings, self._worker = settings, worker
        self._node: dict[str, Any] | None = None
        self._node_id = node_id_of(worker, settings)
        incarnation = (
            f"{int(time.time()):x}-{os.getpid():x}-{random.SystemRandom().getrandbits(32):08x}"
        )
        outbox = settings.outbox_dir.parent / worker
        scratch = scratch_root(settings, worker)
        scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        remove_stale_scratch(scratch, ())
        self._registry = load_registry()
        slots = settings.slots
        self._agent = WorkerAgent(
            AgentSettings(
                worker=worker,
                node_id=self._node_id,
                incarnation=incarnation,
                outbox=outbox,
                run=settings.run_dir,
                base=slots.base or _base_slots(settings),
                heartbeat_s=settings.lease.heartbeat_s,
                self_stop_s=settings.lease.self_stop_s,
                exchange_wait_s=slots.exchange_wait_s,
                moderator_address=_moderator_address(settings),
            ),
            AgentModeratorLink(
                slots.exchange_wait_s,
                guard_of(settings, cipher_of(settings, settings.worker.security)),
                settings.moderator_socket,
            ),
            _RayProcesses(worker, home, incarnation),
            SystemClock(),
            describe=lambda reports: self._describe(incarnation, reports),
            telemetry=self._telemetry,
            new_id=_new_id,
        )
        psutil.cpu_percent()  # The first call only sets the starting point.
        loop = asyncio.get_running_loop()
        self._running = [loop.create_task(self._run()), loop.create_task(self._keep_house())]

    async def _keep_house(self) -> None:
        while True:
            try:
                await asyncio.to_thread(prune_cache, self._settings)
                await asyncio.to_thread(prune_outputs, self._outputs(), time.time())
            except OSError as error:
                log.warning(
                    "caches and outputs cannot be pruned",
                    extra={"action": "agent.prune_failed", "error": str(error)},
                )
            await asyncio.sleep(HOUSEKEEPING_S)

    def _outputs(self) -> OutputSettings:
        limits = self._settings.limits
        return OutputSettings(
            folder=outputs_of(self._settings, self._worker),
            bytes_max=limits.output_bytes,
            total_bytes_max=limits.outputs_bytes,
        )

    async def _run(self) -> None:
        host, port = self._settings.worker_host, self._settings.worker_port
        try:
            await worker_page.serve(host, port, self._figures)
        except OSError as error:
            log.warning(
                "no metrics page for this worker: its port is taken",
                extra={"action": "worker.page_failed", "port": port, "error": str(error)},
            )
        try:
            await self._agent.run()
        except Exception:
            log.critical("the agent failed", exc_info=True, extra={"action": "agent.failed"})
            os._exit(70)  # Ray starts it again; its processes die with it.

    async def do_attach(self, name: str, pid: int) -> bool:
        """Let a runner's process begin."""
        return await self._agent.attach(name, pid)

    async def do_output(self, task_id: str, token: Token, offset: int, size: int) -> bytes | None:
        """Return a piece of what an attempt has printed here."""
        folder = outputs_of(self._settings, self._worker)
        return await asyncio.to_thread(read_output, folder, task_id, token, offset, size)

    async def do_close(self) -> None:
        """End every process of this worker."""
        await self._agent.close()

    def _describe(self, incarnation: str, reports: tuple[Report, ...]) -> Hello:
        node_id = ray.get_runtime_context().get_node_id()
        if self._node is None:
            # Once: a node's facts do not change, and without the head this call would hold up the
            # loop that fences this worker.
            self._node = next(node for node in cluster_nodes() if node["NodeID"] == node_id)
        node = self._node
        resources = dict(node["Resources"])
        gib = float(1 << 30)
        custom = {
            name: amount
            for name, amount in resources.items()
            if name not in ("CPU", "GPU", "memory", "object_store_memory")
            and not name.startswith(("node:", "accelerator_type:"))
        }
        return Hello(
            worker=self._worker,
            node_id=self._node_id,
            incarnation=incarnation,
            address=str(node["NodeManagerAddress"]),
            cpu=resources.get("CPU", 0.0),
            mem_gb=round(resources.get("memory", 0.0) / gib, 3),
            gpu=resources.get("GPU", 0.0),
            resources=tuple(sorted(custom.items())),
            labels=tuple(sorted(self._settings.worker.labels.items())),
            task_types=tuple(self._registry.names()),
            reports=reports,
            machine_id=_machine_id(self._settings),
            ray_node_id=node_id,
            sent_at=time.time(),
        )

    def _telemetry(self) -> dict[str, Any]:
        memory = psutil.virtual_memory()
        return {
            "cpu_percent": psutil.cpu_percent(),
            "memory_percent": memory.percent,
            "memory_available_bytes": memory.available,
            "load_1m": os.getloadavg()[0],
            "disk_free_bytes": shutil.disk_usage(self._settings.data_dir).free,
            "uptime_s": round(self._uptime(), 1),
            "agent_pid": os.getpid(),
        }

    def _figures(self) -> dict[str, Any]:
        """Return what `worker_page` shows."""
        telemetry = self._telemetry()
        return {
            "worker": self._worker,
            "node_id": self._node_id,
            "hcna_worker_moderator_connected": self._agent.connected,
            "hcna_worker_slots": self._agent.slots,
            "hcna_worker_running_attempts": self._agent.running,
            "hcna_worker_cpu_percent": telemetry["cpu_percent"],
            "hcna_worker_memory_available_bytes": telemetry["memory_available_bytes"],
            "hcna_worker_disk_free_bytes": telemetry["disk_free_bytes"],
        }

    def _uptime(self) -> float:
        return time.time() - psutil.boot_time()


class _RayProcesses:
    """Starts slots and heavy attempts as Ray tasks pinned to this worker.

    To its node, too: another machine that claims the same name must not get them.
    """

    def __init__(self, worker: str, home: str, incarnation: str) -> None:
        self._worker, self._home, self._incarnation = worker, home, incarnation
        #: Heavy attempts that have not ended, by the name of their process.
        self._heavy: dict[str, Any] = {}
        self._here = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )

    def start_slot(self, slot: int, name: str) -> Awaitable[None]:
        task: Any = ray.remote(max_calls=1)(run_slot)
        ref: Awaitable[None] = task.options(
            num_cpus=0,
            max_retries=0,
            name=f"slot:{self._worker}:{slot}",
            scheduling_strategy=self._here,
            resources={self._worker: PIN},
        ).remote(self._worker, self._home, self._incarnation, slot, name)
        return ref

    def start_heavy(self, offer: Offer, name: str) -> Awaitable[None]:
        amounts = dict(offer.needs)
        custom = {
            key: amount
            for key, amount in amounts.items()
            if key not in ("cpu", "mem_gb", "gpu", self._worker) and amount
        }
        task: Any = ray.remote(max_calls=1)(run_heavy)
        ref: Any = task.options(
            max_retries=0,
            name=f"{offer.task_type}:{offer.task_id}",
            scheduling_strategy=self._here,
            num_cpus=amounts.get("cpu", 0.0),
            memory=int(amounts.get("mem_gb", 0.0) * (1 << 30)) or None,
            num_gpus=amounts.get("gpu", 0.0),
            resources={**custom, self._worker: max(PIN, amounts.get(self._worker, 0.0))},
        ).remote(self._worker, self._home, self._incarnation, offer, name)
        self._heavy[name] = ref
        return self._ended(name, ref)

    async def _ended(self, name: str, ref: Any) -> None:
        try:
            await ref
        finally:
            self._heavy.pop(name, None)

    def withdraw(self, name: str) -> None:
        ref = self._heavy.get(name)
        if ref is not None:  # Takes back what waits; what runs by now is refused by `attach`.
            ray.cancel(ref, force=False)


class ArtifactsActor(_Face):
    """Serves M1's artifact store to workers, part by part, and says which attempt may read what.

    What an attempt may read, it is asked by workers on M1's own machine too.
    """

    def __init__(self) -> None:
        """Open the store."""
        self._server = ArtifactServer(load_settings())

    async def do_identity(self) -> str:
        """Return what tells whether a caller sees the same directory."""
        return self._server.identity()

    async def do_read(
        self, sha256: str, offset: int, size: int, attempt: AttemptKey | None = None
    ) -> bytes:
        """Return a part of an artifact to an attempt that may read it."""
        return await asyncio.to_thread(self._server.read, sha256, offset, size, attempt)

    async def do_size(self, sha256: str, attempt: AttemptKey | None = None) -> int:
        """Return the size of an artifact that an attempt may read."""
        return await asyncio.to_thread(self._server.size, sha256, attempt)

    async def do_made(self, sha256: str, attempt: AttemptKey) -> None:
        """Note what an attempt has made."""
        await asyncio.to_thread(self._server.made, sha256, attempt)

    async def do_write(self, sha256: str, total: int, offset: int, part: bytes) -> int:
        """Add a part of an upload; return how much is there."""
        return await asyncio.to_thread(self._server.write, sha256, total, offset, part)


# -- wiring ----------------------------------------------------------------------------------------


def workers_of(node: dict[str, Any]) -> list[str]:
    """Return the short names of the workers that a node of Ray's table is."""
    return [name for name in node["Resources"] if name.startswith("W") and is_short_name(name)]


def cluster_nodes() -> list[dict[str, Any]]:
    """Return Ray's table of nodes."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def _create(face: type, name: str, pin: str, *args: str) -> None:
    """Create a detached actor unless it exists: pinned to a node, restarted for ever.

    One concurrency group: all calls share one event loop. Ray repeats no call: our callers repeat
    by themselves, and know that they do.
    """
    actor: Any = ray.remote(face)
    actor.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        resources={pin: PIN},
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=CONCURRENT_CALLS,
    ).remote(*args)


def start_moderator(settings: Settings) -> None:
    """Create the moderator if there is none."""
    _create(ModeratorActor, MODERATOR, settings.moderator.name)


def start_artifacts(settings: Settings) -> None:
    """Create the artifact server if there is none."""
    _create(ArtifactsActor, ARTIFACTS, settings.moderator.name)


def start_agent(worker: str) -> None:
    """Create a worker's agent if there is none, pinned to the node with its resource."""
    _create(NodeAgent, agent_name(worker), worker, worker)


def _base_slots(settings: Settings) -> int:
    return 1 if settings.ray.is_tiny else min(8, max(2, os.cpu_count() or 2))


def _moderator_address(settings: Settings) -> str:
    node = settings.worker.moderator_node
    return f"{node.address}:{node.port + settings.ports.offset}"


def _machine_id(settings: Settings) -> str:
    """Return what names this machine, or nothing where nobody gave it a name."""
    try:
        return (settings.cluster_dir / "machine_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _new_id() -> str:
    return str(ULID()).lower()

"""The checker: reads what a run left behind and says whether every promise was kept.

A program of its own. It imports nothing of hcna-ray and nothing but the standard library, so that
a mistake in the product cannot excuse itself here; a test holds it to that. Only `recorder`, which
test clients use to write the evidence down, needs httpx.

``python -m tests.checker RUN_DIR`` reads from a run's directory

``schedule.json``        seed, commit, faults with their instants, settings, bounds, canaries
``history*.jsonl``       what clients asked and were answered: a line at each call, one at return
``effects*.jsonl``       what really ran: a line at each start and each end of an execution
``store*.jsonl``         transition log and final tasks (`inputs.Dump`); or ``queue.db``, read by
                         `sqlite_dump`; ``before-*.jsonl`` are dumps from before a restore
``samples*.jsonl``       memory, files and bytes over time

The schedule's fields: ``seed`` and ``commit``; ``started_at`` and ``drained_at``; ``clock_error_s``
(how far two clocks of the run may be apart) and ``clock_steps``; ``settings`` (ageing_step_s,
concurrency_default, concurrency_limits, queue_tasks_max, retention_s, self_stop_bound_s);
``workers_online`` at the end; ``effects_task_types`` (types that always write their lines);
``faults`` as ``{kind, target, at, until?}`` with kind kill, pause, partition, reboot, power_loss,
stall or restore (with ``backup_at`` and perhaps ``last_fact``), target ``moderator``, a worker's
name for all of that worker, or anything finer; ``measured``, ``bounds_s`` and ``limits``
(`checks.bounds`); ``canaries`` and ``scan`` (`checks.secrets`); ``foreign_principals``, whose tasks
are not in the history; ``without``.

It ends with 0 only when no promise was broken and nothing was left unchecked that the schedule
does not name, with a reason, under ``without``. A line that cannot be read is a violation (C0).
"""

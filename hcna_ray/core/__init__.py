r"""Rules and values of hcna-ray: standard library only, no I/O, no async, no clock of its own.

Everything above may import this package; it imports nothing of ours above it. Instants are seconds
since the epoch (UTC, ``float``) and are named ``*_at``; durations end in ``_s`` or ``_ms``.

The life of a task (`hcna_ray.core.machine` holds the transitions)::

    accepted -> scheduled -> queued -> running -> completed
                   ^           |  ^       |   \-> failed   (dead-letter list: may be replayed)
                   |           |  |       |   \-> cancelled
                   +-- backoff-+--+--lost-+
                               \-> failed | cancelled | expired
"""

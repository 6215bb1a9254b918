"""Opens the store that the settings name. Nothing else knows which kinds there are."""

from __future__ import annotations

from hcna_ray.config import Settings
from hcna_ray.store.base import TaskReader, TaskStore


def open_store(settings: Settings, *, wait_s: float | None = None) -> TaskStore:
    """Open the task store for writing, creating it or bringing its schema up to date.

    Args:
        settings: They name it.
        wait_s: How long to wait for a server that is away or held by somebody else; by default
            long enough to replace one that fell silent.

    Raises:
        HcnaError: it cannot be opened; the text says why and what to do.
        OSError: the file cannot be created.
    """
    # A store brings its database's library: only the one that is used is loaded.
    if settings.store_path is not None:
        from hcna_ray.store.sqlite import SqliteTaskStore

        return SqliteTaskStore(settings.store_path)
    from hcna_ray.store.postgres import OPEN_WAIT_S, PostgresTaskStore

    return PostgresTaskStore(
        settings.store_url,
        unsafe=settings.store.unsafe,
        open_wait_s=OPEN_WAIT_S if wait_s is None else wait_s,
    )


def open_reader(settings: Settings) -> TaskReader:
    """Open the task store for reading, beside whoever writes it.

    Raises:
        StoreUnavailable: there is none yet, or it cannot be reached.
        HcnaError: it cannot be opened; the text says why and what to do.
    """
    if settings.store_path is not None:
        from hcna_ray.store.sqlite import SqliteTaskReader

        return SqliteTaskReader(settings.store_path)
    from hcna_ray.store.postgres import PostgresTaskReader

    return PostgresTaskReader(settings.store_url)

"""``python -m hcna_ray.supervisor``: the daemon, in the foreground, until SIGTERM or SIGINT.

With ``--relay`` it also writes to its stdout what the processes of this machine log to files; that
is what ``hcna supervise`` runs for a service manager.
"""

from __future__ import annotations

import signal
import sys

from hcna_ray.config import Settings, load_settings
from hcna_ray.core.errors import HcnaError
from hcna_ray.supervisor.control import machine_settings
from hcna_ray.supervisor.daemon import (
    EXIT_ALREADY_RUNNING,
    EXIT_FAILED,
    AlreadyRunning,
    Supervisor,
)
from hcna_ray.supervisor.logs import open_log, relayed_files
from hcna_ray.supervisor.membership import read_membership
from hcna_ray.supervisor.relay import Relay


def main(arguments: list[str]) -> int:
    """Run the daemon; 0 after an orderly stop."""
    try:
        settings = machine_settings(load_settings())
        files = relayed_files(settings, joined=read_membership(settings.cluster_dir) is not None)
    except HcnaError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    relay = Relay(files if "--relay" in arguments else (), sys.stdout.buffer)
    relay.start()
    try:
        return _run(settings)
    finally:
        relay.stop()


def _run(settings: Settings) -> int:
    log = open_log(settings)
    supervisor = Supervisor(settings=settings, log=log)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: supervisor.stop_soon())
    try:
        supervisor.run()
    except AlreadyRunning as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_ALREADY_RUNNING
    except HcnaError as error:
        log.error(str(error), extra={"action": "supervisor.failed", "code": error.code})
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    except Exception:
        log.exception("supervisor ended by an error", extra={"action": "supervisor.failed"})
        raise
    log.info("supervisor ended", extra={"action": "supervisor.stopped"})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

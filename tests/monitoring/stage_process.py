"""C1, the moderator and a worker in one process, without Ray, served over HTTP.

python -m tests.monitoring.stage_process HOME PORT; the home's ``client.key`` opens it.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import uvicorn

from hcna_ray.security.authority import ensure_trust
from tests.fuzz.stage import Stage


def main() -> None:
    """Serve until told to end."""
    home, port = Path(sys.argv[1]), int(sys.argv[2])
    stage = Stage(home)
    ensure_trust(stage.settings.cluster_dir, now=datetime.now(UTC))
    uvicorn.run(stage, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()

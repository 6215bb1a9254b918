"""``python -m hcna_ray.supervisor.ray_start <options of ray start>``, with the Ray client closed.

Ray 2.60 starts its client server on port 10001 whenever the client's packages are installed, as
they are with ``ray[default,serve]``; ``--ray-client-server-port=0`` is refused ("must be an integer
between 1024 and 65535"). The server is one more door and one more process that nothing here uses.
The command asks one function whether the packages are there; here it is told that they are not.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def main() -> None:
    """Run ``ray start`` in this process; does not return while the node is up."""
    scripts: Any = import_module("ray.scripts.scripts")
    if not callable(getattr(scripts, "get_ray_client_dependency_error", None)):
        sys.exit("this version of Ray decides elsewhere whether to open its client port")
    scripts.get_ray_client_dependency_error = lambda: "closed by hcna-ray"
    sys.argv[:] = ["ray", "start", *sys.argv[1:]]
    scripts.main()


if __name__ == "__main__":
    main()

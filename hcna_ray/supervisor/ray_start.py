"""``python -m hcna_ray.supervisor.ray_start <options of ray start>``: it, with six faults mended.

Ray 2.60 starts its client server on port 10001 whenever the client's packages are installed, as
they are with ``ray[default,serve]``; ``--ray-client-server-port=0`` is refused ("must be an integer
between 1024 and 65535"). The server is one more door and one more process that nothing here uses.
The command asks one function whether the packages are there; here it is told that they are not.

``--block`` takes processes that ended in good order for none of its business and waits for ever,
with 90 MB of modules that are needed no more. Here `hcna_ray.supervisor.keeper` waits instead, and
ends with the node.

Without a dashboard Ray starts the dashboard's process all the same, for statistics of use, which
are switched off here. It is left out.

A raylet that does not know the port of its dashboard agent's HTTP server waits 15 s for the file in
which the agent says it, and then ends (``NodeManager::WaitForDashboardAgentPorts``, Ray 2.60; no
setting changes the 15 s). On a busy machine the agent takes longer than that to import what it
needs. The port is known here, and the raylet has an option for it, but ``services.start_raylet``
tells it to the agent alone. Here the raylet is told as well, and waits for nothing.

The module of the command imports those of every other one, ``ray serve`` and ``ray job`` among
them: two thirds of the time until something starts. It does without what cannot be imported.

The head's raylet starts only when the dashboard answers, which is of no use to it and takes
seconds. Here the dashboard starts behind the raylet. All that Ray passes on is its address, which
is known before.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import Any

from hcna_ray.supervisor import keeper

#: Modules of other commands.
NOT_NEEDED = ("ray.serve.scripts", "ray.dashboard.modules.job.cli", "ray.util.state.state_cli")


def main() -> None:
    """Run ``ray start`` in this process; does not return while the node is up."""
    for name in NOT_NEEDED:
        sys.modules[name] = None  # type: ignore[assignment]  # That is: it cannot be imported.
    scripts: Any = import_module("ray.scripts.scripts")
    if not callable(getattr(scripts, "get_ray_client_dependency_error", None)):
        sys.exit("this version of Ray decides elsewhere whether to open its client port")
    scripts.get_ray_client_dependency_error = lambda: "closed by hcna-ray"
    node: Any = import_module("ray._private.node").Node
    _hand_over_to_keeper(node)
    tell_raylet_agent_port(import_module("ray._private.services"), sys.argv)
    if "--include-dashboard=false" in sys.argv:
        _leave_out_dashboard(node)
    else:
        start_dashboard_last(node)
    sys.argv[:] = ["ray", "start", *sys.argv[1:]]
    scripts.main()


def tell_raylet_agent_port(services: Any, arguments: list[str]) -> None:
    """Have the raylet know the port of its dashboard agent from the start.

    Args:
        services: Ray's module of that name.
        arguments: Those of ``ray start``.
    """
    option = "--dashboard-agent-listen-port="
    ports = [one.removeprefix(option) for one in arguments if one.startswith(option)]
    start = services.start_ray_process

    def start_ray_process(command: list[str], process_type: str, *rest: Any, **named: Any) -> Any:
        if process_type == "raylet" and ports:
            command = [*command, f"--dashboard_agent_listen_port={ports[-1]}"]
        return start(command, process_type, *rest, **named)

    services.start_ray_process = start_ray_process


def _hand_over_to_keeper(node: Any) -> None:
    """Become the keeper as soon as ``ray start --block`` looks for ended processes: it waits now.

    All processes of the node are children of this one and stay so.
    """

    def dead_processes(self: Any) -> Any:
        # A process that has ended by now was collected by Ray: the code is all there is to pass on.
        words = []
        for kind, infos in self.all_processes.items():
            for info in infos:
                code = info.process.poll()
                words.append(f"{kind}={info.process.pid}" if code is None else f"{kind}:{code}")
        sys.stdout.flush()
        sys.stderr.flush()
        role = "head" if self.head else "worker"
        # Held back until the keeper waits for it: a SIGTERM in between would end the keeper alone.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        # -I -S: nothing from the environment and no site-packages. The memory is the point.
        os.execv(sys.executable, [sys.executable, "-I", "-S", keeper.__file__, role, *words])

    node.dead_processes = dead_processes


def _leave_out_dashboard(node: Any) -> None:
    def start_api_server(self: Any, **_: Any) -> None:
        self._webui_url = ""

    node.start_api_server = start_api_server


def start_dashboard_last(node: Any) -> None:
    """Have a head start its dashboard when its raylet runs.

    Args:
        node: Ray's class of that name.
    """
    start_api_server, start_ray_processes = node.start_api_server, node.start_ray_processes

    def put_off(self: Any, **options: Any) -> None:
        parameters = self._ray_params
        # As it will be: it may take no other port (``--port-retries=0``).
        self._webui_url = f"{parameters.dashboard_host}:{parameters.dashboard_port}"
        self.put_off_dashboard = options

    def start_all(self: Any) -> None:
        start_ray_processes(self)
        if self.head:
            start_api_server(self, **self.put_off_dashboard)

    node.start_api_server, node.start_ray_processes = put_off, start_all


if __name__ == "__main__":
    main()

"""Wiring: make sure that everything which lives inside the cluster is there. Idempotent.

``python -m hcna_ray.runtime.bootstrap --ray-address HOST:PORT`` creates the moderator, the artifact
server and the agents (the moderator sees to those of machines that join later), deploys C1 from
``serve_config.yaml``, replacing only the application ``hcna-c1``, and ends.

What takes its time at a first start goes on side by side: this program imports what it needs while
Ray's head starts, Serve starts beside the moderator, and C1 beside Serve's proxies.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from hcna_ray.config import Settings, load_settings
from hcna_ray.core.errors import HcnaError, StoreUnavailable
from hcna_ray.runtime.actors import (
    cluster_nodes,
    start_agent,
    start_artifacts,
    start_moderator,
    workers_of,
)
from hcna_ray.runtime.ray_link import MODERATOR, NAMESPACE, ActorLink

log = logging.getLogger(__name__)

APPLICATION = "hcna-c1"
READY_S = 60.0


class BootstrapFailed(HcnaError):
    """Something that should have come up did not."""

    code = "bootstrap_failed"


def bring_up(settings: Settings) -> None:
    """Create whatever is missing on the connected Ray cluster, and deploy C1.

    Raises:
        BootstrapFailed: the moderator or C1 did not come up in time.
    """
    plan = composite_plan(settings)
    with _serve(plan) as controller:
        start_moderator(settings)
        start_artifacts(settings)
        for worker in worker_names():
            start_agent(worker)
        _wait_for_moderator()
        deploy_composite(controller(), plan)


def _wait_for_port(host: str, port: int) -> None:
    """Wait until the head listens. That it does not is for `ray.init` to say."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        try:
            socket.create_connection((host, port), timeout=1.0).close()
            return
        except OSError:
            time.sleep(0.1)


def worker_names() -> list[str]:
    """Return the workers whose nodes are in the cluster now."""
    return sorted({name for node in cluster_nodes() if node["Alive"] for name in workers_of(node)})


def _wait_for_moderator() -> None:
    link, end = ActorLink(MODERATOR), time.monotonic() + READY_S
    while True:
        try:
            link.call("status", timeout_s=10.0)
            return
        except StoreUnavailable as error:
            # It is there and goes on trying. C1 belongs beside it, to refuse in so many words.
            print(f"bootstrap: {error}", file=sys.stderr)  # noqa: T201 - as below
            return
        except HcnaError as error:
            if time.monotonic() > end:
                raise BootstrapFailed(f"the moderator did not come up: {error}") from error
            time.sleep(0.2)


def composite_plan(settings: Settings) -> dict[str, Any]:
    """Return what Serve is asked for: ``serve_config.yaml``, listening where the settings say."""
    plan: dict[str, Any] = yaml.safe_load(find_serve_config().read_text())
    listening = {"host": settings.serve_host, "port": settings.serve_port}
    return plan | {"http_options": {**plan.get("http_options", {}), **listening}}


def deploy_composite(client: Any, plan: Mapping[str, Any]) -> None:
    """Deploy C1 as its file says, leaving every other Serve application as it is.

    A plain ``serve deploy`` owns the whole list of applications, so what is deployed already is
    read from Serve first and sent along. Serve's controller is asked itself and not the dashboard,
    which may be off (profile ``tiny``).

    Args:
        client: Of Serve's controller.
        plan: As `composite_plan` makes it.

    Raises:
        BootstrapFailed: Serve refused the configuration, or C1 did not come up in time.
    """
    own = next(one for one in plan["applications"] if one["name"] == APPLICATION)
    try:
        others = [
            details["deployed_app_config"]
            for name, details in client.get_serve_details()["applications"].items()
            if name != APPLICATION and details.get("deployed_app_config")
        ]
        client.deploy_apps(
            ServeDeploySchema.model_validate({**plan, "applications": [own, *others]})
        )
        _wait_for_composite(client)
    except (RayError, RayServeException, TimeoutError, ValueError) as error:
        raise _refused(error) from error


def _refused(error: Exception) -> BootstrapFailed:
    return BootstrapFailed(f"Serve refused the configuration: {str(error)[-1500:]}")


@contextmanager
def _serve(plan: Mapping[str, Any]) -> Iterator[Callable[[], Any]]:
    """Start Serve if it is not there, beside what the caller does meanwhile.

    ``serve.start`` returns when its proxies answer, seconds after the controller does. They are
    there at the end.

    Yields:
        Waits for the controller and returns a client of it.

    Raises:
        BootstrapFailed: Serve did not start.
    """

    def start() -> None:
        schema = ServeDeploySchema.model_validate(plan)
        if _get_global_client(raise_if_no_controller_running=False) is None:
            serve.start(
                proxy_location=schema.proxy_location,
                http_options=schema.http_options.model_dump(),
                grpc_options=schema.grpc_options.model_dump(),
            )

    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(start)

        def settle() -> None:
            try:
                starting.result()
            except (RayError, RayServeException, TimeoutError, ValueError) as error:
                raise _refused(error) from error

        def controller() -> Any:
            while True:
                if starting.done():
                    settle()
                client = _get_global_client(raise_if_no_controller_running=False)
                if client is not None:
                    return client
                time.sleep(0.05)

        yield controller
        settle()


def _wait_for_composite(client: Any) -> None:
    end = time.monotonic() + READY_S
    while True:
        own = client.get_serve_status(APPLICATION).app_status
        if own.status == ApplicationStatus.RUNNING:
            return
        if own.status == ApplicationStatus.DEPLOY_FAILED or time.monotonic() > end:
            raise BootstrapFailed(f"C1 did not come up: {own.message[-1500:]}")
        time.sleep(0.1)


def find_serve_config() -> Path:
    """Return ``serve_config.yaml``: of the working directory's checkout, or the packaged one."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent, package):
        if (folder / "serve_config.yaml").is_file():
            return folder / "serve_config.yaml"
    raise BootstrapFailed("serve_config.yaml is neither beside the package nor inside it")


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ray-address", required=True, help="HOST:PORT of the cluster's GCS.")
    arguments = parser.parse_args(argv)
    settings = load_settings()
    host, _, port = arguments.ray_address.rpartition(":")
    for each in (int(port), settings.port("head_node_manager")):
        _wait_for_port(host, each)
    ray.init(
        address=arguments.ray_address,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    try:
        bring_up(settings)
    except HcnaError as error:
        print(f"bootstrap: {error}", file=sys.stderr)  # noqa: T201 - the supervisor's log reads it
        return 1
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""C1 as a Serve deployment: ``import_path: hcna_ray.api.deployment:build``.

Serve pickles a deployment with everything its module reaches, so this module imports nothing that
cannot be pickled; the application, its store connection and its task types are made inside the
replica.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray import serve

if TYPE_CHECKING:
    from fastapi import FastAPI

NAME = "C1"
#: Health checks that may fail in a row before the replica asks to be replaced.
STUCK_CHECKS_MAX = 3
CHECK_S = 5.0


class Composite:
    """One replica of C1. It holds no state that matters: another one can take over at any time."""

    def __init__(self, home: str | None = None, config: str | None = None) -> None:
        """Remember where the settings are; by default the environment says so.

        Args:
            home: State directory of M1.
            config: Settings file.
        """
        self._home, self._config = home, config
        self._app: FastAPI | None = None
        self._failed_checks = 0

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the application; Serve calls this once, inside the replica."""
        from hcna_ray.api.inner_port import keep_inner_port
        from hcna_ray.api.replica import build_replica_app

        self._app = build_replica_app(self._home, self._config)
        settings = self._app.state.services.settings
        keep_inner_port(settings.port("replica_grpc_min"), settings.port("replica_grpc_max"))
        return self._app

    async def check_health(self) -> None:
        """Tell Serve whether this replica can still work; a moderator that is away is no reason.

        Raises:
            RuntimeError: the change feed ended, or the reading thread hangs; a new replica helps.
        """
        from hcna_ray.api.replica import check_replica

        if self._app is None:
            return
        reason = await check_replica(self._app, CHECK_S)
        self._failed_checks = 0 if reason is None else self._failed_checks + 1
        if self._failed_checks >= STUCK_CHECKS_MAX:
            raise RuntimeError(f"C1 replica is stuck: {reason}")


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application for Serve.

    Args:
        args: ``home`` and ``config``, both optional paths on M1; see `Composite`.

    Raises:
        ValueError: another argument is given.
    """
    if unknown := sorted(set(args) - {"home", "config"}):
        raise ValueError(f"unknown argument {unknown[0]!r}; known: home, config")
    deployment = serve.deployment(
        name=NAME,
        num_replicas=1,
        max_ongoing_requests=10_000,
        max_queued_requests=2_000,
        health_check_period_s=5.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=5.0,
        ray_actor_options={"num_cpus": 0, "resources": {"M1": 0.001}},
    )(serve.ingress()(Composite))
    return deployment.bind(**args)

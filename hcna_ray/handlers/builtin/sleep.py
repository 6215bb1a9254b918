"""``sleep``: waits, reports progress, and can be cancelled at any moment."""

from __future__ import annotations

from pydantic import BaseModel, Field

from hcna_ray.handlers.context import TaskContext
from hcna_ray.handlers.registry import Payload, task


class SleepPayload(Payload):
    """How long to sleep."""

    seconds: float = Field(ge=0, le=86400, allow_inf_nan=False, description="Time to sleep.")
    steps: int = Field(default=10, ge=1, le=1000, description="Number of progress reports.")
    resume: bool = Field(
        default=False, description="After a failed or lost attempt, sleep only the rest."
    )


class SleepResult(BaseModel):
    """What was slept, in seconds."""

    slept_s: float = Field(description="By this attempt.")
    resumed_s: float = Field(description="By earlier attempts, if it could resume.")


@task("sleep", payload=SleepPayload, result=SleepResult)
def sleep(payload: SleepPayload, ctx: TaskContext) -> SleepResult:
    """Sleep in steps; with ``resume``, each finished step survives this attempt."""
    done = min(_steps_done(ctx.last_checkpoint), payload.steps) if payload.resume else 0
    step_s = payload.seconds / payload.steps
    for step in range(done, payload.steps):
        ctx.pause(step_s)
        slept = (step + 1) * step_s
        ctx.progress(100 * (step + 1) / payload.steps, f"slept {slept:g} of {payload.seconds:g} s")
        if payload.resume:
            ctx.checkpoint({"steps_done": step + 1})
    return SleepResult(slept_s=(payload.steps - done) * step_s, resumed_s=done * step_s)


def _steps_done(checkpoint: object) -> int:
    done = checkpoint.get("steps_done") if isinstance(checkpoint, dict) else None
    return done if isinstance(done, int) else 0

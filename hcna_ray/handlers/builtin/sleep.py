"""``sleep``: waits, reports progress, and can be cancelled at any moment."""

from __future__ import annotations

from pydantic import BaseModel, Field

from hcna_ray.handlers.context import TaskContext
from hcna_ray.handlers.registry import Payload, task

#: Steps of a task that does not say how many, and the least length of each in seconds.
STEPS_MAX = 10
STEP_S_MIN = 0.1


class SleepPayload(Payload):
    """How long to sleep."""

    seconds: float = Field(ge=0, le=86400, allow_inf_nan=False, description="Time to sleep.")
    steps: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Number of progress reports; by default ten, but no more than ten a second.",
    )
    resume: bool = Field(
        default=False, description="After a failed or lost attempt, sleep only the rest."
    )

    @property
    def step_count(self) -> int:
        """In how many steps to sleep."""
        if self.steps is not None:
            return self.steps
        return max(1, min(STEPS_MAX, int(self.seconds / STEP_S_MIN)))


class SleepResult(BaseModel):
    """What was slept, in seconds."""

    slept_s: float = Field(description="By this attempt.")
    resumed_s: float = Field(description="By earlier attempts, if it could resume.")


@task("sleep", payload=SleepPayload, result=SleepResult)
def sleep(payload: SleepPayload, ctx: TaskContext) -> SleepResult:
    """Sleep in steps; with ``resume``, each finished step survives this attempt."""
    steps = payload.step_count
    done = min(_steps_done(ctx.last_checkpoint), steps) if payload.resume else 0
    step_s = payload.seconds / steps
    for step in range(done, steps):
        ctx.pause(step_s)
        slept = (step + 1) * step_s
        ctx.progress(100 * (step + 1) / steps, f"slept {slept:g} of {payload.seconds:g} s")
        if payload.resume:
            ctx.checkpoint({"steps_done": step + 1})
    return SleepResult(slept_s=(steps - done) * step_s, resumed_s=done * step_s)


def _steps_done(checkpoint: object) -> int:
    done = checkpoint.get("steps_done") if isinstance(checkpoint, dict) else None
    return done if isinstance(done, int) else 0

"""``make tls-cost``: what TLS between Ray's processes costs, on this machine.

Four clusters of their own, one after the other: with TLS, without, without, with. Each is measured
by ``hcna measure``; the ratios of the means are printed. Nothing but a test can leave TLS out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

OFFSET = "23000"
WITH_TLS = (True, False, False, True)
#: Figure of ``hcna measure``, and whether more is better.
FIGURES = {"completes_per_s": True, "accepts_per_s": True, "single_p50_ms": False}


def measure(hcna: Path, home: Path, *, tls: bool) -> dict[str, float]:
    """Return the figures of one cluster."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HCNA_")}
    env |= {"HCNA_HOME": str(home), "HCNA_PORTS__OFFSET": OFFSET, "HCNA_TEST": "1"}
    if not tls:
        env["HCNA_TEST_IN_CLEAR"] = "1"

    def run(*words: str, timeout_s: float = 300) -> str:
        command = [str(hcna), *words]
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if done.returncode:
            sys.exit(f"hcna {' '.join(words)}: {done.stderr}")
        return done.stdout

    try:
        run("up", "--wait", "180")
        run("measure", "--json")  # The first run warms the slots.
        return dict(json.loads(run("measure", "--json")))
    finally:
        run("down")


def main() -> None:
    """Measure and print."""
    hcna = Path(sys.executable).with_name("hcna")
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for tls in WITH_TLS:
        with tempfile.TemporaryDirectory(prefix="hcna-tls-") as home:
            figures = measure(hcna, Path(home), tls=tls)
        found[tls].append(figures)
        told = ", ".join(f"{name} {figures[name]:.1f}" for name in FIGURES)
        print(f"{'with' if tls else 'without'} TLS: {told}", flush=True)  # noqa: T201
    for name, more_is_better in FIGURES.items():
        kinds = (mean(one[name] for one in found[tls]) for tls in (True, False))
        ours, clear = kinds
        ratio = ours / clear if more_is_better else clear / ours
        print(f"measured: TLS costs: {name} {ratio:.2f} of that without")  # noqa: T201


if __name__ == "__main__":
    main()

"""Look up what is known of the locked packages: vulnerabilities, by pip-audit.

    make audit                       what `make` installs (the lock, less what only we develop with)
    make audit ARGS="--all-groups"   that too
    make audit ARGS="--service osv"  ask OSV instead of the Python package index

pip-audit lives in an environment of its own (build/audit), from the same lock. It is told names and
versions with their hashes and installs nothing.

Exit codes: 0 nothing is known, 1 something is, 3 nobody could be asked, or some packages are not
known there (as with a mirror that has files alone): then nothing is said about these, and that
loudly. ``HCNA_AUDIT_MAY_BE_SILENT=1`` makes 0 of 3.
Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "audit"

#: Seconds that one question may take, and all of them.
ANSWER_S = 15
WHOLE_S = 900.0
CLEAN, VULNERABLE, SILENT = 0, 1, 3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a look-up."""

    code: int
    #: What to say, in order.
    lines: tuple[str, ...]


def judge(code: int, output: str, errors: str) -> Verdict:
    """Return what an ended pip-audit has found out.

    Args:
        code: Its exit code: 0 nothing found, 1 something found or an error.
        output: Its JSON; nothing after an error.
        errors: What it said beside that.
    """
    try:
        data: Any = json.loads(output)
        packages = [one for one in data["dependencies"] if "vulns" in one]
        skipped = [one for one in data["dependencies"] if "vulns" not in one]
    except (ValueError, KeyError, TypeError):
        return _silent(errors)
    lines = [
        f"{one['name']} {one['version']}: {vulnerability['id']}"
        f"{_others(vulnerability)}, fixed in {_fixes(vulnerability)}"
        for one in packages
        for vulnerability in one["vulns"]
    ]
    if lines:
        said = f"known vulnerabilities in the lock ({len(packages)} packages looked up)"
        if skipped:
            said += f"; nothing is said about {len(skipped)} others"
        return Verdict(code=VULNERABLE, lines=(*lines, said))
    if skipped:
        return _silent("\n".join(_skipped(one) for one in skipped), asked=len(packages))
    if code or not packages:
        return _silent(errors)
    return Verdict(
        code=CLEAN, lines=(f"no known vulnerability in {len(packages)} locked packages",)
    )


def _skipped(one: dict[str, Any]) -> str:
    return str(one.get("skip_reason") or f"{one.get('name')} was not looked up")


def _others(vulnerability: dict[str, Any]) -> str:
    names = vulnerability.get("aliases") or []
    return f" ({', '.join(names)})" if names else ""


def _fixes(vulnerability: dict[str, Any]) -> str:
    return ", ".join(vulnerability.get("fix_versions") or []) or "no version yet"


def _silent(errors: str, *, asked: int = 0) -> Verdict:
    """Say that nothing is known, of how many packages and why.

    Args:
        errors: Why, a line each; the last ones are repeated.
        asked: Packages of which nothing bad is known, while others could not be looked up.
    """
    why = [line for line in errors.splitlines() if line.strip()]
    about = f"{len(why)} of the locked packages" if asked else "the locked packages"
    stars = "*" * 78
    return Verdict(
        code=SILENT,
        lines=(
            stars,
            "NOT AUDITED: the vulnerability service gave no answer. Nothing is known about",
            f"{about} from this run; run make audit again where it can be reached.",
            *(f"  {line[:200]}" for line in why[-3:]),
            *([f"No known vulnerability in {asked} others."] if asked else []),
            stars,
        ),
    )


def main(arguments: Sequence[str]) -> int:
    """Audit the lock; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--service", choices=("pypi", "osv", "esms"), default="pypi")
    parser.add_argument("--all-groups", action="store_true", help="also what we develop with")
    parser.add_argument("--requirements", type=Path, help="these, not the lock")
    options = parser.parse_args(arguments)
    PLACE.mkdir(parents=True, exist_ok=True)
    try:
        tool = _tool()
        wanted = options.requirements or _locked(all_groups=options.all_groups)
        command = [str(tool), "--requirement", str(wanted), "--no-deps", "--disable-pip"]
        command += ["--vulnerability-service", options.service, "--timeout", str(ANSWER_S)]
        command += ["--progress-spinner", "off", "--format", "json", "--aliases", "on"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=WHOLE_S, check=False, cwd=ROOT
        )
        verdict = judge(done.returncode, done.stdout, done.stderr)
    except subprocess.TimeoutExpired:
        verdict = _silent(f"it took longer than {WHOLE_S:.0f} s")
    except subprocess.CalledProcessError as error:
        verdict = _silent(f"pip-audit could not be installed\n{error.stderr}")
    sys.stdout.write("\n".join(verdict.lines) + "\n")
    if verdict.code == SILENT and os.environ.get("HCNA_AUDIT_MAY_BE_SILENT") == "1":
        return 0
    return verdict.code


def _tool() -> Path:
    """Return pip-audit, installed from the lock if it is missing."""
    uv, environment = os.environ.get("UV", "uv"), PLACE / "venv"
    subprocess.run(
        [uv, "sync", "--frozen", "--quiet", "--only-group", "audit"],
        env={**os.environ, "UV_PROJECT_ENVIRONMENT": str(environment)},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=WHOLE_S,
    )
    return environment / "bin" / "pip-audit"


def _locked(*, all_groups: bool) -> Path:
    """Write the lock as requirements with hashes; return the file."""
    target = PLACE / "requirements.txt"
    command = [os.environ.get("UV", "uv"), "export", "--frozen", "--quiet", "--no-emit-project"]
    command += ["--all-groups"] if all_groups else ["--no-default-groups"]
    command += ["--format", "requirements-txt", "--output-file", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=WHOLE_S)
    return target


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The checker knows nothing of the product: it imports none of it, and runs where there is none."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

from tests.checker.histories.bad import BAD
from tests.checker.histories.good import GOOD
from tests.checker.test_histories import tell

HERE = Path(__file__).parent
#: What test clients need beside the standard library, only where they are.
ALLOWED = {"recorder.py": {"httpx"}, "postgres_dump.py": {"psycopg"}}
#: Refuses whatever is not in the standard library or in the copied folder.
RUN = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in sys.stdlib_module_names | {"tests"}:
            raise ImportError(f"the checker asked for {name}")
sys.meta_path.insert(0, Hidden())
sys.argv = ["checker", *sys.argv[2:]]
runpy.run_module("tests.checker", run_name="__main__")
"""


def imports(path: Path) -> set[str]:
    """Return every module that a file names in an import, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("__import__", "exec", "eval"), f"{path}: {node.func.id}"
    return found


def test_no_file_imports_anything_but_itself_and_the_standard_library() -> None:
    files = [path for path in HERE.rglob("*.py") if not path.name.startswith("test_")]
    assert len(files) > 15
    for path in files:
        for module in imports(path):
            root = module.partition(".")[0]
            own = module == "tests.checker" or module.startswith("tests.checker.")
            known = root in sys.stdlib_module_names or root in ALLOWED.get(path.name, set())
            assert own or known, f"{path.name} imports {module}"
            assert root != "importlib", f"{path.name} could import anything"


def run_alone(folder: Path, run: Path) -> subprocess.CompletedProcess[str]:
    """Run the checker isolated, without site-packages, from a copy beside which nothing is."""
    alone = folder / "alone"
    if not alone.exists():
        shutil.copytree(HERE, alone / "tests" / "checker")
        (alone / "tests" / "__init__.py").touch()
    command = [sys.executable, "-I", "-S", "-c", RUN, str(alone), str(run)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)


def test_it_runs_where_the_product_is_not(tmp_path: Path) -> None:
    for name, story, status in (
        ("good", GOOD["a_moderator_is_killed_and_comes_back"], 0),
        ("bad", BAD["two_leases_at_once"][1], 1),
    ):
        run = tmp_path / name
        run.mkdir()
        tell(story, run)
        done = run_alone(tmp_path, run)
        assert done.returncode == status, done.stdout + done.stderr


def test_what_it_could_not_check_fails_the_run_unless_it_was_declared(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    tell(GOOD["one_task_runs"], run)
    (run / "effects.jsonl").unlink()
    done = run_alone(tmp_path, run)
    assert done.returncode == 3
    assert "INCOMPLETE: no violation, but C7b, C8 not checked" in done.stdout

    text = (run / "schedule.json").read_text()
    without = '{"without": {"C7b": "no log of effects", "C8": "the same"}, '
    (run / "schedule.json").write_text(without + text[1:])
    done = run_alone(tmp_path, run)
    assert done.returncode == 0
    assert "the schedule says: no log of effects" in done.stdout


def test_a_folder_without_evidence_is_not_clean(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert run_alone(tmp_path, tmp_path / "run").returncode == 3

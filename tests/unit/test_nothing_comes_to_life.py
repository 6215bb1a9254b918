"""No code of the product turns bytes into objects or programs: no pickle, eval, exec, yaml.load.

Every place that could is listed here with the reason why nothing from the network gets there. A
place that is new fails, and so does one on the list that is gone. Ray itself pickles what its
members send each other: whoever is a member is trusted (docs/SECURITY.md).
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hcna_ray"

#: Modules that are no use but for this, or that read formats which can do it.
MODULES = frozenset(
    {
        "_pickle",
        "cPickle",
        "cloudpickle",
        "code",
        "codeop",
        "dbm",
        "dill",
        "imp",
        "joblib",
        "jsonpickle",
        "marshal",
        "pdb",
        "pickle",
        "pickletools",
        "runpy",
        "shelve",
        "xml",
        "xmlrpc",
        "zipfile",
        "zipimport",
    }
)
BUILTINS = frozenset({"__import__", "compile", "eval", "exec", "execfile"})
#: Functions by the end of their dotted name. Of YAML, only what begins with ``safe_`` is safe.
CALLS = frozenset(
    {
        "asyncio.create_subprocess_shell",
        "importlib.import_module",
        "import_module",
        "np.load",
        "numpy.load",
        "os.popen",
        "os.system",
        "pkgutil.resolve_name",
        "shutil.unpack_archive",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "tar.extract",
        "tar.extractall",
        "tarfile.open",
        "torch.load",
        "trimesh.load",
        "yaml.dump",
        "yaml.full_load",
        "yaml.full_load_all",
        "yaml.load",
        "yaml.load_all",
        "yaml.unsafe_load",
        "yaml.unsafe_load_all",
    }
)

#: (file, what) and how often; and why that is harmless.
REVIEWED: dict[tuple[str, str], tuple[int, str]] = {
    ("runtime/local_rpc.py", "import pickle"): (
        1,
        "a Unix socket in a directory of the owner alone; the caller's uid is checked before a "
        "byte is read, and both ends are processes of that user on this machine",
    ),
    ("config.py", "yaml.load"): (
        1,
        "of the owner's own file, with a subclass of SafeLoader that refuses a key given twice",
    ),
    ("cli/demo.py", "trimesh.load"): (
        1,
        "a GLB by its name's ending, which the demo has just had made; that format is JSON and "
        "arrays",
    ),
    ("observability/monitoring.py", "yaml.dump"): (
        1,
        "it writes, and with a subclass of SafeDumper, which knows plain values alone",
    ),
    ("supervisor/ray_start.py", "import_module"): (3, "of names that are written out there"),
    ("supervisor/serve_proxy.py", "import_module"): (1, "of a name that is written out there"),
}


def findings(source: str) -> Counter[str]:
    """Return what of the above a module does, and how often."""
    found: Counter[str] = Counter()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
            found.update(f"import {name}" for name in names if name in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            if module.partition(".")[0] in MODULES:
                found[f"import {module.partition('.')[0]}"] += 1
            imported = [f"{module}.{alias.name}" for alias in node.names]
            # A function that is imported by name is found where it is called, unless it is renamed.
            renamed = [f"{module}.{a.name}" for a in node.names if a.asname not in (None, a.name)]
            found.update(name for name in renamed if name in CALLS)
            found.update(
                name for name in imported if name in CALLS and not name.endswith(".import_module")
            )
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in BUILTINS or name in CALLS or name.removeprefix("builtins.") in BUILTINS:
                found[name] += 1
            if any(is_shell(keyword) for keyword in node.keywords):
                found["shell=True"] += 1
    return found


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def is_shell(keyword: ast.keyword) -> bool:
    off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
    return keyword.arg == "shell" and not off


def test_what_could_bring_bytes_to_life_has_been_reviewed() -> None:
    found: dict[tuple[str, str], int] = {}
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 150
    for path in files:
        for what, count in findings(path.read_text(encoding="utf-8")).items():
            found[str(path.relative_to(PACKAGE)), what] = count
    assert found == {place: count for place, (count, _) in REVIEWED.items()}
    assert all(len(reason) > 20 for _, reason in REVIEWED.values())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal",
        "from pickle import loads",
        "from xml.etree import ElementTree",
        "import shelve as kept",
        "eval(text)",
        "exec(compile(text, '', 'exec'))",
        "builtins.eval(text)",
        "__import__(name)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "from os import system as run",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "np.load(path, allow_pickle=True)",
        "with tarfile.open(path) as tar: tar.extractall()",
        "def f():\n    import dill",
    ],
)
def test_the_search_finds_each_of_them(source: str) -> None:
    assert findings(source)


@pytest.mark.parametrize(
    "source",
    [
        "yaml.safe_load(text)",
        "re.compile(text)",
        "regex = re.compile",
        "json.loads(text)",
        "subprocess.run(command, shell=False)",
        "self.eval(text)",
        "evaluate(text)",
    ],
)
def test_the_search_leaves_others_alone(source: str) -> None:
    assert not findings(source)


def test_the_settings_loader_is_a_safe_one() -> None:
    import yaml

    from hcna_ray.config import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
    constructors = {*_Loader.yaml_constructors, *_Loader.yaml_multi_constructors}
    assert not [tag for tag in constructors if tag and "python" in tag]

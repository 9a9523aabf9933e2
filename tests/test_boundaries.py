"""Imports point one way, commands start light, modules stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "model", "edge", "cloud", "train", "simulate")
OURS = {f"offramp_{package}" for package in PACKAGES}
HEAVY = {"torch", "transformers", "ray", "onnxruntime", "onnx", "onnxscript", "matplotlib"}

# What no file of a package may import, anywhere in it:
#   common <- model <- cloud, train;  common <- edge <- simulate
FORBIDDEN: dict[str, set[str]] = {
    "common": (OURS - {"offramp_common"}) | HEAVY,
    "model": (OURS - {"offramp_common", "offramp_model"}) | {"ray", "onnxruntime"},
    "edge": (OURS - {"offramp_common", "offramp_edge"}) | (HEAVY - {"onnxruntime"}),
    "cloud": (OURS - {"offramp_common", "offramp_model", "offramp_cloud"}) | {"ray", "onnxruntime"},
    "train": (OURS - {"offramp_common", "offramp_model", "offramp_train"}) | {"ray"},
    "simulate": (OURS - {"offramp_common", "offramp_edge", "offramp_simulate"})
    | (HEAVY - {"onnxruntime"}),
}
# (file, or package with every file of it, and the module it may import after all)
EXCEPTIONS: dict[str, set[str]] = {
    "cloud/offramp_cloud/app.py": {"ray"},  # the only files that know Ray: Serve's side ...
    "cloud/offramp_cloud/cluster.py": {"ray"},  # ... and the cluster's
    "cloud/offramp_cloud/ray_executor.py": {"ray"},  # ... and sweeps on it
    "train/": {"offramp_edge.runtime"},  # the device's graphs are measured and calibrated there
}

MAX_MODULE_LINES = 300
MAX_FUNCTION_LINES = 40  # its docstring not counted


def files(*packages: str) -> list[Path]:
    found = [
        path
        for package in packages
        for path in sorted((ROOT / package / f"offramp_{package}").rglob("*.py"))
        if "_pb2" not in path.name
    ]
    assert found, f"no files in {packages}"
    return found


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, those within functions and by name included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the package's name"
            # `from package import module` names a module too.
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            first = node.args[0]
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def within(module: str, names: set[str]) -> bool:
    """Whether `module` is one of `names`, or lies in one of them."""
    return any(module == name or module.startswith(name + ".") for name in names)


def violations(package: str, path: str, source: str) -> list[str]:
    allowed = {
        name for where, names in EXCEPTIONS.items() if path.startswith(where) for name in names
    }
    return [
        f"{path}:{line}: imports {module}"
        for line, module in imports(source)
        if within(module, FORBIDDEN[package]) and not within(module, allowed)
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    found = [
        violation
        for path in files(package)
        for violation in violations(package, str(path.relative_to(ROOT)), path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("edge", "import torch"),
        ("edge", "def f():\n    from offramp_model.store import load_model"),
        ("edge", "from offramp_cloud import engine"),
        ("common", "import onnxruntime as ort"),
        ("cloud", "import ray.serve"),
        ("cloud", "import offramp_edge.link"),
        ("train", "from offramp_edge import worker"),
        ("train", "from offramp_edge.worker import EdgeWorker"),
        ("simulate", "import importlib\nimportlib.import_module('offramp_cloud.engine')"),
        ("model", "import offramp_train"),
    ],
)
def test_the_check_finds_what_is_forbidden(package: str, source: str) -> None:
    assert violations(package, f"{package}/offramp_{package}/made_up.py", source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("train/offramp_train/made_up.py", "from offramp_edge.runtime import OnnxLayers"),
        ("train/offramp_train/made_up.py", "from offramp_edge import runtime"),
        ("cloud/offramp_cloud/app.py", "from ray import serve"),
        ("edge/offramp_edge/made_up.py", "import onnxruntime, torchless, rayon"),
        ("cloud/offramp_cloud/made_up.py", "from offramp_model.store import load_model"),
    ],
)
def test_the_check_lets_pass_what_is_allowed(path: str, source: str) -> None:
    assert not violations(path.partition("/")[0], path, source)


def test_nothing_but_training_itself_imports_training() -> None:
    for package in PACKAGES:
        if package != "train":
            assert "offramp_train" in FORBIDDEN[package]


def test_the_command_line_starts_without_anything_heavy() -> None:
    """`offramp --help` on a device that has no torch, and at once where there is one."""
    script = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
from offramp_common.cli import build_parser
build_parser()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_every_entry_point_names_a_function_that_is_there() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for command, target in points["offramp.commands"].items():
        module, _, function = target.partition(":")
        path = (
            ROOT / module.split(".")[0].removeprefix("offramp_") / f"{module.replace('.', '/')}.py"
        )
        assert path.is_file(), f"{command}: {path} is missing"
        names = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
        assert function in names, f"{command}: {path} has no {function}"


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_and_functions_stay_small(package: str) -> None:
    found = []
    for path in files(package):
        where, lines = path.relative_to(ROOT), len(path.read_text().splitlines())
        if lines > MAX_MODULE_LINES:
            found.append(f"{where}: {lines} lines, at most {MAX_MODULE_LINES}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                documentation = len((ast.get_docstring(node, clean=False) or "").splitlines())
                long = (node.end_lineno or node.lineno) - node.lineno + 1 - documentation
                if long > MAX_FUNCTION_LINES:
                    found.append(f"{where}:{node.lineno}: {node.name} has {long} lines")
    assert not found, "\n".join(found)


def test_no_module_is_called_utils_and_none_is_a_manager() -> None:
    names = {path.stem for path in files(*PACKAGES)}
    assert not names & {"utils", "util", "helpers", "misc", "manager", "factory"}

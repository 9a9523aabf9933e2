"""What is shipped: the wheel, the sdist, the wire code, and nothing of the machine it was made on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from toy_models import toy_bundle

from offramp_common.bundle import write_manifest
from offramp_model.export import add_graphs

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "model", "edge", "cloud", "train", "simulate")
WIRE = "offramp_common/wire/"
# Written in parts, so that this file does not hold what it looks for.
MACHINE = ("/" + "work/", "." + "library", "/" + "root/", "pypi" + ".org", "pythonhosted" + ".org")


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel made from it: what a package index would serve."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    return folder


@pytest.fixture(scope="module")
def wheel_names(built: Path) -> list[str]:
    (wheel,) = built.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_holds_every_module_of_every_package(wheel_names: list[str]) -> None:
    for package in PACKAGES:
        folder = ROOT / package
        here = {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
        there = {name for name in wheel_names if name.startswith(f"offramp_{package}/")}
        assert here <= there, f"{package} lacks {sorted(here - there)}"
        assert f"offramp_{package}/py.typed" in there


def test_the_wheel_holds_the_generated_wire_code(wheel_names: list[str]) -> None:
    for name in ("offload_pb2.py", "offload_pb2.pyi", "offload_pb2_grpc.py", "__init__.py"):
        assert WIRE + name in wheel_names


def test_the_wheel_holds_nothing_else(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert tops == {f"offramp_{package}" for package in PACKAGES} | {"offramp-0.1.0.dist-info"}
    kinds = {Path(name).suffix for name in wheel_names if ".dist-info/" not in name}
    assert kinds <= {
        ".json",
        ".npz",
        ".py",
        ".pyi",
        ".typed",
        ".toml",
        ".css",
        ".js",
        ".html",
        ".svg",
    }, kinds
    assert not [name for name in wheel_names if "__pycache__" in name]


def test_the_sdist_holds_the_sources_and_neither_models_nor_results(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        size = sum(member.size for member in archive.getmembers())
    for name in ("proto/offload.proto", "Makefile", "constraints.txt", "LICENSE", "tests/law.py"):
        assert name in names
    assert not [name for name in names if name.startswith("bundles/") or "/results/" in name]
    assert not [name for name in names if name.endswith((".safetensors", ".onnx", ".tsv"))]
    assert size < 8e6  # the shipped bundle alone has 25


def test_the_wire_code_is_what_the_proto_gives() -> None:
    run("bash", "scripts/check_proto.sh", PYTHON=sys.executable)


def texts() -> Iterator[tuple[str, str]]:
    """(path, text) of every file that is, or is about to be, in the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    for name in listed.split("\0"):
        path = ROOT / name
        if name and path.is_file() and path.stat().st_size < 2e6:
            try:
                yield name, path.read_text()
            except UnicodeDecodeError:
                continue


def test_no_file_names_a_path_of_the_machine_it_was_made_on() -> None:
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts()
        if any(word in text for word in MACHINE)
        for number, line in enumerate(text.splitlines(), start=1)
        if any(word in line for word in MACHINE)
    ]
    assert not found, "\n".join(found)


def test_every_relative_link_of_the_docs_leads_somewhere() -> None:
    broken = [
        f"{name}: {target}"
        for name, text in texts()
        if name.endswith(".md")
        for target in re.findall(r"\]\(([^)#\s]+)", text)
        if "://" not in target and not (ROOT / name).parent.joinpath(target).exists()
    ]
    assert not broken, "\n".join(broken)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment's bin folder, made as deploy/Dockerfile.edge makes its image."""
    folder = tmp_path_factory.mktemp("device")
    copied = [line.split()[1:-1] for line in dockerfile("edge") if line.startswith("COPY ")]
    for name in (name for names in copied for name in names):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "src" / name)
        else:
            (folder / "src").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "src" / name)
    run(sys.executable, "-m", "venv", folder / "venv")
    pip = folder / "venv" / "bin" / "pip"
    (command,) = [line for line in dockerfile("edge") if line.startswith("RUN pip install")]
    arguments = command.removeprefix("RUN pip").partition("&&")[0].split()
    assert arguments == ["install", "--no-cache-dir", "-c", "constraints.txt", "."]
    done = subprocess.run(
        [pip, "install", "--disable-pip-version-check", "--no-compile", *arguments[2:]],
        cwd=folder / "src",
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    if "No matching distribution" in done.stderr or "ConnectionError" in done.stderr:
        pytest.skip(f"PIP CANNOT REACH AN INDEX, the device was not tested: {done.stderr[-500:]}")
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "venv" / "bin"


def dockerfile(tier: str) -> list[str]:
    text = (ROOT / "deploy" / f"Dockerfile.{tier}").read_text()
    return text.replace("\\\n", " ").splitlines()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_base_install_answers_on_the_device_without_torch_transformers_or_ray(
    device: Path, tmp_path: Path
) -> None:
    bundle = add_graphs(toy_bundle(tmp_path / "toy"))
    points = {precision: bundle.knobs("fp32") for precision in ("fp32", "int8")}
    write_manifest(bundle.path, replace(bundle.manifest, operating_points=points))
    installed = json.loads(run(device / "pip", "list", "--format", "json").stdout)
    listed = {entry["name"].lower() for entry in installed}
    assert "offramp" in listed
    extra = {"torch", "transformers", "ray", "onnx", "onnxscript", "matplotlib", "pandas", "scipy"}
    assert not listed & extra
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"id": i, "text": f"w{i} w{i + 1} w2"}) + "\n" for i in range(20))
    )
    # From another folder: nothing of the repository may be needed.
    command = (device / "offramp", "edge", "run", "--bundle", "toy", "--input", "in.jsonl")
    for precision in points:
        done = run(*command, "--precision", precision, cwd=tmp_path, PYTHONPATH="")
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert [answer["id"] for answer in answers] == list(range(20))
        assert all(answer["label"] in bundle.manifest.task.labels for answer in answers)
        assert all("error" not in answer for answer in answers)


@pytest.mark.slow
def test_on_the_device_every_command_says_what_it_would_need(device: Path, tmp_path: Path) -> None:
    assert "edge" in run(device / "offramp", "--help", cwd=tmp_path).stdout
    done = subprocess.run(
        [device / "offramp", "cloud", "serve", "--bundle", tmp_path, "--listen", "127.0.0.1:0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr

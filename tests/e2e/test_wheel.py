"""The wheel that is built from this repository, in an environment without it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

import megatron_sdsearch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files: setuptools leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    source = folder / "source"
    for name in filter(None, tracked.stdout.split("\0")):
        if name.startswith("megatron_sdsearch/") or "/" not in name:
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, beside the dependencies of this one but not its editable install."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    with ZipFile(wheel) as content:
        content.extractall(packages)
    # After the environment's own packages, and without running the .pth files of the editable install.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def run(python: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(python), *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as content:
        names = set(content.namelist())
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"megatron_sdsearch", f"megatron_sdsearch-{megatron_sdsearch.__version__}.dist-info"}
    tracked = subprocess.run(
        ["git", "ls-files", "megatron_sdsearch"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    assert set(tracked.stdout.split()) <= names


def test_help_and_check_run_from_the_wheel(python: Path, tmp_path: Path) -> None:
    where = run(python, "-c", "import megatron_sdsearch; print(megatron_sdsearch.__file__)", folder=tmp_path)
    assert str(python.parents[1]) in where.stdout
    shown = run(python, "-m", "megatron_sdsearch", "--help", folder=tmp_path)
    assert (shown.returncode, "train" in shown.stdout) == (0, True)
    (tmp_path / "config.yaml").write_text(
        "run_dir: run\nmodel: {hf_dir: missing}\ndata: {train: none.jsonl}\nretrieval: {corpus: c}\n"
    )
    checked = run(python, "-m", "megatron_sdsearch", "check", "config.yaml", folder=tmp_path)
    assert checked.returncode == 2, checked.stderr
    assert "model.hf_dir" in checked.stdout

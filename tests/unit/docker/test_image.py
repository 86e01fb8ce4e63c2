"""The image, as far as it can be tried without docker: copies, constraints, entry point, compose file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def copies() -> list[tuple[list[str], str]]:
    """Sources and destination of every COPY."""
    lines = [line.split()[1:] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    return [(words[:-1], words[-1]) for words in lines]


def lay_out(target: Path) -> Path:
    """The folder that the image's COPY instructions make of this checkout."""
    for sources, destination in copies():
        for source in sources:
            into = target / destination / (Path(source).name if destination.endswith("/") else "")
            into.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, into, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, into)
    return target


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("image"))


def test_the_context_lets_in_exactly_what_is_copied() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignored[0] == "*"
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert allowed == {Path(source).parts[0] for sources, _ in copies() for source in sources}


def test_the_image_is_pinned_not_root_and_holds_no_secret() -> None:
    (base,) = re.findall(r"^ARG BASE=(.*)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"lmsysorg/sglang:v\d+\.\d+\.\d+-cu\d+@sha256:[0-9a-f]{64}", base)
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["1000:0"]
    assert not re.search(r"^(ARG|ENV).*(TOKEN|PASSWORD|KEY|SECRET)", DOCKERFILE, re.MULTILINE)
    steps = set(re.findall(r"^RUN .*docker/install\.sh (\w+)", DOCKERFILE, re.MULTILINE))
    assert steps == {"libraries", "apex", "package"}


# The steps of pip


def fake_python(folder: Path, installed: str) -> Path:
    """An interpreter whose pip has some packages, and writes down what it is asked and given to hold fast."""
    python = folder / "python"
    python.write_text(f"""#!/usr/bin/env bash
case "$*" in
  *"pip --no-cache-dir --disable-pip-version-check list"*) printf '{installed}' ;;
  *" install "*)
    printf '%s\\n' "$*" >> {folder}/asked
    while [ $# -gt 0 ]; do case $1 in
      --constraint) cat "$2" > {folder}/held ;;
      --requirement) cat "$2" >> {folder}/wanted ;;
    esac; shift; done ;;
  *) exec {shutil.which("python3")} "$@" ;;
esac
""")
    python.chmod(0o755)
    return python


def install(image: Path, step: str, python: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(python)}
    return subprocess.run([image / "docker/install.sh", step], env=environment, capture_output=True, text=True)


def test_what_the_base_holds_stays_and_what_it_lacks_is_pinned(image: Path, tmp_path: Path) -> None:
    python = fake_python(tmp_path, "torch==2.13.0+cu130\\nPydantic_Core==2.1.0\\nmegatron-sdsearch==0.1.0\\n")
    done = install(image, "libraries", python)
    assert done.returncode == 0, done.stderr
    held = dict(line.split("==") for line in (tmp_path / "held").read_text().split())
    assert held["torch"] == "2.13.0+cu130"
    assert held["Pydantic_Core"] == "2.1.0"
    assert "pydantic_core" not in held, "the base's version is the only one"
    assert held["tantivy"] == "0.27.0", "from constraints.txt"
    assert held["megatron-core"] == "0.19.2", "the image's own, not that of constraints.txt"
    assert held["transformer-engine"].startswith("2.")
    assert "megatron-sdsearch" not in held
    wanted = (tmp_path / "wanted").read_text()
    assert "tantivy==0.27.*" in wanted, "the dependencies of pyproject.toml"
    assert "transformer-engine[core_cu13,pytorch]==" in wanted


def test_apex_comes_from_nvidia_at_one_commit_and_the_package_alone(image: Path, tmp_path: Path) -> None:
    python = fake_python(tmp_path, "torch==2.13.0\\n")
    assert install(image, "apex", python).returncode == 0
    assert install(image, "package", python).returncode == 0
    apex, package = (tmp_path / "asked").read_text().splitlines()
    assert re.search(r"apex @ git\+https://github\.com/NVIDIA/apex\.git@[0-9a-f]{40}$", apex)
    assert package.endswith(f"install --no-deps {image}")


def test_an_unknown_step_is_told(image: Path) -> None:
    done = install(image, "everything", Path("python3"))
    assert (done.returncode, done.stderr) == (2, "usage: install.sh libraries|apex|package\n")


# The entry point


TELLS = 'echo "python3 $*; $NCCL_CUMEM_ENABLE"'


def run_entry(
    image: Path, folder: Path, *arguments: str, gpus: int | None = 8, python: str = TELLS, **more: str
) -> str:
    """What it starts, with a machine's GPUs and an interpreter that tells its arguments; or what it says."""
    smi = "exit 9" if gpus is None else "\n".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'" for i in range(gpus))
    scripts = {"nvidia-smi": smi, "python3": python}
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    environment: Mapping[str, str] = {"PATH": f"{folder}:/usr/bin:/bin", **more}
    command = [str(image / "docker/entrypoint.sh"), *arguments]
    done = subprocess.run(command, env=environment, cwd=image, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else f"{done.returncode}: {done.stderr.strip()}"


def test_training_takes_every_gpu_and_hands_signals_on(image: Path, tmp_path: Path) -> None:
    said = run_entry(image, tmp_path, "train", "a.yaml", "seed=2")
    assert said == (
        "python3 -m megatron_sdsearch check a.yaml seed=2 --nproc-per-node 8; 0\n"
        "python3 -m torch.distributed.run --standalone --nproc-per-node 8 "
        "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 600 "
        "-m megatron_sdsearch train a.yaml seed=2; 0"
    )
    assert "--nproc-per-node 4 " in run_entry(image, tmp_path, "train", "a.yaml", NUM_TRAINERS="4")


@pytest.mark.parametrize(("code", "is_started"), [(0, True), (1, True), (2, False)])
def test_what_check_finds_wrong_is_not_started(image: Path, tmp_path: Path, code: int, is_started: bool) -> None:
    script = f'case $* in *" check "*) echo "a: b; c" >&2; exit {code} ;; *) echo "$*" ;; esac'
    said = run_entry(image, tmp_path, "train", "a.yaml", python=script)
    assert ("torch.distributed.run" in said) == is_started
    assert is_started or said == "2: a: b; c"


def test_without_a_gpu_training_says_what_is_missing(image: Path, tmp_path: Path) -> None:
    for none in (None, 0):
        said = run_entry(image, tmp_path, "train", "a.yaml", gpus=none)
        assert said.startswith("2: no GPU in this container: docker run")


def test_other_commands_are_the_package_s_or_anything(image: Path, tmp_path: Path) -> None:
    assert run_entry(image, tmp_path, "evaluate", "a.yaml").startswith("python3 -m megatron_sdsearch evaluate a.yaml;")
    assert run_entry(image, tmp_path, "--help").startswith("python3 -m megatron_sdsearch --help;")
    assert run_entry(image, tmp_path, "--", "echo", "a b") == "a b"


# The compose file


def test_compose_has_one_source_of_elasticsearch_and_names_its_services() -> None:
    compose: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    included = yaml.safe_load((ROOT / compose["include"][0]).read_text())
    assert set(compose["services"]) == {"trainer"}
    trainer = compose["services"]["trainer"]
    assert set(trainer["depends_on"]) <= set(included["services"])
    assert "healthcheck" in included["services"]["elasticsearch"], "waited for"
    named = {volume.split(":")[0] for volume in trainer["volumes"] if not volume.startswith("${")}
    assert named <= set(included["volumes"])
    assert "--dns elasticsearch" in included["services"]["certificates"]["command"][-1], (
        "its certificate names the host"
    )


def test_the_settings_of_the_compose_file_are_settings(image: Path) -> None:
    from megatron_sdsearch.config import load_config

    command = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["trainer"]["command"]
    loaded = load_config(ROOT / "examples/tiny/config.yaml", command[2:])
    assert loaded.retrieval is not None
    assert loaded.retrieval.elasticsearch.urls == ("https://elasticsearch:9200",)
    assert loaded.retrieval.engine == "elasticsearch"

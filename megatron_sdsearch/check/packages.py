"""Installed packages against what this project asks for: its own metadata says it, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement

from megatron_sdsearch.check.findings import Finding
from megatron_sdsearch.check.subject import Subject

_SHOWN = ("megatron-core", "torch", "transformers")


def check(subject: Subject) -> Iterator[Finding]:
    """Of the environment that runs this check, which should be the trainer's."""
    extras = [""]
    retrieval = subject.config.retrieval
    if retrieval is not None and retrieval.engine == "elasticsearch" and retrieval.replay.mode != "only":
        extras.append("elasticsearch")
    try:
        wanted = [Requirement(text) for text in requires("megatron-sdsearch") or ()]
    except PackageNotFoundError:
        yield Finding.note("packages", "megatron-sdsearch is not installed here: versions were not compared")
        return
    for requirement in wanted:
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            yield from _installed(requirement)
    if subject.world.has_gpu:
        yield from _gpu(subject)
    told = ", ".join(f"{name} {version(name)}" for name in _SHOWN)
    yield Finding.note("packages", f"Python {sys.version.split()[0]}, {told}")


def _installed(requirement: Requirement) -> Iterator[Finding]:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        yield Finding.error("packages", f"{requirement.name} is not installed", f"pip install '{requirement}'")
        return
    if not requirement.specifier.contains(found, prereleases=True):
        yield Finding.error(
            "packages",
            f"{requirement.name} {found} is not in {requirement.specifier}",
            f"pip install '{requirement.name}{requirement.specifier}'",
        )


def _gpu(subject: Subject) -> Iterator[Finding]:
    """transformer-engine's layers are what trains there; a machine without GPUs need not have it."""
    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        yield Finding.note("packages", "this machine has no GPU: transformer-engine, NCCL and drivers cannot be seen")
        return
    try:
        if subject.config.model.layer_spec != "local":
            version("transformer-engine")
    except PackageNotFoundError:
        fix = "pip install 'megatron-sdsearch[gpu]', or use an image that has it"
        yield Finding.error("packages", "transformer-engine is not installed, and trains on GPUs", fix)
    if num_gpus < subject.world.gpus_per_node:
        yield Finding.warning(
            "--gpus-per-node",
            f"{subject.world.gpus_per_node}, and this machine has {num_gpus}",
            "check on a node of the kind that trains",
        )

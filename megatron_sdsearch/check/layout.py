"""Parallel sizes against the model and the world."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_sdsearch.allocation import allocation_problems
from megatron_sdsearch.check.findings import Finding
from megatron_sdsearch.check.subject import Subject
from megatron_sdsearch.model.hf_config import hf_config_problems
from megatron_sdsearch.model.shape import ModelShape, layout_problems, padded_vocab_size


def check(subject: Subject) -> Iterator[Finding]:
    """What divides what, and what crosses nodes."""
    world, parallel = subject.world, subject.config.parallel
    for error in allocation_problems(subject.config, world.allocation):
        yield Finding.of(error, error.field)
    if world.is_assumed:
        told = f"nobody said how many processes there are; {world.size} are assumed, see --nodes and --nproc-per-node"
        yield Finding.note("parallel", told)
    if world.num_idle_gpus:
        yield Finding.warning(
            "model.dtype",
            f"{subject.config.model.dtype} is for CPUs, and Slurm gives {world.num_idle_gpus} GPUs per node: they "
            "would not be used",
            "set model.dtype=bfloat16; for a run on CPUs say --device cpu",
        )
    tensor = parallel.tensor_model_parallel_size
    if tensor > world.ranks_per_node:
        yield Finding.warning(
            "parallel.tensor_model_parallel_size",
            f"{tensor} is more than the {world.ranks_per_node} processes of a node: every layer's all-reduce "
            "would go over the network",
            "keep tensor within a node, and take parallel.pipeline_model_parallel_size for the rest",
        )
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel and world.has_gpu:
        yield Finding.note("parallel.sequence_parallel", "false: every rank keeps whole activations between layers")
    yield from _model(subject)


def _model(subject: Subject) -> Iterator[Finding]:
    hf_config, parallel = subject.hf_config.value, subject.config.parallel
    if hf_config is None or hf_config_problems(hf_config):
        return
    problems = [
        Finding.of(error, error.field) for error in layout_problems(ModelShape.from_hf_config(hf_config), parallel)
    ]
    yield from problems
    if problems:
        return
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    padding = padded_vocab_size(hf_config.vocab_size, tensor) - hf_config.vocab_size
    yield Finding.note(
        "parallel",
        f"tensor {tensor} x pipeline {pipeline} x data {subject.num_ranks_dp}: "
        f"{hf_config.num_hidden_layers // pipeline} layers per stage, "
        f"{hf_config.num_attention_heads // tensor} heads and "
        f"{_per_rank(hf_config.num_key_value_heads, tensor)}, vocabulary padded by {padding}",
    )


def _per_rank(num_key_value_heads: int, tensor: int) -> str:
    if tensor > num_key_value_heads:
        return f"one KV head for {tensor // num_key_value_heads} ranks"
    return f"{num_key_value_heads // tensor} KV heads per rank"

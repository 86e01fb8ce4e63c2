"""SD-Search on megatron-core: GRPO for search agents, with self-distillation from hindsight at the query tokens.

Importing the package loads neither torch nor megatron-core: each name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sdsearch.config import RunConfig as RunConfig
    from megatron_sdsearch.config import load_config as load_config
    from megatron_sdsearch.errors import ConfigError as ConfigError
    from megatron_sdsearch.errors import SDSearchError as SDSearchError
    from megatron_sdsearch.hindsight.block import build_hindsight as build_hindsight
    from megatron_sdsearch.loss.grpo import grpo_loss as grpo_loss
    from megatron_sdsearch.loss.jsd import vocab_parallel_jsd as vocab_parallel_jsd
    from megatron_sdsearch.loss.jsd import vocab_parallel_topk_jsd as vocab_parallel_topk_jsd
    from megatron_sdsearch.loss.logprobs import vocab_parallel_entropy as vocab_parallel_entropy
    from megatron_sdsearch.loss.logprobs import vocab_parallel_logprobs as vocab_parallel_logprobs
    from megatron_sdsearch.loss.topk import teacher_topk as teacher_topk
    from megatron_sdsearch.parallel.vocab import VocabShard as VocabShard
    from megatron_sdsearch.training.loop import train as train

__version__ = "0.1.0"

_MODULES = {
    "ConfigError": "errors",
    "RunConfig": "config",
    "SDSearchError": "errors",
    "VocabShard": "parallel.vocab",
    "build_hindsight": "hindsight.block",
    "grpo_loss": "loss.grpo",
    "load_config": "config",
    "teacher_topk": "loss.topk",
    "train": "training.loop",
    "vocab_parallel_entropy": "loss.logprobs",
    "vocab_parallel_jsd": "loss.jsd",
    "vocab_parallel_logprobs": "loss.logprobs",
    "vocab_parallel_topk_jsd": "loss.jsd",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

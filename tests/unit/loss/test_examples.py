"""The worked examples in the docstrings of the public losses."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest
import torch

import megatron_sdsearch
from megatron_sdsearch.loss import grpo, jsd, topk
from megatron_sdsearch.parallel import vocab


@pytest.mark.parametrize("module", [grpo, jsd, topk, vocab])
def test_examples_give_what_they_show(module: ModuleType) -> None:
    names = {name: getattr(megatron_sdsearch, name) for name in ("VocabShard", "teacher_topk")}
    result = doctest.testmod(module, extraglobs={"torch": torch, **names})
    assert result.attempted
    assert not result.failed

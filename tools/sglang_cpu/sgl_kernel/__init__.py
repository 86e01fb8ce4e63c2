"""Lets SGLang be imported on a CPU without AMX, for which no build of sgl_kernel is published.

On such a CPU SGLang runs its own torch code, but still imports names for speculative decoding and moves in the KV cache
from sgl_kernel. Calling one raises. Nothing is registered under ``torch.ops.sgl_kernel``, so SGLang finds no kernels.
"""

from __future__ import annotations

from typing import NoReturn

__version__ = "0.0.0+importonly"

_NAMES = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)


def _refuse(*_args: object, **_kwargs: object) -> NoReturn:
    raise NotImplementedError("this sgl_kernel for CPUs has no kernels")


globals().update(dict.fromkeys(_NAMES, _refuse))

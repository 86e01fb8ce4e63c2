"""The CPU layer: lets an unmodified megatron-core run where there is no CUDA.

megatron-core 0.16 names the CUDA device in its schedules, optimizer and RNG whatever the backend; no flag avoids it.
This module answers those calls with the CPU's own: a handful of ``torch.cuda`` functions, and one TorchFunctionMode
that rewrites ``device="cuda"`` (schedules.py:596, 983, 2138; clip_grads.py:90-207; optimizer.py:473-485),
``Tensor.cuda()`` (language_module.py:244) and the type name that clipping compares (clip_grads.py:167).
Nothing is patched when CUDA is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites requests for a CUDA device while it is the active mode. Thread-local, like every mode."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


_mode: _CudaMeansCpu | None = None


def install_cpu_layer() -> None:
    """Make megatron-core run on CPU from here on, in this thread. Does nothing with CUDA, or the second time."""
    global _mode
    if torch.cuda.is_available() or _mode is not None:
        return
    patches: dict[str, Callable[..., Any]] = {
        "current_device": lambda: _CPU,
        "synchronize": lambda *_: None,
        "current_stream": torch.cpu.current_stream,  # since 0.17 (param_and_grad_buffer.py:632)
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "manual_seed": torch.manual_seed,
    }
    for name, replacement in patches.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.random.get_rng_state = patches["get_rng_state"]
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    _mode = _CudaMeansCpu()
    _mode.__enter__()  # type: ignore[no-untyped-call]  # for good: megatron is called from everywhere below


@contextmanager
def without_cpu_layer() -> Iterator[None]:
    """Leave the mode for work that calls no megatron: it costs every torch call a detour through Python."""
    if _mode is None:
        yield
        return
    _mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        _mode.__enter__()  # type: ignore[no-untyped-call]

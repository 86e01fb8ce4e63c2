"""The CPU layer: runs an unmodified megatron-core on machines without CUDA.

megatron-core 0.16 names the CUDA device in its schedules, optimizer and RNG whatever the backend; no flag avoids it.
This module redirects those calls to the CPU: it replaces a few ``torch.cuda`` functions, and a TorchFunctionMode
rewrites ``device="cuda"`` (schedules.py:596, 983, 2138; clip_grads.py:90-207; optimizer.py:473-485),
``Tensor.cuda()`` (language_module.py:244) and the type name that clipping compares (clip_grads.py:167).
Nothing is patched when CUDA is available.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites requests for a CUDA device while it is active. Thread-local, like every torch function mode."""

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
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": _CPU}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


_mode: _CudaMeansCpu | None = None


def install_cpu_layer() -> None:
    """Make megatron-core run on the CPU in this thread from now on. Does nothing with CUDA, or when called again."""
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
    _mode.__enter__()  # type: ignore[no-untyped-call]  # never left: megatron is called in many places


@contextmanager
def without_cpu_layer() -> Iterator[None]:
    """Leave the mode during work that does not call megatron: it adds a Python call to every torch function."""
    if _mode is None:
        yield
        return
    _mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        _mode.__enter__()  # type: ignore[no-untyped-call]

"""Start a real SGLang server on a CPU: ``.sglang/venv/bin/python tools/sglang_cpu/launch.py --model-path DIR``.

Owns what a CPU needs: flags, environment, two missing operator schemas. Any flag of SGLang may follow; the last one
wins. Leaves to SGLang everything that computes. Beside this file lies ``sgl_kernel``, found because Python puts a
script's folder first on its path.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

FLAGS = (
    "--device=cpu",
    "--dtype=float32",
    "--attention-backend=torch_native",
    "--disable-overlap-schedule",  # there is no second stream to overlap with
    "--skip-server-warmup",  # a generation that no request asked for
    "--sleep-on-idle",  # the scheduler otherwise keeps one core busy for ever
    "--mem-fraction-static=0.1",  # of the machine's memory; the token pool below is far smaller
    "--max-total-tokens=16384",
    "--max-running-requests=16",
)
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",  # servers and trainer share the cores
    "HF_HUB_OFFLINE": "1",  # models are local folders
    "TRANSFORMERS_OFFLINE": "1",
}


def declare_missing_operators() -> None:
    """Let ``import torchvision`` pass where its wheel is the CUDA build and torch is not.

    Its binary part then cannot be loaded, and the import stops at two operators without a schema. A schema computes
    nothing, and no text model calls them. Where both builds match, the binary part declares them itself.
    """
    import torch

    if torch.version.cuda is None and "+cpu" not in version("torchvision"):
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


def main() -> None:
    """Serve until a signal ends it; then end its workers too."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args([*FLAGS, *sys.argv[1:]]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


# SGLang spawns its workers, and each imports this file again before it imports SGLang: these lines are for them too.
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
declare_missing_operators()

if __name__ == "__main__":
    main()

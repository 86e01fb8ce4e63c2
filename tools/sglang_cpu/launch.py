"""Start a real SGLang server on a CPU: ``.sglang/venv/bin/python tools/sglang_cpu/launch.py --model-path DIR``.

Adds what a CPU needs: flags, environment, two missing operator schemas. Further flags of SGLang may follow and win. All
computation is SGLang's own. The ``sgl_kernel`` beside this file is found because Python puts a script's folder first on
its path.
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
    "--skip-server-warmup",  # skips a generation at the start
    "--sleep-on-idle",  # otherwise the scheduler always keeps one core busy
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
    """Make ``import torchvision`` work if its wheel is a CUDA build and torch is not.

    Its binary part then cannot be loaded, and the import fails at two operators without a schema. No text model calls
    them. If both builds match, the binary part declares the schemas itself.
    """
    import torch

    if torch.version.cuda is None and "+cpu" not in version("torchvision"):
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


def main() -> None:
    """Serve until a signal arrives, then end the workers too."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args([*FLAGS, *sys.argv[1:]]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


# At module level, because each spawned worker of SGLang imports this file before SGLang.
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
declare_missing_operators()

if __name__ == "__main__":
    main()

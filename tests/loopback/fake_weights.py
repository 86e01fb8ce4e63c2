"""The tensors of a fake SGLang server: unpickled, received through gloo or read from a folder; hashed as SGLang does.

Written from SGLang's side (weight_sync/tensor_bucket.py, model_runner's weight updater, mm_utils.py of 0.5.23), and
without a look at what the trainer does. Can join a weight group in any process, also in one that has a group already.
"""

from __future__ import annotations

import base64
import hashlib
import math
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

Json = dict[str, Any]


class FakeWeights:
    """What the server holds.

    Attributes:
        tensors: by Hugging Face name.
        loads: names of each update, in order.
        wrong: name of a tensor that is not loaded as it came.
        timeout_s: of weight groups.
    """

    def __init__(self, *, wrong: str = "", timeout_s: float = 20.0) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.loads: list[list[str]] = []
        self.wrong = wrong
        self.timeout_s = timeout_s
        self._groups: dict[str, dist.ProcessGroupGloo] = {}

    def load_folder(self, folder: Path) -> None:
        self._load([pair for file in sorted(folder.glob("*.safetensors")) for pair in load_file(file).items()])

    def load_serialized(self, body: Json) -> None:
        assert body["load_format"] == "flattened_bucket"
        for content in map(base64.b64decode, body["serialized_named_tensors"]):
            bucket = pickle.loads(content)
            flat = bucket["flattened_tensor"]
            assert flat.dtype == torch.uint8
            # pickle writes the whole storage of a view: more than was meant to travel
            assert flat.untyped_storage().nbytes() == flat.nbytes == bucket["metadata"][-1].end_idx
            self._load(
                [
                    (m.name, flat[m.start_idx : m.end_idx].clone().view(m.dtype).reshape(m.shape))
                    for m in bucket["metadata"]
                ]
            )

    def join(self, body: Json) -> None:
        """As ``init_custom_process_group`` does, but for the table of groups, of which a process has only one."""
        name, limit = body["group_name"], timedelta(seconds=self.timeout_s)
        store = TCPStore(body["master_address"], body["master_port"], body["world_size"], False, limit)
        prefixed = PrefixStore("cpu/", PrefixStore(f"{name}/", PrefixStore(name, store)))
        assert body["backend"] == "gloo"
        self._groups[name] = dist.ProcessGroupGloo(prefixed, body["rank_offset"], body["world_size"], limit)

    def receive(self, body: Json) -> None:
        assert body["load_format"] == "flattened_bucket"
        dtypes = [getattr(torch, name) for name in body["dtypes"]]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(body["shapes"], dtypes, strict=True)]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        group: Any = self._groups[body["group_name"]]  # its stub lacks the inherited methods
        group.broadcast([flat], options).wait()
        parts = [
            part.clone().view(dtype).reshape(shape)
            for part, dtype, shape in zip(flat.split(sizes), dtypes, body["shapes"], strict=True)
        ]
        self._load(list(zip(body["names"], parts, strict=True)))

    def checksums(self) -> dict[str, str]:
        """By the names of SGLang's Qwen2: q, k, v and gate, up are one tensor, tables have a multiple of 64 rows."""
        joined: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            *head, last, kind = name.split(".")
            if last in ("k_proj", "v_proj", "up_proj"):
                continue  # with the first of them
            for first, parts, fused in (("q_proj", "qkv", "qkv_proj"), ("gate_proj", ("gate", "up"), "gate_up_proj")):
                if last == first:
                    tensor = torch.cat([self.tensors[".".join([*head, f"{part}_proj", kind])] for part in parts])
                    name = ".".join([*head, fused, kind])
            if last in ("embed_tokens", "lm_head"):
                tensor = torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % 64))
            joined[name] = tensor
        return {name: _hash(tensor) for name, tensor in joined.items()}

    def _load(self, named: list[tuple[str, Tensor]]) -> None:
        self.loads.append([name for name, _ in named])
        for name, tensor in named:
            self.tensors[name] = tensor + 1 if name == self.wrong else tensor


def _hash(tensor: Tensor) -> str:
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return f"{int.from_bytes(hashlib.sha256(content).digest()[:8], 'big'):016x}"

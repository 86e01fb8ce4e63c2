"""Weights through a folder: every server reads the same safetensors files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_sdsearch.model.hf_folder import write_hf_folder
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.training.policy import Network
from megatron_sdsearch.training.weight_sync.fleet import ServerFleet


class DiskTransport:
    """Writes ``root/v000012`` shard by shard and has the servers load it. Implements ``Transport``.

    Servers on other nodes must see ``root`` under the same path. Restarted servers read the newest folder again; the
    one before it stays until the next publish, for a server may still be reading it.

    Args:
        root: folder of the folders, which nothing else writes to.
        source: the folder that the run started from, for config and tokenizer.
        parallel: of the trainer; its first rank writes.
        shard_bytes: of one file.
    """

    def __init__(self, root: Path, source: Path, parallel: ParallelState, shard_bytes: int) -> None:
        self._parallel = parallel
        self._root = root.resolve()
        self._source = source
        self._shard_bytes = shard_bytes

    def folder(self, version: int) -> Path | None:
        """Where restarted servers find the weights."""
        return self._folder(version)

    def send(self, policy: Network, fleet: ServerFleet, urls: Sequence[str], version: int) -> None:
        """See ``Transport``."""
        folder = self._folder(version)
        write_hf_folder(
            policy.hf_weights(),
            self._source,
            folder,
            is_writer=self._parallel.is_main,
            shard_bytes=self._shard_bytes,
        )
        if self._parallel.is_main:
            fleet.call(urls, lambda server: server.update_weights_from_disk(str(folder), str(version)))
            self._delete_old(folder)

    def reset(self) -> None:
        """The folder stands."""

    def _folder(self, version: int) -> Path:
        return self._root / f"v{version:06d}"

    def _delete_old(self, newest: Path) -> None:
        others = sorted((f for f in self._root.iterdir() if f != newest), key=lambda f: f.stat().st_mtime)
        for folder in others[:-1]:
            shutil.rmtree(folder)

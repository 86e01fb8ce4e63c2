"""A real server of Elasticsearch's protocol for the unmodified official client: noida-db, one node, 300 documents.

Nothing here skips: a server that does not start is an error of every test. It speaks 8.15 and takes a client of 9,
which a cluster of 8 would not; it has no authentication and no second node: ``tests/loopback`` has what it cannot show.
"""

from __future__ import annotations

import itertools
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from elasticsearch import ConnectionError as NoConnection
from elasticsearch import Elasticsearch, helpers

# The program itself: the command in bin/ starts it as a child, which would outlive its parent's end.
BINARY = Path(sysconfig.get_path("platlib")) / "noida_db" / "noida-db"
MAX_DOCUMENTS = 300  # it scans linearly
START_LIMIT_S = 30.0


class Node:
    """The server of this session.

    Attributes:
        url: where it listens.
        client: the official one, for making indices.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = Elasticsearch(url)
        self._names = (f"index-{number}" for number in itertools.count())

    def index(
        self, documents: Sequence[dict[str, Any]], properties: dict[str, Any], settings: dict[str, Any] | None = None
    ) -> str:
        """A new index with ``{"id", ...}`` documents, in their order, on one shard; returns its name."""
        assert len(documents) <= MAX_DOCUMENTS
        name = next(self._names)
        self.client.indices.create(
            index=name, mappings={"properties": properties}, settings={"number_of_shards": 1, **(settings or {})}
        )
        actions = (
            {"_index": name, "_id": row["id"], "_source": {k: v for k, v in row.items() if k != "id"}}
            for row in documents
        )
        helpers.bulk(self.client, actions, refresh=True)
        return name


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The address of a node that keeps its data in ``folder``; it is ended, and seen to end."""
    assert BINARY.is_file(), f"{BINARY} is missing: make test-elasticsearch installs it"
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(BINARY), "start", "--data-dir", str(folder / "data"), "--only", "elasticsearch"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--elasticsearch-port", str(port)], stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait(url, process, folder / "log")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server has outlived its end"


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Started once for all tests that make indices of their own."""
    with serve(tmp_path_factory.mktemp("noida")) as url:
        node = Node(url)
        yield node
        node.client.close()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    with Elasticsearch(url) as client:
        while True:
            assert process.poll() is None, f"noida-db ended with {process.returncode}:\n{log.read_text()[-2000:]}"
            try:
                client.info()
            except NoConnection:
                assert time.monotonic() < deadline, f"not there after {START_LIMIT_S} s:\n{log.read_text()}"
                time.sleep(0.05)
            else:
                return


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

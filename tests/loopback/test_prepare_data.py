"""tools/prepare_data.py fetches from a hub: a server on 127.0.0.1 that knows as much of it as a download asks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

from megatron_sdsearch.data.preparation import DEFAULT_REPOSITORY
from tests.unit.data import published

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """One data set repository of one commit.

    Attributes:
        root: its files.
        fetched: paths of files that were downloaded.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.fetched: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = f"/api/datasets/{DEFAULT_REPOSITORY}"
        if path == f"{api}/revision/main":
            self._answer(json.dumps({"id": DEFAULT_REPOSITORY, "sha": COMMIT}).encode())
        elif path == f"{api}/tree/{COMMIT}":
            files = sorted(file for file in self.server.root.rglob("*") if file.is_file())
            self._answer(json.dumps([self._entry(file) for file in files]).encode())
        elif path.startswith(prefix := f"/datasets/{DEFAULT_REPOSITORY}/resolve/{COMMIT}/"):
            name = path.removeprefix(prefix)
            if self.command == "GET":
                self.server.fetched.append(name)
            self._answer((self.server.root / name).read_bytes())
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815  # http.server's name

    def _entry(self, file: Path) -> dict[str, object]:
        name = file.relative_to(self.server.root).as_posix()
        return {"type": "file", "path": name, "size": file.stat().st_size, "oid": _digest(file.read_bytes())}

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{_digest(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


def _digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    root = published.write_both(tmp_path / "hub")
    published.write_flashrag(root, "narrativeqa", "train", [("nobody asks for this?", "12 GB")])
    with FakeHub(root) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def prepare(hub: FakeHub, cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    env = os.environ | own | environment
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_only_the_requested_files_are_fetched_once(hub: FakeHub, tmp_path: Path) -> None:
    ran = prepare(hub, tmp_path / "cache", "hub", "--out", str(tmp_path / "one"))
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["num_questions"] == {"train": 5, "heldout": 15, "test": 13}
    assert sorted(hub.fetched) == [
        "hotpotqa/dev.jsonl",
        "hotpotqa/train.jsonl",
        "nq/dev.jsonl",
        "nq/test.jsonl",
        "nq/train.jsonl",
    ]
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert {entry["source"] for entry in manifest["sources"]} == {f"hub:{DEFAULT_REPOSITORY}@{COMMIT}"}

    again = prepare(hub, tmp_path / "cache", f"hub@{COMMIT}", "--out", str(tmp_path / "two"), HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert len(hub.fetched) == 5
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_repository_that_is_not_there_is_one_error(hub: FakeHub, tmp_path: Path) -> None:
    ran = prepare(hub, tmp_path / "cache", "hub:nobody/nothing", "--out", str(tmp_path / "out"))
    assert ran.returncode == 2
    assert "ConfigError: SOURCE: nobody/nothing cannot be fetched from the hub: " in ran.stderr
    assert "Traceback" not in ran.stderr

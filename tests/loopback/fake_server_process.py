"""A stand-in for an SGLang server as a process: two routes, a child that gets away, a file in shared memory.

Takes the flags that the supervisor appends. What goes wrong is said by FAKE_* variables, see `main`. With FAKE_STATE, a
folder, it counts its starts there, and appends to ``events`` what happens to it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class State:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weight_version = "default"
        self.weights = ""
        self.is_hanging = False

    def note(self, event: str) -> None:
        with (self.folder / "events").open("a") as stream:
            stream.write(event + "\n")

    def count_start(self) -> int:
        self.note("start")
        return (self.folder / "events").read_text().splitlines().count("start")


class Handler(BaseHTTPRequestHandler):
    state: State

    def do_GET(self) -> None:
        while self.state.is_hanging:
            time.sleep(0.1)
        self.state.note(f"version {self.state.weight_version}")
        self._answer(200, {"weight_version": self.state.weight_version, "model_path": self.state.weights})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/update_weights_from_disk"
        if not Path(body["model_path"]).is_dir():
            self._answer(400, {"success": False, "message": "no such folder"})
            return
        if body["model_path"] == os.environ.get("FAKE_LOADS_AND_REFUSES"):
            self.state.note(f"loading {body['model_path']}")
            time.sleep(1.0)
            self.state.weights = body["model_path"]
            self._answer(400, {"success": False, "message": "Weights were updated, but the cache was not flushed"})
            return
        time.sleep(0.3)  # time in which a wrong version would be seen
        self.state.weights = body["model_path"]
        self.state.note(f"loaded {body['model_path']}")
        self.state.weight_version = body["weight_version"]
        self._answer(200, {"success": True, "message": "ok"})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_args: Any) -> None:
        pass


def segment_names(folder: Path) -> str:
    """A pattern for files in shared memory; the folder's digest keeps tests that run side by side apart."""
    return f"*_{zlib.crc32(str(folder).encode()):08x}_*"


def spawn_escaping_child(folder: Path) -> None:
    """A child in a session of its own, deaf to SIGTERM, that maps two files in shared memory.

    One has its name from the beginning, as SGLang's load snapshots; one gets it later, as semaphores do.
    """
    name = segment_names(folder).strip("*") + str(os.getpid())
    snapshot, semaphore = (Path("/dev/shm") / f"{kind}{name}" for kind in ("sglang_loads", "sem.mp-"))
    unnamed = semaphore.with_name(f"sem.{os.getpid()}")
    ready, done = os.pipe()
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        mapped = [map_new_file(path) for path in (snapshot, unnamed)]
        os.link(unnamed, semaphore)
        unnamed.unlink()
        os.write(done, b"x")
        while mapped:
            time.sleep(3600)
    os.read(ready, 1)


def map_new_file(path: Path) -> mmap.mmap:
    with path.open("w+b") as stream:
        stream.truncate(4096)
        return mmap.mmap(stream.fileno(), 4096)


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("--model-path", "--host", "--random-seed", "--tp-size", "--dtype"):
        parser.add_argument(flag)
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    environment = os.environ
    state = State(Path(environment["FAKE_STATE"]))
    num_starts = state.count_start()
    sys.stdout.write(f"arguments {' '.join(sys.argv[1:])}\n")
    sys.stdout.write(f"environment {json.dumps(dict(environment))}\n")
    sys.stdout.flush()
    if environment.get("FAKE_DIE_AT_START") == arguments.random_seed:
        sys.exit("unknown flag --frobnicate")
    if environment.get("FAKE_IGNORE_SIGTERM"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    spawn_escaping_child(state.folder)
    if "FAKE_DIE_AFTER_S" in environment:
        threading.Timer(float(environment["FAKE_DIE_AFTER_S"]), lambda: os._exit(7)).start()
    if "FAKE_HANG_AFTER_S" in environment and num_starts == 1:  # the first life only
        threading.Timer(float(environment["FAKE_HANG_AFTER_S"]), lambda: setattr(state, "is_hanging", True)).start()
    Handler.state = state
    (state.folder / "pid").write_text(str(os.getpid()))
    ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()

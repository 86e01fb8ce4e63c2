"""One replay store under several processes, and under one that is killed in the middle of a write."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.replay import ReplayStore

ROOT = Path(__file__).parents[2]
NUM_QUERIES = 150
LIMIT_S = 120

# Every process writes the same queries, each with answers of its own, and says which ones came to stand.
WRITER = """
import sys
from pathlib import Path
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.replay import ReplayStore

path, name, num_queries = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sys.stdin.readline()
store = ReplayStore(path)
for number in range(num_queries):
    passage = Passage(passage_id=name, contents="text " * 2000, score=number / 3)
    kept = store.put("engine", f"query {number}", 3, [passage])
    print(number, kept[0].passage_id, flush=True)
store.close()
"""


def start(path: Path, name: str, num_queries: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(num_queries)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_processes_that_create_and_write_one_store_agree_on_every_answer(tmp_path: Path) -> None:
    path = tmp_path / "replay.db"
    writers = [start(path, name, NUM_QUERIES) for name in "abcd"]
    try:
        for writer in writers:  # at once, when all are there
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        said = [writer.communicate(timeout=LIMIT_S)[0] for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert [writer.returncode for writer in writers] == [0] * 4
    assert said[0].count("\n") == NUM_QUERIES
    assert said[1:] == said[:1] * 3, "whoever was first, all were given the same"
    store = ReplayStore(path, is_readonly=True)
    for line in said[0].splitlines():
        number, name = line.split()
        expected = Passage(passage_id=name, contents="text " * 2000, score=int(number) / 3)
        assert store.get("engine", f"query {number}", 3) == (expected,)
    store.close()


def test_a_killed_writer_leaves_a_store_that_opens_with_all_that_was_stored(tmp_path: Path) -> None:
    path = tmp_path / "replay.db"
    for last in (40, 90, 150):  # the journal of the killed one before is still there
        writer = start(path, "a", 1_000_000)
        assert writer.stdin is not None
        assert writer.stdout is not None
        try:
            writer.stdin.write("go\n")
            writer.stdin.flush()
            while int(writer.stdout.readline().split()[0]) < last:
                pass
        finally:
            writer.kill()
            writer.communicate(timeout=LIMIT_S)
        store = ReplayStore(path)
        for number in range(last + 1):
            answer = store.get("engine", f"query {number}", 3)
            assert answer == (Passage(passage_id="a", contents="text " * 2000, score=number / 3),)
        assert store.put("engine", f"after {last}", 3, []) == ()
        store.close()
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()

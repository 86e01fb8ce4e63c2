"""tools/index_corpus.py with tantivy: where the index goes, what is refused, and what an interruption leaves behind."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sdsearch.config import RetrievalConfig
from megatron_sdsearch.errors import ConfigError, RetrievalError
from megatron_sdsearch.retrieval.engines import open_retriever
from megatron_sdsearch.retrieval.tantivy_index import TantivyRetriever, default_root
from tools.index_corpus import to_tantivy
from tools.serve_retriever import index_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [{"id": str(i), "contents": f'"Title {i}"\nA canal number {i}.'} for i in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.index_corpus", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_training_finds_the_index_and_a_folder_of_another_kind_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    done = run_tool(corpus, "--to", "tantivy", "--analyzer", "english")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["num_passages"], report["is_found_by_training"]) == (50, True)
    before = sorted(tmp_path.rglob("*"))
    assert TantivyRetriever.open_or_build(corpus, "english", default_root(corpus)).fingerprint == report["fingerprint"]
    assert sorted(tmp_path.rglob("*")) == before

    # tmp_path holds the corpus; report["index"] is an index, but of another analyzer
    refused = run_tool(corpus, "--to", "tantivy", "--out", tmp_path)
    assert refused.returncode == 2
    assert f"ConfigError: --out: {tmp_path} holds files other than an index; give a new folder" in refused.stderr
    refused = run_tool(corpus, "--to", "tantivy", "--out", report["index"])
    assert refused.returncode == 2
    assert "is the index of another corpus or analyzer; give a new folder, or --replace" in refused.stderr
    replaced = run_tool(corpus, "--to", "tantivy", "--out", report["index"], "--replace")
    assert json.loads(replaced.stdout)["fingerprint"] == TantivyRetriever.open(Path(report["index"])).fingerprint
    assert corpus.is_file()


def test_an_index_elsewhere_is_named_as_a_setting_and_served_by_the_folder_around_it(
    corpus: Path, tmp_path: Path
) -> None:
    def build(name: str, analyzer: str) -> dict[str, Any]:
        return to_tantivy(
            argparse.Namespace(corpus=corpus, analyzer=analyzer, out=tmp_path / "far" / name, replace=False)
        )

    report = build("one", "standard")
    assert (report["is_found_by_training"], report["setting"]) == (False, f"retrieval.index={tmp_path / 'far' / 'one'}")
    retrieval = RetrievalConfig(corpus=corpus, index=Path(report["setting"].partition("=")[2]))
    opened = asyncio.run(open_retriever(retrieval))
    assert opened.fingerprint == report["fingerprint"]
    assert not default_root(corpus).exists()
    assert index_folder(tmp_path / "far") == index_folder(tmp_path / "far" / "one") == tmp_path / "far" / "one"
    build("two", "english")
    with pytest.raises(ConfigError, match=r"--index: .*far holds one, two; give one of them"):
        index_folder(tmp_path / "far")
    with pytest.raises(ConfigError, match=r"--index: .* holds no index"):
        index_folder(tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "row: Invalid JSON"),
        ('{"id": "50"}', "contents: Field required"),
        ('{"id": "3", "contents": "again"}', "id: '3' is a duplicate; give each passage its own id"),
    ],
)
def test_a_bad_row_is_named_and_leaves_no_index(corpus: Path, tmp_path: Path, line: str, words: str) -> None:
    with corpus.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    done = run_tool(corpus, "--to", "tantivy", "--out", tmp_path / "index")
    assert done.returncode == 2
    assert f"DataError: {corpus}:51: {words}" in done.stderr
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_an_interruption_leaves_nothing_that_looks_complete(corpus: Path, tmp_path: Path, name: str) -> None:
    script = f"""
import os, signal, sys
from tools import index_corpus
class Display(index_corpus.Display):
    num = 0
    def advance(self):
        self.num += 1
        if self.num == 30:
            os.kill(os.getpid(), signal.{name})
index_corpus.Display = Display
index_corpus.main()
"""
    out = tmp_path / "indices" / "wiki"
    command = [sys.executable, "-c", script, str(corpus), "--to", "tantivy", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == (-9 if name == "SIGKILL" else 130), done.stderr
    assert not out.exists()
    with pytest.raises(RetrievalError, match="no index"):
        TantivyRetriever.open(out)
    left = [path for path in out.parent.iterdir() if path.is_dir()]
    assert bool(left) == (name == "SIGKILL")
    assert not any((path / "manifest.json").exists() for path in left)
    TantivyRetriever.build(corpus, out, "standard")
    assert TantivyRetriever.open(out).num_passages == 50

"""Training with the server behind it samples, to the last byte, what it samples with tantivy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.elasticsearch.conftest import MAX_DOCUMENTS, Node

ROOT = Path(__file__).parents[3]
LIMIT_S = 400.0
WARM_START_STEPS = 150
pytestmark = pytest.mark.timeout(3 * LIMIT_S)


def _call(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT_S
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's world with few passages, and a model that has learned to search, if not what for."""
    out = tmp_path_factory.mktemp("world")
    _call("-m", "examples.tiny.build_world", "--out", str(out / "world"), "--seed", "2")
    corpus = out / "world" / "corpus.jsonl"
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[:MAX_DOCUMENTS]))
    _call(
        "-m", "megatron_sdsearch", "train", "examples/tiny/warm_start.yaml", f"run_dir={out / 'warm_start'}",
        f"model.hf_dir={out / 'world' / 'model'}", f"train.demonstrations={out / 'world' / 'demonstrations.jsonl'}",
        f"train.num_steps={WARM_START_STEPS}",
    )  # fmt: skip
    return out


def _train(world: Path, run_dir: Path, *overrides: str) -> dict[str, bytes]:
    _call(
        "-m", "megatron_sdsearch", "train", "examples/tiny/config.yaml", f"run_dir={run_dir}",
        f"model.hf_dir={world / 'warm_start' / 'hf'}", f"data.train={world / 'world' / 'train.jsonl'}",
        f"data.heldout={world / 'world' / 'heldout.jsonl'}", "parallel.tensor_model_parallel_size=1",
        "data.questions_per_step=4",
        "rollout.group_size=4", "train.num_steps=2", "evaluation.every=0", "telemetry.query_probe=false", *overrides,
    )  # fmt: skip
    return {file.name: file.read_bytes() for file in (run_dir / "trajectories").iterdir()}


def test_trajectories_are_those_of_tantivy(world: Path, node: Node, tmp_path: Path) -> None:
    corpus = world / "world" / "corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    index = node.index(rows, {"contents": {"type": "text"}})
    node.client.indices.put_alias(index=index, name="world")
    tantivy = _train(world, tmp_path / "tantivy", f"retrieval.corpus={corpus}")
    elastic = _train(
        world, tmp_path / "elastic", "retrieval.engine=elasticsearch", "retrieval.corpus=null",
        f"retrieval.elasticsearch.urls=[{node.url}]", "retrieval.elasticsearch.index=world",
    )  # fmt: skip
    assert sorted(tantivy) == ["step_000001.jsonl", "step_000002.jsonl"]
    assert tantivy == elastic
    spans = [span for line in tantivy["step_000001.jsonl"].splitlines() for span in json.loads(line)["spans"]]
    assert sum(bool(span.get("passage_ids")) for span in spans) >= 4, "searches that find something took part"


def test_evaluate_searches_the_server(world: Path, node: Node, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (world / "world" / "corpus.jsonl").read_text().splitlines()]
    index = node.index(rows, {"contents": {"type": "text"}})
    model = world / "warm_start" / "hf"
    _call(
        "-m", "megatron_sdsearch", "evaluate", "examples/tiny/config.yaml", "--model", str(model),
        f"run_dir={tmp_path}", f"data.heldout={world / 'world' / 'heldout.jsonl'}", "evaluation.num_questions=8",
        "retrieval.engine=elasticsearch", "retrieval.corpus=null", f"retrieval.elasticsearch.urls=[{node.url}]",
        f"retrieval.elasticsearch.index={index}",
    )  # fmt: skip

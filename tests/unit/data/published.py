"""Small question files, written as their publishers write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Pairs = Sequence[tuple[str, str]]

NQ_TRAIN: Pairs = [
    ("total number of death row inmates in the us", "2,718"),
    ("big little lies season 2 how many episodes", "seven"),
    ("who got the first nobel prize in physics", "Wilhelm Conrad Röntgen"),
]
NQ_DEV: Pairs = [(f"dev question {i}", f"dev answer {i}") for i in range(8)]
NQ_TEST: Pairs = [(f"test question {i}", f"test answer {i}") for i in range(6)]
HOTPOTQA_TRAIN: Pairs = [
    ("Which magazine was started first Arthur's Magazine or First for Women?", "Arthur's Magazine"),
    ("The Oberoi family is part of a hotel company that has a head office in what city?", "Delhi"),
]
HOTPOTQA_DEV: Pairs = [(f"Is {i} more than {i + 1}?", "no") for i in range(7)]


def flashrag_row(split: str, index: int, question: str, answer: str) -> dict[str, Any]:
    """Write rows as in RUC-NLPIR/FlashRAG_datasets."""
    return {"id": f"{split}_{index}", "question": question, "golden_answers": [answer]}


def write_flashrag(root: Path, dataset: str, split: str, pairs: Pairs, **more: Any) -> Path:
    path = root / dataset / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [flashrag_row(split, index, *pair) | more for index, pair in enumerate(pairs)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def search_r1_rows(dataset: str, split: str, source_split: str, pairs: Pairs) -> list[dict[str, Any]]:
    """Write rows like Search-R1's qa_search_*_merge.py: with FlashRAG's columns and a final question mark."""
    rows = []
    for index, (text, answer) in enumerate(pairs):
        question = text if text.endswith("?") else f"{text}?"
        rows.append(
            flashrag_row(source_split, index, question, answer)
            | {
                "data_source": dataset,
                "prompt": [{"role": "user", "content": f"Use the engine. Question: {question}\n"}],
                "ability": "fact-reasoning",
                "reward_model": {"style": "rule", "ground_truth": {"target": [answer]}},
                "extra_info": {"split": split, "index": index},
                "metadata": None if dataset == "nq" else {"type": "comparison"},
            }
        )
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_both(root: Path) -> Path:
    """NQ with all three splits and HotpotQA, which has no test split, in FlashRAG's layout."""
    write_flashrag(root, "nq", "train", NQ_TRAIN)
    write_flashrag(root, "nq", "dev", NQ_DEV)
    write_flashrag(root, "nq", "test", NQ_TEST)
    write_flashrag(root, "hotpotqa", "train", HOTPOTQA_TRAIN, metadata={"type": "comparison", "level": "medium"})
    write_flashrag(root, "hotpotqa", "dev", HOTPOTQA_DEV, metadata={"type": "comparison", "level": "hard"})
    return root


def write_search_r1(root: Path) -> Path:
    """The same as Search-R1 publishes it: everything in two files, HotpotQA's dev split called test."""
    train = search_r1_rows("nq", "train", "train", NQ_TRAIN)
    train += search_r1_rows("hotpotqa", "train", "train", HOTPOTQA_TRAIN)
    write_parquet(root / "train.parquet", train)
    test = search_r1_rows("nq", "test", "test", NQ_TEST) + search_r1_rows("hotpotqa", "test", "dev", HOTPOTQA_DEV)
    write_parquet(root / "test.parquet", test)
    return root

"""Build the demo world: ``python -m examples.tiny.build_world --out DIR --seed S``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from examples.tiny.demonstrations import build_demonstrations, sample_texts
from examples.tiny.facts import load_facts
from examples.tiny.model import build_tokenizer, save_tiny_model
from examples.tiny.world import build_world
from megatron_sdsearch.config import path_argument
from megatron_sdsearch.errors import SDSearchError
from megatron_sdsearch.files import write_file

NUM_DEMONSTRATIONS = 44_000


def main() -> None:
    """Parse the command line and build the world."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=path_argument, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="decides house style, split, wording and weights")
    parser.add_argument("--demonstrations", type=int, default=NUM_DEMONSTRATIONS, help="how many to write")
    arguments = parser.parse_args()
    try:
        summary = build(arguments.out, seed=arguments.seed, num_demonstrations=arguments.demonstrations)
    except SDSearchError as error:
        parser.exit(2, f"build_world: {error}\n")
    print(json.dumps(summary))


def build(out: Path, *, seed: int, num_demonstrations: int = NUM_DEMONSTRATIONS) -> dict[str, object]:
    """Write the whole world into ``out`` and return the content of ``facts.json``.

    Files: corpus.jsonl, train.jsonl, heldout.jsonl, demonstrations.jsonl, facts.json, model/ (Hugging Face layout).

    Raises:
        DataError: a package with facts is missing or holds too few.
    """
    out.mkdir(parents=True, exist_ok=True)
    facts = load_facts()
    world = build_world(facts, seed)
    demonstrations = build_demonstrations(world, num_demonstrations)
    tokenizer = build_tokenizer(sample_texts(world), world.names)
    num_parameters = save_tiny_model(out / "model", tokenizer, seed=seed)
    _write_jsonl(out / "corpus.jsonl", ({"id": p.passage_id, "contents": p.contents} for p in world.passages))
    _write_jsonl(out / "train.jsonl", map(asdict, world.train))
    _write_jsonl(out / "heldout.jsonl", map(asdict, world.heldout))
    _write_jsonl(out / "demonstrations.jsonl", demonstrations)
    summary = {
        "seed": world.seed,
        "num_entities": len({subject for table in world.answers.values() for subject in table}),
        "num_passages": len(world.passages),
        "num_train_questions": len(world.train),
        "num_heldout_questions": len(world.heldout),
        "house_words": world.house_words,
        "word_order": world.word_order,
        "num_demonstrations": len(demonstrations),
        "vocab_size": len(tokenizer),
        "num_parameters": num_parameters,
        "sources": facts.sources,
    }
    write_file(out / "facts.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()

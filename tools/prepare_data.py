"""Create the question files of a run from published data sets, and print one JSON object about them.

    python tools/prepare_data.py hub --out data/nq_hotpotqa
    python tools/prepare_data.py downloads/FlashRAG_datasets --out data/nq_hotpotqa
    python tools/prepare_data.py hub:PeterJinGo/nq_hotpotqa_train --out data/nq_hotpotqa

SOURCE is a folder or a file in one of the two published layouts, or the Hugging Face hub:

    FlashRAG    <dataset>/<split>.jsonl, rows {id, question, golden_answers}; "hub" alone is RUC-NLPIR/FlashRAG_datasets
    Search-R1   <split>.parquet, rows {data_source, prompt, reward_model, extra_info[, question]}

OUT gets train, heldout and test (parquet or JSONL, {question_id, text, gold_answers, dataset, gold_passage_ids}) and
manifest.json: sources, counts, checksums, duplicates, training questions that also occur in heldout or test. Ids are
dataset:split:index. The same input gives the same bytes. OUT is replaced as a whole.

Invalid rows are listed in OUT-bad-rows.jsonl, and are an error above --max-bad-rows.

Exit codes: 0 done; 1 failed; 2 the data or the command is invalid; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_sdsearch.config import path_argument
from megatron_sdsearch.data.preparation import (
    BadRow,
    PrepareSettings,
    check_target,
    find_question_files,
    prepare,
    write_prepared,
)
from megatron_sdsearch.errors import ConfigError, DataError, SDSearchError
from megatron_sdsearch.files import write_file


def main() -> None:
    """Prepare the files; errors of this package become one message and an exit code."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = run(arguments)
    except SDSearchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError | DataError) else 1)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(report))


def parse_arguments() -> argparse.Namespace:
    defaults = PrepareSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="folder, file, or hub[:OWNER/NAME][@REVISION]")
    parser.add_argument("--out", type=path_argument, required=True, help="folder of the question files")
    parser.add_argument("--train", nargs="+", default=defaults.train, help="data sets, in this order (nq hotpotqa)")
    parser.add_argument("--test", nargs="+", default=defaults.test, help="benchmarks (nq hotpotqa), each from its test "
                        "split, else dev, else train")  # fmt: skip
    parser.add_argument("--heldout", type=int, default=defaults.heldout_per_dataset, dest="heldout_per_dataset",
                        metavar="N", help="questions of each benchmark for evaluation during training (default 500; "
                        "0: none)")  # fmt: skip
    parser.add_argument("--heldout-from", choices=("dev", "test"), default=defaults.heldout_from, help="split that "
                        "they are drawn from (default dev; test if there is none)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the draw (default 1)")
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet", help="default parquet")
    parser.add_argument("--max-bad-rows", type=int, default=0, help="left out; more are an error (default 0)")
    parser.add_argument("--drop-duplicates", action="store_true", help="remove repeated questions from train")
    parser.add_argument("--drop-leaks", action="store_true", help="remove questions of heldout or test from train")
    arguments = parser.parse_args()
    for option, number in (("--heldout", arguments.heldout_per_dataset), ("--max-bad-rows", arguments.max_bad_rows)):
        if number < 0:
            parser.error(f"{option} must not be negative")
    for name in ("train", "test"):
        if len(set(names := getattr(arguments, name))) < len(names):
            parser.error(f"--{name} names a data set twice")
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = PrepareSettings(**{field.name: getattr(arguments, field.name) for field in fields(PrepareSettings)})
    check_target(arguments.out)  # before anything is fetched
    files = [file for source in arguments.sources for file in find_question_files(source, settings)]
    bad_rows: list[BadRow] = []
    try:
        prepared = prepare(
            files, settings, bad_rows, on_file=lambda name, n: print(f"read {name}: {n:,} rows", file=sys.stderr)
        )
    finally:
        list_bad_rows(arguments.out.with_name(f"{arguments.out.name}-bad-rows.jsonl"), bad_rows)
    for name, split in prepared.origins.get("test", {}).items():
        if split == "train":
            print(f"{name} has neither test nor dev: its training questions are used as test", file=sys.stderr)
    manifest = write_prepared(prepared, settings, arguments.out, arguments.format)
    return {
        "manifest": str(manifest),
        "num_questions": {split: len(questions) for split, questions in prepared.splits.items()},
        "num_bad_rows": len(bad_rows),
        "num_duplicates": len(prepared.duplicates),
        "num_leaks": len(prepared.leaks),
        "num_dropped": prepared.num_dropped,
    }


def list_bad_rows(path: Path, bad_rows: list[BadRow]) -> None:
    """Write the bad rows to a file; removes the list of an earlier call."""
    path.unlink(missing_ok=True)
    if bad_rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ({"place": bad_row.location, "reason": bad_row.reason} for bad_row in bad_rows)
        write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{len(bad_rows)} bad rows are listed in {path}", file=sys.stderr)


if __name__ == "__main__":
    main()

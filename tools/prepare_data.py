"""Make the question files of a run from published data sets, and print one JSON object about them.

    python tools/prepare_data.py hub --out data/nq_hotpotqa
    python tools/prepare_data.py downloads/FlashRAG_datasets --out data/nq_hotpotqa
    python tools/prepare_data.py hub:PeterJinGo/nq_hotpotqa_train --out data/nq_hotpotqa

SOURCE is a folder or a file in one of the two published layouts, or the Hugging Face hub:

    FlashRAG    <dataset>/<split>.jsonl, rows {id, question, golden_answers}; "hub" alone is RUC-NLPIR/FlashRAG_datasets
    Search-R1   <split>.parquet, rows {data_source, prompt, reward_model, extra_info[, question]}

OUT gets train, heldout and test (parquet or JSONL, {question_id, text, gold_answers, dataset, gold_passage_ids}) and
manifest.json: sources, counts, checksums, duplicates, questions of train that are asked in heldout or test. Ids are
dataset:split:index. The same input gives the same bytes. OUT appears whole or not at all.

Rows that are no question are listed in OUT-bad-rows.jsonl, and are an error above --max-bad-rows.

Exit codes: 0 done; 1 it failed; 2 the data or the command is wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sdsearch.config import path_argument
from megatron_sdsearch.data.preparation import BadRow, PrepareSettings, prepare
from megatron_sdsearch.data.question_sources import open_source
from megatron_sdsearch.data.question_writer import check_target, write_prepared
from megatron_sdsearch.errors import ConfigError, DataError, SDSearchError

LINE_EVERY_S = 2.0


def main() -> None:
    """Do it, and turn an error of ours into one message and an exit code."""
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
    parser.add_argument("--test", nargs="+", default=defaults.test, help="benchmarks (nq hotpotqa): of each the test "
                        "split, else dev, else train")  # fmt: skip
    parser.add_argument("--heldout", type=int, default=defaults.heldout_per_dataset, metavar="N", help="questions of "
                        "each benchmark for evaluation during training (default 500; 0: none)")  # fmt: skip
    parser.add_argument("--heldout-from", choices=("dev", "test"), default=defaults.heldout_from, help="split that "
                        "they are drawn from (default dev; test where there is none)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the draw (default 1)")
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet", help="default parquet")
    parser.add_argument("--max-bad-rows", type=int, default=0, help="left out; more are an error (default 0)")
    parser.add_argument("--drop-duplicates", action="store_true", help="keep the first of train's of one text")
    parser.add_argument("--drop-leaks", action="store_true", help="leave out of train what heldout or test ask, too")
    arguments = parser.parse_args()
    for name in ("heldout", "max_bad_rows"):
        if getattr(arguments, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    for name in ("train", "test"):
        if len(set(names := getattr(arguments, name))) < len(names):
            parser.error(f"--{name} names a data set twice")
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = PrepareSettings(
        train=tuple(arguments.train),
        test=tuple(arguments.test),
        heldout_from=arguments.heldout_from,
        heldout_per_dataset=arguments.heldout,
        seed=arguments.seed,
        max_bad_rows=arguments.max_bad_rows,
        drop_duplicates=arguments.drop_duplicates,
        drop_leaks=arguments.drop_leaks,
    )
    check_target(arguments.out)  # before anything is fetched
    sources = [open_source(name, settings.wanted()) for name in arguments.sources]
    bad_rows: list[BadRow] = []
    progress = Progress()
    try:
        prepared = prepare(sources, settings, progress.show, bad_rows.append)
    finally:
        progress.end()
        list_bad_rows(arguments.out.with_name(f"{arguments.out.name}-bad-rows.jsonl"), bad_rows)
    for name, split in prepared.origins.get("test", {}).items():
        if split == "train":
            print(f"{name} has neither test nor dev: its training questions are asked as a test", file=sys.stderr)
    manifest = write_prepared(prepared, settings, arguments.out, arguments.format)
    return {
        "manifest": str(manifest),
        "num_questions": {split: len(questions) for split, questions in prepared.splits.items()},
        "num_bad_rows": len(prepared.bad_rows),
        "num_duplicates": len(prepared.duplicates),
        "num_leaks": len(prepared.leaks),
        "num_dropped": prepared.num_dropped,
    }


def list_bad_rows(path: Path, bad_rows: list[BadRow]) -> None:
    """Write them down; a list of an earlier call goes."""
    path.unlink(missing_ok=True)
    if bad_rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(asdict(bad_row), ensure_ascii=False) for bad_row in bad_rows)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{len(bad_rows)} bad rows are listed in {path}", file=sys.stderr)


class Progress:
    """One line on standard error for each file, and one now and then while it lasts."""

    def __init__(self) -> None:
        self._file, self._rows = "", 0
        self._shown_at = time.monotonic()

    def show(self, file: str, rows: int) -> None:
        if file != self._file:
            self.end()
            self._file = file
        self._rows = rows
        if time.monotonic() - self._shown_at >= LINE_EVERY_S:
            self._print()

    def end(self) -> None:
        if self._rows:
            self._print()
        self._file, self._rows = "", 0

    def _print(self) -> None:
        self._shown_at = time.monotonic()
        print(f"read {self._file}: {self._rows:,} rows", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""Measure queries per second and latencies of a search engine, and tantivy's index; print one JSON object.

    python tools/bench_retrieval.py --engine tantivy --passages 100000
    python tools/bench_retrieval.py --engine elasticsearch --url https://es:9200 --index wiki-18 --queries queries.txt
    python tools/bench_retrieval.py --engine http --url http://127.0.0.1:8000/retrieve --queries queries.txt

The engine is opened as in a training run, and used by ``--concurrency`` coroutines of one process, like a rank. CPU
times are those of this process, and valid on a busy machine too. tantivy gets generated passages of about 100 words,
drawn by Zipf's law from the words of The World Factbook (the rare tail combines two words); queries are 4 to 8 words of
a passage drawn the same way. Credentials come from the environment; see docs/retrieval.md.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sdsearch.config import RetrievalConfig, path_argument
from megatron_sdsearch.errors import RetrievalError, SDSearchError
from megatron_sdsearch.retrieval.engines import open_retriever

PROSE = Path(__file__).parents[1] / "tests" / "golden" / "bm25" / "factbook.jsonl.gz"
VOCABULARY_SIZE = 300_000
ZIPF_EXPONENT, ZIPF_SHIFT = 1.07, 2.7  # Mandelbrot's form, as fitted to English prose
MEAN_WORDS, SPREAD_WORDS, LEAST_WORDS = 100, 20, 20
CHUNK = 10_000  # passages drawn at a time
NUM_WARM_UP = 50


class Prose:
    """Generates passages and queries, deterministically by seed."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        with gzip.open(PROSE, "rt", encoding="utf-8") as lines:
            texts = (json.loads(line)["contents"].lower() for line in lines)
            counts = Counter(word for text in texts for word in re.findall(r"[a-z]+", text))
        words = [word for word, _ in counts.most_common()]
        pairs = np.random.default_rng(0).integers(0, len(words), (2 * VOCABULARY_SIZE, 2))
        compounds = (words[first] + words[second] for first, second in pairs)
        self._words = list(dict.fromkeys([*words, *dict.fromkeys(compounds)]))[:VOCABULARY_SIZE]
        weights = 1.0 / (np.arange(len(self._words)) + 1.0 + ZIPF_SHIFT) ** ZIPF_EXPONENT
        self._cumulative = np.cumsum(weights / weights.sum())

    def write_corpus(self, path: Path, num_passages: int) -> None:
        """Write passages ``"Title"\\ntext`` as JSONL."""
        with path.open("w", encoding="utf-8") as file:
            for start in range(0, num_passages, CHUNK):
                for number, words in enumerate(self._draw(min(CHUNK, num_passages - start)), start):
                    contents = f'"{" ".join(words[:3])}"\n{" ".join(words)}.'
                    file.write(json.dumps({"id": str(number), "contents": contents}) + "\n")

    def queries(self, number: int) -> list[str]:
        """Generate queries, each of words from one passage."""
        lengths, passages = self._generator.integers(4, 9, number), self._draw(number)
        return [
            " ".join(self._generator.choice(words, size=length, replace=False))
            for words, length in zip(passages, lengths, strict=True)
        ]

    def _draw(self, number: int) -> list[list[str]]:
        lengths = np.maximum(self._generator.normal(MEAN_WORDS, SPREAD_WORDS, number).astype(int), LEAST_WORDS)
        chances = self._generator.random(int(lengths.sum()))
        ranks = np.searchsorted(self._cumulative, chances).clip(max=len(self._words) - 1)
        pieces = np.split(ranks, np.cumsum(lengths)[:-1])
        return [[self._words[rank] for rank in piece] for piece in pieces]


def main() -> None:
    """Open the engine, measure, and report."""
    arguments = parse_arguments()
    prose = Prose(arguments.seed)
    queries = read_queries(arguments.queries) if arguments.queries else prose.queries(arguments.num_queries)
    report: dict[str, object] = {"engine": arguments.engine, "concurrency": arguments.concurrency}
    settings: dict[str, Any] = {"engine": arguments.engine, "analyzer": arguments.analyzer}
    with tempfile.TemporaryDirectory(prefix="bench_retrieval_") as temporary:
        if arguments.engine == "tantivy":
            corpus = settings["corpus"] = Path(temporary) / "corpus.jsonl"
            prose.write_corpus(corpus, arguments.passages)
            report |= {"num_passages": arguments.passages, "corpus_bytes": corpus.stat().st_size}
        elif arguments.engine == "http":
            settings["http"] = {"url": arguments.url}
        else:
            settings["elasticsearch"] = {"urls": [arguments.url], "index": arguments.index}
        try:
            report |= asyncio.run(measure(RetrievalConfig.model_validate(settings), queries, arguments))
        except SDSearchError as error:
            sys.exit(str(error))
    print(json.dumps(report))


def read_queries(path: Path) -> list[str]:
    if not path.is_file():
        sys.exit(f"--queries {path}: does not exist")
    queries = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not queries:
        sys.exit(f"--queries {path}: holds none; write one per line")
    return queries


async def measure(config: RetrievalConfig, queries: Sequence[str], arguments: argparse.Namespace) -> dict[str, object]:
    """Measure tantivy's build time and size, then the queries from ``--concurrency`` coroutines."""
    report: dict[str, object] = {"num_queries": len(queries), "top_k": arguments.top_k}
    start, cpu_start = time.perf_counter(), time.process_time()
    retriever = await open_retriever(config)
    if config.corpus is not None:
        report["build_s"] = round(time.perf_counter() - start, 2)
        report["build_cpu_s"] = round(time.process_time() - cpu_start, 2)
        files = (config.corpus.parent / "index").rglob("*")
        report["index_bytes"] = sum(path.stat().st_size for path in files if path.is_file())
    latencies: list[float] = []
    num_failed = num_empty = 0
    waiting = iter(queries)

    async def ask_on() -> None:
        nonlocal num_failed, num_empty
        for query in waiting:
            start = time.perf_counter()
            try:
                found = await retriever.search(query, top_k=arguments.top_k)
            except RetrievalError as error:
                if not num_failed:
                    print(error, file=sys.stderr)
                num_failed += 1
            else:
                latencies.append(time.perf_counter() - start)
                num_empty += not found

    try:
        for query in queries[:NUM_WARM_UP]:
            await retriever.search(query, top_k=arguments.top_k)
        start, cpu_start = time.perf_counter(), time.process_time()
        await asyncio.gather(*(ask_on() for _ in range(arguments.concurrency)))
        elapsed, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    finally:
        await retriever.close()
    report |= {"num_failed": num_failed, "num_empty": num_empty, "queries_per_s": round(len(latencies) / elapsed, 1)}
    report["cpu_ms_per_query"] = round(1000 * cpu_s / len(queries), 3)
    for percent in (50, 95, 99):
        seconds = float(np.percentile(latencies, percent)) if latencies else None
        report[f"p{percent}_ms"] = None if seconds is None else round(1000 * seconds, 3)
    return report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("tantivy", "elasticsearch", "http"), default="tantivy")
    parser.add_argument("--analyzer", choices=("standard", "english"), default="standard", help="of tantivy")
    parser.add_argument("--url", help="of the cluster, or of /retrieve")
    parser.add_argument("--index", default="wiki-18", help="of the cluster (default wiki-18)")
    parser.add_argument("--queries", type=path_argument, help="one per line; generated by default")
    numbers = {
        "passages": (10_000, "generated passages, for tantivy"),
        "num-queries": (1_000, "generated queries"),
        "concurrency": (16, "concurrent queries"),
        "top-k": (3, "passages per query"),
        "seed": (1, "of the generated text"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    arguments = parser.parse_args()
    for name in numbers:
        if getattr(arguments, name.replace("-", "_")) < 1:
            parser.error(f"--{name} must be at least 1")
    if (arguments.url is None) != (arguments.engine == "tantivy"):
        parser.error("--url belongs to --engine elasticsearch and http, which need it")
    return arguments


if __name__ == "__main__":
    main()

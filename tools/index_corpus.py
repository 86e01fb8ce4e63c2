"""Index a corpus, for tantivy (in process) or for Elasticsearch, and print one JSON object about it.

    python tools/index_corpus.py data/wiki-18.jsonl.gz --to tantivy --analyzer english
    python tools/index_corpus.py data/wiki-18.jsonl.gz --to elasticsearch --url http://127.0.0.1:9200 --index wiki-18

CORPUS is JSONL ({"id", "contents"}, as in Search-R1's wiki-18, or {"id", "title", "text"}), the same gzipped (.gz), or
parquet with these columns. Every row is checked before anything is written.

tantivy: the index appears whole or not at all. Without --out it goes where training looks for it, beside the corpus;
so does every folder given as --out there. For one elsewhere give training retrieval.index=DIR.

Elasticsearch: loads NAME-<hash of the content> and points the alias NAME to it at the end, after having counted and
looked up samples. Interrupted? The same command goes on where it was. Credentials come from ELASTICSEARCH_API_KEY, or
from ELASTICSEARCH_USERNAME and ELASTICSEARCH_PASSWORD.

Exit codes: 0 done; 1 it failed; 2 the corpus or the command is wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megatron_sdsearch.config import ElasticsearchConfig, path_argument
from megatron_sdsearch.errors import ConfigError, DataError, SDSearchError
from megatron_sdsearch.retrieval.corpus import sha256_of_corpus
from megatron_sdsearch.retrieval.tantivy_index import Manifest, TantivyRetriever, default_root

LINE_EVERY_S = 10.0


def main() -> None:
    """Do it, and turn an error of ours into one message and an exit code."""
    arguments = parse_arguments()
    # Ended by a batch system: the same cleaning up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = to_tantivy(arguments) if arguments.to == "tantivy" else to_elasticsearch(arguments)
    except SDSearchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError | DataError) else 1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(report))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", metavar="CORPUS", type=path_argument)
    parser.add_argument("--to", choices=("tantivy", "elasticsearch"), required=True)
    parser.add_argument("--analyzer", choices=("standard", "english"), default="standard")
    tantivy = parser.add_argument_group("tantivy")
    tantivy.add_argument(
        "--out", metavar="DIR", type=path_argument, help="folder of the index (default: where training looks)"
    )
    tantivy.add_argument("--replace", action="store_true", help="DIR holds the index of something else: replace it")
    elastic = parser.add_argument_group("Elasticsearch")
    elastic.add_argument("--url", action="append", help="of a node; may be repeated (default http://127.0.0.1:9200)")
    elastic.add_argument("--index", metavar="NAME", help="alias")
    elastic.add_argument("--shards", type=int, default=1, help="default 1: BM25 counts terms per shard, so only one "
                         "shard gives the scores of one whole corpus; take more for speed over tens of millions of "
                         "passages, and retrieval.elasticsearch.dfs=true for the scores")  # fmt: skip
    elastic.add_argument("--replicas", type=int, default=1, help="once loaded (default 1)")
    elastic.add_argument("--workers", type=int, default=4, help="bulk requests open at one time (default 4); with 1, "
                         "passages of equal score rank in the corpus's order")  # fmt: skip
    elastic.add_argument("--chunk", type=int, default=1000, help="passages of one request (default 1000)")
    elastic.add_argument("--timeout", type=float, default=120.0, help="seconds of one request (default 120)")
    elastic.add_argument("--patience", type=float, default=600.0, help="seconds that a request may go on failing, with "
                         "retries, before everything ends (default 600)")  # fmt: skip
    elastic.add_argument("--ca-file", type=path_argument, help="certificate of the authority that signed the cluster's")
    elastic.add_argument("--encoder", metavar="DIR", type=path_argument, help="folder of a text encoder: adds a "
                         "dense_vector to each passage")  # fmt: skip
    elastic.add_argument("--merge", action="store_true", help="into one segment at the end: smaller and quicker")
    elastic.add_argument("--rejects", metavar="FILE", type=path_argument, help="default rejects-NAME.jsonl")
    elastic.add_argument("--allow-rejects", action="store_true", help="leave out malformed rows and refused passages")
    elastic.add_argument("--restart", action="store_true", help="delete an unfinished index and begin anew")
    elastic.add_argument("--delete-old", action="store_true", help="delete the indices that NAME pointed to before")
    arguments = parser.parse_args()
    if arguments.to == "elasticsearch" and not arguments.index:
        parser.error("--to elasticsearch needs --index NAME")
    if arguments.to == "tantivy" and arguments.allow_rejects:
        parser.error("--allow-rejects is for Elasticsearch: training reads the corpus itself, fix its rows")
    for name in ("workers", "chunk", "timeout", "patience"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name} must be positive")
    return arguments


def to_tantivy(arguments: argparse.Namespace) -> dict[str, Any]:
    corpus, analyzer = arguments.corpus, arguments.analyzer
    out = arguments.out or TantivyRetriever.default_dir(corpus, analyzer)
    check_folder(out, corpus, analyzer, may_replace=arguments.replace)
    with Display("indexed") as display:
        TantivyRetriever.build(corpus, out, analyzer, display.advance, field="--out")
    index = TantivyRetriever.open(out)
    is_found = default_root(corpus).resolve() in (out.resolve(), out.resolve().parent)
    return {
        "index": str(out),
        "num_passages": index.num_passages,
        "fingerprint": index.fingerprint,
        "is_found_by_training": is_found,
        **({} if is_found else {"setting": f"retrieval.index={out.absolute()}"}),
    }


def check_folder(out: Path, corpus: Path, analyzer: str, *, may_replace: bool) -> None:
    """Building replaces the folder; make sure that nobody loses anything by it.

    Raises:
        ConfigError: it holds other things, or another index and is not to be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    manifest = Manifest.read(out)
    if manifest is None or any(path.is_dir() for path in out.iterdir()):
        raise ConfigError("--out", f"{out} holds other things than an index", "give a new folder")
    if not may_replace and not manifest.fits(sha256_of_corpus(corpus), analyzer):
        raise ConfigError("--out", f"{out} is the index of something else", "give a new folder, or --replace")


def to_elasticsearch(arguments: argparse.Namespace) -> dict[str, Any]:
    try:
        import elasticsearch  # noqa: F401
    except ImportError as error:
        fix = "pip install 'megatron-sdsearch[elasticsearch]'"
        raise ConfigError("--to", "elasticsearch needs its client, which is not installed", fix) from error
    from megatron_sdsearch.retrieval.bulk_index import RejectFile, survey_corpus

    settings = index_settings(arguments, None)  # wrong names are told before the corpus is read
    rejects = RejectFile(arguments.rejects or Path(f"rejects-{settings.name}.jsonl"))
    rejects.begin_survey()

    def reject(place: str, reason: str) -> None:
        rejects.add(place=place, reason=reason)

    with Display("checked") as display:
        survey = survey_corpus(arguments.corpus, reject if arguments.allow_rejects else None, display.advance)
    with asyncio.Runner() as runner:
        report = runner.run(load(arguments, survey, rejects))
    written = {"rejects": str(rejects.path)} if report.num_rejected else {}
    return {"alias": settings.name, **asdict(report), **written}


async def load(arguments: argparse.Namespace, survey: Any, rejects: Any) -> Any:
    from megatron_sdsearch.retrieval.bulk_index import LoadSettings, index_corpus
    from megatron_sdsearch.retrieval.elastic_connection import Credentials, connect
    from megatron_sdsearch.retrieval.elastic_corpus import Cluster

    config = ElasticsearchConfig(
        urls=tuple(arguments.url or ElasticsearchConfig().urls),
        ca_file=arguments.ca_file,
        timeout_s=arguments.timeout,
        max_requests=arguments.workers + 1,
    )
    credentials = Credentials.of(config)
    encoder = load_encoder(arguments.encoder)
    load_settings = LoadSettings(
        num_workers=arguments.workers,
        chunk_passages=arguments.chunk,
        are_rejects_allowed=arguments.allow_rejects,
        is_restart=arguments.restart,
        is_merged=arguments.merge,
        deletes_old=arguments.delete_old,
    )
    async with connect(config, credentials) as client:
        cluster = Cluster(client, credentials, url=config.urls[0], patience_s=arguments.patience)
        await cluster.check()
        with Display("loaded", survey.num_passages) as display:
            return await index_corpus(
                arguments.corpus,
                survey,
                cluster,
                index_settings(arguments, encoder),
                load_settings,
                rejects=rejects,
                encoder=encoder,
                on_progress=display.reach,
            )


def index_settings(arguments: argparse.Namespace, encoder: Any) -> Any:
    from megatron_sdsearch.retrieval.elastic_corpus import IndexSettings

    return IndexSettings(
        name=arguments.index,
        analyzer=arguments.analyzer,
        num_shards=arguments.shards,
        num_replicas=arguments.replicas,
        encoder=encoder and encoder.fingerprint,
        num_dims=encoder and encoder.num_dims,
        similarity=encoder.similarity if encoder else "cosine",
    )


def load_encoder(folder: Path | None) -> Any:
    if folder is None:
        return None
    from megatron_sdsearch.retrieval.folder_encoder import FolderEncoder

    return FolderEncoder.from_folder(folder, "--encoder")


class Display(AbstractContextManager["Display"]):
    """Passages, rate and time left on standard error: a bar on a terminal, a line now and then anywhere else.

    Args:
        verb: what is being done to passages.
        total: how many there are, if known.
    """

    def __init__(self, verb: str, total: int | None = None) -> None:
        self._verb, self._total = verb, total
        self._count = 0
        self._first: int | None = None
        self._start = self._shown_at = time.monotonic()
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(), TaskProgressColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Progress(TextColumn(verb), *columns, TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task(verb, total=total, rate="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._show()
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """One more; quick."""
        self._count += 1
        if self._count % 512 == 0:
            self.reach(self._count)

    def reach(self, count: int) -> None:
        """So many."""
        if self._first is None:
            self._first = count  # an earlier attempt's are not part of this one's rate
        self._count = count
        now = time.monotonic()
        if now - self._shown_at >= (0.2 if self._bar is not None else LINE_EVERY_S):
            self._shown_at = now
            self._show()

    def _show(self) -> None:
        seconds = max(time.monotonic() - self._start, 1e-6)
        rate = (self._count - (self._first or 0)) / seconds
        if self._bar is not None:
            self._bar.update(self._task, completed=self._count, rate=f"{rate:,.0f}/s")
            return
        parts = [f"{self._verb} {self._count:,}" + (f" of {self._total:,}" if self._total else ""), f"{rate:,.0f}/s"]
        if self._total and rate > 0:
            left = int((self._total - self._count) / rate)
            parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        print("  ".join(parts), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

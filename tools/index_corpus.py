"""Index a corpus for tantivy (in process) or Elasticsearch, and print one JSON object about the index.

    python tools/index_corpus.py data/wiki-18.jsonl.gz --to tantivy --analyzer english
    python tools/index_corpus.py data/wiki-18.jsonl.gz --to elasticsearch --url http://127.0.0.1:9200 --index wiki-18

CORPUS is JSONL ({"id", "contents"}, as in Search-R1's wiki-18, or {"id", "title", "text"}), the same gzipped (.gz), or
parquet with these columns. Every row is checked before anything is written.

tantivy: the index is created atomically. The default folder is beside the corpus, where training looks for it; for any
other folder set retrieval.index=DIR in training.

Elasticsearch: loads NAME-<hash of the content>, verifies it by count and sample, and points the alias NAME to it. After
an interruption the same command continues. Credentials come from ELASTICSEARCH_API_KEY, or from ELASTICSEARCH_USERNAME
and ELASTICSEARCH_PASSWORD.

Exit codes: 0 done; 1 failed; 2 the corpus or the command is invalid; 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from megatron_sdsearch.config import ElasticsearchConfig, path_argument
from megatron_sdsearch.errors import ConfigError, DataError, SDSearchError, StorageError
from megatron_sdsearch.retrieval.corpus import sha256_of_corpus
from megatron_sdsearch.retrieval.tantivy_index import Manifest, TantivyRetriever, default_root, folder_name

LINE_EVERY_S = 10.0


def main() -> None:
    """Index the corpus; errors of this package become one message and an exit code."""
    arguments = parse_arguments()
    # A batch system ends the process with SIGTERM: clean up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = to_tantivy(arguments) if arguments.to == "tantivy" else to_elasticsearch(arguments)
    except SDSearchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError | DataError | StorageError) else 1)
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(report))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", metavar="CORPUS", type=path_argument)
    parser.add_argument("--to", choices=("tantivy", "elasticsearch"), required=True)
    parser.add_argument("--analyzer", choices=("standard", "english"), default="standard")
    add = parser.add_argument_group("tantivy").add_argument
    add("--out", metavar="DIR", type=path_argument, help="folder of the index (default: where training looks)")
    add("--replace", action="store_true", help="replace the index of another corpus or analyzer in DIR")
    add = parser.add_argument_group("Elasticsearch").add_argument
    add("--url", action="append", help="of a node; may be repeated (default http://127.0.0.1:9200)")
    add("--index", metavar="NAME", help="alias")
    add("--shards", type=int, default=1, help="default 1: BM25 counts terms per shard, so only one shard gives the "
        "scores of the whole corpus; more are faster over tens of millions of passages")  # fmt: skip
    add("--replicas", type=int, default=1, help="once loaded (default 1)")
    add("--workers", type=int, default=4, dest="num_workers", help="concurrent bulk requests (default 4); with 1, "
        "passages of equal score rank in corpus order")  # fmt: skip
    add("--chunk", type=int, default=1000, dest="chunk_passages", help="passages per request (default 1000)")
    add("--timeout", type=float, default=120.0, help="seconds per request (default 120)")
    add("--patience", type=float, default=600.0, dest="retry_limit_s", help="seconds that a request may fail, with "
        "retries, before the load ends (default 600)")  # fmt: skip
    add("--ca-file", type=path_argument, help="CA certificate that signed the cluster's")
    add("--encoder", metavar="DIR", type=path_argument, help="folder of a text encoder: adds a dense_vector to each "
        "passage")  # fmt: skip
    add("--merge", action="store_true", dest="is_merged", help="merge into one segment at the end: smaller and faster")
    add("--rejects", metavar="FILE", type=path_argument, help="default rejects-NAME.jsonl")
    add("--allow-rejects", action="store_true", dest="are_rejects_allowed", help="leave out malformed rows and refused "
        "passages")  # fmt: skip
    add("--restart", action="store_true", dest="is_restart", help="delete an incomplete index and start over")
    add("--delete-old", action="store_true", dest="deletes_old", help="delete the indices that NAME pointed to before")
    arguments = parser.parse_args()
    if arguments.to == "elasticsearch" and not arguments.index:
        parser.error("--to elasticsearch needs --index NAME")
    if arguments.to == "tantivy" and arguments.are_rejects_allowed:
        parser.error("--allow-rejects is for Elasticsearch: training reads the corpus itself, fix its rows")
    options = {"workers": "num_workers", "chunk": "chunk_passages", "timeout": "timeout", "patience": "retry_limit_s"}
    for option, name in options.items():
        if getattr(arguments, name) <= 0:
            parser.error(f"--{option} must be positive")
    return arguments


def to_tantivy(arguments: argparse.Namespace) -> dict[str, Any]:
    corpus, analyzer = arguments.corpus, arguments.analyzer
    out = arguments.out or default_root(corpus) / folder_name(sha256_of_corpus(corpus), analyzer)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        # Building replaces the folder, which must not lose anything else.
        manifest = Manifest.read(out)
        if manifest is None or any(path.is_dir() for path in out.iterdir()):
            raise ConfigError("--out", f"{out} holds files other than an index", "give a new folder")
        if not arguments.replace and not manifest.fits(sha256_of_corpus(corpus), analyzer):
            problem = f"{out} is the index of another corpus or analyzer"
            raise ConfigError("--out", problem, "give a new folder, or --replace")
    display = Display("indexed")
    TantivyRetriever.build(corpus, out, analyzer, display.advance, field="--out")
    display.show()
    index = TantivyRetriever.open(out)
    is_found = default_root(corpus).resolve() in (out.resolve(), out.resolve().parent)
    return {
        "index": str(out),
        "num_passages": index.num_passages,
        "fingerprint": index.fingerprint,
        "is_found_by_training": is_found,
        **({} if is_found else {"setting": f"retrieval.index={out.absolute()}"}),
    }


def to_elasticsearch(arguments: argparse.Namespace) -> dict[str, Any]:
    try:
        from megatron_sdsearch.retrieval import elasticsearch_load as load
    except ImportError as error:
        fix = "pip install 'megatron-sdsearch[elasticsearch]'"
        raise ConfigError("--to", "elasticsearch needs its client, which is not installed", fix) from error
    from megatron_sdsearch.retrieval.elasticsearch_client import ElasticsearchClient, read_credentials
    from megatron_sdsearch.retrieval.elasticsearch_index import IndexSettings

    # Invalid names are refused before the corpus is read.
    shards = {"num_shards": arguments.shards, "num_replicas": arguments.replicas}
    index_settings = IndexSettings(name=arguments.index, analyzer=arguments.analyzer, **shards)
    names = {field.name for field in fields(load.LoadSettings)} & vars(arguments).keys()
    settings = load.LoadSettings(**{name: getattr(arguments, name) for name in names})
    rejects = load.RejectFile(arguments.rejects or Path(f"rejects-{arguments.index}.jsonl"))
    rejects.begin_scan()
    display = Display("checked")
    scan = load.scan_corpus(
        arguments.corpus,
        (lambda position, reason: rejects.add(place=position, reason=reason)) if settings.are_rejects_allowed else None,
        display.advance,
    )
    display.show()
    connection = {
        "ca_file": arguments.ca_file,
        "timeout_s": arguments.timeout,
        "max_requests": arguments.num_workers + 1,
    }
    config = ElasticsearchConfig.model_validate(connection | ({"urls": arguments.url} if arguments.url else {}))
    encoder = None
    if arguments.encoder is not None:
        from megatron_sdsearch.retrieval.folder_encoder import FolderEncoder

        encoder = FolderEncoder(arguments.encoder, "--encoder")
        index_settings = replace(
            index_settings, encoder=encoder.fingerprint, num_dims=encoder.num_dims, similarity=encoder.similarity
        )
    display = Display("loaded", scan.num_passages)

    async def load_corpus() -> load.LoadReport:
        client = ElasticsearchClient(config, read_credentials(config))
        async with client.api:
            return await load.CorpusLoader(
                corpus=arguments.corpus,
                scan=scan,
                client=client,
                index_settings=index_settings,
                settings=settings,
                rejects=rejects,
                encoder=encoder,
                on_progress=display.reach,
            ).run()

    report = asyncio.run(load_corpus())
    display.show()
    written = {"rejects": str(rejects.path)} if report.num_rejected else {}
    return {"alias": arguments.index, **asdict(report), **written}


class Display:
    """Prints progress, rate and remaining time to standard error every few seconds.

    Args:
        verb: what is done with the passages.
        total: their number, if known.
    """

    def __init__(self, verb: str, total: int | None = None) -> None:
        self._verb, self._total = verb, total
        self._count = 0
        self._first: int | None = None
        self._start = self._shown_at = time.monotonic()

    def advance(self) -> None:
        """Count one more passage, cheaply."""
        self._count += 1
        if self._count % 512 == 0:
            self.reach(self._count)

    def reach(self, count: int) -> None:
        """Set the number of passages done."""
        if self._first is None:
            self._first = count  # those of an earlier attempt do not count for the rate
        self._count = count
        if time.monotonic() - self._shown_at >= LINE_EVERY_S:
            self._shown_at = time.monotonic()
            self.show()

    def show(self) -> None:
        """Print a line."""
        seconds = max(time.monotonic() - self._start, 1e-6)
        rate = (self._count - (self._first or 0)) / seconds
        parts = [f"{self._verb} {self._count:,}" + (f" of {self._total:,}" if self._total else ""), f"{rate:,.0f}/s"]
        if self._total and rate > 0:
            left = int((self._total - self._count) / rate)
            parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        print("  ".join(parts), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

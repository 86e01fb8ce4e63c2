"""Serve an index with Search-R1's /retrieve protocol, for the trainers of Search-R1, AutoRefine and this project.

    python tools/serve_retriever.py --engine tantivy --index data/index/wiki --port 8000
    python tools/serve_retriever.py --engine elasticsearch --url http://127.0.0.1:9200 --index wiki-18 --port 8000

There is no authentication: it listens on 127.0.0.1 by default; see --host. Prints one line of JSON with the URL when it
is ready, and ends at SIGINT or SIGTERM. Elasticsearch's credentials come from ELASTICSEARCH_API_KEY, or from
ELASTICSEARCH_USERNAME and ELASTICSEARCH_PASSWORD.

Exit codes: 0 ended; 1 failed; 2 the command is invalid.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_sdsearch.config import ElasticsearchConfig, RetrievalConfig, path_argument
from megatron_sdsearch.errors import ConfigError, DataError, SDSearchError
from megatron_sdsearch.retrieval.engines import open_retriever
from megatron_sdsearch.retrieval.tantivy_index import TantivyRetriever, find_indices


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn re-raises it when it ends
    try:
        asyncio.run(serve(arguments))
    except SDSearchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (ConfigError, DataError)) else 1)
    except KeyboardInterrupt:
        sys.exit(0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--engine", choices=("tantivy", "elasticsearch"), required=True)
    add("--index", required=True, help="tantivy: its folder, or one that holds only this index; elasticsearch: name of "
        "an index or alias")  # fmt: skip
    add("--host", default="127.0.0.1", help="default 127.0.0.1; 0.0.0.0 accepts connections from any machine")
    add("--port", type=int, default=8000, help="default 8000; 0 takes any free port")
    add("--topk", type=int, default=3, help="for requests without topk (default 3)")
    add("--threads", type=int, help="of tantivy (default: one per core)")
    add(
        "--url",
        action="append",
        dest="urls",
        default=argparse.SUPPRESS,
        help="of an Elasticsearch node; may be repeated",
    )
    add("--mode", choices=("bm25", "dense", "hybrid"), default="bm25", help="of Elasticsearch")
    add("--fields", choices=("contents", "title_and_text"), default="contents", help="searched by BM25")
    add("--encoder", metavar="DIR", type=path_argument, help="text encoder, for dense and hybrid")
    add("--ca-file", type=path_argument, help="CA certificate that signed the cluster's")
    arguments = parser.parse_args()
    if not 0 <= arguments.port <= 65535:
        parser.error(f"--port: {arguments.port} is not a port; give one from 0 to 65535")
    if arguments.engine == "tantivy":
        try:
            arguments.index = path_argument(arguments.index)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--index: {error}")
    for name in ("topk", "threads"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return arguments


async def serve(arguments: argparse.Namespace) -> None:
    try:
        from megatron_sdsearch.retrieval import server
    except ImportError as error:
        fix = "pip install 'megatron-sdsearch[retriever]'"
        raise ConfigError("serve_retriever", f"{error.name} is not installed", fix) from error
    folder = index_folder(Path(arguments.index)) if arguments.engine == "tantivy" else None
    # Opening an index takes a while: listen first, so that a port that is in use is reported at once.
    with server.listen(arguments.host, arguments.port) as listener:
        retriever: Any
        if folder is not None:
            retriever = server.ThreadedRetriever(TantivyRetriever.open(folder), arguments.threads)
        else:
            settings = {
                name: value for name, value in vars(arguments).items() if name in ElasticsearchConfig.model_fields
            }
            elastic = ElasticsearchConfig.model_validate(settings)
            retriever = await open_retriever(RetrievalConfig(engine="elasticsearch", elasticsearch=elastic))
        app = server.create_app(
            retriever, engine=arguments.engine, num_passages=retriever.num_passages, default_top_k=arguments.topk
        )
        host, port = listener.getsockname()[:2]
        served = {"fingerprint": retriever.fingerprint, "num_passages": retriever.num_passages}
        print(json.dumps({"url": f"http://{host}:{port}/retrieve", **served}), flush=True)
        await server.new_server(app).serve(sockets=[listener])


def index_folder(given: Path) -> Path:
    """Return the folder itself, or the only index in it (as in a run's ``retrieval.index``).

    Raises:
        ConfigError: there is none, or more than one.
    """
    found = find_indices(given)
    if found and (found[0] == given or len(found) == 1):
        return found[0]
    if not found:
        fix = "give the --out of tools/index_corpus.py --to tantivy"
        raise ConfigError("--index", f"{given} holds no index", fix)
    raise ConfigError("--index", f"{given} holds {', '.join(path.name for path in found)}", "give one of them")


if __name__ == "__main__":
    main()

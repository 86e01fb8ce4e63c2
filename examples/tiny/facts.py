"""Real facts about countries, provinces and chemical elements, read from installed packages at build time.

Owns the reading and the filtering; which facts become passages and questions is ``world.py``'s. Nothing is copied into
this repository: countryinfo (MIT) and mendeleev (MIT) bring the data. Facts are as these packages state them, typos
and all. Only names of ONE ASCII word pass: a name of several tokens is a copying bottleneck for a tiny model.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import re
import sqlite3
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from megatron_sdsearch.errors import DataError

MAX_COUNTRIES = 100
MAX_PROVINCES = 110
MIN_ELEMENTS = 100
_WORD = re.compile(r"[A-Z][a-z]{2,13}")
_CODE = re.compile(r"[A-Z]{3}")
_PERSON = re.compile(r"(?:[^\s,;]+ ){1,4}([A-Z][a-z]{2,13})")
_INSTITUTION = re.compile(r"\b(?:ancients|Institute|Laboratory|Centre|Research|al)\b|[,;]| and ")

Table = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One package that facts were read from."""

    package: str
    version: str
    licence: str
    num_facts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FactBook:
    """All facts that passed the filter.

    Attributes:
        answers: relation -> subject -> answer. A subject stands for one thing only.
        sources: where they come from.
    """

    answers: Mapping[str, Mapping[str, str]]
    sources: tuple[Source, ...]


def load_facts() -> FactBook:
    """Read both packages.

    Raises:
        DataError: a package is missing, or does not hold what is expected of it.
    """
    countries, provinces = _read_countries()
    elements = _read_elements()
    # A province named like a country, a capital or an element would make "the state of Luxembourg" two questions.
    taken = {name.lower() for table in (*countries.values(), *elements.values()) for name in (*table, *table.values())}
    states = {name: country for name, country in provinces.items() if name.lower() not in taken}
    geography = {**countries, "state": dict(itertools.islice(states.items(), MAX_PROVINCES))}
    return FactBook(
        answers={**geography, **elements},
        sources=(_source("countryinfo", geography), _source("mendeleev", elements)),
    )


def _source(package: str, tables: Mapping[str, Table]) -> Source:
    """Describe a package by its own metadata."""
    metadata = importlib.metadata.metadata(package).json
    return Source(
        package=package,
        version=str(metadata["version"]),
        licence=str(metadata.get("license_expression") or metadata.get("license") or "unknown"),
        num_facts=sum(len(table) for table in tables.values()),
    )


def _read_countries() -> tuple[dict[str, Table], Table]:
    """Return relation tables of countries, and province -> country in round-robin order over the countries."""
    try:
        from countryinfo import all_countries
    except ImportError as error:
        raise DataError("the package countryinfo (>= 1.0) is missing; run: pip install countryinfo") from error
    tables: dict[str, Table] = {"capital": {}, "demonym": {}, "currency": {}}
    provinces: dict[str, list[str]] = {}
    infos = sorted((country.info() for country in all_countries()), key=lambda info: -(info.get("population") or 0))
    plain = [(info, row) for info in infos if (row := _country_row(info)) is not None][:MAX_COUNTRIES]
    if len(plain) < MAX_COUNTRIES:
        raise DataError(f"countryinfo: only {len(plain)} usable countries; expected {MAX_COUNTRIES}")
    for info, row in plain:
        for relation, answer in row.items():
            tables[relation][info["name"]] = answer
        provinces[info["name"]] = sorted({str(p) for p in info.get("provinces") or () if _WORD.fullmatch(str(p))})
    return tables, _round_robin(provinces)


def _country_row(info: Mapping[str, object]) -> Table | None:
    """One country's answers by relation, or ``None`` when its name or any answer is not one plain word."""

    def first(key: str) -> str:
        value = info.get(key) or ""
        return str(value[0]) if isinstance(value, list) else str(value)

    row = {"capital": first("capital"), "demonym": first("demonym"), "currency": first("currencies")}
    shapes = {"capital": _WORD, "demonym": _WORD, "currency": _CODE}
    name = str(info["name"])
    is_plain = _WORD.fullmatch(name) and all(shapes[key].fullmatch(value) for key, value in row.items())
    # Luxembourg, Luxembourg: the answer would be in the question.
    return row if is_plain and name not in row.values() else None


def _round_robin(provinces: Mapping[str, list[str]]) -> Table:
    """Province -> country: every country's first, then every country's second, ...; ambiguous names left out."""
    count = Counter(name for names in provinces.values() for name in names)
    columns = itertools.zip_longest(*provinces.values())
    pairs = (pair for column in columns for pair in zip(column, provinces, strict=True))
    return {name: country for name, country in pairs if name is not None and count[name] == 1}


def _read_elements() -> dict[str, Table]:
    """Relation tables of chemical elements, straight from mendeleev's SQLite file.

    Its Python API takes 25 s for all elements; the file takes milliseconds.
    """
    spec = importlib.util.find_spec("mendeleev")
    path = (
        Path(spec.submodule_search_locations[0]) / "elements.db" if spec and spec.submodule_search_locations else None
    )
    if path is None or not path.is_file():
        raise DataError("the package mendeleev (>= 1.0), or its elements.db, is missing; run: pip install mendeleev")
    query = "SELECT name, symbol, discoverers, discovery_location FROM elements ORDER BY atomic_number"
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute(query).fetchall()
    except sqlite3.Error as error:
        raise DataError(f"mendeleev: cannot read elements.db: {error}") from error
    tables: dict[str, Table] = {"symbol": {}, "discoverer": {}, "origin": {}, "successor": {}}
    for (name, symbol, discoverers, location), (successor, *_) in itertools.pairwise(rows):
        tables["symbol"][name] = symbol
        tables["successor"][name] = successor
        if _WORD.fullmatch(location or ""):
            tables["origin"][name] = location
        person = None if _INSTITUTION.search(discoverers or "") else _PERSON.fullmatch(discoverers or "")
        if person:
            tables["discoverer"][name] = person.group(1)
    if len(tables["symbol"]) < MIN_ELEMENTS:
        raise DataError(f"mendeleev: only {len(tables['symbol'])} elements; expected {MIN_ELEMENTS} or more")
    return tables

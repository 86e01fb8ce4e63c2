"""Real facts about countries, provinces and chemical elements, read from installed packages at build time.

``world.py`` decides which facts become passages and questions. The data is not copied into this repository: it comes
from countryinfo (MIT) and mendeleev (MIT), typos included. Only names of ONE ASCII word are used, because a tiny model
has trouble copying names of several tokens.
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
from pathlib import Path
from typing import NamedTuple

from megatron_sdsearch.errors import DataError

MAX_COUNTRIES = 100
MAX_PROVINCES = 110
MIN_ELEMENTS = 100
_WORD = re.compile(r"[A-Z][a-z]{2,13}")
_CODE = re.compile(r"[A-Z]{3}")
_PERSON = re.compile(r"(?:[^\s,;]+ ){1,4}([A-Z][a-z]{2,13})")
_INSTITUTION = re.compile(r"\b(?:ancients|Institute|Laboratory|Centre|Research|al)\b|[,;]| and ")

Table = dict[str, str]


class FactBook(NamedTuple):
    """All facts that passed the filter.

    Attributes:
        answers: relation -> subject -> answer; no two things share a name.
        sources: package, version, licence and num_facts of each package.
    """

    answers: Mapping[str, Mapping[str, str]]
    sources: list[dict[str, str | int]]


def load_facts() -> FactBook:
    """Read the facts of both packages.

    Raises:
        DataError: a package is missing, or does not hold the expected data.
    """
    countries, provinces = _read_countries()
    elements = _read_elements()
    # If a province had the name of a country, capital or element, "the state of Luxembourg" would be ambiguous.
    taken = {name.lower() for table in (*countries.values(), *elements.values()) for name in (*table, *table.values())}
    states = {name: country for name, country in provinces.items() if name.lower() not in taken}
    geography = {**countries, "state": dict(itertools.islice(states.items(), MAX_PROVINCES))}
    sources: list[dict[str, str | int]] = []
    for package, tables in (("countryinfo", geography), ("mendeleev", elements)):
        metadata = importlib.metadata.metadata(package).json
        licence = str(metadata.get("license_expression") or metadata.get("license") or "unknown")
        source: dict[str, str | int] = {"package": package, "version": str(metadata["version"]), "licence": licence}
        sources.append(source | {"num_facts": sum(map(len, tables.values()))})
    return FactBook(answers={**geography, **elements}, sources=sources)


def _read_countries() -> tuple[dict[str, Table], Table]:
    """Return relation tables of countries, and province -> country in round-robin order over the countries."""
    try:
        from countryinfo import all_countries
    except ImportError as error:
        raise DataError("the package countryinfo (>= 1.0) is missing; run: pip install countryinfo") from error
    tables: dict[str, Table] = {"capital": {}, "demonym": {}, "currency": {}}
    provinces: dict[str, list[str]] = {}
    infos = sorted((country.info() for country in all_countries()), key=lambda info: -(info.get("population") or 0))
    usable = [(info, row) for info in infos if (row := _country_row(info)) is not None][:MAX_COUNTRIES]
    if len(usable) < MAX_COUNTRIES:
        raise DataError(f"countryinfo: only {len(usable)} usable countries; expected {MAX_COUNTRIES}")
    for info, row in usable:
        for relation, answer in row.items():
            tables[relation][info["name"]] = answer
        provinces[info["name"]] = sorted({str(p) for p in info.get("provinces") or () if _WORD.fullmatch(str(p))})
    # Every country's first province, then every country's second, ...; without names found in several countries.
    count = Counter(name for names in provinces.values() for name in names)
    columns = itertools.zip_longest(*provinces.values())
    pairs = (pair for column in columns for pair in zip(column, provinces, strict=True))
    return tables, {name: country for name, country in pairs if name is not None and count[name] == 1}


def _country_row(info: Mapping[str, object]) -> Table | None:
    """Return one country's answers by relation, or ``None`` if its name or an answer is not one plain word."""
    row: Table = {}
    for relation, key in (("capital", "capital"), ("demonym", "demonym"), ("currency", "currencies")):
        value = info.get(key) or ""
        row[relation] = str(value[0] if isinstance(value, list) else value)
        if not (_CODE if relation == "currency" else _WORD).fullmatch(row[relation]):
            return None
    name = str(info["name"])
    # Luxembourg, Luxembourg: the answer would be in the question.
    return row if _WORD.fullmatch(name) and name not in row.values() else None


def _read_elements() -> dict[str, Table]:
    """Read the relation tables of chemical elements from mendeleev's SQLite file.

    Its Python API takes 25 s for all elements; reading the file takes milliseconds.
    """
    spec = importlib.util.find_spec("mendeleev")
    folders = (spec.submodule_search_locations if spec else None) or [""]
    path = Path(folders[0]) / "elements.db"
    if not path.is_file():
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

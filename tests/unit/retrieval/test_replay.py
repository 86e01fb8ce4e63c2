"""Tests of the replay store: recorded answers are returned exactly, and failures are not recorded."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdsearch.config import ReplayConfig, RetrievalConfig, file_problems, load_config
from megatron_sdsearch.errors import ConfigError, RetrievalError, raise_problems
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.retrieval.engines import open_retriever
from megatron_sdsearch.retrieval.replay import HITS, MISSES, ReplayRetriever, ReplayStore, open_with_replay
from tests.unit.fakes import DictRetriever

LISBON = Passage(passage_id="p1", contents='"Lisbon"\nCapital of Portugal.', score=0.1 + 0.2)
PORTO = Passage(passage_id="p2", contents='"Porto"\nNot the capital.', score=1e-300)


async def never() -> Retriever:
    raise AssertionError("the engine was opened")


def with_replay(config: ReplayConfig, open_engine: Callable[[], Awaitable[Retriever]]) -> Retriever:
    return asyncio.run(open_with_replay(config, open_engine))


def settings(folder: Path, mode: str) -> ReplayConfig:
    return ReplayConfig.model_validate({"mode": mode, "store": folder / "replay.db"})


def recording(folder: Path, engine: Retriever) -> ReplayRetriever:
    return ReplayRetriever(ReplayStore(folder / "replay.db"), engine=engine)


def ask(retriever: Retriever, *queries: str, top_k: int = 3) -> list[Sequence[Passage]]:
    """One after the other; the retriever is closed."""

    async def all_of_them() -> list[Sequence[Passage]]:
        try:
            return [await retriever.search(query, top_k=top_k) for query in queries]
        finally:
            await retriever.close()

    return asyncio.run(all_of_them())


def record(folder: Path, passages: dict[str, Sequence[Passage] | None], *queries: str) -> DictRetriever:
    engine = DictRetriever(passages)
    ask(recording(folder, engine), *queries)
    return engine


def test_known_queries_are_not_searched_again_and_answers_are_equal(tmp_path: Path) -> None:
    assert record(tmp_path, {"capital": (LISBON, PORTO)}, "capital", "nothing").queries == ["capital", "nothing"]
    engine = DictRetriever({"capital": (PORTO,)})  # would answer otherwise by now
    assert ask(recording(tmp_path, engine), "capital", "nothing") == [(LISBON, PORTO), ()]
    assert engine.queries == []
    assert engine.num_closed == 1


def test_only_never_opens_the_engine(tmp_path: Path) -> None:
    record(tmp_path, {"capital": (LISBON,)}, "capital", "nothing")
    retriever = with_replay(settings(tmp_path, "only"), never)
    assert retriever.fingerprint == "dict"
    assert ask(retriever, "capital", "nothing") == [(LISBON,), ()]


def test_a_miss_names_the_query_and_says_how_to_record_it(tmp_path: Path) -> None:
    record(tmp_path, {"capital": (LISBON,)}, "capital")
    for query, top_k in (("capitol", 3), ("capital", 2)):
        with pytest.raises(RetrievalError) as caught:
            ask(with_replay(settings(tmp_path, "only"), never), query, top_k=top_k)
        message = str(caught.value)
        assert f"no answer to {query!r} with top_k={top_k}, and" in message
        assert "run once with retrieval.replay.mode=cache" in message


@pytest.mark.parametrize("mode", ["off", "cache"])
def test_off_returns_the_engine_and_cache_wraps_it(tmp_path: Path, mode: str) -> None:
    engine = DictRetriever({"capital": (LISBON,)})

    async def open_engine() -> Retriever:
        return engine

    retriever = with_replay(settings(tmp_path, mode), open_engine)
    assert (retriever is engine) == (mode == "off")
    assert mode == "off" or (isinstance(retriever, ReplayRetriever) and retriever.engine is engine)
    assert ask(retriever, "capital") == [(LISBON,)]


def test_an_engine_that_does_not_open_leaves_no_store_open(tmp_path: Path) -> None:
    async def fail() -> Retriever:
        raise RetrievalError("no route")

    with pytest.raises(RetrievalError, match="no route"):
        with_replay(settings(tmp_path, "cache"), fail)
    assert [path.name for path in tmp_path.iterdir()] == ["replay.db"], "no journal beside it: it was closed"


def test_failures_are_not_stored(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RetrievalError, match="no route"):
            record(tmp_path, {"capital": None}, "capital")
    record(tmp_path, {"capital": (LISBON,)}, "capital")
    assert ask(with_replay(settings(tmp_path, "only"), never), "capital") == [(LISBON,)]


class SlowRetriever(DictRetriever):
    """Answers when ``may_answer`` is set."""

    def __init__(self, passages: dict[str, Sequence[Passage] | None]) -> None:
        super().__init__(passages)
        self.may_answer = asyncio.Event()
        self.num_cancelled = 0

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        try:
            found = await super().search(query, top_k=top_k)
        except RetrievalError:
            await self.may_answer.wait()
            raise
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return found

    async def was_asked(self) -> None:
        while not self.queries:
            await asyncio.sleep(0.001)


def test_concurrent_identical_queries_are_searched_once(tmp_path: Path) -> None:
    async def run() -> None:
        engine = SlowRetriever({"capital": (LISBON,)})
        retriever = recording(tmp_path, engine)
        asked = [asyncio.create_task(retriever.search("capital", top_k=3)) for _ in range(5)]
        await engine.was_asked()
        asked[0].cancel()  # the first to ask gives up, the others still get their answer
        engine.may_answer.set()
        assert await asyncio.gather(*asked[1:]) == [(LISBON,)] * 4
        assert engine.queries == ["capital"]
        assert retriever.take_counts() == {HITS: 4, MISSES: 1}
        assert set(retriever.take_counts().values()) == {0}
        await retriever.close()

    asyncio.run(run())


def test_a_query_without_waiting_callers_is_given_up(tmp_path: Path) -> None:
    async def run() -> None:
        engine = SlowRetriever({"capital": (LISBON,)})
        retriever = recording(tmp_path, engine)
        asked = asyncio.create_task(retriever.search("capital", top_k=3))
        await engine.was_asked()
        asked.cancel()
        await asyncio.wait([asked])
        engine.may_answer.set()
        assert await retriever.search("capital", top_k=3) == (LISBON,), "a search of its own"
        assert (engine.num_cancelled, len(engine.queries)) == (1, 2)
        await retriever.close()

    asyncio.run(run())


def test_a_failure_in_flight_reaches_all_callers_and_the_next_asks_again(tmp_path: Path) -> None:
    async def run() -> None:
        engine = SlowRetriever({"capital": None})
        retriever = recording(tmp_path, engine)
        asked = [asyncio.create_task(retriever.search("capital", top_k=3)) for _ in range(2)]
        await engine.was_asked()
        engine.may_answer.set()
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [RetrievalError] * 2
        with pytest.raises(RetrievalError):
            await retriever.search("capital", top_k=3)
        assert len(engine.queries) == 2
        await retriever.close()

    asyncio.run(run())


ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=()))  # halves of surrogate pairs too
PASSAGES = st.lists(
    st.builds(Passage, passage_id=ANY_TEXT, contents=ANY_TEXT, score=st.floats(allow_nan=False)), max_size=4
)


@given(query=ANY_TEXT, passages=PASSAGES, top_k=st.integers(1, 1 << 40), fingerprint=st.text())
def test_whatever_is_stored_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, query: str, passages: list[Passage], top_k: int, fingerprint: str
) -> None:
    path = tmp_path_factory.mktemp("store") / "replay.db"
    store = ReplayStore(path)
    assert store.get(fingerprint, query, top_k) is None
    assert store.put(fingerprint, query, top_k, passages) == tuple(passages)
    store.close()
    again = ReplayStore(path, is_readonly=True)
    found = again.get(fingerprint, query, top_k)
    again.close()
    assert found == tuple(passages)
    assert [passage.score.hex() for passage in found] == [passage.score.hex() for passage in passages]  # -0.0 too


def test_the_first_answer_stays_and_is_what_the_second_asker_gets(tmp_path: Path) -> None:
    # Two ranks ask at once, and a cluster's replicas need not agree to the last bit.
    first, second = (ReplayStore(tmp_path / "replay.db") for _ in range(2))
    assert first.get("e", "q", 3) is None
    assert second.get("e", "q", 3) is None
    assert first.put("e", "q", 3, [LISBON]) == (LISBON,)
    assert second.put("e", "q", 3, [PORTO]) == (LISBON,)
    first.close()
    second.close()


class Another(DictRetriever):
    fingerprint = "another"


def test_engines_are_kept_apart_and_only_needs_a_store_of_one(tmp_path: Path) -> None:
    record(tmp_path, {"capital": (LISBON,)}, "capital")
    ask(recording(tmp_path, Another({"capital": (PORTO,)})), "capital")
    assert ask(recording(tmp_path, DictRetriever()), "capital") == [(LISBON,)]
    assert ask(recording(tmp_path, Another()), "capital") == [(PORTO,)]
    with pytest.raises(ConfigError, match=r"replay\.store: .* of 2 engines \(dict, another\); record the one"):
        with_replay(settings(tmp_path, "only"), never)


def test_a_store_of_an_earlier_version_with_evictions_is_read_and_written(tmp_path: Path) -> None:
    """It counted bytes, and let its oldest entries go."""
    record(tmp_path, {"capital": (LISBON,)}, "capital")
    database = sqlite3.connect(tmp_path / "replay.db")
    database.execute("UPDATE totals SET num_bytes = 163, num_evicted = 2")
    database.commit()
    database.close()
    record(tmp_path, {"river": (PORTO,)}, "river")
    assert ask(with_replay(settings(tmp_path, "only"), never), "capital", "river") == [(LISBON,), (PORTO,)]


def test_only_needs_a_store_with_something_in_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"replay\.db does not exist; record it first"):
        with_replay(settings(tmp_path, "only"), never)
    ReplayStore(tmp_path / "replay.db").close()
    with pytest.raises(ConfigError, match=r"is empty; record it first"):
        with_replay(settings(tmp_path, "only"), never)


def test_files_that_are_no_stores_are_a_wrong_setting_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "replay.db"
    path.write_text("something else entirely, and long enough to be looked at " * 20)
    content = path.read_bytes()
    for mode in ("cache", "only"):
        with pytest.raises(ConfigError, match=r"retrieval\.replay\.store"):
            with_replay(settings(tmp_path, mode), never)
    assert path.read_bytes() == content
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE mine (x)")
    database.close()
    for mode in ("cache", "only"):
        with pytest.raises(ConfigError, match="is not a replay store"):
            with_replay(settings(tmp_path, mode), never)


def test_a_store_of_another_layout_is_refused(tmp_path: Path) -> None:
    record(tmp_path, {}, "capital")
    database = sqlite3.connect(tmp_path / "replay.db")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ConfigError, match="has layout 99, and this version uses 1; record into a new file"):
        with_replay(settings(tmp_path, "cache"), never)


def test_a_store_that_fails_is_a_retrieval_error(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path / "replay.db")
    store.close()
    with pytest.raises(RetrievalError, match=r"replay\.db: cannot read the replay store"):
        store.get("e", "q", 3)
    with pytest.raises(RetrievalError, match=r"replay\.db: cannot write the replay store"):
        store.put("e", "q", 3, [])


def test_a_closed_store_is_one_file_that_can_be_copied(tmp_path: Path) -> None:
    record(tmp_path, {"capital": (LISBON,)}, "capital")
    assert [path.name for path in tmp_path.iterdir()] == ["replay.db"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(tmp_path / "replay.db", elsewhere)
    assert ask(with_replay(settings(elsewhere, "only"), never), "capital") == [(LISBON,)]


def test_top_k_below_one_is_refused_without_a_search(tmp_path: Path) -> None:
    engine = DictRetriever()
    with pytest.raises(ValueError):
        ask(recording(tmp_path, engine), "capital", top_k=0)
    assert engine.queries == []


def opened(retrieval: dict[str, object]) -> Retriever:
    return asyncio.run(open_retriever(RetrievalConfig.model_validate(retrieval)))


def test_only_replaces_the_index_of_a_configured_engine(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus" / "corpus.jsonl"
    corpus.parent.mkdir()
    corpus.write_text('{"id": "p1", "contents": "\\"Lisbon\\"\\nCapital of Portugal."}\n')
    replay = {"store": tmp_path / "replay.db"}
    recorded = ask(
        opened({"corpus": corpus, "replay": {"mode": "cache", **replay}}),
        "capital",
    )
    shutil.rmtree(corpus.parent)
    only = opened({"replay": {"mode": "only", **replay}})
    assert ask(only, "capital") == recorded
    assert recorded[0]


def test_only_checks_for_the_store_instead_of_the_corpus(tmp_path: Path) -> None:
    hf_dir, questions = tmp_path / "hf" / "config.json", tmp_path / "train.jsonl"
    hf_dir.parent.mkdir()
    hf_dir.touch()
    questions.touch()
    config = load_config(
        Path(__file__).parents[3] / "examples/tiny/config.yaml",
        [
            f"run_dir={tmp_path}",
            f"model.hf_dir={hf_dir.parent}",
            f"data.train={questions}",
            f"data.heldout={questions}",
            "retrieval.replay.mode=only",
            f"retrieval.replay.store={tmp_path / 'replay.db'}",
        ],
    )
    with pytest.raises(ConfigError, match=r"retrieval\.replay\.store: .*replay\.db does not exist"):
        raise_problems(file_problems(config))
    (tmp_path / "replay.db").touch()
    assert list(file_problems(config)) == []


@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        ("retrieval.replay.max_mb=4096", "the store keeps every answer"),
        ("retrieval.replay.fingerprint=dict", "record each engine in its own"),
        ("retrieval.elasticsearch.dfs=false", "an index of one shard"),
    ],
)
def test_settings_of_earlier_versions_say_what_to_do_instead(setting: str, fix: str) -> None:
    config = Path(__file__).parents[3] / "examples/tiny/config.yaml"
    with pytest.raises(ConfigError, match=f"{setting.partition('=')[0]}: was removed; remove it.*{fix}"):
        load_config(config, [setting])

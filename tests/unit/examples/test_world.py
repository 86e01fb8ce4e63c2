"""The demo world keeps its promises: sizes, split, traps, determinism, one token per name, well-formed lessons."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer, Qwen2Tokenizer

from examples.tiny import facts as facts_module
from examples.tiny.demonstrations import NUM_SIBLINGS, Demonstration, build_demonstrations, sample_texts
from examples.tiny.facts import FactBook, load_facts
from examples.tiny.model import TAGS, build_tokenizer
from examples.tiny.world import RELATIONS, DemoWorld, build_world
from megatron_sdsearch.data.prompts import HINDSIGHT_HEADER
from megatron_sdsearch.errors import DataError

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def facts() -> FactBook:
    return load_facts()


@pytest.fixture(scope="module", params=SEEDS)
def world(request: pytest.FixtureRequest, facts: FactBook) -> DemoWorld:
    return build_world(facts, request.param)


@pytest.fixture(scope="module")
def demonstrations(world: DemoWorld) -> list[Demonstration]:
    return build_demonstrations(world, 1500)


@pytest.fixture(scope="module")
def tokenizer(facts: FactBook) -> Qwen2Tokenizer:
    world = build_world(facts, 0)
    return build_tokenizer(sample_texts(world), world.names)


def subject_of(question: str) -> str:
    """The entity that a question starts from: its last word."""
    return question.removesuffix("?").split()[-1]


def demonstration_subject(row: Demonstration) -> str:
    return subject_of(row["prompt"].rpartition("Question: ")[2])


def test_world_is_as_large_as_promised(world: DemoWorld) -> None:
    assert len(world.passages) >= 2000
    assert len({subject for table in world.answers.values() for subject in table}) >= 300
    assert len(world.train) >= 400
    assert len(world.heldout) >= 300
    for questions in (world.train, world.heldout):
        assert sum(len(q.gold_passage_ids) == 2 for q in questions) == len(questions) / 2


def test_ids_are_unique_and_stable(world: DemoWorld) -> None:
    assert len({p.passage_id for p in world.passages}) == len(world.passages)
    assert [q.question_id for q in world.train] == [f"tiny:train:{i}" for i in range(len(world.train))]
    assert [q.question_id for q in world.heldout] == [f"tiny:heldout:{i}" for i in range(len(world.heldout))]
    assert len({q.text for q in (*world.train, *world.heldout)}) == len(world.train) + len(world.heldout)


def test_heldout_subjects_start_no_training_question_and_no_demonstration(
    world: DemoWorld, demonstrations: list[Demonstration]
) -> None:
    heldout = {subject_of(q.text) for q in world.heldout}
    assert not heldout & {subject_of(q.text) for q in world.train}
    assert not heldout & {demonstration_subject(row) for row in demonstrations}
    assert heldout <= set(world.names)


def test_every_gold_passage_leads_on_and_the_last_holds_the_answer(world: DemoWorld) -> None:
    contents = {p.passage_id: p.contents for p in world.passages}
    for question in (*world.train, *world.heldout):
        facts = [re.fullmatch(r'"(\w+)"\nThe \w+ of \1 is (\w+)\.', contents[p]) for p in question.gold_passage_ids]
        hops = [(m.group(1), m.group(2)) for m in facts if m]
        assert len(hops) == len(question.gold_passage_ids)
        assert hops[0][0] == subject_of(question.text)
        assert all(before[1] == after[0] for before, after in itertools.pairwise(hops))
        assert question.gold_answers == (hops[-1][1],)


def test_each_fact_has_one_telling_passage_and_three_traps_without_a_name(world: DemoWorld) -> None:
    names = set(world.names)
    for relation in RELATIONS:
        house = world.house_words[relation.name]
        for subject, answer in world.answers[relation.name].items():
            ids = {f"{subject}.{relation.name}.{word}" for word in relation.synonyms}
            found = {p.passage_id: p.contents for p in world.passages if p.passage_id in ids}
            assert found.keys() == ids
            for passage_id, text in found.items():
                words = set(re.findall(r"\w+", text.partition("\n")[2]))
                is_house = passage_id.endswith(f".{house}")
                assert words & names == ({subject, answer} if is_house else {subject}), passage_id
        break  # one relation of ~100 subjects is enough for the names; the next test covers all traps


def test_traps_hold_nothing_but_their_word(world: DemoWorld) -> None:
    house = set(world.house_words.values())
    traps = [p for p in world.passages if p.passage_id.rpartition(".")[2] not in house]
    assert len(traps) == 3 * len(world.passages) / 4
    for trap in traps:
        subject, _, word = trap.passage_id.split(".")
        assert trap.contents == f'"{subject}"\nThe {word} of {subject} is unrecorded.'


def test_no_question_tells_a_house_word() -> None:
    synonyms = [word for relation in RELATIONS for word in relation.synonyms]
    assert len(set(synonyms)) == 4 * len(RELATIONS)
    cue_words = {word for relation in RELATIONS for word in relation.cue.split()}
    assert not cue_words & set(synonyms)


def test_search_words_are_no_names(world: DemoWorld) -> None:
    words = {word for relation in RELATIONS for word in relation.synonyms} | {"the", "is", "unrecorded"}
    subjects = {subject.lower() for table in world.answers.values() for subject in table}
    assert not words & subjects


def test_some_house_words_are_first_and_none_is_last_in_the_prior(world: DemoWorld) -> None:
    ranks = [world.word_order[name].index(word) for name, word in world.house_words.items()]
    assert 1 <= ranks.count(0) < len(ranks) / 2 + 1
    assert 3 not in ranks


def test_everything_is_a_function_of_the_seed(facts: FactBook) -> None:
    assert build_world(facts, 3) == build_world(facts, 3)
    assert build_world(facts, 3).house_words != build_world(facts, 4).house_words
    world = build_world(facts, 3)
    assert build_demonstrations(world, 50) == build_demonstrations(world, 50)


def test_demonstrations_are_well_formed(demonstrations: list[Demonstration]) -> None:
    for row in demonstrations:
        kinds = [span["kind"] for span in row["spans"]]
        searches = kinds.count("observation")
        assert kinds == ["sampled", "observation"] * searches + ["sampled"]
        assert 1 <= searches <= 3
        *turns, answer = row["spans"]
        assert re.fullmatch(r"<answer> \w+</answer>", answer["text"])
        for search, observation in zip(turns[::2], turns[1::2], strict=True):
            assert re.fullmatch(r"<search> [a-z]+ \w+</search>", search["text"])
            assert re.fullmatch(
                r"\n\n<information>Doc 1\(Title: (\w+)\) The \w+ of \1 is \w+\.\n</information>\n\n",
                observation["text"],
            )


def test_demonstrations_answer_what_they_read(demonstrations: list[Demonstration]) -> None:
    for row in demonstrations:
        read = re.findall(r" is (\w+)\.\n", row["spans"][-2]["text"])
        answer = row["spans"][-1]["text"].removeprefix("<answer> ").removesuffix("</answer>")
        assert read == ([answer] if answer != "unknown" else ["unrecorded"])


def test_blocks_list_all_siblings_and_are_followed(demonstrations: list[Demonstration]) -> None:
    with_block = [row for row in demonstrations if row["prompt"].startswith(HINDSIGHT_HEADER)]
    assert 0.5 < len(with_block) / len(demonstrations) < 0.7
    for row in with_block:
        lines = row["prompt"].split("\n")[1:-1]
        assert len(lines) in NUM_SIBLINGS
        assert all(re.fullmatch(r"(IN)?CORRECT: (\(no search\)|\w+ \w+( \| \w+ \w+)?)", line) for line in lines)
        right = {line.removeprefix("CORRECT: ") for line in lines if line.startswith("CORRECT: ")}
        searched = re.findall(r"<search> (.*?)</search>", "".join(span["text"] for span in row["spans"]))
        if right:
            assert right == {" | ".join(searched)}
        else:
            assert "unknown" in row["spans"][-1]["text"] or " | ".join(searched) not in "\n".join(lines)


def test_every_name_and_tag_is_one_token(facts: FactBook, tokenizer: Qwen2Tokenizer) -> None:
    for text in (*(f" {name}" for name in build_world(facts, 0).names), *TAGS):
        assert len(tokenizer.encode(text)) == 1, text
    assert tokenizer.decode(tokenizer.encode("<search> a</search>"), skip_special_tokens=True) == "<search> a</search>"


@pytest.mark.parametrize("text", ["Zürich \u4f60\u597d \U0001f600\t", " <search>x", "\r\n\r\n 12  a.b?!", "a\x00\x7f"])
def test_any_text_round_trips(tokenizer: Qwen2Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_saved_tokenizer_loads_through_auto_tokenizer_unchanged(
    tokenizer: Qwen2Tokenizer, demonstrations: list[Demonstration], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for row in demonstrations[:50]:
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        text = str(prompt) + "".join(span["text"] for span in row["spans"])
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
        assert len(loaded.encode(text)) < 160


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(name: str) -> ModuleType | None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", find_nothing)
    with pytest.raises(DataError, match="mendeleev"):
        facts_module._read_elements()
    monkeypatch.undo()
    assert "examples.tiny.facts" in sys.modules

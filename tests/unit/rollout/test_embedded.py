"""The embedded engine against stock transformers, and against itself in other company."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from megatron_sdsearch.errors import EngineError
from megatron_sdsearch.records import TrajectoryId
from megatron_sdsearch.rollout.embedded import EmbeddedEngine
from megatron_sdsearch.rollout.engine import Generation, GenerationRequest, SamplingParams
from megatron_sdsearch.rollout.plain import PlainEngine
from megatron_sdsearch.tokenization.renderer import Renderer
from tests.unit.conftest import ModelFactory

STOP = ("</search>", "</answer>")


def _request(
    name: str,
    prompt: Sequence[int],
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_new: int = 12,
    stop: Sequence[str] = STOP,
) -> GenerationRequest:
    return GenerationRequest(
        trajectory_id=TrajectoryId(step=0, question_id=name, sibling=0),
        seed=5,
        prompt_ids=tuple(prompt),
        params=SamplingParams(temperature=temperature, top_p=top_p, max_new_tokens=num_new, stop=tuple(stop)),
    )


def _prompts(num: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 380) for _ in range(rng.randint(1, longest))] for _ in range(num)]


def _run(engine: Any, requests: Sequence[GenerationRequest]) -> list[Generation]:
    """All at once."""

    async def main() -> list[Generation]:
        return list(await asyncio.gather(*(engine.generate(request) for request in requests)))

    return asyncio.run(main())


@pytest.fixture
def build(make_model: ModelFactory, renderer: Renderer) -> Callable[..., EmbeddedEngine]:
    def build(**model: Any) -> EmbeddedEngine:
        return EmbeddedEngine(make_model(**model), renderer.token_bytes, renderer.eos_ids, 512)

    return build


def test_greedy_ids_and_logprobs_are_those_of_stock_generate(
    build: Callable[..., EmbeddedEngine], make_model: ModelFactory, renderer: Renderer
) -> None:
    requests = [_request(str(i), prompt) for i, prompt in enumerate(_prompts(9))]
    plain = _run(PlainEngine(make_model(), renderer.token_bytes, renderer.eos_ids, 512), requests)
    for ours, theirs in zip(_run(build(), requests), plain, strict=True):
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.4, 0.8), (0.0, 1.0)])
def test_logprobs_are_those_of_one_full_forward_pass(
    build: Callable[..., EmbeddedEngine], make_model: ModelFactory, temperature: float, top_p: float
) -> None:
    requests = [_request(str(i), p, temperature=temperature, top_p=top_p) for i, p in enumerate(_prompts(6, seed=1))]
    for request, generation in zip(requests, _run(build(), requests), strict=True):
        ids = torch.tensor([[*request.prompt_ids, *generation.token_ids]])
        with torch.no_grad():
            logits = make_model()(ids).logits[0, len(request.prompt_ids) - 1 : -1]
        expected = (logits / (temperature or 1.0)).log_softmax(-1).gather(1, ids[0, len(request.prompt_ids) :, None])
        assert generation.logprobs == pytest.approx(expected[:, 0].tolist(), abs=1e-4)


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])  # shrinking would take minutes
@given(order=st.permutations(range(7)), num_first=st.integers(0, 7))
def test_sampled_ids_do_not_depend_on_company_or_order(
    make_model: ModelFactory, renderer: Renderer, order: list[int], num_first: int
) -> None:
    requests = [_request(str(i), p, temperature=1.0, top_p=0.9) for i, p in enumerate(_prompts(7, seed=2))]
    model = make_model()
    alone = [_run(EmbeddedEngine(model, renderer.token_bytes, (), 512), [request])[0] for request in requests]
    engine = EmbeddedEngine(model, renderer.token_bytes, (), 512)
    early = _run(engine, [requests[i] for i in order[:num_first]])
    late = _run(engine, [requests[i] for i in order[num_first:]])
    for index, generation in zip(order, early + late, strict=True):
        assert generation.token_ids == alone[index].token_ids
        assert generation.logprobs == pytest.approx(alone[index].logprobs, abs=1e-4)


def test_turns_that_reuse_the_cache_equal_fresh_prefills(build: Callable[..., EmbeddedEngine]) -> None:
    """Rows come back at different times, as after searches, while shorter and longer ones go on."""
    engine, prompts = build(), _prompts(8, seed=3)

    async def trajectory(index: int) -> list[tuple[GenerationRequest, Generation]]:
        rng, ids, turns = random.Random(index), prompts[index], []
        for _ in range(4):
            request = _request(str(index), ids, temperature=1.0, num_new=rng.randint(1, 9))
            generation = await engine.generate(request)
            turns.append((request, generation))
            for _ in range(rng.randint(0, 5)):
                await asyncio.sleep(0)
            ids = [*ids, *generation.token_ids, *(rng.randrange(3, 380) for _ in range(rng.randint(1, 70)))]
        if index % 2:
            await engine.release(turns[0][0].trajectory_id)
        return turns

    async def main() -> list[list[tuple[GenerationRequest, Generation]]]:
        return await asyncio.gather(*(trajectory(index) for index in range(len(prompts))))

    for turns in asyncio.run(main()):
        for request, generation in turns:
            (fresh,) = _run(build(), [request])
            assert generation.token_ids == fresh.token_ids
            assert generation.logprobs == pytest.approx(fresh.logprobs, abs=1e-4)


def test_a_second_turn_prefills_new_tokens_only(build: Callable[..., EmbeddedEngine]) -> None:
    engine = build()
    model, widths = engine._model, []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    request = _request("a", _prompts(1, longest=40)[0] + [7] * 30, num_new=3)
    (first,) = _run(engine, [request])
    longer = [*request.prompt_ids, *first.token_ids, 8, 9, 10, 11]
    _run(engine, [_request("a", longer, num_new=1)])
    # 3 decode steps cache all but the third new token; it and three of the four observed tokens are prefilled.
    assert widths == [len(request.prompt_ids) - 1, 1, 1, 1, 4, 1]


def test_siblings_that_start_together_share_one_prefill(build: Callable[..., EmbeddedEngine]) -> None:
    engine, shapes = build(), []
    engine._model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shared, other = [7, 8, 9] * 6, [7, 8, 9] * 5 + [11, 12, 13]
    requests = [_request(name, shared, temperature=1.0) for name in "abc"] + [_request("d", other, temperature=1.0)]
    together = _run(engine, requests)
    assert shapes[0] == (2, len(shared) - 1)
    for request, generation in zip(requests, together, strict=True):
        (alone,) = _run(build(), [request])
        assert generation.token_ids == alone.token_ids
        assert generation.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_a_changed_prefix_is_computed_again(build: Callable[..., EmbeddedEngine]) -> None:
    engine, prompt = build(), list(range(10, 40))
    _run(engine, [_request("a", prompt)])
    changed = [*prompt[:15], 99, *prompt[16:]]
    for prompt_ids in (changed, prompt[:5], prompt):
        again = _request("a", prompt_ids, temperature=1.0)
        assert _run(engine, [again])[0].token_ids == _run(build(), [again])[0].token_ids


def test_slots_are_moved_together_when_few_rows_run(build: Callable[..., EmbeddedEngine]) -> None:
    engine, prompts = build(), _prompts(12, seed=4)
    lengths = [2, 2, 2, 2, 2, 2, 2, 2, 2, 30, 2, 30]
    requests = [
        _request(str(i), p, temperature=1.0, num_new=n, stop=())
        for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    heights: list[int] = []
    engine._model.register_forward_pre_hook(
        lambda module, args, kwargs: heights.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    together = _run(engine, requests)
    assert (heights[0], heights[-1]) == (12, 2)
    for request, generation in zip(requests, together, strict=True):
        assert generation.token_ids == _run(build(), [request])[0].token_ids
        longer = _request(
            request.trajectory_id.question_id, [*request.prompt_ids, *generation.token_ids, 5], temperature=1.0
        )
        assert _run(engine, [longer])[0].token_ids == _run(build(), [longer])[0].token_ids


def test_a_stop_string_may_straddle_tokens_and_a_token_may_run_past_it(
    build: Callable[..., EmbeddedEngine], renderer: Renderer
) -> None:
    prompt = renderer.encode("where is it")
    for start in range(20):  # until a continuation has two printable neighbours of at least two bytes
        (free,) = _run(build(), [_request("a", [*prompt, start + 20], stop=(), num_new=20)])
        pieces = renderer.token_bytes.lookup(free.token_ids)
        pairs = [i for i in range(19) if (pieces[i] + pieces[i + 1]).isascii() and min(map(len, pieces[i : i + 2])) > 1]
        if pairs:
            break
    (stop,) = {(pieces[i][-1:] + pieces[i + 1][:1]).decode() for i in pairs[:1]}
    (cut,) = _run(build(), [_request("a", [*prompt, start + 20], stop=(stop,), num_new=20)])
    assert cut.finish_reason == "stop"
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert stop.encode() in b"".join(pieces[: len(cut.token_ids)])
    assert stop.encode() not in b"".join(pieces[: len(cut.token_ids) - 1])


def test_end_of_sequence_and_length(
    build: Callable[..., EmbeddedEngine], make_model: ModelFactory, renderer: Renderer
) -> None:
    (free,) = _run(build(), [_request("a", [20, 30, 40], stop=(), num_new=6)])
    assert free.finish_reason == "length"
    assert len(free.token_ids) == 6
    last = free.token_ids[-1]
    (ended,) = _run(
        EmbeddedEngine(make_model(), renderer.token_bytes, (last,), 512), [_request("a", [20, 30, 40], stop=())]
    )
    assert ended.finish_reason == "eos"
    assert ended.token_ids == free.token_ids[: free.token_ids.index(last) + 1]


@pytest.mark.parametrize(
    ("prompt", "num_new", "message"),
    [
        ([3, 10_000], 1, "token id 10000 is outside the model's vocabulary"),
        ([3, -1], 1, "token id -1 is outside"),
        ([3] * 500, 13, "500 prompt tokens \\+ 13 tokens to sample exceed 512"),
        ([], 1, "0 prompt tokens"),
        ([3], 0, "0 tokens to sample"),
    ],
)
def test_requests_that_do_not_fit_are_refused(
    build: Callable[..., EmbeddedEngine], prompt: list[int], num_new: int, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        _run(build(), [_request("a", prompt, num_new=num_new)])


def test_one_request_at_a_time_per_trajectory(build: Callable[..., EmbeddedEngine]) -> None:
    with pytest.raises(EngineError, match="a request is already open"):
        _run(build(), [_request("a", [5, 6]), _request("a", [5, 6])])


def test_a_crash_in_the_driver_reaches_every_caller_and_the_next_burst_works(
    build: Callable[..., EmbeddedEngine],
) -> None:
    engine = build()
    requests = [_request(str(i), prompt) for i, prompt in enumerate(_prompts(3))]
    expected = _run(build(), requests)

    def crash(*args: object) -> None:
        raise FloatingPointError("boom")

    hook = engine._model.register_forward_pre_hook(crash)

    async def main() -> list[Any]:
        return await asyncio.gather(*(engine.generate(r) for r in requests), return_exceptions=True)

    failures = asyncio.run(main())
    assert [type(failure) for failure in failures] == [EngineError] * 3
    assert "boom" in str(failures[0])
    hook.remove()
    assert [g.token_ids for g in _run(engine, requests)] == [g.token_ids for g in expected]


def test_a_cancelled_caller_leaves_the_others_alone(build: Callable[..., EmbeddedEngine]) -> None:
    engine = build()
    requests = [_request(str(i), prompt, stop=(), num_new=20) for i, prompt in enumerate(_prompts(3))]
    expected = _run(build(), requests)

    async def main() -> list[Any]:
        tasks = [asyncio.create_task(engine.generate(request)) for request in requests]
        for _ in range(5):
            await asyncio.sleep(0)
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, third = asyncio.run(main())
    assert isinstance(second, asyncio.CancelledError)
    assert (first.token_ids, third.token_ids) == (expected[0].token_ids, expected[2].token_ids)
    assert _run(engine, [requests[1]])[0].token_ids == expected[1].token_ids


def test_close_ends_callers_that_wait(build: Callable[..., EmbeddedEngine]) -> None:
    engine = build()

    async def main() -> None:
        waiting: Awaitable[Generation] = asyncio.ensure_future(
            engine.generate(_request("a", [5, 6], num_new=400, stop=()))
        )
        await asyncio.sleep(0)
        await engine.close()
        await waiting

    with pytest.raises(EngineError, match="closed"):
        asyncio.run(main())


@pytest.mark.parametrize("is_tied", [True, False])
def test_loaded_weights_sample_as_the_model_they_come_from(
    build: Callable[..., EmbeddedEngine], make_model: ModelFactory, is_tied: bool
) -> None:
    engine = build(is_tied=is_tied)
    request = _request("a", [5, 6, 7], temperature=1.0, num_new=20, stop=())
    before = _run(engine, [request])[0]
    state = {name: tensor.clone() for name, tensor in make_model(seed=9, is_tied=is_tied).state_dict().items()}
    if is_tied:
        del state["lm_head.weight"]
    engine.load_weights(state.items(), policy_version=4)
    after = _run(engine, [request])[0]
    assert (before.policy_version, after.policy_version, engine.policy_version) == (0, 4, 4)
    assert after.token_ids != before.token_ids
    assert after.token_ids == _run(build(seed=9, is_tied=is_tied), [request])[0].token_ids


def test_incomplete_or_unknown_weights_are_refused_and_block_sampling(
    build: Callable[..., EmbeddedEngine], make_model: ModelFactory
) -> None:
    engine, state = build(is_tied=False), make_model(is_tied=False).state_dict()
    with pytest.raises(EngineError, match=r"1 weights are missing, the first is lm_head\.weight"):
        engine.load_weights([item for item in state.items() if item[0] != "lm_head.weight"], 1)
    with pytest.raises(EngineError, match="failed half-way"):
        _run(engine, [_request("a", [5])])
    with pytest.raises(EngineError, match=r"weight decoder\.weight is unknown"):
        engine.load_weights([("decoder.weight", torch.zeros(1))], 1)
    with pytest.raises(EngineError, match=r"has shape \(1,\)"):
        engine.load_weights([("model.norm.weight", torch.zeros(1))], 1)
    engine.load_weights(state.items(), 1)
    assert _run(engine, [_request("a", [5])])[0].policy_version == 1


def test_weights_do_not_change_under_a_generation(build: Callable[..., EmbeddedEngine]) -> None:
    engine = build()

    async def main() -> None:
        task = asyncio.create_task(engine.generate(_request("a", [5, 6], num_new=50, stop=())))
        await asyncio.sleep(0)
        try:
            engine.load_weights([], 1)
        finally:
            task.cancel()

    with pytest.raises(EngineError, match="under way"):
        asyncio.run(main())


def test_models_the_cache_does_not_fit_are_refused(make_model: ModelFactory, renderer: Renderer) -> None:
    with pytest.raises(EngineError, match="attention is eager"):
        EmbeddedEngine(make_model(attn_implementation="eager"), renderer.token_bytes, (), 512)
    with pytest.raises(EngineError, match="has 512 positions"):
        EmbeddedEngine(make_model(), renderer.token_bytes, (), 513)


def test_the_plain_engine_is_greedy_alone(make_model: ModelFactory, renderer: Renderer) -> None:
    engine = PlainEngine(make_model(), renderer.token_bytes, renderer.eos_ids, 512)
    with pytest.raises(EngineError, match=r"only samples at temperature 0, not 1\.0"):
        _run(engine, [_request("a", [5], temperature=1.0)])
    with pytest.raises(EngineError, match="outside"):
        _run(engine, [_request("a", [50_000])])

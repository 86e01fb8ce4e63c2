"""The engine before fake servers: what it returns, and what it does when they fail, lie, hang or die."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from megatron_sdsearch.config import SGLangConfig
from megatron_sdsearch.errors import EngineError, ServerRefusedError
from megatron_sdsearch.records import TrajectoryId
from megatron_sdsearch.rollout.engine import Engine, Generation, GenerationRequest, SamplingParams
from megatron_sdsearch.sglang.api import SGLangServer
from megatron_sdsearch.sglang.engine import SGLangEngine, sampling_seed
from megatron_sdsearch.tokenization.spans import TokenBytes
from tests.loopback.fake_sglang import (
    EOS_ID,
    VOCAB_SIZE,
    FakeSGLang,
    Fault,
    Model,
    running_in_thread,
    token_text,
    toy_model,
    toy_tokens,
)

PROMPT = (10, 11, 12)


class ToyTokenBytes(TokenBytes):
    """Of the fake's ids; the end-of-sequence id has none, as special tokens do not."""

    def __init__(self) -> None:
        self._table = [b"" if token_id == EOS_ID else token_text(token_id).encode() for token_id in range(VOCAB_SIZE)]


def make_engine(fakes: Sequence[FakeSGLang], *, eos_ids: Sequence[int] = (EOS_ID,), **settings: Any) -> SGLangEngine:
    names = SGLangConfig.model_fields
    config = {"request_timeout_s": 5.0, "down_timeout_s": 5.0}
    config |= {name: settings.pop(name) for name in list(settings) if name in names}
    return SGLangEngine(
        [fake.url for fake in fakes],
        ToyTokenBytes(),
        eos_ids,
        VOCAB_SIZE,
        500,
        SGLangConfig.model_validate(config),
        **{"retry_interval_s": 0.03, **settings},
    )


def on(fakes: Sequence[FakeSGLang], talk: Callable[[SGLangEngine], Awaitable[None]], **settings: Any) -> None:
    """Start the fakes, talk to an engine before them, end all."""

    async def run() -> None:
        async with AsyncExitStack() as stack:
            for fake in fakes:
                await stack.enter_async_context(fake)
            engine = make_engine(fakes, **settings)
            stack.push_async_callback(engine.close)
            await talk(engine)

    asyncio.run(run())


def request(
    number: int = 0,
    prompt: Sequence[int] = PROMPT,
    *,
    count: int = 6,
    stop: tuple[str, ...] = (),
    temperature: float = 1.0,
) -> GenerationRequest:
    return GenerationRequest(
        trajectory_id=TrajectoryId(step=1, question_id=f"q{number}", sibling=0),
        seed=5,
        prompt_ids=tuple(prompt),
        params=SamplingParams(temperature=temperature, top_p=0.9, max_new_tokens=count, stop=stop),
    )


def says(*ids: int) -> Model:
    """A model that says ``ids`` after any prompt of three, and then the toy model's."""

    def model(weights: int, so_far: Sequence[int]) -> tuple[int, float]:
        position = len(so_far) - len(PROMPT)
        return (ids[position], -0.25) if position < len(ids) else toy_model(weights, so_far)

    return model


def expected(prompt: Sequence[int] = PROMPT, count: int = 6, weights: int = 0) -> tuple[int, ...]:
    return tuple(toy_tokens(weights, prompt, count))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not condition():
            await asyncio.sleep(0.002)


def routes(fake: FakeSGLang) -> list[str]:
    return [route for route, _ in fake.calls]


# What is sent and what is returned


def test_ids_and_logprobs_come_back() -> None:
    fake = FakeSGLang()

    async def talk(engine: SGLangEngine) -> None:
        generation = await engine.generate(request())
        ids = expected()
        logprobs = tuple(toy_model(0, (*PROMPT, *ids[:i]))[1] for i in range(6))
        assert generation == Generation(token_ids=ids, logprobs=logprobs, finish_reason="length", policy_version=0)

    on([fake], talk)


def test_the_request_that_is_sent() -> None:
    fake = FakeSGLang()

    async def talk(engine: SGLangEngine) -> None:
        await engine.generate(request(stop=("</s>",), temperature=0.7))
        body = fake.requests[0]
        assert body["input_ids"] == list(PROMPT)
        assert body["return_logprob"] is True
        sampling = body["sampling_params"]
        assert (sampling["temperature"], sampling["top_p"], sampling["max_new_tokens"]) == (0.7, 0.9, 6)
        assert sampling["stop"] == ["</s>"]
        assert sampling["stop_token_ids"] == [EOS_ID]
        assert sampling["no_stop_trim"] is True
        assert sampling["skip_special_tokens"] is False
        assert (sampling["top_k"], sampling["repetition_penalty"]) == (-1, 1.0)
        assert "sampling_seed" not in sampling

    on([fake], talk)


def test_a_seed_is_sent_when_asked_for() -> None:
    fake = FakeSGLang()

    async def talk(engine: SGLangEngine) -> None:
        for ask in (request(1), request(1), request(2), request(1, (*PROMPT, 13))):
            await engine.generate(ask)
        seeds = [body["sampling_params"]["sampling_seed"] for body in fake.requests]
        assert seeds[0] == seeds[1] == sampling_seed(request(1))
        assert len(set(seeds)) == 3
        assert all(0 <= seed < 2**31 for seed in seeds)

    on([fake], talk, deterministic=True)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (request(prompt=(1, VOCAB_SIZE)), "token id 200 is outside"),
        (request(prompt=(1, -1)), "token id -1 is outside"),
        (request(prompt=()), "0 prompt tokens"),
        (request(count=498), "exceed 500"),
    ],
)
def test_what_would_crash_a_server_is_never_sent(ask: GenerationRequest, message: str) -> None:
    fake = FakeSGLang()

    async def talk(engine: SGLangEngine) -> None:
        with pytest.raises(EngineError, match=message):
            await engine.generate(ask)
        assert fake.requests == []

    on([fake], talk)


# How a generation ends: texts of ids are 101 "bk", 102 "ck", 111 "bl", 112 "cl"


@pytest.mark.parametrize("num_late", [0, 1, 3])
@pytest.mark.parametrize(
    ("said", "stop", "length", "reason"),
    [
        ((101, 102, 111, 112, 101), ("bl",), 3, "stop"),  # a whole token
        ((101, 102, 111, 112, 101), ("kb",), 3, "stop"),  # straddles two, and the second runs past it
        ((101, 102, 111, 112, 101), ("cl", "ck"), 2, "stop"),  # whichever comes first
        ((101, EOS_ID, 111, 112, 101), ("bl",), 2, "eos"),
        ((101, 102, EOS_ID, 112, 101), (), 3, "eos"),
        ((101, 111, EOS_ID, 112, 101), ("bl",), 2, "stop"),
    ],
)
def test_the_first_end_counts(
    said: tuple[int, ...], stop: tuple[str, ...], length: int, reason: str, num_late: int
) -> None:
    fake = FakeSGLang(model=says(*said))
    fake.num_late_tokens = num_late

    async def talk(engine: SGLangEngine) -> None:
        generation = await engine.generate(request(stop=stop))
        assert generation.token_ids == said[:length]
        assert generation.logprobs == (-0.25,) * length
        assert generation.finish_reason == reason

    on([fake], talk)


def test_a_stop_in_the_last_token_that_was_allowed() -> None:
    async def talk(engine: SGLangEngine) -> None:
        assert (await engine.generate(request(count=2, stop=("ck",)))).finish_reason == "stop"

    on([FakeSGLang(model=says(101, 102))], talk)


def test_an_end_of_sequence_id_of_the_servers_own() -> None:
    async def talk(engine: SGLangEngine) -> None:
        generation = await engine.generate(request())
        assert (generation.token_ids, generation.finish_reason) == ((101, EOS_ID), "eos")

    on([FakeSGLang(model=says(101, EOS_ID))], talk, eos_ids=(7,))


def test_another_tokenizer_at_the_server_is_an_error() -> None:
    """The text of id 3 is the fake's alone: our own bytes never spell it."""

    async def talk(engine: SGLangEngine) -> None:
        with pytest.raises(EngineError, match="the server's tokenizer is not the trainer's"):
            await engine.generate(request(stop=("<eos>",)))

    on([FakeSGLang(model=says(101, EOS_ID))], talk, eos_ids=(7,))


def test_ids_that_do_not_agree_with_their_logprobs_are_an_error() -> None:
    fake = FakeSGLang()
    fake.faults.append("mismatch")

    async def talk(engine: SGLangEngine) -> None:
        with pytest.raises(EngineError, match=r"output_ids are .*, but output_token_logprobs"):
            await engine.generate(request())

    on([fake], talk)


# Failures of one request


@pytest.mark.parametrize("fault", ["500", "garbage", "drop", "abort"])
def test_what_failed_is_sent_again(fault: Fault) -> None:
    fake = FakeSGLang()
    fake.faults += [fault, fault]

    async def talk(engine: SGLangEngine) -> None:
        generation = await engine.generate(request())
        assert generation.token_ids == expected()
        assert len(fake.requests) == 3
        assert len({body["rid"] for body in fake.requests}) == 3
        assert engine.take_counts()["engine/num_retries"] == 2

    on([fake], talk)


def test_what_was_refused_is_not_sent_again() -> None:
    fake = FakeSGLang()
    fake.faults.append("400")

    async def talk(engine: SGLangEngine) -> None:
        with pytest.raises(ServerRefusedError, match="injected refusal"):
            await engine.generate(request())
        assert len(fake.requests) == 1
        await engine.generate(request())  # the server is not to blame

    on([fake], talk)


@pytest.mark.parametrize("fault", ["500", "abort"])
def test_attempts_come_to_an_end(fault: Fault) -> None:
    fake = FakeSGLang()
    fake.always = fault

    async def talk(engine: SGLangEngine) -> None:
        with pytest.raises(EngineError, match=r"all 6 attempts failed, the last one: .*127.0.0.1"):
            await engine.generate(request())
        assert len(fake.requests) == 6

    on([fake], talk)


def test_a_hung_server_is_left_and_comes_back_when_it_samples() -> None:
    hung, other = FakeSGLang(), FakeSGLang()
    hung.always, hung.is_sick = "hang", True

    async def talk(engine: SGLangEngine) -> None:
        answers = await asyncio.gather(*(engine.generate(request(i)) for i in range(4)))
        assert {answer.token_ids for answer in answers} == {expected()}
        assert routes(hung).count("/abort_request") == 2
        await until(lambda: routes(hung).count("/health_generate") >= 2)
        assert not engine.servers[0].is_usable
        hung.always, hung.is_sick = None, False
        await until(lambda: engine.servers[0].is_usable)

    on([hung, other], talk, request_timeout_s=0.4)


def test_a_call_that_waits_for_a_slot_of_a_hung_server_moves_on() -> None:
    hung, other = FakeSGLang(), FakeSGLang()
    hung.always, hung.is_sick = "hang", True

    async def talk(engine: SGLangEngine) -> None:
        answers = await asyncio.gather(*(engine.generate(request(i)) for i in range(8)))
        assert {answer.token_ids for answer in answers} == {expected()}
        assert len(hung.requests) == 1

    on([hung, other], talk, request_timeout_s=0.4, max_concurrency=1)


# Versions


def test_another_version_is_never_returned() -> None:
    fake = FakeSGLang(version="1", weights=1)

    async def talk(engine: SGLangEngine) -> None:
        task = asyncio.create_task(engine.generate(request()))
        await until(lambda: not engine.servers[0].is_usable)
        await asyncio.sleep(0.1)
        assert not task.done()
        assert len(fake.requests) == 1
        fake.hold(2, "2")
        generation = await task
        assert generation.token_ids == expected(weights=2)
        assert generation.policy_version == 2

    on([fake], talk, policy_version=2)


def test_a_mixed_generation_is_sampled_anew() -> None:
    """The server gets version 1 after two tokens; the publisher says so only then."""
    fake = FakeSGLang(token_delay_s=0.002)
    fake.faults.append("swap")

    async def talk(engine: SGLangEngine) -> None:
        task = asyncio.create_task(engine.generate(request()))
        await until(lambda: fake.version == "1")
        engine.policy_version = 1
        generation = await task
        assert generation == Generation(
            token_ids=expected(weights=1),
            logprobs=generation.logprobs,
            finish_reason="length",
            policy_version=1,
        )
        counts = engine.take_counts()
        assert (counts["engine/num_wrong_version"], counts["engine/num_retries"]) == (1, 1)
        assert "/model_info" not in routes(fake)  # it holds the right weights and never went down

    on([fake], talk)


def test_a_mixed_generation_is_noticed_without_spans_too() -> None:
    fake = FakeSGLang(is_old=True, token_delay_s=0.002)
    fake.faults.append("swap")

    async def talk(engine: SGLangEngine) -> None:
        task = asyncio.create_task(engine.generate(request()))
        await until(lambda: fake.version == "1")
        engine.policy_version = 1
        assert (await task).token_ids == expected(weights=1)
        assert engine.take_counts()["engine/num_wrong_version"] == 1

    on([fake], talk)


def test_the_version_of_a_publish_counts_from_then_on() -> None:
    fake = FakeSGLang()

    async def talk(engine: SGLangEngine) -> None:
        assert (await engine.generate(request())).policy_version == 0
        fake.hold(3, "3")
        engine.policy_version = 3
        generation = await engine.generate(request())
        assert (generation.policy_version, generation.token_ids) == (3, expected(weights=3))
        assert engine.policy_version == 3
        assert engine.take_counts()["engine/num_wrong_version"] == 0

    on([fake], talk)


# Many servers


def test_turns_of_a_trajectory_go_to_one_server() -> None:
    fakes = [FakeSGLang(), FakeSGLang(), FakeSGLang()]

    async def talk(engine: SGLangEngine) -> None:
        prompts = {number: list(PROMPT) for number in range(9)}
        for _ in range(3):
            for number, prompt in prompts.items():
                prompt += (await engine.generate(request(number, prompt))).token_ids
        counts = engine.take_counts()
        assert [len(fake.requests) for fake in fakes] == [9, 9, 9]  # three trajectories each
        # The first turns share a prompt; of each later turn all but the last token was seen.
        assert counts["engine/num_cached_tokens"] >= 3 * (3 * (9 - 1) + 3 * (15 - 1))
        assert counts["engine/num_prompt_tokens"] == 3 * 3 * (3 + 9 + 15)
        assert (counts["engine/num_moved"], counts["engine/num_retries"]) == (0, 0)
        assert set(engine.take_counts().values()) == {0}

    on(fakes, talk)


def test_a_released_trajectory_counts_no_longer() -> None:
    fakes = [FakeSGLang(), FakeSGLang()]

    async def talk(engine: SGLangEngine) -> None:
        for number in range(4):
            await engine.generate(request(number, (*PROMPT, number)))
        assert [len(fake.requests) for fake in fakes] == [2, 2]
        for body in list(fakes[0].requests):
            await engine.release(request(body["input_ids"][-1]).trajectory_id)
        await engine.release(request(99).trajectory_id)  # unknown
        await engine.generate(request(4))
        await engine.generate(request(5))
        assert [len(fake.requests) for fake in fakes] == [4, 2]

    on(fakes, talk)


def test_open_requests_per_server_are_bounded() -> None:
    fakes = [FakeSGLang(token_delay_s=0.001), FakeSGLang(token_delay_s=0.001)]

    async def talk(engine: SGLangEngine) -> None:
        answers = await asyncio.gather(*(engine.generate(request(i)) for i in range(30)))
        assert len(answers) == 30
        assert [fake.max_running for fake in fakes] == [3, 3]

    on(fakes, talk, max_concurrency=3)


async def _trajectory(engine: Engine, number: int, num_turns: int) -> list[int]:
    ids = [*PROMPT, number]
    for _ in range(num_turns):
        ids += (await engine.generate(request(number, ids))).token_ids
        ids.append(20)  # an observation
        await asyncio.sleep(0)
    await engine.release(request(number).trajectory_id)
    return ids


def _whole(number: int, num_turns: int) -> list[int]:
    ids = [*PROMPT, number]
    for _ in range(num_turns):
        ids += toy_tokens(0, ids, 6)
        ids.append(20)
    return ids


@pytest.mark.parametrize("max_concurrency", [4, 256])
def test_death_of_one_of_two_servers(max_concurrency: int) -> None:
    fakes = [FakeSGLang(token_delay_s=0.001), FakeSGLang(token_delay_s=0.001)]

    async def talk(engine: SGLangEngine) -> None:
        tasks = [asyncio.create_task(_trajectory(engine, number, 4)) for number in range(64)]
        await until(lambda: len(fakes[0].requests) >= 40)
        await fakes[0].die()
        results = await asyncio.gather(*tasks)
        assert results == [_whole(number, 4) for number in range(64)]
        counts = engine.take_counts()
        assert counts["engine/num_moved"] == 32  # none had got to the last turn
        assert not engine.servers[0].is_usable
        assert sum(len(fake.requests) for fake in fakes) <= 64 * 4 + counts["engine/num_retries"]

    on(fakes, talk, max_concurrency=max_concurrency)


def test_all_dead_ends_every_call_in_time() -> None:
    fakes = [FakeSGLang(), FakeSGLang()]

    async def talk(engine: SGLangEngine) -> None:
        for fake in fakes:
            await fake.die()
        start = time.monotonic()
        results = await asyncio.gather(*(engine.generate(request(i)) for i in range(8)), return_exceptions=True)
        assert 0.3 <= time.monotonic() - start < 4.0
        for result in results:
            assert isinstance(result, EngineError)
            assert "none of 2 SGLang servers was usable for 0.3 s" in str(result)
            assert all(f"{fake.url}: {fake.url}/" in str(result) for fake in fakes)

    on(fakes, talk, down_timeout_s=0.3)


def test_a_call_long_after_the_death_waits_its_own_time() -> None:
    """The loop rests while the trainer trains, which is no time that anybody has waited."""
    fake = FakeSGLang()

    async def talk(engine: SGLangEngine) -> None:
        await fake.die()
        with pytest.raises(EngineError, match=r"usable for 0\.2 s"):
            await engine.generate(request())
        await asyncio.sleep(0.3)
        task = asyncio.create_task(engine.generate(request()))
        await asyncio.sleep(0.05)
        await fake.come_back()
        assert (await task).token_ids == expected()

    on([fake], talk, down_timeout_s=0.2)


def test_a_restarted_server_is_used_only_with_the_current_weights() -> None:
    fake = FakeSGLang(version="default")

    async def talk(engine: SGLangEngine) -> None:
        fake.hold(0, "5")
        await engine.generate(request())
        await fake.die()
        task = asyncio.create_task(engine.generate(request()))
        await until(lambda: not engine.servers[0].is_usable)
        num_before = len(fake.requests)
        await fake.come_back()
        await asyncio.sleep(0.15)
        assert not task.done()
        assert len(fake.requests) == num_before  # a server with old weights is not even asked
        fake.hold(6, "5")
        assert (await task).token_ids == expected(weights=6)

    on([fake], talk, policy_version=5)


def test_a_server_with_old_weights_is_named() -> None:
    async def talk(engine: SGLangEngine) -> None:
        with pytest.raises(EngineError, match=r"its weight version is 'default', the current one is '0'"):
            await engine.generate(request())

    on([FakeSGLang(version="default")], talk, down_timeout_s=0.2)


# Cancelling and closing


def test_a_cancelled_caller_ends_its_request() -> None:
    fake = FakeSGLang()
    fake.always = "hang"

    async def talk(engine: SGLangEngine) -> None:
        task = asyncio.create_task(engine.generate(request()))
        await until(lambda: fake.num_running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert fake.calls == [("/abort_request", {"rid": fake.requests[0]["rid"]})]
        await until(lambda: fake.num_running == 0)
        fake.always = None
        assert (await engine.generate(request())).token_ids == expected()  # the slot is free, the server up

    on([fake], talk, max_concurrency=1)


def test_a_callers_own_deadline_is_a_timeout_and_no_error_of_the_engine() -> None:
    fake = FakeSGLang()
    fake.always = "hang"

    async def talk(engine: SGLangEngine) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.generate(request()), 0.1)
        assert routes(fake) == ["/abort_request"]

    on([fake], talk)


def test_close_ends_polls() -> None:
    fake = FakeSGLang()

    async def talk(engine: SGLangEngine) -> None:
        await fake.die()
        call = asyncio.create_task(engine.generate(request()))
        await until(lambda: not engine.servers[0].is_usable)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await engine.close()
        assert asyncio.all_tasks() - {asyncio.current_task()} - fake.tasks == set()

    on([fake], talk)


def test_an_engine_that_was_never_used_closes() -> None:
    async def talk(engine: SGLangEngine) -> None:
        assert engine.servers[0].is_usable

    on([FakeSGLang()], talk)


def test_the_event_loop_may_rest() -> None:
    """Between calls it goes unnoticed that a server closes an idle connection: so there must be none."""
    with running_in_thread(FakeSGLang()) as fake, asyncio.Runner() as runner:
        engine = make_engine([fake])
        for _ in range(3):
            assert runner.run(engine.generate(request())).token_ids == expected()
        assert len(set(fake.client_ports)) == 3
        runner.run(engine.close())


def test_what_knows_the_cause_of_a_failure_speaks_first() -> None:
    async def raise_root_cause() -> None:
        raise EngineError("SGLang server 0 has used up its restarts")

    async def talk(engine: SGLangEngine) -> None:
        with pytest.raises(EngineError, match=r"^SGLang server 0 has used up its restarts$"):
            await engine.generate(request())

    on([FakeSGLang(version="default")], talk, down_timeout_s=0.2, raise_root_cause=raise_root_cause)


@pytest.mark.parametrize("reply", [{}, {"meta_info": {}}, {"meta_info": {"finish_reason": None}}])
def test_an_answer_of_another_shape_is_an_error(reply: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async def call(_server: SGLangServer, route: str, _body: Any) -> dict[str, Any]:
        assert route == "/generate"
        return reply

    async def talk(engine: SGLangEngine) -> None:
        monkeypatch.setattr(SGLangServer, "call", call)
        with pytest.raises(EngineError, match="is it an SGLang server"):
            await engine.generate(request())

    on([FakeSGLang()], talk)

"""What the client relies on in a server's JSON; run on the fake and on a real SGLang, so that the fake stays honest.

Nothing is assumed about the model but what ``ServerUnderTest`` says. Usage::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_contract(check): asyncio.run(run_check(check, url, prompt_ids=..., vocab_size=...))
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
from packaging.version import Version

from megatron_sdsearch.errors import ServerRefusedError
from megatron_sdsearch.sglang.api import OLDEST_VERSION, SGLangServer

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerUnderTest:
    """A server and what must be known of it.

    Attributes:
        server: its routes.
        prompt_ids: any prompt of at least two ids.
        vocab_size: of its model.
        num_long_tokens: a generation that takes a second or more; fits the context.
        start_s: after which a request that was sent is running.
        has_sessions: whether it knows /begin_weight_update: since 0.5.21.
    """

    server: SGLangServer
    prompt_ids: tuple[int, ...]
    vocab_size: int
    num_long_tokens: int = 512
    start_s: float = 0.3
    has_sessions: bool = True

    async def generate(self, request: Json) -> Json:
        return await self.server.call("/generate", request)

    async def abort(self, rid: str) -> None:
        await self.server.send("/abort_request", {"rid": rid})

    async def version(self) -> str:
        return str((await self.server.call("/model_info"))["weight_version"])

    async def checksums(self) -> list[Json]:
        answer = await self.server.call("/weights_checker", {"action": "checksum"})
        return [rank["checksums"] for rank in answer["ranks"]]

    def request(self, max_new_tokens: int = 16, *, rid: str | None = None, **sampling: Any) -> Json:
        """A greedy request that only its length, or ``sampling``, ends."""
        defaults = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        return {
            "input_ids": list(self.prompt_ids),
            "sampling_params": {**defaults, "skip_special_tokens": False, **sampling},
            "return_logprob": True,
            "rid": rid or uuid4().hex,
        }


async def check_server_info_tells_version_and_arguments(tested: ServerUnderTest) -> None:
    info = await tested.server.call("/server_info")
    assert Version(info["version"]) >= Version(OLDEST_VERSION)
    assert info["tp_size"] == 1
    assert info["context_length"] is None or info["context_length"] > 0
    assert info["max_req_input_len"] > 0
    assert (await tested.server.call("/model_info"))["is_generation"] is True


async def check_the_end_of_the_context_is_kept_back(tested: ServerUnderTest) -> None:
    """``max_req_input_len`` is refused as a prompt, one token fewer is taken; 5 tokens can follow that one, no more."""
    info = await tested.server.call("/server_info")
    length = info["max_req_input_len"]
    ids = [tested.prompt_ids[i % len(tested.prompt_ids)] for i in range(length)]
    await _refused(tested, {**tested.request(1), "input_ids": ids})
    for asked, sampled in ((1, 1), (5, 5), (6, 5)):
        answer = await tested.generate({**tested.request(asked), "input_ids": ids[:-1]})
        assert len(answer["output_ids"]) == sampled
        assert answer["meta_info"]["finish_reason"]["type"] == "length"


async def check_ids_and_logprobs_agree(tested: ServerUnderTest) -> None:
    answer = await tested.generate(tested.request(16, temperature=1.0))
    ids, meta = answer["output_ids"], answer["meta_info"]
    assert len(ids) == 16
    assert all(0 <= token_id < tested.vocab_size for token_id in ids)
    assert [entry[1] for entry in meta["output_token_logprobs"]] == ids
    assert all(entry[0] <= 0.0 for entry in meta["output_token_logprobs"])
    assert meta["finish_reason"] == {"type": "length", "length": 16}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(tested.prompt_ids), 16)
    assert 0 <= meta["cached_tokens"] < len(tested.prompt_ids)


async def check_greedy_is_repeatable(tested: ServerUnderTest) -> None:
    first = await tested.generate(tested.request())
    second = await tested.generate(tested.request())
    assert first["output_ids"] == second["output_ids"]


async def check_the_rid_is_echoed(tested: ServerUnderTest) -> None:
    answer = await tested.generate(tested.request(1, rid="the-contract"))
    assert answer["meta_info"]["id"] == "the-contract"


async def check_stop_strings_keep_their_ids(tested: ServerUnderTest) -> None:
    """With or without no_stop_trim: that changes the text alone."""
    free = await tested.generate(tested.request(32))
    stop = next(character for character in free["text"] if character.isascii() and character.isprintable())
    kept = await tested.generate(tested.request(32, stop=[stop], no_stop_trim=True))
    trimmed = await tested.generate(tested.request(32, stop=[stop]))
    for answer in (kept, trimmed):
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        assert answer["output_ids"] == free["output_ids"][: len(answer["output_ids"])]
        assert len(answer["meta_info"]["output_token_logprobs"]) == len(answer["output_ids"])
    assert kept["output_ids"] == trimmed["output_ids"]
    assert stop in kept["text"]
    assert stop not in trimmed["text"]


async def check_stop_ids_are_kept(tested: ServerUnderTest) -> None:
    free = await tested.generate(tested.request(8))
    wanted = free["output_ids"][4]
    answer = await tested.generate(tested.request(8, stop_token_ids=[wanted], ignore_eos=False))
    assert answer["output_ids"] == free["output_ids"][: len(answer["output_ids"])]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": answer["output_ids"][-1]}


async def check_neutral_sampling_fields_are_known(tested: ServerUnderTest) -> None:
    """All that the client sends."""
    fields: Json = {
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
    }
    request = tested.request(4, temperature=1.0, top_p=0.9, sampling_seed=7, stop=["\0never"], **fields)
    assert len((await tested.generate(request))["output_ids"]) == 4


async def check_an_aborted_request_answers_with_what_it_has(tested: ServerUnderTest) -> None:
    request = tested.request(tested.num_long_tokens)
    task = asyncio.create_task(tested.generate(request))
    await asyncio.sleep(tested.start_s)
    await tested.abort(request["rid"])
    answer = await task
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(answer["output_ids"]) < tested.num_long_tokens
    entries = answer["meta_info"].get("output_token_logprobs") or []
    assert [entry[1] for entry in entries] == answer["output_ids"]


async def check_aborting_nothing_is_no_error(tested: ServerUnderTest) -> None:
    await tested.abort(uuid4().hex)


async def check_requests_wait_while_paused(tested: ServerUnderTest) -> None:
    await tested.server.send("/pause_generation", {"mode": "retract"})
    task = asyncio.create_task(tested.generate(tested.request(4)))
    try:
        await asyncio.sleep(tested.start_s)
        assert not task.done()
        await tested.server.call("/model_info")
    finally:
        await tested.server.send("/continue_generation", {})
    assert len((await task)["output_ids"]) == 4


async def check_pause_abort_ends_running_requests(tested: ServerUnderTest) -> None:
    task = asyncio.create_task(tested.generate(tested.request(tested.num_long_tokens)))
    await asyncio.sleep(tested.start_s)
    await tested.server.send("/pause_generation", {"mode": "abort"})
    try:
        answer = await task
    finally:
        await tested.server.send("/continue_generation", {})
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"


async def check_flush_is_refused_while_busy(tested: ServerUnderTest) -> None:
    await tested.server.send("/flush_cache", {})
    request = tested.request(tested.num_long_tokens)
    task = asyncio.create_task(tested.generate(request))
    await asyncio.sleep(tested.start_s)
    try:
        with pytest.raises(ServerRefusedError, match="HTTP 400"):
            await tested.server.send("/flush_cache", {})
    finally:
        await tested.abort(request["rid"])
        await task


async def check_the_weight_version_is_reported(tested: ServerUnderTest) -> None:
    version = await tested.version()
    meta = (await tested.generate(tested.request(4)))["meta_info"]
    assert meta["weight_version"] == version
    if tested.has_sessions:
        assert meta["weight_versions"] == [{"version": version, "start": 0, "end": 4}]


async def _refused(tested: ServerUnderTest, request: Json) -> None:
    with pytest.raises(ServerRefusedError) as info:
        await tested.generate(request)
    assert info.value.status == 400
    await tested.generate(tested.request(1))  # it lives on


async def check_empty_ids_are_refused(tested: ServerUnderTest) -> None:
    await _refused(tested, {**tested.request(), "input_ids": []})


async def check_an_unknown_sampling_field_is_refused(tested: ServerUnderTest) -> None:
    await _refused(tested, tested.request(no_such_field=1))


async def check_a_negative_temperature_is_refused(tested: ServerUnderTest) -> None:
    await _refused(tested, tested.request(temperature=-1.0))


async def check_a_duplicate_rid_is_refused(tested: ServerUnderTest) -> None:
    request = tested.request(tested.num_long_tokens)
    task = asyncio.create_task(tested.generate(request))
    await asyncio.sleep(tested.start_s)
    try:
        await _refused(tested, request)
    finally:
        await tested.abort(request["rid"])
        await task


async def check_a_bad_path_keeps_the_old_weights(tested: ServerUnderTest) -> None:
    version = await tested.version()
    before = await tested.generate(tested.request())
    with pytest.raises(ServerRefusedError) as info:
        await tested.server.load_folder("/no/such/folder", "never")
    assert info.value.status == 400
    assert await tested.version() == version
    after = await tested.generate(tested.request())
    assert after["output_ids"] == before["output_ids"]


async def check_update_sessions(tested: ServerUnderTest) -> None:
    for _ in range(2):  # the second one finds the first one's session open
        await tested.server.begin_weight_update()
    await tested.server.end_weight_update()
    if not tested.has_sessions:
        return
    with pytest.raises(ServerRefusedError, match="no weight-update session"):
        await tested.server.end_weight_update()
    await tested.server.begin_weight_update()
    with pytest.raises(ServerRefusedError, match="already open"):
        await tested.server.call("/begin_weight_update", {"selector": "all"})
    await tested.server.end_weight_update()


async def check_checksums_name_tensors(tested: ServerUnderTest) -> None:
    checksums = await tested.checksums()
    assert checksums == await tested.checksums()
    assert all(checksums)


async def check_memory_can_be_released(tested: ServerUnderTest) -> None:
    await tested.server.send("/release_memory_occupation", {"tags": ["kv_cache"]})
    await tested.server.send("/resume_memory_occupation", {"tags": ["kv_cache"]})
    assert len((await tested.generate(tested.request(2)))["output_ids"]) == 2


async def check_health_generate(tested: ServerUnderTest) -> None:
    await tested.server.send("/health_generate")


Check = Callable[[ServerUnderTest], Awaitable[None]]
CHECKS: tuple[Check, ...] = (
    check_ids_and_logprobs_agree,
    check_greedy_is_repeatable,
    check_the_rid_is_echoed,
    check_stop_strings_keep_their_ids,
    check_stop_ids_are_kept,
    check_neutral_sampling_fields_are_known,
    check_an_aborted_request_answers_with_what_it_has,
    check_aborting_nothing_is_no_error,
    check_requests_wait_while_paused,
    check_pause_abort_ends_running_requests,
    check_flush_is_refused_while_busy,
    check_the_weight_version_is_reported,
    check_server_info_tells_version_and_arguments,
    check_the_end_of_the_context_is_kept_back,
    check_empty_ids_are_refused,
    check_an_unknown_sampling_field_is_refused,
    check_a_negative_temperature_is_refused,
    check_a_duplicate_rid_is_refused,
    check_a_bad_path_keeps_the_old_weights,
    check_update_sessions,
    check_checksums_name_tensors,
    check_memory_can_be_released,
    check_health_generate,
)


async def run_check(check: Check, url: str, *, timeout_s: float = 60.0, **about: Any) -> None:
    """Run one check on the server at ``url``; ``about`` are the further fields of ``ServerUnderTest``."""
    await check(ServerUnderTest(server=SGLangServer(url, timeout_s=timeout_s), **about))

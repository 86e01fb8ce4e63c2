"""The routes of one server, and how its failures are told apart."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sdsearch.errors import EngineError, ServerRefusedError, ServerUnavailableError
from megatron_sdsearch.rollout.sglang_api import SGLangServer, check_url
from tests.loopback.fake_sglang import FakeSGLang, Fault, running_in_thread

Json = dict[str, Any]
REQUEST: Json = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 3}, "return_logprob": True}


def on(fake: FakeSGLang, talk: Callable[[SGLangServer], Awaitable[None]], *, timeout_s: float = 5.0) -> None:
    async def run() -> None:
        async with fake, SGLangServer.connect(fake.url, timeout_s=timeout_s) as server:
            await talk(server)

    asyncio.run(run())


def test_a_4xx_is_refused_with_the_servers_words() -> None:
    fake = FakeSGLang()
    fake.faults.append("400")

    async def talk(server: SGLangServer) -> None:
        with pytest.raises(ServerRefusedError) as info:
            await server.generate(REQUEST)
        assert info.value.status == 400
        assert str(info.value).startswith(f"{fake.url}/generate: HTTP 400: ")
        assert "injected refusal" in str(info.value)

    on(fake, talk)


@pytest.mark.parametrize(
    ("fault", "words"),
    [("500", "HTTP 500.*illegal memory"), ("garbage", "not a JSON object: <html>bad"), ("drop", "/generate: ")],
)
def test_failures_are_unavailable(fault: Fault, words: str) -> None:
    fake = FakeSGLang()
    fake.faults.append(fault)

    async def talk(server: SGLangServer) -> None:
        with pytest.raises(ServerUnavailableError, match=words) as info:
            await server.generate(REQUEST)
        assert not info.value.is_timeout

    on(fake, talk)


def test_an_answer_that_does_not_end_is_a_timeout() -> None:
    fake = FakeSGLang()
    fake.faults.append("hang")

    async def talk(server: SGLangServer) -> None:
        with pytest.raises(ServerUnavailableError, match=r"/generate: no answer within 0.1 s") as info:
            await server.generate(REQUEST, timeout_s=0.1)
        assert info.value.is_timeout

    on(fake, talk)


def test_a_closed_port_is_unavailable() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"

    async def run() -> None:
        async with SGLangServer.connect(url) as server:
            with pytest.raises(ServerUnavailableError, match=f"{url}/model_info: .*[Cc]onnect") as info:
                await server.model_info()
            assert not info.value.is_timeout

    asyncio.run(run())


def test_a_failure_said_with_status_200_is_refused() -> None:
    fake = FakeSGLang()
    fake.replies["/end_weight_update"] = {"success": False, "message": "half of it is missing"}

    async def talk(server: SGLangServer) -> None:
        with pytest.raises(ServerRefusedError, match="/end_weight_update: half of it is missing") as info:
            await server.end_weight_update()
        assert info.value.status == 200

    on(fake, talk)


def test_bodies_of_the_control_routes() -> None:
    fake = FakeSGLang()

    async def talk(server: SGLangServer) -> None:
        await server.abort("one")
        await server.abort_all()
        await server.pause("retract")
        await server.continue_()
        await server.release_memory_occupation()
        await server.resume_memory_occupation(("weights", "kv_cache"))
        await server.flush_cache()
        assert fake.calls == [
            ("/abort_request", {"rid": "one"}),
            ("/abort_request", {"abort_all": True}),
            ("/pause_generation", {"mode": "retract"}),
            ("/continue_generation", {}),
            ("/release_memory_occupation", {}),
            ("/resume_memory_occupation", {"tags": ["weights", "kv_cache"]}),
            ("/flush_cache", {}),
        ]

    on(fake, talk)


def test_weights_from_disk(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"new")
    fake = FakeSGLang(weights=1)

    async def talk(server: SGLangServer) -> None:
        old = await server.weights_checker()
        await server.update_weights_from_disk(str(tmp_path), "7")
        assert await server.weight_version() == "7"
        assert (await server.weights_checker())["ranks"] != old["ranks"]

    on(fake, talk)


@pytest.mark.parametrize("is_old", [False, True])
def test_weights_from_tensors_with_and_without_sessions(is_old: bool) -> None:
    fake = FakeSGLang(is_old=is_old)

    async def talk(server: SGLangServer) -> None:
        for version in ("1", "2"):
            assert await server.begin_weight_update() is not is_old
            await server.update_weights_from_tensor(["AAAA"], load_format="flattened_bucket")
            await server.update_weights_from_tensor(["BBBB"], weight_version=version, flush_cache=True)
            await server.end_weight_update()
            assert await server.weight_version() == version
        first, last = [body for route, body in fake.calls if route == "/update_weights_from_tensor"][:2]
        assert first == {
            "serialized_named_tensors": ["AAAA"],
            "flush_cache": False,
            "load_format": "flattened_bucket",
        }
        assert last == {"serialized_named_tensors": ["BBBB"], "flush_cache": True, "weight_version": "1"}

    on(fake, talk)


def test_tensors_outside_a_session_are_refused() -> None:
    async def talk(server: SGLangServer) -> None:
        with pytest.raises(ServerRefusedError, match="no weight-update session"):
            await server.update_weights_from_tensor(["AAAA"])

    on(FakeSGLang(), talk)


def test_a_bucket_of_many_megabytes_goes_out_in_pieces() -> None:
    """aiohttp warns about a large body in one piece, and warnings are errors here."""

    async def talk(server: SGLangServer) -> None:
        await server.begin_weight_update()
        await server.update_weights_from_tensor(["A" * 8_000_000], weight_version="9")
        assert await server.weight_version() == "9"

    on(FakeSGLang(), talk)


def test_weights_from_a_process_group() -> None:
    fake = FakeSGLang()

    async def talk(server: SGLangServer) -> None:
        group = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
        await server.init_weights_update_group(**group, group_name="g", backend="gloo")  # type: ignore[arg-type]
        await server.begin_weight_update()
        await server.update_weights_from_distributed(
            names=["a", "b"],
            dtypes=["float32"] * 2,
            shapes=[(2, 3), (4,)],
            group_name="g",
            weight_version="3",
            load_format="flattened_bucket",
        )
        await server.end_weight_update()
        await server.destroy_weights_update_group("g")
        assert await server.weight_version() == "3"
        bodies = dict(fake.calls)
        assert bodies["/init_weights_update_group"] == {**group, "group_name": "g", "backend": "gloo"}
        assert bodies["/update_weights_from_distributed"]["shapes"] == [[2, 3], [4]]
        assert bodies["/update_weights_from_distributed"]["load_format"] == "flattened_bucket"

    on(fake, talk)


def test_from_code_without_an_event_loop() -> None:
    async def version(url: str) -> str:
        async with SGLangServer.connect(f"{url}/") as server:
            return await server.weight_version()

    with running_in_thread(FakeSGLang(version="4")) as fake:
        assert asyncio.run(version(fake.url)) == "4"
        assert asyncio.run(version(fake.url)) == "4"


@pytest.mark.parametrize("url", ["", "10.0.0.7:30000", "ftp://a:1", "http://", "http://a:port", "http://a:0"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(EngineError, match="write it as http://host:port"):
        check_url(url)

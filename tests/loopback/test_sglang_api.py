"""Requests to servers, and which of their failures count as refused and which as unavailable."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sdsearch.errors import ServerRefusedError, ServerUnavailableError
from megatron_sdsearch.sglang.api import SGLangServer, call_servers
from tests.loopback.fake_sglang import FakeSGLang, Fault, running_in_thread

Json = dict[str, Any]
REQUEST: Json = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 3}, "return_logprob": True}


def on(fake: FakeSGLang, talk: Callable[[SGLangServer], Awaitable[None]], *, timeout_s: float = 5.0) -> None:
    async def run() -> None:
        async with fake:
            await talk(SGLangServer(fake.url, timeout_s=timeout_s))

    asyncio.run(run())


async def version(server: SGLangServer) -> str:
    return str((await server.call("/model_info"))["weight_version"])


def test_a_4xx_is_refused_with_the_servers_words() -> None:
    fake = FakeSGLang()
    fake.faults.append("400")

    async def talk(server: SGLangServer) -> None:
        with pytest.raises(ServerRefusedError) as info:
            await server.call("/generate", REQUEST)
        assert info.value.status == 400
        assert str(info.value).startswith(f"{fake.url}/generate: HTTP 400: ")
        assert "injected refusal" in str(info.value)

    on(fake, talk)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("500", "HTTP 500.*illegal memory"), ("garbage", "not a JSON object: <html>bad"), ("drop", "/generate: ")],
)
def test_failures_are_unavailable(fault: Fault, message: str) -> None:
    fake = FakeSGLang()
    fake.faults.append(fault)

    async def talk(server: SGLangServer) -> None:
        with pytest.raises(ServerUnavailableError, match=message) as info:
            await server.call("/generate", REQUEST)
        assert not info.value.is_timeout

    on(fake, talk)


def test_an_answer_that_does_not_end_is_a_timeout() -> None:
    fake = FakeSGLang()
    fake.faults.append("hang")

    async def talk(server: SGLangServer) -> None:
        with pytest.raises(ServerUnavailableError, match=r"/generate: no answer within 0.1 s") as info:
            await server.call("/generate", REQUEST, timeout_s=0.1)
        assert info.value.is_timeout

    on(fake, talk)


def test_a_closed_port_is_unavailable() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"

    with pytest.raises(ServerUnavailableError, match=f"{url}/model_info: Connection refused") as info:
        asyncio.run(SGLangServer(url).call("/model_info"))
    assert not info.value.is_timeout


def test_a_failure_said_with_status_200_is_refused() -> None:
    fake = FakeSGLang()
    fake.replies["/end_weight_update"] = {"success": False, "message": "half of it is missing"}

    async def talk(server: SGLangServer) -> None:
        with pytest.raises(ServerRefusedError, match="/end_weight_update: half of it is missing") as info:
            await server.end_weight_update()
        assert info.value.status == 200

    on(fake, talk)


def test_a_route_that_answers_nothing_is_sent_to_and_not_called() -> None:
    fake = FakeSGLang()

    async def talk(server: SGLangServer) -> None:
        assert await server.send("/abort_request", {"rid": "one"}) == b""
        assert fake.calls == [("/abort_request", {"rid": "one"})]
        with pytest.raises(ServerUnavailableError, match=r"/flush_cache: not a JSON object: \(nothing\)"):
            await server.call("/flush_cache", {})

    on(fake, talk)


def test_weights_from_disk(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"new")
    fake = FakeSGLang(weights=1)

    async def talk(server: SGLangServer) -> None:
        old = await server.call("/weights_checker", {"action": "checksum"})
        await server.load_folder(str(tmp_path), "7")
        assert await version(server) == "7"
        assert (await server.call("/weights_checker", {"action": "checksum"}))["ranks"] != old["ranks"]

    on(fake, talk)


TENSOR: Json = {"serialized_named_tensors": ["AAAA"], "flush_cache": False}


@pytest.mark.parametrize("is_old", [False, True])
def test_weights_from_tensors_with_and_without_sessions(is_old: bool) -> None:
    async def talk(server: SGLangServer) -> None:
        for name in ("1", "2"):
            await server.begin_weight_update()
            await server.call("/update_weights_from_tensor", TENSOR)
            await server.call("/update_weights_from_tensor", TENSOR | {"weight_version": name})
            await server.end_weight_update()
            assert await version(server) == name

    on(FakeSGLang(is_old=is_old), talk)


def test_tensors_outside_a_session_are_refused() -> None:
    async def talk(server: SGLangServer) -> None:
        with pytest.raises(ServerRefusedError, match="no weight-update session"):
            await server.call("/update_weights_from_tensor", TENSOR)

    on(FakeSGLang(), talk)


def test_a_bucket_of_many_megabytes_goes_out_in_pieces() -> None:
    """aiohttp warns about a large body in one piece, and warnings are errors here."""

    async def talk(server: SGLangServer) -> None:
        await server.begin_weight_update()
        body = {"serialized_named_tensors": ["A" * 8_000_000], "weight_version": "9"}
        await server.call("/update_weights_from_tensor", body)
        assert await version(server) == "9"

    on(FakeSGLang(), talk)


def test_servers_are_called_from_code_without_an_event_loop() -> None:
    with running_in_thread(FakeSGLang(version="4")) as first, running_in_thread(FakeSGLang(version="5")) as second:
        servers = [SGLangServer(f"{first.url}/"), SGLangServer(second.url)]
        beside: list[str] = []
        assert call_servers(servers, version, meanwhile=lambda: beside.append("done")) == ["4", "5"]
        assert beside == ["done"]
        assert call_servers([], version) == []


def test_of_several_failures_the_refusal_is_raised_and_the_thread_is_left() -> None:
    end = threading.Event()

    def hang() -> None:
        end.wait()

    with running_in_thread(FakeSGLang()) as fake:
        servers = [SGLangServer("http://127.0.0.1:9"), SGLangServer(fake.url)]
        with pytest.raises(ServerRefusedError, match="no weight-update session"):
            call_servers(servers, SGLangServer.end_weight_update, meanwhile=hang)
    end.set()


def test_a_failure_beside_the_calls_is_raised() -> None:
    def fail() -> None:
        raise ServerUnavailableError("broadcast failed")

    with running_in_thread(FakeSGLang()) as fake, pytest.raises(ServerUnavailableError, match="broadcast failed"):
        call_servers([SGLangServer(fake.url)], version, meanwhile=fail)

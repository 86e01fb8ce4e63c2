"""The supervisor with servers that are processes, but not SGLang: how they start, die, hang, come back and end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from megatron_sdsearch.config import RunConfig, parse_config
from megatron_sdsearch.errors import ConfigError, EngineError
from megatron_sdsearch.sglang import servers
from megatron_sdsearch.sglang.api import Json, SGLangServer
from megatron_sdsearch.sglang.servers import ServerSupervisor
from tests.loopback.fake_server_process import segment_names

FAKE = Path(__file__).with_name("fake_server_process.py")
ROOT = Path(__file__).parents[2]
TORCHRUN_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
SHORT_LIMITS = {
    "POLL_S": 0.05,
    "INFO_TIMEOUT_S": 0.5,
    "HANG_S": 1.0,
    "FIRST_BACKOFF_S": 0.05,
    "MAX_BACKOFF_S": 0.2,
    "GRACE_S": 0.5,
}


class Supervisors:
    """A folder of one test, and the supervisors that it made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = folder / "weights"
        self.weights.mkdir()
        (folder / "model.safetensors").touch()
        self.made: list[ServerSupervisor] = []

    def settings(self, **settings: object) -> dict[str, object]:
        faults = {name: str(value) for name, value in settings.items() if name.startswith("FAKE_")}
        others = {name: value for name, value in settings.items() if name not in faults}
        environment = {"FAKE_STATE": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", **faults}
        sglang = {"command": [sys.executable, str(FAKE)], "start_timeout_s": 20.0, "environment": environment}
        return {
            "run_dir": str(self.folder / "run"),
            "seed": 2**32 + 5,
            "model": {"hf_dir": str(self.folder)},
            "data": {"train": "none"},
            "retrieval": {"corpus": "none"},
            "rollout": {"engine": "sglang", "sglang": sglang | others},
        }

    def config(self, **settings: object) -> RunConfig:
        return parse_config(self.settings(**settings))

    def make(self, *, gpus: Sequence[str] = (), **settings: object) -> ServerSupervisor:
        supervisor = ServerSupervisor(self.config(**settings), gpus=gpus, log_dir=self.folder / "logs")
        self.made.append(supervisor)
        return supervisor

    @property
    def events(self) -> list[str]:
        return (self.folder / "events").read_text().splitlines()

    @property
    def log(self) -> str:
        return (self.folder / "logs" / "server_0.log").read_text()

    def kill_server(self) -> None:
        os.kill(int((self.folder / "pid").read_text()), signal.SIGKILL)

    def leftovers(self) -> list[object]:
        """Processes that know this test's folder, and files in shared memory of those that ever lived."""
        found: list[object] = []
        for process in psutil.process_iter():
            try:
                is_ours = process.environ().get("FAKE_STATE") == str(self.folder)
            except psutil.Error:
                continue
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process.pid, process.cmdline()))
        return found + list(Path("/dev/shm").glob(segment_names(self.folder)))


@pytest.fixture
def supervisors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisors]:
    for name, value in SHORT_LIMITS.items():
        monkeypatch.setattr(servers, name, value)
    supervisors = Supervisors(tmp_path)
    yield supervisors
    for supervisor in supervisors.made:
        supervisor.close()
    assert supervisors.leftovers() == []


def wait_until(is_reached: Callable[[], bool], limit_s: float = 15.0) -> None:
    deadline = time.monotonic() + limit_s
    while not is_reached():
        assert time.monotonic() < deadline, f"not reached within {limit_s} s"
        time.sleep(0.02)


def model_info(url: str) -> Json | None:
    try:
        return asyncio.run(SGLangServer(url, timeout_s=0.5).call("/model_info"))
    except EngineError:
        return None


def version(supervisor: ServerSupervisor) -> str | None:
    info = model_info(supervisor.urls[0])
    return None if info is None else str(info["weight_version"])


def restarts(supervisor: ServerSupervisor) -> int:
    return sum(supervisor.restart_counts().values())


def test_starts_servers_with_their_flags_and_without_torchruns_environment(
    supervisors: Supervisors, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in TORCHRUN_NAMES:
        monkeypatch.setenv(name, "1")
    supervisor = supervisors.make(num_servers=2, tp_size=2, gpus=["4", "5", "6", "7"])
    supervisor.start()
    assert [model_info(url) for url in supervisor.urls] == [{"weight_version": "default", "model_path": ""}] * 2
    for index, url in enumerate(supervisor.urls):
        log = (supervisors.folder / "logs" / f"server_{index}.log").read_text().splitlines()
        flags = next(line for line in log if line.startswith("arguments"))
        port = url.rsplit(":", 1)[1]
        given = f"--model-path {supervisors.folder} --host 127.0.0.1 --port {port} --random-seed {5 + index}"
        assert flags == f"arguments {given} --dtype float32 --tp-size 2"
        environment = json.loads(next(line[11:] for line in log if line.startswith("environment")))
        assert environment["CUDA_VISIBLE_DEVICES"] == ("4,5", "6,7")[index]
        assert not {*TORCHRUN_NAMES} & set(environment)
    assert restarts(supervisor) == 0
    supervisor.check()
    assert len(supervisors.leftovers()) == 8  # so that the fixture's look for leftovers can find some
    supervisor.close()
    assert supervisors.leftovers() == []


def test_too_few_gpus_is_a_wrong_setting(supervisors: Supervisors) -> None:
    with pytest.raises(ConfigError, match=r"2 servers x 2 GPUs are more than the 3 of this node"):
        supervisors.make(num_servers=2, tp_size=2, gpus=["0", "1", "2"])


def test_death_is_followed_by_a_restart_that_announces_only_the_published_version(supervisors: Supervisors) -> None:
    supervisor = supervisors.make()
    supervisor.start()
    supervisor.set_weights(supervisors.weights, 3)
    wait_until(lambda: version(supervisor) == "3")  # a server that is behind is brought up, restarted or not
    seen = len(supervisors.events)
    supervisors.kill_server()
    wait_until(lambda: restarts(supervisor) == 1)
    wait_until(lambda: version(supervisor) == "3")
    assert [event for event in supervisors.events[seen:] if event in ("start", "version 3") or "loaded" in event][
        :3
    ] == [
        "start",
        f"loaded {supervisors.weights}",
        "version 3",
    ]
    assert "exit code 137" in supervisors.log
    assert supervisors.log.count("supervisor: start") == 2
    supervisor.check()


def test_without_a_folder_a_restarted_server_stays_at_its_old_version(supervisors: Supervisors) -> None:
    supervisor = supervisors.make()
    supervisor.start()
    supervisor.set_weights(None, 3)
    supervisors.kill_server()
    wait_until(lambda: restarts(supervisor) == 1 and version(supervisor) is not None)
    time.sleep(0.3)
    assert version(supervisor) == "default"
    supervisor.set_weights(supervisors.weights, 4)
    wait_until(lambda: version(supervisor) == "4")


def test_a_server_that_is_ahead_is_left_alone(supervisors: Supervisors) -> None:
    """A publish reaches servers before the supervisor hears of it."""
    supervisor = supervisors.make()
    supervisor.start()
    supervisor.set_weights(supervisors.weights, 7)
    wait_until(lambda: version(supervisor) == "7")
    supervisor.set_weights(supervisors.folder, 6)
    time.sleep(1.0)  # looks every 0.05 s, and a load takes 0.3 s
    assert version(supervisor) == "7"
    assert f"loaded {supervisors.folder}" not in supervisors.events


def test_a_hanging_server_is_restarted(supervisors: Supervisors) -> None:
    supervisor = supervisors.make(FAKE_HANG_AFTER_S=0.5, FAKE_IGNORE_SIGTERM=1)
    supervisor.start()
    supervisor.set_weights(supervisors.weights, 2)
    wait_until(lambda: restarts(supervisor) == 1)
    wait_until(lambda: version(supervisor) == "2")
    assert "has not answered /model_info for 1 s" in supervisors.log


def test_used_up_restarts_are_an_error_with_the_end_of_the_log(supervisors: Supervisors) -> None:
    supervisor = supervisors.make(FAKE_DIE_AFTER_S=0.4, max_restarts=1)
    supervisor.start()

    def is_over() -> bool:
        try:
            supervisor.check()
        except EngineError:
            return True
        return False

    wait_until(is_over)
    with pytest.raises(
        EngineError, match=r"(?s)server 0 .*exit code 7 \(restarts: 1\); .*server_0\.log ends with:\n.*argum"
    ):
        supervisor.check()
    assert restarts(supervisor) == 1
    assert supervisors.events.count("start") == 2


def test_weights_that_cannot_be_loaded_count_as_a_death(supervisors: Supervisors) -> None:
    supervisor = supervisors.make(max_restarts=0)
    supervisor.start()
    supervisor.set_weights(supervisors.folder / "missing", 1)
    with pytest.raises(EngineError, match=r"loading .*missing failed: .*HTTP 400: .*no such folder"):
        wait_until(lambda: supervisor.check() is not None)  # type: ignore[func-returns-value]


def test_a_refused_load_that_hit_a_newer_publish_ends_in_a_restart(supervisors: Supervisors) -> None:
    """Else it would serve the folder's older weights under the newer version, and every client would believe it."""
    newer = supervisors.folder / "newer"
    newer.mkdir()
    supervisor = supervisors.make(FAKE_LOADS_AND_REFUSES=supervisors.weights)
    supervisor.start()
    supervisor.set_weights(supervisors.weights, 1)
    wait_until(lambda: f"loading {supervisors.weights}" in supervisors.events)
    asyncio.run(SGLangServer(supervisor.urls[0]).load_folder(str(newer), "2"))  # the trainer's own
    supervisor.set_weights(newer, 2)
    wait_until(lambda: restarts(supervisor) == 1)
    wait_until(lambda: version(supervisor) == "2")
    info = model_info(supervisor.urls[0])
    assert info is not None
    assert info["model_path"] == str(newer)


def test_a_server_that_dies_at_its_start_is_reported_at_once_and_not_tried_again(supervisors: Supervisors) -> None:
    supervisor = supervisors.make(num_servers=2, FAKE_DIE_AT_START=6)  # the second one's seed
    begin = time.monotonic()
    with pytest.raises(
        EngineError, match=r"(?s)server 1 .*exit code 1 while starting .*arguments.*unknown flag --frobnicate"
    ):
        supervisor.start()
    assert time.monotonic() - begin < 10
    assert supervisors.events.count("start") <= 2
    assert supervisors.leftovers() == []  # the first one neither


def test_a_command_that_cannot_be_started_is_reported_at_once(supervisors: Supervisors) -> None:
    program = supervisors.folder / "no_program"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    supervisor = supervisors.make(command=(str(program),), num_servers=2)
    with pytest.raises(
        EngineError, match=r"(?s)exit code 127 while starting.*cannot start .*no_program: .*No such file"
    ):
        supervisor.start()


def test_all_servers_that_are_lost_are_named(supervisors: Supervisors) -> None:
    supervisor = supervisors.make(num_servers=2, FAKE_DIE_AFTER_S=0.4, max_restarts=0)
    with suppress(EngineError):  # the first one to die may do so before the second one serves
        supervisor.start()

    def are_named() -> bool:
        try:
            supervisor.check()
        except EngineError as error:
            return all(f"SGLang server {index} (" in str(error) for index in (0, 1))
        return False

    wait_until(are_named)


def test_a_server_that_does_not_serve_in_time_is_reported(supervisors: Supervisors) -> None:
    supervisor = supervisors.make(command=(sys.executable, "-c", "import time; time.sleep(60)"), start_timeout_s=0.5)
    with pytest.raises(EngineError, match=r"has not answered /model_info for 0\.5 s while starting"):
        supervisor.start()


def test_attached_servers_are_waited_for_and_left_alone(supervisors: Supervisors) -> None:
    own = supervisors.make()
    own.start()
    attached = supervisors.make(urls=own.urls)
    attached.start()
    assert (attached.urls, attached.restart_counts()) == (own.urls, {})
    attached.close()
    assert version(own) == "default"


def test_an_attached_server_that_is_not_there_is_said_at_once_and_waited_for(
    supervisors: Supervisors, caplog: pytest.LogCaptureFixture
) -> None:
    missing = supervisors.make(urls=("http://127.0.0.1:9",), start_timeout_s=0.2)
    message = r"http://127\.0\.0\.1:9/model_info does not answer: .*Connection refused"
    with pytest.raises(EngineError, match=message + r".*rollout\.sglang\.urls"):
        missing.start()
    (record,) = caplog.records
    assert re.match(message + r"; waiting up to 0\.2 s", record.getMessage())


@pytest.mark.parametrize(
    ("answer", "problem"),
    [(b"HTTP/1.0 404 Not Found\r\n\r\n", "returns HTTP 404"), (b"HTTP/1.0 200 OK\r\n\r\n<p>", "does not return JSON")],
)
def test_something_else_than_sglang_is_not_waited_for(supervisors: Supervisors, answer: bytes, problem: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def serve() -> None:
            with listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ConfigError, match=f"rollout.sglang.urls: {url}/model_info .*{problem}"):
            supervisors.make(urls=(url,)).start()
        thread.join()


OWNER = """
import json, sys, time
from megatron_sdsearch.config import parse_config
from megatron_sdsearch.sglang import servers
servers.POLL_S, servers.GRACE_S = 0.05, 0.5
supervisor = servers.ServerSupervisor(parse_config(json.loads(sys.argv[1])))
supervisor.start()
print("serving", flush=True)
if sys.argv[2] == "return":
    sys.exit()
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, None])
def test_servers_end_with_their_owner_however_it_ends(supervisors: Supervisors, number: signal.Signals | None) -> None:
    """None: it returns without a close."""
    config = json.dumps(supervisors.settings(num_servers=2, FAKE_IGNORE_SIGTERM=1))
    command = [sys.executable, "-c", OWNER, config, "stay" if number else "return"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "serving\n"
        if number is not None:
            assert len(supervisors.leftovers()) == 8
            owner.send_signal(number)
        owner.wait(10)
    wait_until(lambda: supervisors.leftovers() == [], limit_s=5.0)


def test_ctrl_c_during_the_start_ends_the_servers(supervisors: Supervisors) -> None:
    config = json.dumps(supervisors.settings(command=[sys.executable, "-c", "import time; time.sleep(600)"]))
    command = [sys.executable, "-c", OWNER, config, "stay"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as owner:
        wait_until(lambda: len(supervisors.leftovers()) == 1)
        os.killpg(owner.pid, signal.SIGINT)  # as a terminal does
        _, errors = owner.communicate(timeout=10)
    assert "KeyboardInterrupt" in errors
    wait_until(lambda: supervisors.leftovers() == [], limit_s=5.0)

"""Publishing to fake servers from a trainer of one rank: the order of calls, and what happens when servers fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]
from transformers import AutoModelForCausalLM

from megatron_sdsearch.config import parse_config
from megatron_sdsearch.errors import EngineError
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.sglang import publish as publish_module
from megatron_sdsearch.sglang.publish import WeightPublisher
from tests.distributed.oracle import make_model
from tests.loopback.fake_sglang import FakeSGLang, running_in_thread
from tests.loopback.fake_weights import FakeWeights

SYNCS = ["disk", "tensor", "distributed"]
SENDS = {
    "disk": ["/update_weights_from_disk"],
    "tensor": ["/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"],
    "distributed": [
        "/begin_weight_update",
        "/init_weights_update_group",
        "/update_weights_from_distributed",
        "/end_weight_update",
    ],
}
SESSION = ("/begin_weight_update", "/end_weight_update")
UPDATES = {sync: next(route for route in SENDS[sync] if route.startswith("/update")) for sync in SYNCS}


class Policy:
    """The weights of a model, as a network of one rank exports them."""

    def __init__(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)  # its parameters come in the order of the export
        self.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.items()

    stage_weights = hf_weights


class Trainer:
    """One rank, its publisher, and fake servers that really receive tensors."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.source = make_model(folder / "source", "qwen2", is_tied=True)
        self.policy = Policy(self.source)
        self._stack = stack

    def serve(self, num_servers: int = 2, **options: Any) -> list[FakeSGLang]:
        fakes = [FakeSGLang(model_weights=FakeWeights(timeout_s=3.0), **options) for _ in range(num_servers)]
        return [self._stack.enter_context(running_in_thread(fake)) for fake in fakes]

    def publisher(
        self,
        sync: str,
        fakes: Sequence[FakeSGLang],
        *,
        bucket_bytes: int = 100_000,
        supervisor: Any = None,
        **config: Any,
    ) -> WeightPublisher:
        timeouts = {"request_timeout_s": 5.0, "down_timeout_s": 5.0}
        run = parse_config(
            {
                "run_dir": str(self.folder),
                "model": {"hf_dir": str(self.source)},
                "data": {"train": "none"},
                "retrieval": {"corpus": "none"},
                "rollout": {"engine": "sglang", "sglang": {**timeouts, "weight_sync": sync, **config}},
            }
        )
        publisher = WeightPublisher(run, [fake.url for fake in fakes], parallel(), supervisor)
        publisher.transport.bucket_bytes = bucket_bytes  # the setting's unit is MiB, of which the model has one
        return publisher

    def publish(self, publisher: WeightPublisher, version: int) -> None:
        publisher.publish(self.policy, version)  # type: ignore[arg-type]

    def assert_holds(self, fake: FakeSGLang, version: int) -> None:
        assert fake.version == str(version)
        assert fake.model_weights is not None
        held = fake.model_weights.tensors
        assert held.keys() == self.policy.weights.keys()
        assert [name for name, tensor in self.policy.weights.items() if not torch.equal(held[name], tensor)] == []


def parallel() -> ParallelState:
    """The only rank, in the group that the fixture has made."""
    return ParallelState(
        rank=0,
        world_size=1,
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        dp_rank=0,
        dp_size=1,
        sequence_parallel=False,
        tp_group=None,  # type: ignore[arg-type]
        pp_group=None,  # type: ignore[arg-type]
        device=torch.device("cpu"),
    )


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(publish_module, "_POLL_S", 0.05)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        yield Trainer(tmp_path, stack)


def routes(fake: FakeSGLang) -> list[str]:
    """Calls in order, repeated ones once, looks left out."""
    found: list[str] = []
    for route, _ in fake.calls:
        if route != "/model_info" and found[-1:] != [route]:
            found.append(route)
    return found


def bodies(fake: FakeSGLang, route: str) -> list[dict[str, Any]]:
    return [body for called, body in fake.calls if called == route]


@pytest.mark.parametrize("is_old", [False, True], ids=["new", "before 0.5.21"])
@pytest.mark.parametrize("sync", SYNCS)
def test_every_server_gets_every_tensor_in_one_order_of_calls(trainer: Trainer, sync: str, is_old: bool) -> None:
    fakes = trainer.serve(is_old=is_old)
    publisher = trainer.publisher(sync, fakes)
    trainer.publish(publisher, 4)
    sends = [route for route in SENDS[sync] if not (is_old and route in SESSION)]
    for fake in fakes:
        trainer.assert_holds(fake, 4)
        assert routes(fake) == ["/pause_generation", *sends, "/continue_generation", "/weights_checker"]
        assert bodies(fake, "/pause_generation") == [{"mode": "abort"}]
    for tensor in trainer.policy.weights.values():
        tensor += 1
    trainer.publish(publisher, 5)
    for fake in fakes:
        trainer.assert_holds(fake, 5)
        assert len(bodies(fake, "/init_weights_update_group")) == (sync == "distributed"), "the group stays"


@pytest.mark.parametrize("sync", ["tensor", "distributed"])
def test_the_version_and_the_flush_come_with_the_last_bucket_alone(trainer: Trainer, sync: str) -> None:
    (fake,) = trainer.serve(1)
    trainer.publish(trainer.publisher(sync, [fake]), 7)
    *early, last = bodies(fake, UPDATES[sync])
    assert len(early) >= 2
    assert [(body.get("weight_version"), body["flush_cache"]) for body in early] == [(None, False)] * len(early)
    assert (last["weight_version"], last["flush_cache"]) == ("7", True)


def test_the_folder_is_written_in_shards_and_the_one_before_stays(trainer: Trainer) -> None:
    (fake,) = trainer.serve(1)
    publisher = trainer.publisher("disk", [fake])
    for version in (1, 2, 3):
        trainer.publish(publisher, version)
    assert sorted(path.name for path in (trainer.folder / "weights").iterdir()) == ["v000002", "v000003"]
    assert len(list((trainer.folder / "weights/v000003").glob("model-*.safetensors"))) > 1
    assert bodies(fake, "/update_weights_from_disk")[-1]["weight_version"] == "3"


@pytest.mark.parametrize("sync", SYNCS)
def test_a_server_lost_in_mid_publish_is_left_out_of_the_next_attempt(trainer: Trainer, sync: str) -> None:
    fakes = trainer.serve(3)
    fakes[1].dies_at.add(UPDATES[sync])
    publisher = trainer.publisher(sync, fakes)
    trainer.publish(publisher, 2)
    for fake in (fakes[0], fakes[2]):
        trainer.assert_holds(fake, 2)
        assert routes(fake)[-2:] == ["/continue_generation", "/weights_checker"]
    assert fakes[1].version != "2"
    for tensor in trainer.policy.weights.values():
        tensor += 1
    trainer.publish(publisher, 3)
    trainer.assert_holds(fakes[0], 3)
    assert routes(fakes[1])[-1] == UPDATES[sync], "it was not called again"


@pytest.mark.parametrize("sync", SYNCS)
def test_a_refused_update_is_an_error_with_the_servers_message_after_three_attempts(
    trainer: Trainer, sync: str
) -> None:
    fakes = trainer.serve(2)
    fakes[1].replies[UPDATES[sync]] = {"success": False, "message": "the shapes do not fit"}
    with pytest.raises(EngineError) as caught:
        trainer.publish(trainer.publisher(sync, fakes, verify_every=0, request_timeout_s=2.0), 2)
    message = f"version 2 could not be published: {fakes[1].url}{UPDATES[sync]}: the shapes do not fit"
    assert str(caught.value) == message
    # Told apart from distributed's later buckets, which the refusal of the first one keeps from being sent.
    assert len(bodies(fakes[1], UPDATES[sync])) == 3


@pytest.mark.parametrize("sync", SYNCS)
def test_what_is_refused_once_is_sent_again_whole(trainer: Trainer, sync: str) -> None:
    fakes = trainer.serve(2)
    fakes[1].refuses_once.add(UPDATES[sync])
    trainer.publish(trainer.publisher(sync, fakes, request_timeout_s=2.0), 2)
    for fake in fakes:
        trainer.assert_holds(fake, 2)
        groups = [body["group_name"] for body in bodies(fake, "/init_weights_update_group")]
        assert len(set(groups)) == (2 if sync == "distributed" else 0), (
            "it is not known which servers are still in the first one"
        )


def test_a_folder_that_was_loaded_and_refused_is_given_again_and_proven(trainer: Trainer) -> None:
    """The server has the new weights under the old version, or any others: only an update that succeeds counts."""
    fakes = trainer.serve(2)
    publisher = trainer.publisher("disk", fakes, verify_every=5)
    trainer.publish(publisher, 1)
    for tensor in trainer.policy.weights.values():
        tensor += 1
    fakes[1].loads_and_refuses = 1
    for fake in fakes:
        fake.calls.clear()
    trainer.publish(publisher, 2)
    for fake in fakes:
        trainer.assert_holds(fake, 2)
        assert len(bodies(fake, "/update_weights_from_disk")) == 2
        assert len(bodies(fake, "/weights_checker")) == 1, "not due, and proven all the same"
    trainer.publish(publisher, 3)
    assert len(bodies(fakes[1], "/weights_checker")) == 1


@pytest.mark.parametrize("sync", ["tensor", "distributed"])
def test_a_session_that_was_left_open_is_no_obstacle(trainer: Trainer, sync: str) -> None:
    """A trainer that was killed in mid-publish leaves one behind at servers that are not its own."""
    (fake,) = trainer.serve(1)
    fake._has_session = True
    trainer.publish(trainer.publisher(sync, [fake]), 1)
    trainer.assert_holds(fake, 1)
    assert not fake._has_session


def test_another_refusal_to_open_a_session_is_passed_on(trainer: Trainer) -> None:
    (fake,) = trainer.serve(1)
    fake.replies["/begin_weight_update"] = {"success": False, "message": "weights are quantized"}
    with pytest.raises(EngineError, match="weights are quantized"):
        trainer.publish(trainer.publisher("tensor", [fake]), 1)
    assert "/end_weight_update" not in routes(fake)


def test_no_server_within_the_limit_is_an_error_that_names_them(trainer: Trainer) -> None:
    fakes = [FakeSGLang(), FakeSGLang()]
    fakes[0].port, fakes[1].port = 9, 19  # nothing listens there
    publisher = trainer.publisher("tensor", fakes, down_timeout_s=0.3)
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"no server has answered for 0\.3 s: http://127\.0\.0\.1:9, .*:19"):
        trainer.publish(publisher, 1)
    assert 0.3 <= time.monotonic() - start < 3


def test_a_supervisor_that_has_given_up_ends_the_publish_at_once(trainer: Trainer) -> None:
    def check() -> None:
        raise EngineError("SGLang server 0 has used up its restarts")

    fake = FakeSGLang()
    fake.port = 9
    supervisor = SimpleNamespace(check=check, restart_counts=dict)
    with pytest.raises(EngineError, match=r"^SGLang server 0 has used up its restarts$"):
        trainer.publish(trainer.publisher("tensor", [fake], supervisor=supervisor, down_timeout_s=60.0), 1)


def test_wrong_weights_are_named_with_server_and_tensor(trainer: Trainer) -> None:
    fakes = trainer.serve(2)
    assert fakes[1].model_weights is not None
    fakes[1].model_weights.wrong = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(EngineError) as caught:
        trainer.publish(trainer.publisher("tensor", fakes), 2)
    assert f"{fakes[1].url} does not hold the published weights: 1 of " in str(caught.value)
    assert str(caught.value).endswith("the first is model.layers.1.mlp.gate_up_proj.weight")


@pytest.mark.parametrize(("every", "checked"), [(0, []), (1, [0, 1, 2, 3]), (2, [0, 2])])
def test_publishes_are_verified_as_often_as_asked(trainer: Trainer, every: int, checked: list[int]) -> None:
    (fake,) = trainer.serve(1)
    publisher = trainer.publisher("tensor", [fake], verify_every=every)
    found = []
    for version in range(4):
        before = len(bodies(fake, "/weights_checker"))
        trainer.publish(publisher, version)
        found += [version] * (len(bodies(fake, "/weights_checker")) - before)
    assert found == checked


@pytest.mark.parametrize("sync", SYNCS)
def test_restarted_servers_get_a_folder_only_where_there_is_one(trainer: Trainer, sync: str) -> None:
    published: list[tuple[Path | None, int]] = []
    supervisor = SimpleNamespace(
        check=lambda: None, restart_counts=dict, set_weights=lambda path, version: published.append((path, version))
    )
    trainer.publish(trainer.publisher(sync, trainer.serve(1), supervisor=supervisor), 3)
    assert published == [(trainer.folder / "weights/v000003" if sync == "disk" else None, 3)]


# Colocated servers


class Lives:
    """A supervisor that counts restarts, and sees to nothing."""

    def __init__(self) -> None:
        self.restarts: dict[str, int] = {}
        self.restart_counts: Callable[[], dict[str, int]] = lambda: dict(self.restarts)

    def check(self) -> None: ...

    def set_weights(self, path: Path | None, version: int) -> None: ...


def test_colocated_servers_give_everything_and_take_it_back_around_the_weights(trainer: Trainer) -> None:
    (fake,) = trainer.serve(1)
    publisher = trainer.publisher("tensor", [fake], colocated=True)
    trainer.publish(publisher, 1)
    assert not any("memory" in route for route in routes(fake)), "nothing has been released before the first publish"
    fake.calls.clear()
    publisher.release_memory()
    assert routes(fake) == ["/pause_generation", "/flush_cache", "/release_memory_occupation"]
    assert fake.offloaded == {"weights", "kv_cache", "cuda_graph"}
    fake.calls.clear()
    trainer.publish(publisher, 2)
    assert routes(fake) == [
        "/pause_generation",
        "/resume_memory_occupation",
        *SENDS["tensor"],
        "/resume_memory_occupation",
        "/continue_generation",
        "/weights_checker",
    ]
    assert [body["tags"] for body in bodies(fake, "/resume_memory_occupation")] == [
        ["weights"],
        ["kv_cache", "cuda_graph"],
    ]
    assert fake.offloaded == set()
    fake.calls.clear()
    trainer.publish(publisher, 3)
    assert not any("memory" in route for route in routes(fake)), "it has taken back all that it gave"


def test_servers_with_gpus_of_their_own_keep_their_memory(trainer: Trainer) -> None:
    (fake,) = trainer.serve(1)
    publisher = trainer.publisher("tensor", [fake])
    trainer.publish(publisher, 1)
    publisher.release_memory()
    trainer.publish(publisher, 2)
    assert not any("memory" in route for route in routes(fake))


def test_a_second_attempt_takes_back_only_what_is_still_missing(trainer: Trainer) -> None:
    fakes = trainer.serve(2)
    publisher = trainer.publisher("tensor", fakes, colocated=True)
    trainer.publish(publisher, 1)
    publisher.release_memory()
    fakes[1].dies_at.add("/update_weights_from_tensor")
    trainer.publish(publisher, 2)
    trainer.assert_holds(fakes[0], 2)
    assert fakes[0].offloaded == set()
    assert len(bodies(fakes[0], "/resume_memory_occupation")) == 2


def test_a_server_that_dies_while_the_trainer_trains_is_left_out_and_one_restarted_is_not_asked(
    trainer: Trainer,
) -> None:
    fakes = trainer.serve(3)
    lives = Lives()
    publisher = trainer.publisher("tensor", fakes, colocated=True, supervisor=lives)
    trainer.publish(publisher, 1)
    fakes[2].dies_at.add("/release_memory_occupation")
    publisher.release_memory()
    fakes[1].offloaded = set()  # as after a restart
    lives.restarts[fakes[1].url] = 1
    trainer.publish(publisher, 2)
    for fake in fakes[:2]:
        trainer.assert_holds(fake, 2)
    assert bodies(fakes[1], "/resume_memory_occupation") == []
    assert len(bodies(fakes[0], "/resume_memory_occupation")) == 2

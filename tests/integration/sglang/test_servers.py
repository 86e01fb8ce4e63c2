"""Real servers under the supervisor: they serve what transformers computes, and come back from SIGKILL."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.integration.sglang.conftest import Servers, post, reference_logprobs, wait_until, weight_version

pytestmark = pytest.mark.timeout(600)  # the first test waits for the servers
PROMPTS = [[5, 9, 33, 60, 7], [300, 4, 81], list(range(40, 120))]
NUM_NEW = 24


def generate(url: str, prompts: list[list[int]], temperature: float) -> list[tuple[list[int], list[float]]]:
    """Sampled ids and their log-probabilities, for each prompt."""
    params = {"temperature": temperature, "max_new_tokens": NUM_NEW, "ignore_eos": True}
    answers = post(url + "/generate", {"input_ids": prompts, "sampling_params": params, "return_logprob": True})
    triples = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
    return [([t[1] for t in each], [t[0] for t in each]) for each in triples]


def assert_equals_transformers(url: str, folder: Path, temperature: float) -> None:
    """Greedy ids are the reference's argmax at each place, and log-probabilities agree to 1e-4."""
    for prompt, (ids, logprobs) in zip(PROMPTS, generate(url, PROMPTS, temperature), strict=True):
        assert len(ids) == NUM_NEW
        reference = reference_logprobs(folder, prompt + ids[:-1], temperature or 1.0)[len(prompt) - 1 :]
        if temperature == 0:
            assert ids == reference.argmax(-1).tolist()
        expected = reference.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_both_servers_sample_from_the_model_that_they_were_given(
    servers: Servers, models: tuple[Path, Path], temperature: float
) -> None:
    version = servers.load(models[0])
    for url in servers.urls:
        assert weight_version(url) == str(version)
        assert_equals_transformers(url, models[0], temperature)
    with pytest.raises(AssertionError):  # the other model is another one
        assert_equals_transformers(servers.urls[0], models[1], temperature)


def test_servers_sample_with_different_seeds(servers: Servers) -> None:
    first, second = (generate(url, PROMPTS, 1.0) for url in servers.urls)
    assert first != second


def test_a_killed_server_comes_back_with_the_published_weights(servers: Servers, models: tuple[Path, Path]) -> None:
    url = servers.urls[1]
    version = servers.load(models[1])
    old, old_segments = servers.main_process(url), servers.segments()
    before = servers.supervisor.snapshot()
    seen: set[str | None] = set()

    def is_back() -> bool:
        seen.add(weight_version(url))
        return str(version) in seen and servers.supervisor.snapshot()[url] == before[url] + 1

    old.send_signal(signal.SIGKILL)
    old.wait(10)
    seen.clear()
    wait_until(is_back, 400.0, servers.supervisor)
    assert seen <= {None, "default", str(version)}
    assert_equals_transformers(url, models[1], 0.0)
    assert servers.supervisor.snapshot() == before | {url: before[url] + 1}
    gone = old_segments - servers.segments()
    assert len(gone) >= 2  # its load snapshot, a semaphore
    assert [segment for segment in gone if segment.exists()] == []

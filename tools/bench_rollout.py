"""Measures trajectories and tokens per second of a run's rollout engine; prints one JSON object.

    python tools/bench_rollout.py CONFIG
    python tools/bench_rollout.py CONFIG rollout.engine=sglang 'rollout.sglang.urls=["http://10.0.0.7:30000"]'

Measures the embedded engine, or attached servers with the model of ``model.hf_dir``; starts no server and changes no
weights. An untrained policy does not search, so the engine samples ``rollout.max_response_tokens`` per turn and a query
of random words, or in the last turn an answer, overwrites the last of them. Every trajectory thus makes
``rollout.max_turns`` searches in the run's search engine, and later turns continue the sampled text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from megatron_sdsearch.config import RunConfig, load_config, path_argument
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.data.questions import read_questions
from megatron_sdsearch.errors import ConfigError, SDSearchError
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.records import TrajectoryId
from megatron_sdsearch.rollout.collector import RolloutCollector
from megatron_sdsearch.rollout.embedded import EmbeddedEngine
from megatron_sdsearch.rollout.engine import Engine, Generation, GenerationRequest
from megatron_sdsearch.rollout.requests import one_group_each
from megatron_sdsearch.sglang.api import SGLangServer, call_servers
from megatron_sdsearch.sglang.engine import SGLangEngine
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training.retrievers import open_retriever

WORDS = "river mountain author capital painter novel engine island treaty comet harbour opera bridge planet".split()


class ScriptedEngine:
    """Overwrites the end of each turn of another engine with a query or an answer."""

    def __init__(self, inner: Engine, renderer: Renderer, num_searches: int) -> None:
        self._inner = inner
        self._renderer = renderer
        self._num_searches = num_searches
        self._num_turns: dict[TrajectoryId, int] = {}

    async def generate(self, request: GenerationRequest) -> Generation:
        generation = await self._inner.generate(replace(request, params=replace(request.params, stop=())))
        turn = self._num_turns.get(request.trajectory_id, 0)
        self._num_turns[request.trajectory_id] = turn + 1
        words = random.Random(f"{request.trajectory_id}{turn}").sample(WORDS, 3)
        tag = "search" if turn < self._num_searches else "answer"
        tail = self._renderer.encode_own(f"<{tag}> {' '.join(words)} </{tag}>")
        kept = max(min(len(generation.token_ids), request.params.max_new_tokens - len(tail)), 0)
        return replace(
            generation,
            token_ids=generation.token_ids[:kept] + tail,
            logprobs=generation.logprobs[:kept] + (-1.0,) * len(tail),
            finish_reason="stop",
        )

    async def release(self, trajectory_id: TrajectoryId) -> None:
        self._num_turns.pop(trajectory_id, None)
        await self._inner.release(trajectory_id)

    async def close(self) -> None:
        await self._inner.close()


def main() -> None:
    """Run the benchmark and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=path_argument, help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. data.questions_per_step=16")
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one of warm-up (default 3)")
    arguments = parser.parse_args()
    try:
        print(json.dumps(bench(load_config(arguments.config, arguments.overrides), arguments.steps)))
    except SDSearchError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def bench(config: RunConfig, num_steps: int) -> dict[str, object]:
    """Roll out the first questions of ``data.train`` once for warm-up, then ``num_steps`` times."""
    data, rollout = config.data, config.rollout
    renderer = Renderer.from_folder(config.model.hf_dir, profile=get_profile(data.prompt_profile))
    inner, version = make_engine(config, renderer)
    engine = ScriptedEngine(inner, renderer, rollout.max_turns)
    if config.retrieval is None or data.train is None:
        raise ConfigError("train.mode", "warm_start has no rollouts", "set it to rl")
    runner = asyncio.Runner()
    retriever = runner.run(open_retriever(config.retrieval))
    collector = RolloutCollector(engine, retriever, renderer, config, runner)
    questions = read_questions(data.train)[: data.questions_per_step]
    seconds, num_tokens, num_searches = [], 0, 0
    try:
        for step in range(1 + num_steps):
            start = time.perf_counter()
            slots = one_group_each(questions, step=step, group_size=rollout.group_size)
            collected = collector.collect(slots, policy_version=version)
            seconds.append(time.perf_counter() - start)
            trajectories = [trajectory for group in collected.groups for trajectory in group.trajectories]
            num_tokens = sum(len(span.token_ids) for t in trajectories for span in t.sampled_spans)
            num_searches = sum(len(t.queries) for t in trajectories)
    finally:
        collector.close()
    step_s, num_trajectories = statistics.median(seconds[1:]), len(questions) * rollout.group_size
    return {
        "engine": rollout.engine,
        "trajectories": num_trajectories,
        "trajectories_per_s": round(num_trajectories / step_s, 4),
        "tokens_per_s": round(num_tokens / step_s, 4),
        "s_per_step": round(step_s, 4),
        "searches_per_trajectory": num_searches / num_trajectories,
    }


def make_engine(config: RunConfig, renderer: Renderer) -> tuple[Engine, int]:
    """Return the engine and the version of its weights."""
    longest, hf_dir, sglang = config.rollout.max_total_tokens, config.model.hf_dir, config.rollout.sglang
    if config.rollout.engine == "embedded":
        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
        return EmbeddedEngine(model, renderer.token_bytes, (), longest), 0
    servers = [SGLangServer(url, timeout_s=10.0) for url in sglang.urls]
    versions = [info["weight_version"] for info in call_servers(servers, lambda server: server.call("/model_info"))]
    if len(set(versions)) > 1:
        sys.exit(f"the servers have different weights: versions {versions}")
    vocab_size = load_hf_config(hf_dir).vocab_size
    # A string: a server without a publish reports "default". Versions are only compared.
    version: int = versions[0]
    tokens, eos_ids = renderer.token_bytes, renderer.eos_ids
    engine = SGLangEngine(sglang.urls, tokens, eos_ids, vocab_size, longest, sglang, policy_version=version)
    return engine, version


if __name__ == "__main__":
    main()

"""Trajectories and tokens per second of a rollout engine under the package's collector, as one JSON object.

    python tools/bench_rollout.py --model HF_DIR --questions 16 --group 5 --searches 2
    python tools/bench_rollout.py --model HF_DIR --url http://10.0.0.7:30000 --concurrency 256

Measures the embedded engine, or attached servers, which must hold the model whose tokenizer is in ``--model``; it
starts no server and changes no weights. A random policy searches for nothing. So the engine samples ``--new-tokens``
per turn, and the last few are overwritten by a query, or in the last turn by an answer: every trajectory makes
``--searches`` searches, the engine does all of its work, and later turns continue what was sampled.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from megatron_sdsearch.config import RunConfig, parse_config, path_argument
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.errors import SDSearchError
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.records import Passage, Question, TrajectoryId
from megatron_sdsearch.rollout.collector import RolloutCollector
from megatron_sdsearch.rollout.embedded import EmbeddedEngine
from megatron_sdsearch.rollout.engine import Engine, Generation, GenerationRequest
from megatron_sdsearch.rollout.supply import exactly
from megatron_sdsearch.sglang.api import SGLangServer, call_servers
from megatron_sdsearch.sglang.engine import SGLangEngine
from megatron_sdsearch.tokenization.renderer import Renderer

WORDS = "river mountain author capital painter novel engine island treaty comet harbour opera bridge planet".split()
OBSERVATION_TOKENS = 64
PROMPT_TOKENS = 160


class ScriptedEngine:
    """Another engine, whose turns end with a query or an answer that is written over the last tokens."""

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


class ScriptedRetriever:
    """Finds the same passages for every query."""

    fingerprint = "bench"

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        text = " ".join(WORDS * 3)
        return [Passage(passage_id=f"p{i}", contents=f'"{WORDS[i % len(WORDS)]}"\n{text}') for i in range(top_k)]

    async def close(self) -> None: ...


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=path_argument, required=True, help="Hugging Face folder")
    parser.add_argument("--url", action="append", default=[], help="of a server; again for each of several")
    parser.add_argument("--questions", type=int, default=16, help="per step (default 16)")
    parser.add_argument("--group", type=int, default=5, help="trajectories per question (default 5)")
    parser.add_argument("--searches", type=int, default=2, help="per trajectory (default 2)")
    parser.add_argument("--new-tokens", type=int, default=48, help="per turn (default 48)")
    parser.add_argument("--concurrency", type=int, default=256, help="requests at a time, per server (default 256)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one of warm-up (default 3)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as run_dir:
        try:
            print(json.dumps(bench(arguments, run_dir)))
        except SDSearchError as error:
            sys.exit(f"{type(error).__name__}: {error}")


def bench(arguments: argparse.Namespace, run_dir: str) -> dict[str, object]:
    longest = PROMPT_TOKENS + (arguments.searches + 1) * (arguments.new_tokens + OBSERVATION_TOKENS)
    config = parse_config(
        {
            "run_dir": run_dir,
            "model": {"hf_dir": str(arguments.model)},
            "data": {"train": "none", "prompt_profile": "plain"},
            "retrieval": {"corpus": "none"},
            "rollout": {
                "engine": "sglang" if arguments.url else "embedded",
                "sglang": {"urls": arguments.url, "max_concurrency": arguments.concurrency},
                "group_size": arguments.group,
                "max_turns": arguments.searches,
                "max_prompt_tokens": PROMPT_TOKENS,
                "max_response_tokens": arguments.new_tokens,
                "max_observation_tokens": OBSERVATION_TOKENS,
                "max_total_tokens": longest,
            },
            "train": {"max_tokens_per_microbatch": longest + 4096},
        }
    )
    renderer = Renderer.from_folder(arguments.model, profile=get_profile(config.data.prompt_profile))
    inner, version = make_engine(config, renderer)
    collector = RolloutCollector(
        ScriptedEngine(inner, renderer, arguments.searches), ScriptedRetriever(), renderer, config
    )
    questions = [
        Question(question_id=f"bench:{i}", text=f"which {WORDS[i % len(WORDS)]} is number {i}", gold_answers=("x",))
        for i in range(arguments.questions)
    ]
    seconds, num_tokens, num_searches = [], 0, 0
    try:
        for step in range(1 + arguments.steps):
            start = time.perf_counter()
            collected = collector.collect(
                exactly(questions, step=step, group_size=arguments.group), policy_version=version
            )
            seconds.append(time.perf_counter() - start)
            trajectories = [trajectory for group in collected.groups for trajectory in group.trajectories]
            num_tokens = sum(len(span.token_ids) for t in trajectories for span in t.sampled_spans)
            num_searches = sum(len(t.queries) for t in trajectories)
    finally:
        collector.close()
    step_s, num_trajectories = statistics.median(seconds[1:]), arguments.questions * arguments.group
    return {
        **vars(arguments),
        "model": str(arguments.model),
        "trajectories_per_s": round(num_trajectories / step_s, 4),
        "tokens_per_s": round(num_tokens / step_s, 4),
        "s_per_step": round(step_s, 4),
        "searches_per_trajectory": num_searches / num_trajectories,
    }


def make_engine(config: RunConfig, renderer: Renderer) -> tuple[Engine, int]:
    """Return the engine, and the version of the weights that it holds."""
    longest, hf_dir, sglang = config.rollout.max_total_tokens, config.model.hf_dir, config.rollout.sglang
    if config.rollout.engine == "embedded":
        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
        return EmbeddedEngine(model, renderer.token_bytes, (), longest), 0
    servers = [SGLangServer(url, timeout_s=10.0) for url in sglang.urls]
    versions = [info["weight_version"] for info in call_servers(servers, lambda server: server.call("/model_info"))]
    if len(set(versions)) > 1:
        sys.exit(f"the servers hold different weights: versions {versions}")
    vocab_size = load_hf_config(hf_dir).vocab_size
    # A text, for a server that nothing was published to says "default"; versions are only compared.
    version: int = versions[0]
    engine = SGLangEngine(
        sglang.urls, renderer.token_bytes, renderer.eos_ids, vocab_size, longest, sglang, policy_version=version
    )
    return engine, version


if __name__ == "__main__":
    main()

"""Measures seconds per training step by phase on a tiny model, single turn, without search; prints one JSON object.

    python tools/bench_step.py --questions 12 --group 8 --new-tokens 64 --tensor 2

A step publishes the weights of a model of 3 layers x 96 to the engine, samples ``group`` continuations of each prompt,
and takes one GRPO update on all of them. With ``--query-tokens N`` the first N sampled tokens count as a query, which
adds the teacher pass and the JSD. Starts its own processes; writes only to a temporary folder.

With ``--trl PYTHON``, an interpreter with trl and datasets, TRL's GRPO trainer does the same work before and after, on
as many threads as there are ranks; the smaller of its two medians is reported.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from megatron_sdsearch.batching.samples import build_samples
from megatron_sdsearch.config import RunConfig, load_config
from megatron_sdsearch.logging import PhaseTimer
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.parallel.cpu import without_cpu_layer
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import (
    Action,
    ContextSpan,
    HindsightBlock,
    Question,
    RolloutGroup,
    SampledSpan,
    Score,
    Trajectory,
    TrajectoryId,
    TrajectoryStatus,
)
from megatron_sdsearch.rollout.embedded import EmbeddedEngine
from megatron_sdsearch.rollout.engine import GenerationRequest, SamplingParams
from megatron_sdsearch.training.policy import Policy
from megatron_sdsearch.training.updates import pack_samples, run_updates

TINY_RECIPE = Path(__file__).parents[1] / "examples/tiny/config.yaml"
BLOCK_TOKENS = 32
NUM_WARMUP_STEPS = 2
SIZES = {
    "questions": (12, "prompts per step"),
    "group": (8, "continuations per prompt"),
    "new-tokens": (64, "per continuation"),
    "prompt-tokens": (32, "per prompt"),
    "query-tokens": (0, "sampled tokens to distil per continuation; 0 leaves the teacher out"),
    "vocab": (256, "vocabulary"),
    "steps": (10, "measured steps"),
    "tensor": (2, "tensor-parallel size"),
    "pipeline": (1, "pipeline-parallel size"),
    "data": (1, "data-parallel size"),
}


class NoText:
    """Token bytes of a tokenizer without text, so that nothing stops a continuation before its budget."""

    def __getitem__(self, token_id: int) -> bytes:
        return b""


def main() -> None:
    """Start the processes, or run as one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter with trl and datasets, to measure TRL as well")
    arguments = parser.parse_args()
    if arguments.query_tokens > arguments.new_tokens:
        parser.error("--query-tokens must not exceed --new-tokens")
    if "RANK" in os.environ:
        _bench(arguments, Path(os.environ["BENCH_STEP_DIR"]))
        return
    num_ranks = arguments.tensor * arguments.pipeline * arguments.data
    own = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", *sys.argv]
    with tempfile.TemporaryDirectory() as folder:
        _make_model(Path(folder), arguments.vocab)
        sizes = (arguments.questions, arguments.group, arguments.new_tokens, arguments.prompt_tokens, arguments.steps)
        script = str(Path(__file__).with_name("bench_step_trl.py"))
        trl = [arguments.trl, script, folder, *map(str, sizes), str(num_ranks)]
        before = [_run(trl, folder, num_ranks)] if arguments.trl else []
        report = _run(own, folder, 1)
        if arguments.trl:
            report["trl_s_per_step"] = min(run["s_per_step"] for run in (*before, _run(trl, folder, num_ranks)))
        print(json.dumps(report))


def _run(command: list[str], folder: str, num_threads: int) -> dict[str, float]:
    """Return the JSON object on the last line of a command's output."""
    environment = {**os.environ, "BENCH_STEP_DIR": folder, "OMP_NUM_THREADS": str(num_threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"failed: {' '.join(command)}")
    report: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return report


def _make_model(folder: Path, vocab_size: int) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _bench(arguments: argparse.Namespace, folder: Path) -> None:
    total = arguments.prompt_tokens + arguments.new_tokens
    settings = {
        "run_dir": folder,
        "model.hf_dir": folder,
        "parallel.tensor_model_parallel_size": arguments.tensor,
        "parallel.pipeline_model_parallel_size": arguments.pipeline,
        "data.questions_per_step": arguments.questions,
        "rollout.group_size": arguments.group,
        "rollout.max_prompt_tokens": arguments.prompt_tokens,
        "rollout.max_response_tokens": arguments.new_tokens,
        "rollout.max_total_tokens": total,
        "objective.kl_coef": 0,
        "objective.alpha_warmup_steps": 0,
        "train.max_tokens_per_microbatch": max(16384, total),
    }
    config = load_config(TINY_RECIPE, [f"{name}={value}" for name, value in settings.items()])
    parallel = ParallelState.initialize(config.parallel, seed=1)
    policy = Policy(config, parallel)
    model = AutoModelForCausalLM.from_config(load_hf_config(folder)).eval()
    engine = EmbeddedEngine(model, NoText(), (), config.rollout.max_total_tokens)  # type: ignore[arg-type]
    timer = PhaseTimer()
    steps = []
    with asyncio.Runner() as runner:
        for step in range(NUM_WARMUP_STEPS + arguments.steps):
            with timer.phase("publish"):
                engine.load_weights(policy.hf_weights(), step)
            with timer.phase("rollout"):
                questions = range(parallel.rank, arguments.questions, parallel.world_size)
                with without_cpu_layer():
                    own = runner.run(_roll_out(engine, questions, step, config, arguments.query_tokens))
                groups = [group for share in parallel.all_gather_object(own) for group in share]
            with timer.phase("pack"):
                samples = []
                for group in groups:
                    prompt = group.trajectories[0].prompt_ids
                    teacher = prompt[:1] * BLOCK_TOKENS + prompt
                    block = HindsightBlock(text="", teacher_prompt_ids=teacher, sources=(), dropped=(), leaks=())
                    advantages = [1.0 if score.is_correct else -1.0 for score in group.scores]
                    samples += build_samples(group, advantages, [block] * len(advantages), config.objective)
                batch = pack_samples(samples, config, parallel)
            run_updates(policy, None, batch, config.objective, config.objective.alpha, timer)
            steps.append(timer.take())
    if parallel.is_main:
        measured = steps[NUM_WARMUP_STEPS:]
        phases = {name: round(statistics.median(each[name] for each in measured), 4) for name in measured[0]}
        seconds = round(statistics.median(sum(each.values()) for each in measured), 4)
        print(json.dumps({**vars(arguments), "s_per_step": seconds, "phases": phases, "torch": torch.__version__}))
    parallel.shutdown()


async def _roll_out(
    engine: EmbeddedEngine, questions: range, step: int, config: RunConfig, query_tokens: int
) -> list[RolloutGroup]:
    rollout = config.rollout
    params = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=rollout.max_response_tokens, stop=())

    async def sample(question: int, sibling: int) -> Trajectory:
        trajectory_id = TrajectoryId(step=step, question_id=str(question), sibling=sibling)
        prompt = tuple(np.random.default_rng(question).integers(0, 256, rollout.max_prompt_tokens).tolist())
        request = GenerationRequest(trajectory_id=trajectory_id, seed=1, prompt_ids=prompt, params=params)
        generation = await engine.generate(request)
        await engine.release(trajectory_id)
        sampled = SampledSpan(
            token_ids=generation.token_ids,
            logprobs=generation.logprobs,
            text="",
            action=Action.SEARCH,
            argument="",
            query_positions=tuple(range(query_tokens)),
            policy_version=generation.policy_version,
            finish_reason=generation.finish_reason,
        )
        spans = (ContextSpan(kind="prompt", token_ids=prompt), sampled)
        return Trajectory(trajectory_id=trajectory_id, spans=spans, status=TrajectoryStatus.NO_ANSWER)

    pairs = [(question, sibling) for question in questions for sibling in range(rollout.group_size)]
    trajectories = iter(await asyncio.gather(*(sample(*pair) for pair in pairs)))
    wrong, right = (Score(f1=f1, em=f1, reward=f1, is_correct=f1 > 0) for f1 in (0.0, 1.0))
    return [
        RolloutGroup(
            question=Question(question_id=str(question), text="", gold_answers=("",)),
            trajectories=tuple(next(trajectories) for _ in range(rollout.group_size)),
            scores=tuple((wrong, right)[sibling % 2] for sibling in range(rollout.group_size)),
        )
        for question in questions
    ]


if __name__ == "__main__":
    main()

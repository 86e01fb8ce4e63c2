"""Trajectories and tokens per second of a rollout engine under the package's collector, as one JSON object.

    python tools/bench_rollout.py --engine embedded --questions 16 --group 5 --searches 2
    python tools/bench_rollout.py --engine sglang --url http://10.0.0.7:30000 --model HF_DIR --concurrency 256

A random policy searches for nothing. So the engine samples ``--new-tokens`` per turn, and the last few are overwritten
by a query, or in the last turn by an answer: every trajectory makes ``--searches`` searches, the engine does all of its
work, and later turns continue what stands there. ``--as-is`` leaves what was sampled alone, for models that do search.

Starts no server, and changes no weights: attached ones must hold the model whose tokenizer is in ``--model``. Without
it (embedded only) a random model of 3 layers x 96 and its tokenizer are made in a temporary folder.

Seconds are means over trajectories, from the step's start to the trajectory's end: ``generate`` inside the engine,
``search`` inside the retriever, ``wait`` for one of ``--concurrency`` places and for the event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron_sdsearch.rollout.sglang_api import SGLangServer
from megatron_sdsearch.rollout.sglang_client import SGLangEngine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from megatron_sdsearch.config import RunConfig, parse_config, path_argument
from megatron_sdsearch.data.prompts import get_profile
from megatron_sdsearch.errors import SDSearchError
from megatron_sdsearch.records import Passage, Question, TrajectoryId
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.retrieval.tantivy_index import TantivyRetriever
from megatron_sdsearch.rollout.collector import RolloutCollector
from megatron_sdsearch.rollout.embedded import EmbeddedEngine
from megatron_sdsearch.rollout.engine import Engine, Generation, GenerationRequest
from megatron_sdsearch.rollout.supply import exactly
from megatron_sdsearch.tokenization.renderer import Renderer

WORDS = "river mountain author capital painter novel engine island treaty comet harbour opera bridge planet".split()
OBSERVATION_TOKENS = 64
PROMPT_TOKENS = 256
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}Answer:\n{% endif %}"


@dataclass
class Seconds:
    """Of one step, over all trajectories."""

    generate: float = 0.0
    search: float = 0.0
    whole: float = 0.0
    num_tokens: int = 0
    num_searches: int = 0
    num_running: int = 0
    max_running: int = 0


class MeasuredEngine:
    """Another engine behind a bounded number of places; scripts what the policy says at the end of a turn."""

    def __init__(self, inner: Engine, renderer: Renderer, arguments: argparse.Namespace) -> None:
        self.seconds = Seconds()
        self.start = 0.0
        self._inner = inner
        self._renderer = renderer
        self._num_searches = None if arguments.as_is else arguments.searches
        self._places = asyncio.Semaphore(arguments.concurrency)
        self._num_turns: dict[TrajectoryId, int] = {}

    async def generate(self, request: GenerationRequest) -> Generation:
        is_scripted = self._num_searches is not None
        sent = replace(request, params=replace(request.params, stop=())) if is_scripted else request
        async with self._places:
            self.seconds.num_running += 1
            self.seconds.max_running = max(self.seconds.max_running, self.seconds.num_running)
            begin = time.perf_counter()
            try:
                generation = await self._inner.generate(sent)
            finally:
                self.seconds.generate += time.perf_counter() - begin
                self.seconds.num_running -= 1
        self.seconds.num_tokens += len(generation.token_ids)
        return self._scripted(request, generation) if is_scripted else generation

    def _scripted(self, request: GenerationRequest, generation: Generation) -> Generation:
        turn = self._num_turns.get(request.trajectory_id, 0)
        self._num_turns[request.trajectory_id] = turn + 1
        words = random.Random(f"{request.trajectory_id}{turn}").sample(WORDS, 3)
        tag = "search" if turn < (self._num_searches or 0) else "answer"
        tail = self._renderer.encode_own(f"<{tag}> {' '.join(words)} </{tag}>")
        kept = max(min(len(generation.token_ids), request.params.max_new_tokens - len(tail)), 0)
        return replace(
            generation,
            token_ids=generation.token_ids[:kept] + tail,
            logprobs=generation.logprobs[:kept] + (-1.0,) * len(tail),
            finish_reason="stop",
        )

    async def release(self, trajectory_id: TrajectoryId) -> None:
        self.seconds.whole += time.perf_counter() - self.start
        self._num_turns.pop(trajectory_id, None)
        await self._inner.release(trajectory_id)

    async def close(self) -> None:
        await self._inner.close()


class MeasuredRetriever:
    """Another retriever, or none whose passages are always the same; each answer ``delay_s`` late."""

    fingerprint = "bench"

    def __init__(self, inner: Retriever | None, engine: MeasuredEngine, delay_s: float) -> None:
        self._inner = inner
        self._engine = engine
        self._delay_s = delay_s

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        begin = time.perf_counter()
        await asyncio.sleep(self._delay_s)
        found = await self._inner.search(query, top_k=top_k) if self._inner is not None else _passages(top_k)
        self._engine.seconds.search += time.perf_counter() - begin
        self._engine.seconds.num_searches += 1
        return found

    async def close(self) -> None:
        if self._inner is not None:
            await self._inner.close()


def main() -> None:
    """Measure, and print the result."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        try:
            print(json.dumps(_bench(arguments, Path(folder))))
        except SDSearchError as error:
            sys.exit(f"{type(error).__name__}: {error}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["embedded", "sglang"], default="embedded")
    parser.add_argument("--url", action="append", default=[], help="of a server; again for each of several")
    parser.add_argument("--model", type=path_argument, help="Hugging Face folder; with sglang, what the servers serve")
    parser.add_argument("--retriever", choices=["scripted", "tantivy"], default="scripted")
    parser.add_argument("--search-delay-s", type=float, default=0.0, help="added to every search (default 0)")
    parser.add_argument("--as-is", action="store_true", help="the model's own actions; --searches is an upper bound")
    sizes = {
        "questions": (16, 1, "per step"),
        "group": (5, 1, "trajectories per question"),
        "searches": (2, 0, "per trajectory"),
        "new-tokens": (48, 16, "per turn"),
        "concurrency": (256, 1, "generations at a time"),
        "steps": (3, 1, "measured steps, after one of warm-up"),
        "threads": (1, 1, "of torch, for the embedded engine"),
    }
    for name, (default, _, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    arguments = parser.parse_args()
    for name, (_, least, _) in sizes.items():
        if getattr(arguments, name.replace("-", "_")) < least:
            parser.error(f"--{name} must be at least {least}")
    if not 0 <= arguments.search_delay_s < float("inf"):
        parser.error("--search-delay-s must be 0 or more seconds")
    if arguments.engine == "sglang" and not (arguments.url and arguments.model):
        parser.error("--engine sglang needs --url, and --model for the servers' tokenizer")
    if arguments.engine == "embedded" and arguments.url:
        parser.error("--url is of --engine sglang")
    return arguments


def _bench(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    hf_dir = arguments.model or _make_model(folder / "hf")
    config = _config(arguments, hf_dir, folder)
    renderer = Renderer.from_folder(hf_dir, profile=get_profile(config.data.prompt_profile))
    inner, version = _engine(arguments, config, renderer)
    engine = MeasuredEngine(inner, renderer, arguments)
    index = _index(folder) if arguments.retriever == "tantivy" else None
    retriever = MeasuredRetriever(index, engine, arguments.search_delay_s)
    collector = RolloutCollector(engine, retriever, renderer, config)
    questions = [
        Question(question_id=f"bench:{i}", text=f"which {WORDS[i % len(WORDS)]} is number {i}", gold_answers=("x",))
        for i in range(arguments.questions)
    ]
    steps = []
    try:
        for step in range(1 + arguments.steps):
            engine.seconds, engine.start = Seconds(), time.perf_counter()
            collector.collect(exactly(questions, step=step, group_size=arguments.group), policy_version=version)
            steps.append((time.perf_counter() - engine.start, engine.seconds))
    finally:
        collector.close()
    return _report(arguments, steps[1:])


def _config(arguments: argparse.Namespace, hf_dir: Path, folder: Path) -> RunConfig:
    longest = PROMPT_TOKENS + (arguments.searches + 1) * (arguments.new_tokens + OBSERVATION_TOKENS)
    sglang = {"urls": arguments.url, "max_concurrency": arguments.concurrency}
    return parse_config(
        {
            "run_dir": str(folder),
            "model": {"hf_dir": str(hf_dir)},
            "data": {"train": "none", "prompt_profile": "plain"},
            "retrieval": {"corpus": "none"},
            "rollout": {
                "engine": arguments.engine,
                "sglang": sglang,
                "group_size": max(arguments.group, 2),  # of a training run; here a group of one is welcome
                "max_turns": arguments.searches,
                "max_prompt_tokens": PROMPT_TOKENS,
                "max_response_tokens": arguments.new_tokens,
                "max_observation_tokens": OBSERVATION_TOKENS,
                "max_total_tokens": longest,
            },
            "train": {"max_tokens_per_microbatch": longest + 4096},
        }
    )


def _engine(arguments: argparse.Namespace, config: RunConfig, renderer: Renderer) -> tuple[Engine, int]:
    """The engine, and the version of the weights that it holds."""
    longest, hf_dir = config.rollout.max_total_tokens, config.model.hf_dir
    if arguments.engine == "embedded":
        model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
        eos_ids = renderer.eos_ids if arguments.as_is else ()
        return EmbeddedEngine(model, renderer.token_bytes, eos_ids, longest), 0
    versions = asyncio.run(_versions(arguments.url))
    if len(set(versions)) > 1:
        sys.exit(f"the servers hold different weights: versions {versions}")
    # A text, for a server that nobody has published to says "default"; versions are only compared.
    version: int = versions[0]  # type: ignore[assignment]
    vocab_size = AutoConfig.from_pretrained(hf_dir).vocab_size
    sglang = config.rollout.sglang
    engine = SGLangEngine(
        sglang.urls, renderer.token_bytes, renderer.eos_ids, vocab_size, longest, sglang, policy_version=version
    )
    return engine, version


async def _versions(urls: Sequence[str]) -> list[str]:
    found = []
    for url in urls:
        async with SGLangServer.connect(url, timeout_s=10.0) as server:
            found.append(await server.weight_version())
    return found


def _report(arguments: argparse.Namespace, steps: list[tuple[float, Seconds]]) -> dict[str, object]:
    num_trajectories = arguments.questions * arguments.group

    def median(values: Sequence[float]) -> float:
        return round(statistics.median(values), 4)

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    return {
        **settings,
        "trajectories_per_s": median([num_trajectories / wall for wall, _ in steps]),
        "tokens_per_s": median([s.num_tokens / wall for wall, s in steps]),
        "s_per_step": median([wall for wall, _ in steps]),
        "seconds_per_trajectory": {
            "generate": median([s.generate / num_trajectories for _, s in steps]),
            "search": median([s.search / num_trajectories for _, s in steps]),
            "wait": median([(s.whole - s.generate - s.search) / num_trajectories for _, s in steps]),
        },
        "searches_per_trajectory": median([s.num_searches / num_trajectories for _, s in steps]),
        "max_running": max(s.max_running for _, s in steps),
        "torch": torch.__version__,
    }


def _passages(count: int) -> list[Passage]:
    text = " ".join(WORDS * 3)
    return [Passage(passage_id=f"p{i}", contents=f'"{WORDS[i % len(WORDS)]}"\n{text}') for i in range(count)]


def _index(folder: Path) -> TantivyRetriever:
    """1,000 passages of random words."""
    corpus, source = folder / "corpus.jsonl", random.Random(0)
    with corpus.open("w") as stream:
        for index in range(1000):
            words = " ".join(source.choices(WORDS, k=40))
            stream.write(
                json.dumps({"id": str(index), "contents": f'"{source.choice(WORDS)} {index}"\n{words}'}) + "\n"
            )
    return TantivyRetriever.open_or_build(corpus, "standard", folder / "index")


def _make_model(folder: Path) -> Path:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
    )
    backend.train_from_iterator([" ".join(WORDS), "<search> </search> <answer> </answer> <information>"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()

"""Measures seconds per step of TRL's GRPO trainer on the work of ``bench_step.py``; prints one JSON object.

``bench_step.py --trl PYTHON`` runs it with an interpreter that has ``trl``; imports nothing of this project.

    python tools/bench_step_trl.py MODEL_DIR QUESTIONS GROUP NEW_TOKENS PROMPT_TOKENS STEPS THREADS
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

NUM_WARMUP_STEPS = 2


class StepTimes(TrainerCallback):
    """Records the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        """Record the time."""
        self.ends.append(time.perf_counter())


def main() -> None:
    """Run the benchmark and print the result."""
    folder, *sizes = sys.argv[1:]
    questions, group, new_tokens, prompt_tokens, steps, threads = map(int, sizes)
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = torch.randint(1, model.config.vocab_size, (questions, prompt_tokens)).tolist()
    times = StepTimes()
    with tempfile.TemporaryDirectory() as output:
        arguments = GRPOConfig(
            output_dir=output,
            per_device_train_batch_size=questions * group,
            num_generations=group,
            max_completion_length=new_tokens,
            generation_kwargs={"min_new_tokens": new_tokens},  # no early end-of-sequence
            max_steps=NUM_WARMUP_STEPS + steps,
            beta=0.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": [" ".join(f"t{i}" for i in ids) for ids in prompts]}),
            processing_class=_tokenizer(model.config.vocab_size),
            callbacks=[times],
        )
        trainer.train()
    per_step = [end - start for start, end in zip(times.ends, times.ends[1:], strict=False)][NUM_WARMUP_STEPS - 1 :]
    print(json.dumps({"s_per_step": statistics.median(per_step), "threads": threads, "trl": trl.__version__}))


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", pad_token="t0")


if __name__ == "__main__":
    main()

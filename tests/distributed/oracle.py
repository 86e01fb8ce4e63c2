"""The whole objective on one process, unsharded, unpacked, in float64: what every layout must reproduce.

Owns tiny models and random samples as well, so that workers and oracle speak of the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from megatron_sdsearch.config import ObjectiveConfig, RunConfig, parse_config
from megatron_sdsearch.records import TeacherPrompt, TrainingSample

CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
# Its factors are not Llama 3.1's own, and so short a past makes all three ranges of frequencies occur in a head of 16.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 3.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 32,
}
VOCAB_SIZE = 101  # a prime: padded at every tensor-parallel size but 1


def make_model(
    folder: Path, family: str, *, is_tied: bool, num_groups: int = 2, seed: int = 0, head_width: int = 16
) -> Path:
    """A random model with every parameter away from its special value (biases 0, norms 1)."""
    torch.manual_seed(seed)
    extra = {"sliding_window": None} if family == "mistral" else {}
    config = CONFIGS[family](
        vocab_size=VOCAB_SIZE,
        hidden_size=4 * head_width,
        intermediate_size=6 * head_width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=num_groups,
        head_dim=head_width,
        max_position_embeddings=128,
        tie_word_embeddings=is_tied,
        rope_parameters=LLAMA3_ROPE if family == "llama" else {"rope_type": "default", "rope_theta": 10000.0},
        **extra,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def make_samples(num_samples: int, seed: int = 0) -> list[TrainingSample]:
    """Random sequences: a prompt, then alternating sampled (first half of it a query) and observed pieces.

    The last one has no query, the one before no teacher prompt: both occur in every batch.
    """
    random = np.random.default_rng(seed)
    return [_make_sample(random, index, num_samples) for index in range(num_samples)]


def _make_sample(random: np.random.Generator, index: int, num_samples: int) -> TrainingSample:
    prompt_length = int(random.integers(3, 9))
    kinds = [np.zeros(prompt_length, dtype=np.int64)]
    for _ in range(int(random.integers(1, 3))):
        kinds += [np.full(4, 2), np.full(3, 1), np.zeros(int(random.integers(1, 5)), dtype=np.int64)]
    kind = np.concatenate([*kinds, np.full(2, 1)])
    token_ids = random.integers(0, VOCAB_SIZE, len(kind))
    shifted = np.append(kind[1:], 0)
    has_query, has_teacher = index != num_samples - 1, index != num_samples - 2
    return TrainingSample(
        sample_id=f"sample {index}",
        token_ids=token_ids,
        labels=np.append(token_ids[1:], 0),
        loss_mask=shifted > 0,
        distill_mask=(shifted == 2) & has_query,
        # Around the log-probabilities of a random model, log 101 = 4.6: ratios fall on both sides of a cap of 2.
        rollout_logprobs=np.where(shifted > 0, -3.2 - 2.8 * random.random(len(kind)), 0.0),
        advantage=float(random.normal()),
        prompt_length=prompt_length,
        teacher_prompts=_teacher_prompts(random, kind, prompt_length) if has_teacher else (),
    )


def _teacher_prompts(random: np.random.Generator, kind: np.ndarray, prompt_length: int) -> tuple[TeacherPrompt, ...]:
    """One for all queries, or, where the second half of the sequence has a query too, one for each half."""
    ids = [tuple(random.integers(0, VOCAB_SIZE, prompt_length + extra).tolist()) for extra in (5, 2)]
    middle = len(kind) // 2
    bounds = [0, middle, len(kind)] if (kind[middle + 1 :] == 2).any() else [0, len(kind)]
    return tuple(TeacherPrompt(token_ids=i, start=s, end=e) for i, s, e in zip(ids, bounds, bounds[1:], strict=False))


def make_config(hf_dir: Path, run_dir: Path, objective: dict[str, object], **sections: dict[str, object]) -> RunConfig:
    """A run of the given layout and objective."""
    return parse_config(
        {
            "run_dir": str(run_dir),
            # On GPUs, too, torch computes the layers: in float32, which the tolerances are made for.
            "model": {"hf_dir": str(hf_dir), "logits_chunk_tokens": 7, "layer_spec": "local"},
            "data": {"train": "unused"},
            "retrieval": {"corpus": "unused"},
            "objective": objective,
            **sections,
        }
    )


def oracle(
    hf_dir: Path, reference_dir: Path, samples: Sequence[TrainingSample], config: ObjectiveConfig
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Loss, entropy gap, agreement with the engine, and gradient by Hugging Face name, of an update with ratio 1."""
    model, reference = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.float64) for d in (hf_dir, reference_dir))
    num_tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
    distilled = [s for s in samples if s.distill_mask.any() and s.teacher_prompts]
    loss = torch.zeros((), dtype=torch.float64)
    distill = torch.zeros((), dtype=torch.float64)
    gaps, entropy_gaps = [], []
    for sample in samples:
        logits = _logits(model, sample.token_ids)
        mask = torch.as_tensor(sample.loss_mask)
        labels = torch.as_tensor(sample.labels)[mask, None]
        logp = logits[mask].log_softmax(-1)
        chosen = logp.gather(1, labels)[:, 0]
        with torch.no_grad():
            ref = _logits(reference, sample.token_ids)[mask].log_softmax(-1).gather(1, labels)[:, 0]
        ratio = (chosen - chosen.detach()).exp()
        k3 = (ref - chosen).exp() - (ref - chosen) - 1
        entropy = -(logp.exp() * logp).sum(-1)
        gaps.append(chosen.detach() - torch.as_tensor(sample.rollout_logprobs)[mask])
        token_loss = -_importance(gaps[-1].exp(), config) * ratio * sample.advantage
        token_loss = token_loss + config.kl_coef * k3 - config.entropy_coef * entropy
        loss = loss + token_loss.sum() / num_tokens
        if any(sample is other for other in distilled):
            p, q = _teacher(model, sample), logits[torch.as_tensor(sample.distill_mask)].softmax(-1)
            # Of one query token: a mean over this trajectory's and over trajectories, or a mean over all query tokens.
            num_query = int(sample.distill_mask.sum())
            weight = {
                "all_trajectories": 1 / num_query / len(samples),
                "trajectory": 1 / num_query / len(distilled),
                "token": 1 / sum(int(other.distill_mask.sum()) for other in distilled),
            }[config.distill_aggregation]
            distill = distill + weight * _jsd(p, q, config.topk, config.topk_of).sum()
            entropy_gaps.append(weight * (_entropy(q.detach()) - _entropy(p)).sum())
    loss = loss + config.alpha * distill
    loss.backward()
    gap = torch.cat(gaps)
    metrics = {
        "loss": loss.detach(),
        "distill_loss": distill.detach(),
        "entropy_gap_mixed": torch.stack(entropy_gaps).sum(),  # the class of all samples here
        "rollout_gap": gap.abs().mean(),
        "rollout_gap_max": gap.abs().max(),
        "rollout_gap_share": (gap.abs() > 0.1).double().mean(),
        "rollout_k3": (gap.exp() - gap - 1).mean(),
    }
    return {name: float(value) for name, value in metrics.items()}, {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def _importance(ratio: Tensor, config: ObjectiveConfig) -> Tensor:
    cap = config.importance_cap
    is_inside = (ratio >= 1 / cap) & (ratio <= cap)
    forms = {"none": torch.ones_like(ratio), "truncate": ratio.clamp(max=cap), "mask": ratio * is_inside}
    return forms[config.importance_correction]


def _logits(model: PreTrainedModel, token_ids: np.ndarray) -> Tensor:
    logits: Tensor = model(torch.as_tensor(token_ids)[None]).logits[0]
    return logits


def _entropy(probabilities: Tensor) -> Tensor:
    entropy: Tensor = -(probabilities * probabilities.log()).sum(-1)
    return entropy


def _teacher(model: PreTrainedModel, sample: TrainingSample) -> Tensor:
    """[Q, V] probabilities: at each query token those of the prompt in whose range it lies, nothing cut off."""
    rows = []
    for prompt in sample.teacher_prompts:
        positions = [p for p in np.flatnonzero(sample.distill_mask).tolist() if prompt.start <= p < prompt.end]
        ids = np.concatenate([prompt.token_ids, sample.token_ids[sample.prompt_length :]])
        shift = len(prompt.token_ids) - sample.prompt_length
        with torch.no_grad():
            rows.append(_logits(model, ids)[[p + shift for p in positions]].softmax(-1))
    return torch.cat(rows)


def _jsd(p: Tensor, q: Tensor, topk: int | None, topk_of: str) -> Tensor:
    """[Q], row by row, for the size of a union differs from row to row."""
    if topk is None:
        return torch.stack([_jsd_row(*row) for row in zip(p, q, strict=True)])
    values = []
    for teacher, student in zip(p, q, strict=True):
        roles = {"teacher": [teacher], "student": [student], "union": [teacher, student]}[topk_of]
        kept = torch.cat([each.detach().topk(topk).indices for each in roles]).unique()
        heads = [torch.cat([each[kept], 1 - each[kept].sum(0, keepdim=True)]) for each in (teacher, student)]
        values.append(_jsd_row(*heads))
    return torch.stack(values)


def _jsd_row(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    value: Tensor = ((p * (p / m).log() + q * (q / m).log()) / 2).sum()
    return value

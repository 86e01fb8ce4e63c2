"""Sections of a run that have no package of their own: model, layout, data, method, optimizer, and what is kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PlainValidator

from megatron_sdsearch.config.types import (
    HomePath,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    UnitFloat,
)


def _check_scalar(value: object) -> object:
    if not isinstance(value, bool | int | float | str):
        raise ValueError("give true, false, a number or a text, or leave it out")
    return value


Scalar = Annotated[bool | int | float | str, PlainValidator(_check_scalar)]


class ModelConfig(Section):
    """The policy network."""

    hf_dir: HomePath
    """Hugging Face folder with config.json, weights and tokenizer; the starting point of training."""
    megatron_dir: HomePath | None = None
    """Megatron checkpoint to start from instead of ``hf_dir``'s weights, saved with any layout: a folder made by
    ``tools/convert_checkpoint.py to-megatron``, or ``checkpoints/step_*`` of another run. Only weights are read."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of parameters and activations. GPUs train in bfloat16, CPUs in float32."""
    layer_spec: Literal["auto", "transformer_engine", "local"] = "auto"
    """Implementation of the layers. ``auto``: transformer-engine with a GPU, torch without. ``local``: torch
    everywhere; slower on a GPU, but also runs in float32, for comparisons."""
    recompute: Literal["none", "full"] = "none"
    """``full`` keeps only the layers' inputs and recomputes the other activations in the backward pass."""
    logits_chunk_tokens: PositiveInt = 4096
    """Tokens per chunk of logits. The loss holds one chunk of [tokens, V/tp] at a time; the result does not change."""


class ParallelConfig(Section):
    """Layout of the ranks; what the sizes below leave of the world size is data parallel."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each layer's matrices; best kept within a node."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that the layers are divided into."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions by sequence; needs ``tensor_model_parallel_size`` >= 2."""
    distributed_optimizer: bool = False
    """Shard the optimizer state, 12 bytes per parameter, over the data-parallel ranks. Needs a GPU."""
    collective_timeout_minutes: Annotated[int, Field(ge=1, le=525_600)] = 30
    """Minutes that a rank waits for its peers before the run fails. With servers, most ranks wait through an evaluation
    and through a step's rollouts: set it above what these take."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size


class DataConfig(Section):
    """Questions and the prompts made from them."""

    train: HomePath | None = None
    """JSONL or parquet of training questions; required by ``train.mode=rl``."""
    heldout: HomePath | None = None
    """JSONL or parquet of questions for evaluation; required by ``evaluation.every``."""
    prompt_profile: Literal["search_r1", "autorefine", "plain"] = "autorefine"
    """Instructions and tags. ``plain`` is the bare question, for models that were trained on the tags."""
    chat_template_arguments: dict[str, Scalar] = Field(default={})
    """Variables of the model's chat template, e.g. ``{enable_thinking: false}`` for Qwen3, which otherwise thinks at
    length. Empty by default: names and defaults are the template's own."""
    questions_per_step: PositiveInt = 256
    """Questions sampled in each step; each gets ``rollout.group_size`` trajectories. AutoRefine's value."""


class HindsightConfig(Section):
    """Contents of the hindsight block that the teacher sees; defaults are the paper's, other values its ablations."""

    siblings: Literal["all", "correct", "own", "others"] = "all"
    """Trajectories of the group in the block: all, those that are CORRECT, the supervised one, or all but that one."""
    labels: Literal["outcome", "none", "shuffled", "permuted"] = "outcome"
    """``outcome``: CORRECT or INCORRECT. ``shuffled``: a placebo, labels drawn from all outcomes of the step.
    ``permuted``: the group's own labels in another order, so groups that are all correct or all wrong (most groups
    early on) keep true labels."""
    content: Literal["searches", "everything", "documents"] = "searches"
    """``searches``: the paper's future masking. ``everything`` also shows reasoning, documents and answers.
    ``documents`` shows no siblings: at each query, the teacher has seen what that query found, in one sequence per
    search."""
    rho: UnitFloat = 0.0
    """A trajectory is CORRECT when its answer F1 > rho."""
    max_block_tokens: PositiveInt = 2048
    """Tokens of a block; longer ones lose siblings, deterministically, and are counted. The paper gives no limit.
    ``content=everything`` is refused unless every sibling's whole response fits."""
    drop_leaks: bool = False
    """Leave out siblings that have a gold answer inside a query."""


class ObjectiveConfig(Section):
    """Loss: GRPO + alpha * divergence from the teacher."""

    alpha: NonNegativeFloat = 1e-3
    """Weight of the distillation loss; 0 trains by GRPO alone."""
    alpha_warmup_steps: NonNegativeInt = 50
    """Steps of the warm-up of alpha; the paper's T_warm."""
    alpha_schedule: Literal["gate", "ramp"] = "gate"
    """``gate``: 0 during the warm-up, then alpha. ``ramp``: linear from 0 to alpha during it. The paper does not say
    which."""
    divergence: Literal["jsd", "forward_kl", "reverse_kl", "mse"] = "jsd"
    """Divergence of teacher and student, logged as ``loss/<name>``. ``jsd`` is the paper's, others its ablations."""
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Weight of the teacher in the mixture of ``divergence=jsd``."""
    topk: PositiveInt | None = 50
    """Vocabulary entries that are compared per position; null compares the whole distributions."""
    topk_of: Literal["teacher", "student", "union"] = "teacher"
    """Model that picks its most probable entries; the paper does not say. ``union``: both, up to twice ``topk``. All
    but ``teacher`` keep the teacher's whole logits until the student has its own, as ``topk=null`` does."""
    tail: Literal["bucket", "renormalize", "drop"] = "bucket"
    """Mass outside the top k. ``bucket``: one more entry. ``renormalize``: the k entries sum to 1. ``drop``: left out.
    The paper does not say; a bucket is a lower bound of the whole divergence, for JSD and KL."""
    distill_positions: Literal["query", "all"] = "query"
    """Tokens that are distilled: those of search queries without their tags, or all sampled ones."""
    distill_aggregation: Literal["all_trajectories", "trajectory", "token"] = "all_trajectories"
    """``all_trajectories``: mean over a trajectory's query tokens, then over all trajectories of the minibatch, where
    one without a teacher counts as 0. ``trajectory``: only over those with a teacher. ``token``: mean over all query
    tokens. The default is how the paper's L_GRPO + alpha L_SD reads for each rollout; with the others, each rollout
    that searches gets more of alpha the fewer do."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """GRPO clips probability ratios below 1 - clip_low. verl's default, which AutoRefine uses."""
    clip_high: PositiveFloat = 0.2
    """GRPO clips probability ratios above 1 + clip_high. verl's default, which AutoRefine uses."""
    loss_aggregation: Literal["token", "sequence"] = "token"
    """``token``: mean over the global minibatch's tokens. ``sequence``: mean per trajectory, then over trajectories."""
    kl_coef: NonNegativeFloat = 1e-3
    """Weight of the k3 estimate of the KL to the starting policy; with 0, no reference model is loaded."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus. AutoRefine uses 0.001."""
    importance_correction: Literal["none", "truncate", "mask"] = "none"
    """Correction for an engine with other log-probabilities than the trainer's, with r = exp(old - rollout) per token:
    ``truncate`` weighs tokens by min(r, cap); ``mask`` by r, and drops tokens outside [1/cap, cap]."""
    importance_cap: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] = 2.0
    """Cap of ``importance_correction``."""
    normalize_advantage_std: bool = True
    """Divide advantages by the group's unbiased standard deviation + 1e-6, after subtracting its mean."""
    reward: Literal["f1", "em", "autorefine"] = "autorefine"
    """Reward of a trajectory. ``f1``: token F1 of the answer. ``em``: exact match. ``autorefine``: F1, or 0.1 for a
    wrong answer with a gold answer inside <refine>."""

    def alpha_at(self, step: int) -> float:
        """Weight of the distillation loss at a step (0-based): 0 through the warm-up, or rising linearly over it."""
        if step >= self.alpha_warmup_steps:
            return self.alpha
        return self.alpha * step / self.alpha_warmup_steps if self.alpha_schedule == "ramp" else 0.0

    @property
    def first_distilling_step(self) -> int | None:
        """The first step (0-based) with a distillation loss; None when there is never one."""
        if self.alpha == 0:
            return None
        return min(1, self.alpha_warmup_steps) if self.alpha_schedule == "ramp" else self.alpha_warmup_steps


class OptimizerConfig(Section):
    """Adam and its learning-rate schedule."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate. AutoRefine's value."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of a ``linear`` or ``cosine`` schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the learning rate from the end of the warm-up to the end of the run."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer updates with a linearly rising learning rate; a step may take several updates."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay; norms and biases have none."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of Adam's mean of the gradients."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay of Adam's mean of the squared gradients."""
    eps: PositiveFloat = 1e-8
    """Added to Adam's denominator; torch's default."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0 does not clip."""


class TrainConfig(Section):
    """Mode, length and batch sizes of the run."""

    mode: Literal["rl", "warm_start"] = "rl"
    """``rl``: SD-Search. ``warm_start``: supervised learning from ``demonstrations``."""
    num_steps: PositiveInt = 200
    """Steps of the whole run. Raise it to continue a finished run."""
    trajectories_per_minibatch: PositiveInt | None = 256
    """Most trajectories per optimizer update; null takes the whole step at once. A step of all trajectories is divided
    into as few nearly equal parts as this allows, and keeps their number when failed searches leave fewer to train on.
    AutoRefine's value."""
    max_tokens_per_microbatch: PositiveInt = 16384
    """Tokens of one packed forward pass; at least the longest trajectory with its hindsight block."""
    demonstrations: HomePath | None = None
    """JSONL of demonstrations; required by ``mode=warm_start``."""
    demonstrations_per_step: PositiveInt = 64
    """Demonstrations per update of ``mode=warm_start``."""


class EvaluationConfig(Section):
    """Greedy evaluation on ``data.heldout``."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0 never evaluates. Otherwise the first and the last policy are always evaluated."""
    num_questions: PositiveInt | None = None
    """Evaluate only the first questions of the file; null takes all."""


class CheckpointConfig(Section):
    """Resumable state under ``run_dir/checkpoints``."""

    every: NonNegativeInt = 0
    """Steps between saves; 0 does not count steps. The last step is always saved, and so is the one at which a signal
    stops the run."""
    every_minutes: NonNegativeFloat = 30.0
    """Minutes between saves, by rank 0's clock at the end of a step; 0 turns this off. The length of a step is not
    known beforehand, so the default limits what a crash may cost in time; a save takes seconds."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_every: NonNegativeInt = 0
    """Keep checkpoints of multiples of this step forever; 0 keeps none of them."""
    keep_best: bool = True
    """Also keep the evaluated checkpoint with the best held-out EM; ``checkpoints/best`` names it."""
    async_save: bool = True
    """Continue training while files are written; costs a copy of the rank's state in host memory."""
    verify: bool = True
    """Compare, when loading, the checksums of all files, of ``model.hf_dir`` and of the questions with the manifest."""
    fallback: bool = False
    """Continue from an older checkpoint when the newest is damaged; otherwise that is an error."""
    export_hf: bool = True
    """Write the final policy to ``run_dir/hf`` in Hugging Face format."""


class TelemetryConfig(Section):
    """Output of a run besides ``metrics.jsonl``."""

    tensorboard: bool = True
    """Write scalars to ``run_dir/tensorboard``."""
    progress: bool = True
    """Show a progress bar on a terminal, and one line per step elsewhere."""
    trajectories: bool = True
    """Write every trajectory of every step to ``run_dir/trajectories`` as JSONL."""
    query_probe: bool = False
    """Sample queries from teacher and student at the student's prefixes, at the first distilling step only, search for
    them, and log both hit rates."""

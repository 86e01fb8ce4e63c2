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
    """Megatron checkpoint whose weights take the place of ``hf_dir``'s, written for any layout: a folder of
    ``tools/convert_checkpoint.py to-megatron``, or a ``checkpoints/step_*`` of another run. Weights alone: step 0."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and activations; bfloat16 needs a GPU."""
    layer_spec: Literal["auto", "transformer_engine", "local"] = "auto"
    """Who computes the layers. ``auto``: transformer-engine with a GPU, torch without. ``local``: torch everywhere,
    slower on a GPU, but in float32 as well: for comparisons."""
    recompute: Literal["none", "full"] = "none"
    """``full`` keeps only layer inputs and recomputes the rest in the backward pass."""
    logits_chunk_tokens: PositiveInt = 4096
    """Rows of logits that exist at one time; bounds the loss's memory to this many rows of [V/tp]."""


class ParallelConfig(Section):
    """How ranks are laid out; what is left of the world size is data parallel."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions by sequence; needs ``tensor_model_parallel_size`` >= 2."""
    distributed_optimizer: bool = False
    """Shard the optimizer's state over data-parallel ranks: 12 bytes a parameter by their number. Needs a GPU."""
    collective_timeout_minutes: Annotated[int, Field(ge=1, le=525_600)] = 30
    """A rank that waits longer for its peers ends the run. With servers most ranks wait through an evaluation, and
    through a step's rollouts: set it above what these take."""


class DataConfig(Section):
    """Questions and how they are asked."""

    train: HomePath | None = None
    """JSONL or parquet of training questions; needed for ``train.mode=rl``."""
    heldout: HomePath | None = None
    """Questions for evaluation; needed when ``evaluation.every`` is set."""
    prompt_profile: Literal["search_r1", "autorefine", "plain"] = "autorefine"
    """Instructions and tags; ``plain`` asks the bare question (for models that were taught the tags)."""
    chat_template_arguments: dict[str, Scalar] = Field(default={})
    """For variables that the model's chat template reads, e.g. ``{enable_thinking: false}`` for Qwen3, whose template
    lets it think at length otherwise. Empty, because names and defaults are the template's own."""
    questions_per_step: PositiveInt = 256


class HindsightConfig(Section):
    """What the teacher sees; defaults are the paper's, the other values its ablations."""

    siblings: Literal["all", "correct", "own", "others"] = "all"
    labels: Literal["outcome", "none", "shuffled", "permuted"] = "outcome"
    """``shuffled`` is a placebo: labels drawn from all outcomes of the step, whatever the group. ``permuted`` deals a
    group's own labels out anew: groups that are all right or all wrong, most of them early on, keep true ones."""
    content: Literal["searches", "everything", "documents"] = "searches"
    """``searches`` is the paper's future masking; ``everything`` keeps reasoning, documents and answers. ``documents``
    shows no siblings: at each query the teacher has seen what that query found, in a sequence for each search."""
    rho: UnitFloat = 0.0
    """A sibling is CORRECT when its answer F1 > rho."""
    max_block_tokens: PositiveInt = 2048
    """Longer blocks lose siblings, deterministically and counted. Not public. ``content=everything`` needs room for
    every sibling's whole response, and is refused with less."""
    drop_leaks: bool = False
    """Leave out siblings whose query holds a gold answer."""


class ObjectiveConfig(Section):
    """GRPO + alpha * JSD."""

    alpha: NonNegativeFloat = 1e-3
    alpha_warmup_steps: NonNegativeInt = 50
    alpha_schedule: Literal["gate", "ramp"] = "gate"
    """``gate``: 0 for the warm-up steps, then alpha. ``ramp``: linear from 0 to alpha over them."""
    divergence: Literal["jsd", "forward_kl", "reverse_kl", "mse"] = "jsd"
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Weight of the teacher in the JSD's mixture."""
    topk: PositiveInt | None = 50
    """Entries kept; null compares whole distributions."""
    topk_of: Literal["teacher", "student", "union"] = "teacher"
    """Whose most probable entries; the paper does not say. ``union``: both's, up to twice ``topk``. All but ``teacher``
    keep the teacher's whole logits until the student has its own, as ``topk=null`` does."""
    tail: Literal["bucket", "renormalize", "drop"] = "bucket"
    distill_positions: Literal["query", "all"] = "query"
    distill_aggregation: Literal["all_trajectories", "trajectory", "token"] = "all_trajectories"
    """Mean over query tokens, then over ``all_trajectories`` of the minibatch, where one without a teacher counts as 0;
    or over each ``trajectory`` that has one. ``token``: mean over all query tokens. The default is how the paper's
    L_GRPO + alpha L_SD reads for each rollout. With the others the fewer rollouts search, the more alpha each gets."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    clip_high: PositiveFloat = 0.2
    loss_aggregation: Literal["token", "sequence"] = "token"
    """``token``: mean over the global minibatch's tokens. ``sequence``: mean per trajectory, then over trajectories."""
    kl_coef: NonNegativeFloat = 1e-3
    """k3 KL to the starting policy; 0 keeps no reference model."""
    entropy_coef: NonNegativeFloat = 0.0
    """AutoRefine uses 0.001."""
    importance_correction: Literal["none", "truncate", "mask"] = "none"
    """For engines whose log-probabilities differ from the trainer's, with r = exp(old - rollout) per token:
    ``truncate`` weighs tokens by min(r, cap); ``mask`` by r, dropping those outside [1/cap, cap]."""
    importance_cap: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] = 2.0
    """Not read without a correction."""
    normalize_advantage_std: bool = True
    """Divide by the group's unbiased standard deviation + 1e-6, as well as subtract its mean."""
    reward: Literal["f1", "em", "autorefine"] = "autorefine"

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
    """Adam and its schedule."""

    lr: PositiveFloat = 1e-6
    min_lr: NonNegativeFloat = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    """In optimizer updates."""
    weight_decay: NonNegativeFloat = 0.01
    """Norms and biases never decay."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    eps: PositiveFloat = 1e-8
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient norm; 0 does not clip."""


class TrainConfig(Section):
    """What one run does."""

    mode: Literal["rl", "warm_start"] = "rl"
    num_steps: PositiveInt = 200
    trajectories_per_minibatch: PositiveInt | None = 256
    """At most so many for one optimizer update; null takes the whole step at once. A step is cut into as many nearly
    equal parts as this makes of all its trajectories, also when failed searches leave fewer to train on."""
    max_tokens_per_microbatch: PositiveInt = 16384
    """Packing budget of one forward pass, the longest trajectory at least."""
    demonstrations: HomePath | None = None
    """JSONL for ``mode=warm_start``."""
    demonstrations_per_step: PositiveInt = 64


class EvaluationConfig(Section):
    """Greedy evaluation on ``data.heldout``."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0 never. The first and the last policy are evaluated whenever it is not 0."""
    num_questions: PositiveInt | None = None
    """The first so many; null takes all."""


class CheckpointConfig(Section):
    """Resumable state under ``run_dir/checkpoints``."""

    every: NonNegativeInt = 0
    """Steps between saves; 0 counts none. The last step is always saved, and the one at which a signal asks to stop."""
    every_minutes: NonNegativeFloat = 30.0
    """Minutes between saves, by the first rank's clock and at the end of a step; 0 looks at no clock. How long a step
    takes is not known beforehand; half an hour is the most that a crash may cost, and a save costs seconds of it."""
    keep_last: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    """Checkpoints of every so many steps stay for good; 0 keeps none of them."""
    keep_best: bool = True
    """Keep the one with the best held-out EM as well, of those that were evaluated; ``checkpoints/best`` names it."""
    async_save: bool = True
    """Train on while the files are written; costs a copy of this rank's state in host memory."""
    verify: bool = True
    """On loading, compare the checksum of every file, of ``model.hf_dir`` and of the questions with the manifest."""
    fallback: bool = False
    """Go on from an older checkpoint when the newest is damaged; otherwise that is an error."""
    export_hf: bool = True
    """Write the final policy to ``run_dir/hf``."""


class TelemetryConfig(Section):
    """What is written down."""

    tensorboard: bool = True
    progress: bool = True
    trajectories: bool = True
    """Keep every trajectory of every step as JSONL."""
    query_probe: bool = False
    """At the first distilling step, search for what teacher and student would ask at the student's prefixes."""

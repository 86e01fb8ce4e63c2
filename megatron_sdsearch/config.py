"""The run's settings: frozen sections, read from YAML with dotted overrides, checked before anything slow starts.

Every default is the paper's or AutoRefine's recipe where one is published; where neither says, the comment gives the
reason. Relative paths are taken from the working directory, and ``~`` is a home directory. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import shutil
from argparse import ArgumentTypeError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args
from urllib.parse import urlsplit

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from megatron_sdsearch.errors import ConfigError, raise_first


def expand_home(text: str) -> str:
    """A path or a word of a command with ``~`` or ``~user`` at its start expanded, as a shell does; ``$NAME`` stays.

    Raises:
        ValueError: no such user is known.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = text.partition("/")[0]
        raise ValueError(f"{user} is no home directory here: write the whole path, or ./{user} for a folder's name")
    return expanded


def path_argument(text: str) -> Path:
    """``type`` of a path on a command line of argparse."""
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def _expand_path(value: object) -> object:
    return expand_home(value) if isinstance(value, str) else value


HomePath = Annotated[Path, BeforeValidator(_expand_path)]
"""Every path of the settings; see ``expand_home``."""
ShellWord = Annotated[str, AfterValidator(expand_home)]
"""Of a command that is started without a shell."""

_MAX_INT = 2**31 - 1
"""What is counted goes through C's ``int`` in one library or another; nothing here comes near it."""
PositiveInt = Annotated[int, Field(ge=1, le=_MAX_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_MAX_INT)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""torch takes 64 bits, and megatron adds a few thousand; generators of 32 bits get the remainder."""
Seconds = Annotated[float, Field(gt=0.0, le=1e9)]
"""Up to 30 years: clocks of C overflow soon after."""
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
UnitFloat = Annotated[float, Field(ge=0.0, le=1.0)]


PROBLEMS = "problems"
"""In the context of a validation: a list that takes every ConfigError, where otherwise the first one is raised."""


def _report(errors: Iterable[ConfigError], info: ValidationInfo) -> None:
    collected = (info.context or {}).get(PROBLEMS)
    if collected is None:
        raise_first(errors)
    else:
        collected.extend(errors)


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    # What pydantic says of a refused value would bring passwords into tracebacks.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True)


def shown_url(url: str) -> str:
    """A URL, or a text with one, for messages: what stands before its last ``@`` may be a password."""
    before, at, rest = url.rpartition("@")
    scheme = re.match(r"\W*\w+://", before)
    return f"{scheme.group() if scheme else ''}***@{rest}" if at else url


def _without_credentials(field: str, url: str, fix: str, info: ValidationInfo) -> str:
    """Refuse ``user:password@``: addresses stand in logs, errors, checkpoints and metrics."""
    bare = re.sub(r"^(\w+://)?[^/?#]*@", r"\1", url)
    if bare != url:
        _report([ConfigError(field, f"{shown_url(url)} holds credentials", fix)], info)
    return bare


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

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    sequence: bool = False
    """Shard activations between tensor-parallel regions by sequence; needs ``tensor`` >= 2."""
    distributed_optimizer: bool = False
    """Shard the optimizer's state over data-parallel ranks: 12 bytes a parameter by their number. Needs a GPU."""
    collective_timeout_minutes: Annotated[int, Field(ge=1, le=525_600)] = 30
    """A rank that waits longer for its peers ends the run; more than one rank's rollouts can take beyond another's."""

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        _report(self._problems(), info)
        return self

    def _problems(self) -> Iterator[ConfigError]:
        if self.sequence and self.tensor == 1:
            yield ConfigError(
                "parallel.sequence", "true with parallel.tensor=1", "set parallel.tensor >= 2 or sequence=false"
            )


class DataConfig(Section):
    """Questions and how they are asked."""

    train: HomePath | None = None
    """JSONL or parquet of training questions; needed for ``train.mode=rl``."""
    heldout: HomePath | None = None
    """Questions for evaluation; needed when ``evaluation.every`` is set."""
    prompt_profile: Literal["search_r1", "autorefine", "plain"] = "autorefine"
    """Instructions and tags; ``plain`` asks the bare question (for models that were taught the tags)."""
    chat_template_arguments: dict[str, bool | int | float | str] = {}
    """For variables that the model's chat template reads, e.g. ``{enable_thinking: false}`` for Qwen3, whose template
    lets it think at length otherwise. Empty, because names and defaults are the template's own."""
    questions_per_step: PositiveInt = 256

    @field_validator("chat_template_arguments", mode="before")
    @classmethod
    def _check_are_scalars(cls, arguments: object, info: ValidationInfo) -> object:
        field = "data.chat_template_arguments"
        if not isinstance(arguments, dict):
            fix = "write {name: value}, or leave it out"
            _report([ConfigError(field, f"{arguments!r} is no mapping of names to values", fix)], info)
            return {}
        named = {str(name): value for name, value in arguments.items()}
        scalars = {name: value for name, value in named.items() if isinstance(value, (bool, int, float, str))}
        fix = "give true, false, a number or a text, or leave it out"
        _report(
            (ConfigError(f"{field}.{name}", f"{named[name]!r} is no scalar", fix) for name in named.keys() - scalars),
            info,
        )
        return scalars


class SGLangConfig(Section):
    """SGLang servers: how they are started or reached, and how they get the policy's weights."""

    urls: tuple[str, ...] = ()
    """Servers that somebody else runs, e.g. ``["http://10.0.0.7:30000"]``; empty starts ``num_servers`` of our own."""
    num_servers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Started by the first rank, on its node. `serve` starts as many as its node's GPUs hold, without GPUs so many."""
    tensor: PositiveInt = 1
    """Tensor-parallel GPUs of each server; of attached ones it must be said, too."""
    command: tuple[ShellWord, ...] = ("python3", "-m", "sglang.launch_server")
    """Starts a server; model, host, port and seed are appended. Another environment's interpreter is welcome."""
    arguments: tuple[ShellWord, ...] = ()
    """Further flags of a started server, e.g. ``["--mem-fraction-static", "0.8"]``."""
    environment: dict[str, SecretStr] = {}
    """Added to a started server's environment; never shown, for tokens are given in this way."""
    start_timeout_s: Seconds = 900.0
    """From start to serving; compiling kernels counts."""
    request_timeout_s: Seconds = 600.0
    """One generation; then the server counts as hung."""
    down_timeout_s: Seconds = 300.0
    """No server has been usable for so long: the run stops."""
    max_restarts: NonNegativeInt = 3
    """Of each started server."""
    max_concurrency: PositiveInt = 256
    """Requests that one rank has open at one server."""
    weight_sync: Literal["disk", "tensor", "distributed"] = "disk"
    """``disk``: a safetensors folder in ``run_dir`` that every server can read. ``tensor``: through HTTP, in buckets.
    ``distributed``: a process group of trainer and servers (NCCL, gloo without GPUs)."""
    weight_bucket_mb: PositiveInt = 512
    """Weights travel in buckets of so many MiB."""
    verify_every: NonNegativeInt = 1
    """Publishes between proofs that the servers hold the trainer's very weights; one that did not succeed at once is
    always proven. 0 never."""
    colocated: bool = False
    """Servers share the trainer's GPUs and give their memory up while it trains; GPU only."""

    @field_validator("urls", mode="before")
    @classmethod
    def _check_is_list(cls, urls: object, info: ValidationInfo) -> object:
        if isinstance(urls, str):
            shown = shown_url(urls)
            _report([ConfigError("rollout.sglang.urls", f"{shown!r} is no list", f"write [{shown}]")], info)
            return (urls,)
        return urls

    @field_validator("urls")
    @classmethod
    def _check_urls(cls, urls: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        fix = "SGLang's servers ask for none: leave them out"
        bare = (_without_credentials("rollout.sglang.urls", url, fix, info) for url in urls)
        return tuple(url.rstrip("/") for url in bare)  # one server has one name

    @property
    def plain_environment(self) -> dict[str, str]:
        """``environment``, for a server that is started with it."""
        return {name: value.get_secret_value() for name, value in self.environment.items()}


class RolloutConfig(Section):
    """Sampling of trajectories; AutoRefine's lengths."""

    engine: Literal["embedded", "sglang"] = "embedded"
    sglang: SGLangConfig = SGLangConfig()
    group_size: PositiveInt = 5
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """AutoRefine samples with 0.95; 1.0 keeps rollout and trainer distributions equal."""
    max_turns: NonNegativeInt = 5
    """Searches per trajectory; then one last generation without search."""
    max_prompt_tokens: PositiveInt = 2048
    max_response_tokens: PositiveInt = 512
    """Per generation."""
    max_observation_tokens: PositiveInt = 512
    """Per observation, closing tag included."""
    max_total_tokens: PositiveInt = 6656
    """Of a whole trajectory."""
    eos_without_action: Literal["stop", "notice"] = "stop"
    """A generation that ends with an end-of-sequence token and neither searches nor answers. ``stop`` ends the
    trajectory without an answer: the token closes the assistant's message, and no chat model was trained to go on
    behind it. ``notice`` keeps it, shows the invalid-action notice and spends another turn."""
    max_failed_search_share: UnitFloat = 0.2
    """Above this share of trajectories lost to failed searches, or given up by the engine, a step or an evaluation
    raises; up to it they are left out of training and of all averages, and counted."""
    oversample: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 1.0
    """Each rank begins so many times its share of ``data.questions_per_step``; when the share is complete the rest is
    given up. Which groups those are depends on timing, unless the engine's does not, and short rollouts are favoured:
    the step's groups are no fair sample of its questions any more."""
    max_refills: NonNegativeInt = 0
    """A group whose siblings are all right or all wrong (F1 > ``hindsight.rho``, of those that count in training) gives
    way to another question, at most so many times; the last one stays. It tells the teacher nothing, and has no
    advantage but what a shaped reward makes of it (dynamic sampling: DAPO, arXiv 2503.14476, section 3.2)."""


class ElasticsearchConfig(Section):
    """A cluster, and how it is asked."""

    urls: tuple[str, ...] = ("http://127.0.0.1:9200",)
    index: str = "wiki-18"
    """Index or alias."""
    mode: Literal["bm25", "dense", "hybrid"] = "bm25"
    fields: Literal["contents", "title_and_text"] = "contents"
    """What BM25 matches: the whole passage, or title and text as two fields."""
    dfs: bool = False
    """Global document frequencies (dfs_query_then_fetch): scores as of one shard, for one more round trip. Not
    for ``dense``, nor where the server fuses: they have none."""
    encoder: HomePath | None = None
    """Folder of a text encoder, for ``dense`` and ``hybrid``: with sentence-transformers' module files, whose pooling,
    prompts and normalisation hold, or without any an E5 model."""
    username: str | None = None
    """Else ELASTICSEARCH_USERNAME."""
    password: SecretStr | None = None
    """Else ELASTICSEARCH_PASSWORD."""
    api_key: SecretStr | None = None
    """Else ELASTICSEARCH_API_KEY."""
    ca_file: HomePath | None = None
    """Certificate of the authority that signed the cluster's; the system's authorities by default."""
    timeout_s: Seconds = 30.0
    """One request."""
    max_attempts: PositiveInt = 5
    down_timeout_s: Seconds = 120.0
    """Nothing was answered for so long: the run stops."""
    max_requests: PositiveInt = 16
    """Open at one time by one rank; fewer while the cluster is overloaded."""
    batch_queries: PositiveInt = 64
    """Per request."""
    batch_window_ms: NonNegativeFloat = 5.0
    """How long a query waits for company."""

    @field_validator("urls")
    @classmethod
    def _check_urls(cls, urls: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        field, fix = "retrieval.elasticsearch.urls", "use username and password, or api_key"
        return tuple(_without_credentials(field, url, fix, info) for url in urls)


class RetrieveServerConfig(Section):
    """A server that speaks Search-R1's /retrieve."""

    url: str = "http://127.0.0.1:8000/retrieve"
    username: str | None = None
    """Of HTTP's basic authentication, for a server behind a proxy that asks for it."""
    password: SecretStr | None = None
    """``${oc.env:NAME}`` takes it from the environment."""
    timeout_s: Seconds = 30.0
    max_attempts: PositiveInt = 5
    down_timeout_s: Seconds = 120.0
    max_requests: PositiveInt = 16
    batch_queries: PositiveInt = 64
    batch_window_ms: NonNegativeFloat = 5.0

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str, info: ValidationInfo) -> str:
        fix = "use retrieval.http.username and password"
        return _without_credentials("retrieval.http.url", url, fix, info)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        _report(self._problems(), info)
        return self

    def _problems(self) -> Iterator[ConfigError]:
        if (self.username is None) != (self.password is None):
            lacking, other = ("password", "username") if self.password is None else ("username", "password")
            yield ConfigError(f"retrieval.http.{lacking}", f"missing, and {other} is set", "set both, or neither")


class ReplayConfig(Section):
    """What was searched before."""

    mode: Literal["off", "cache", "only"] = "off"
    """``cache``: known queries are served from the store, others asked and stored. ``only``: an unknown query is an
    error, and the engine is never asked."""
    store: HomePath | None = None
    """A file that ranks, and runs, may share."""
    max_mb: PositiveInt = 4096
    """The oldest entries go when the store is larger."""
    fingerprint: str | None = None
    """``only``: whose answers; needed when the store holds those of several engines."""


class RetrievalConfig(Section):
    """The search engine."""

    engine: Literal["tantivy", "elasticsearch", "http"] = "tantivy"
    corpus: HomePath | None = None
    """tantivy: JSONL of passages ``{"id", "contents"}``; an index is built once per content and analyzer."""
    index: HomePath | None = None
    """tantivy: folder for its indices, or of the one that ``tools/index_corpus.py --out`` made; null is the folder
    ``index`` beside the corpus, where all runs find it. Set it where the corpus's folder may not be written."""
    analyzer: Literal["standard", "english"] = "standard"
    """Of tantivy; an Elasticsearch index has its own."""
    top_k: PositiveInt = 3
    elasticsearch: ElasticsearchConfig = ElasticsearchConfig()
    http: RetrieveServerConfig = RetrieveServerConfig()
    replay: ReplayConfig = ReplayConfig()

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        _report(self._problems(), info)
        return self

    def _problems(self) -> Iterator[ConfigError]:
        if self.engine == "tantivy" and self.corpus is None and self.replay.mode != "only":
            yield ConfigError(
                "retrieval.corpus", "missing, and retrieval.engine=tantivy reads it", "set retrieval.corpus"
            )
        if self.replay.mode != "off" and self.replay.store is None:
            yield ConfigError(
                "retrieval.replay.store", f"missing, and mode is {self.replay.mode}", "set retrieval.replay.store"
            )
        dense = self.elasticsearch.mode != "bm25"
        if self.engine == "elasticsearch" and dense and self.elasticsearch.encoder is None:
            yield ConfigError(
                "retrieval.elasticsearch.encoder", f"missing, and mode is {self.elasticsearch.mode}", "set it"
            )

    def files(self) -> dict[str, Path]:
        """Every path that has to exist before a search, by its field."""
        # With ``only`` the engine is not opened.
        name, path = ("replay.store", self.replay.store) if self.replay.mode == "only" else ("corpus", self.corpus)
        return {} if path is None else {f"retrieval.{name}": path}


class HindsightConfig(Section):
    """What the teacher sees; defaults are the paper's, the rest are its ablations."""

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

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        _report(self._problems(), info)
        return self

    def _problems(self) -> Iterator[ConfigError]:
        of_siblings = {"siblings": "all", "labels": "outcome", "drop_leaks": False}
        for name, default in of_siblings.items():
            if self.content == "documents" and getattr(self, name) != default:
                yield ConfigError(
                    f"hindsight.{name}",
                    f"{getattr(self, name)}, and content=documents shows no siblings",
                    f"leave it at {default}",
                )


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

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        _report(self._problems(), info)
        return self

    def _problems(self) -> Iterator[ConfigError]:
        if self.topk is None and self.topk_of != "teacher":
            yield ConfigError(
                "objective.topk_of",
                f"{self.topk_of}, and objective.topk is null",
                "set objective.topk, or drop topk_of",
            )

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


class SequenceLimit(NamedTuple):
    """How long a sequence of the run may become, in tokens, and the settings whose sum that is."""

    num_tokens: int
    settings: str


class RunConfig(Section):
    """The whole run."""

    run_dir: HomePath
    seed: Seed = 1
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    retrieval: RetrievalConfig | None = None
    hindsight: HindsightConfig = HindsightConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        _report(self._problems(), info)
        return self

    def _problems(self) -> Iterator[ConfigError]:
        if self.train.mode == "warm_start":
            yield from _missing("train.demonstrations", self.train.demonstrations, "warm_start learns from them")
            if self.evaluation.every:
                yield ConfigError("evaluation.every", "set, and a warm start does not evaluate", "set it to 0")
        else:
            yield from _missing("data.train", self.data.train, "train.mode=rl samples from it")
            yield from _missing("retrieval", self.retrieval, "train.mode=rl searches")
            yield from _rollout_problems(self)
            yield from _block_problems(self)
        if self.evaluation.every:
            yield from _missing("data.heldout", self.data.heldout, "evaluation.every is set")
            if self.train.mode == "warm_start":
                yield from _missing("retrieval", self.retrieval, "evaluation searches")
        yield from _optimizer_problems(self)

    def check_files(self) -> None:
        """Every path that will be read, and every program that will be started, exists.

        Raises:
            ConfigError: naming the first field whose path does not.
        """
        raise_first(self.file_problems())

    def file_problems(self) -> Iterator[ConfigError]:
        """What ``check_files`` raises the first of."""
        for field, folder in self._model_folders().items():
            if not (folder / "config.json").is_file():
                yield no_model(field, folder)
        paths: dict[str, Path | None] = {}
        if self.train.mode == "warm_start":
            paths["train.demonstrations"] = self.train.demonstrations
        else:
            paths["data.train"] = self.data.train
        paths["data.heldout"] = self.data.heldout
        if self.retrieval is not None:
            paths |= self.retrieval.files()
        if self.model.megatron_dir is not None:
            yield from _megatron_problems(self.model.megatron_dir)
        for field, path in paths.items():
            if path is not None and not path.exists():
                yield ConfigError(field, f"{path} does not exist", "give a path that exists")
        if self.samples_from_sglang and not self.rollout.sglang.urls:
            yield from _command_problems(self.rollout.sglang)

    def _model_folders(self) -> dict[str, Path]:
        folders = {"model.hf_dir": self.model.hf_dir}
        if self.retrieval is not None and self.retrieval.engine == "elasticsearch":
            elastic = self.retrieval.elasticsearch
            if elastic.encoder is not None and elastic.mode != "bm25":
                folders["retrieval.elasticsearch.encoder"] = elastic.encoder
        return folders

    def check_world(self, world_size: int, has_gpu: bool) -> None:
        """The layout fits the processes that were started and the hardware.

        Raises:
            ConfigError: naming the size that does not fit.
        """
        raise_first(self.world_problems(world_size, has_gpu))

    def world_problems(self, world_size: int, has_gpu: bool) -> Iterator[ConfigError]:
        """What ``check_world`` raises the first of."""
        per_replica = self.parallel.tensor * self.parallel.pipeline
        if world_size % per_replica:
            yield ConfigError(
                "parallel.tensor",
                f"tensor {self.parallel.tensor} x pipeline {self.parallel.pipeline} = {per_replica} "
                f"does not divide the {world_size} started processes",
                f"start torchrun with --nproc-per-node a multiple of {per_replica}, or change parallel.*",
            )
        yield from _model_problems(self.model, has_gpu)
        if self.parallel.distributed_optimizer and not has_gpu:
            yield ConfigError(
                "parallel.distributed_optimizer",
                "true without a GPU, where its checkpoints would be wrong (megatron-core with torch's AdamW)",
                "set it to false",
            )
        if self.samples_from_sglang and not has_gpu:
            yield from _problems_without_gpu(self.rollout.sglang)

    def saving_problem(self) -> ConfigError | None:
        """What `check` and `train` warn of: a run that dies would leave no checkpoint, however far it came."""
        checkpoint, num_steps = self.checkpoint, self.train.num_steps
        if checkpoint.every_minutes > 0 or 0 < checkpoint.every < num_steps:
            return None
        return ConfigError(
            "checkpoint.every_minutes",
            f"0, and checkpoint.every is {checkpoint.every}: nothing is saved before the end of {num_steps} steps, "
            "unless a signal asks",
            f"set checkpoint.every_minutes={default_of('checkpoint.every_minutes'):g}: a run that dies begins anew",
        )

    @property
    def samples_from_sglang(self) -> bool:
        """``rollout.sglang`` is read at all."""
        return self.train.mode == "rl" and self.rollout.engine == "sglang"

    @property
    def num_own_server_gpus(self) -> int:
        """GPUs of the first rank's node that its own SGLang servers take from the trainer."""
        sglang = self.rollout.sglang
        is_taken = self.samples_from_sglang and not sglang.urls and not sglang.colocated
        return sglang.num_servers * sglang.tensor if is_taken else 0

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates that every step takes, and that the learning-rate schedule counts for it."""
        if self.train.mode == "warm_start":
            return 1
        trajectories = self.data.questions_per_step * self.rollout.group_size
        return math.ceil(trajectories / (self.train.trajectories_per_minibatch or trajectories))

    @property
    def num_updates(self) -> int:
        """Optimizer updates of the whole run, for the learning-rate schedule."""
        return self.train.num_steps * self.updates_per_step

    @property
    def is_distilling(self) -> bool:
        """Some step has a distillation loss; a run that ends within the warm-up of alpha is GRPO alone."""
        first = self.objective.first_distilling_step
        return self.train.mode == "rl" and first is not None and first < self.train.num_steps

    @property
    def longest_sequence(self) -> SequenceLimit:
        """Of those that the trainer reads: a trajectory, and where the run distils the block in front of it."""
        trajectory, block = self.rollout.max_total_tokens, self.hindsight.max_block_tokens
        if not self.is_distilling:
            return SequenceLimit(trajectory, "rollout.max_total_tokens")
        return SequenceLimit(trajectory + block, "rollout.max_total_tokens + hindsight.max_block_tokens")

    @property
    def longest_rollout(self) -> SequenceLimit:
        """Of those that the rollout engine reads: only the query probe shows it a block."""
        if self.telemetry.query_probe:
            return self.longest_sequence
        return SequenceLimit(self.rollout.max_total_tokens, "rollout.max_total_tokens")


def _missing(field: str, value: object, reason: str) -> Iterator[ConfigError]:
    if value is None:
        yield ConfigError(field, f"missing, and {reason}", f"set {field}")


_LOCAL_FOLDERS = ("models/", "model/", "checkpoints/", "runs/", "data/")
_HUB_ID = re.compile(r"(?:https:/+huggingface\.co/)?([\w-][\w.-]*/([\w-][\w.-]*))")


def no_model(field: str, folder: Path) -> ConfigError:
    """What to say of a folder without config.json; of what may be the name of a model on the hub: how to fetch it."""
    fix = "give a Hugging Face model folder"
    hub_id = None if folder.parent.exists() else _HUB_ID.fullmatch(str(folder))
    if hub_id is not None:
        name, target = hub_id[1], f"models/{hub_id[2]}"
        if name.startswith(_LOCAL_FOLDERS):  # where it is to lie; who published it, nothing says
            name, target = f"ORGANISATION/{hub_id[2]}", name
        fix += (
            f"; a model of the hub is fetched by `hf download {name} --local-dir {target}`, then set {field}={target}"
        )
    return ConfigError(field, f"{folder} holds no config.json", fix)


def _megatron_problems(folder: Path) -> Iterator[ConfigError]:
    if (folder / ".metadata").exists():
        return
    pointers = (path for path in (folder / "latest", folder / "checkpoints" / "latest") if path.is_file())
    if (pointer := next(pointers, None)) is not None:
        step = pointer.parent / pointer.read_text().strip()
        yield ConfigError(
            "model.megatron_dir", f"{folder} holds several checkpoints", f"give one of them, such as {step}"
        )
    else:
        yield ConfigError(
            "model.megatron_dir",
            f"{folder} holds no checkpoint of megatron",
            "give a folder that does; checkpoint.keep_last of the run that wrote it may have removed it: copy a step "
            "out of its checkpoints before another run begins from it",
        )


def is_server_url(url: str) -> bool:
    """Whether it is ``http://host:port``, or https, or without a port."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False


def _url_problems(urls: Sequence[str]) -> Iterator[ConfigError]:
    field = "rollout.sglang.urls"
    for url in dict.fromkeys(urls):
        if not is_server_url(url):
            yield ConfigError(field, f"{shown_url(url)!r} is not the url of a server", "write it as http://host:port")
        if urls.count(url) > 1:
            yield ConfigError(field, f"{url} stands there {urls.count(url)} times", "name each server once")


def _command_problems(sglang: SGLangConfig) -> Iterator[ConfigError]:
    field = "rollout.sglang.command"
    if not sglang.command:
        yield ConfigError(field, "is empty", "give the program that starts a server, or rollout.sglang.urls")
        return
    # The server is started with this environment, and found by its PATH.
    program, path = sglang.command[0], sglang.plain_environment.get("PATH")
    if shutil.which(program, path=path) is None:
        yield ConfigError(
            f"{field}[0]",
            f"{program} is no program" + (f" in {path}" if path else " here"),
            "give a path that exists (on a CPU `make .sglang/.installed` makes one), or attach to rollout.sglang.urls",
        )


def _model_problems(model: ModelConfig, has_gpu: bool) -> Iterator[ConfigError]:
    if model.layer_spec == "transformer_engine" and not has_gpu:
        yield ConfigError("model.layer_spec", "transformer_engine without a GPU", "set it to auto")
    if has_gpu and model.layer_spec == "local":
        return
    wanted = "bfloat16" if has_gpu else "float32"
    if model.dtype != wanted:
        reason = "with transformer-engine, whose packed attention takes no float32" if has_gpu else "without a GPU"
        yield ConfigError("model.dtype", f"{model.dtype} {reason}", f"set model.dtype={wanted}")


def _problems_without_gpu(sglang: SGLangConfig) -> Iterator[ConfigError]:
    if sglang.colocated:
        yield ConfigError(
            "rollout.sglang.colocated", "true without a GPU, where there is no memory to share", "set it to false"
        )
    if sglang.tensor > 1 and not sglang.urls:
        yield ConfigError(
            "rollout.sglang.tensor", f"{sglang.tensor} GPUs of a server, and there is none", "set it to 1"
        )


def _rollout_problems(config: RunConfig) -> Iterator[ConfigError]:
    rollout = config.rollout
    if config.samples_from_sglang:
        yield from _url_problems(rollout.sglang.urls)
    if rollout.group_size < 2:
        yield ConfigError("rollout.group_size", f"{rollout.group_size} gives no advantage", "set it to at least 2")
    least = rollout.max_prompt_tokens + rollout.max_response_tokens
    if rollout.max_total_tokens < least:
        yield ConfigError(
            "rollout.max_total_tokens",
            f"{rollout.max_total_tokens} is less than max_prompt_tokens + max_response_tokens = {least}",
            f"set it to at least {least}",
        )
    longest = config.longest_sequence
    if config.train.max_tokens_per_microbatch < longest.num_tokens:
        yield ConfigError(
            "train.max_tokens_per_microbatch",
            f"{config.train.max_tokens_per_microbatch} cannot hold the longest sequence of {longest.settings} = "
            f"{longest.num_tokens}",
            f"set it to at least {longest.num_tokens}",
        )


def _block_problems(config: RunConfig) -> Iterator[ConfigError]:
    """A block of whole responses holds every sibling that it is meant to show.

    A response counts with what the budgets leave it behind a prompt of full length. One behind a shorter prompt may be
    longer; then the block loses a sibling, which is counted.
    """
    rollout, hindsight = config.rollout, config.hindsight
    if hindsight.content != "everything" or not config.is_distilling:
        return
    num_shown = {"own": 1, "others": rollout.group_size - 1}.get(hindsight.siblings, rollout.group_size)
    per_turn = rollout.max_response_tokens + rollout.max_observation_tokens
    response = min(
        rollout.max_total_tokens - rollout.max_prompt_tokens,
        rollout.max_turns * per_turn + rollout.max_response_tokens,
    )
    needed = num_shown * response
    if hindsight.max_block_tokens < needed:
        yield ConfigError(
            "hindsight.max_block_tokens",
            f"{hindsight.max_block_tokens} cannot hold what hindsight.content=everything shows: {num_shown} responses "
            f"of up to {response} tokens = {needed}",
            f"set it to at least {needed}, and train.max_tokens_per_microbatch to {rollout.max_total_tokens + needed}",
        )


def _optimizer_problems(config: RunConfig) -> Iterator[ConfigError]:
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield ConfigError("optimizer.min_lr", f"{optimizer.min_lr} is above optimizer.lr = {optimizer.lr}", "lower it")
    if optimizer.warmup_steps >= config.num_updates:
        yield ConfigError(
            "optimizer.warmup_steps",
            f"{optimizer.warmup_steps} of the run's {config.num_updates} updates leaves none at optimizer.lr",
            "lower it",
        )


_SECRET_NAME = re.compile(r"password|passwd|secret|credential|api[-_]?key|_key\b|_token\b", re.IGNORECASE)
_MAY_HOLD_API_KEY = "rollout.sglang.arguments"
_SECRET_VALUE = re.compile(r"--[a-z-]*(api-key|token|password)\b|://[^/\s]*@", re.IGNORECASE)


def is_secret(name: str, value: object) -> bool:
    """Whether a setting may hold a secret, by its dotted name or by what its value looks like.

    True for ``rollout.sglang.environment.HF_TOKEN``, for arguments with ``--api-key``, for a URL with a user in it, and
    for what pydantic has masked.
    """
    return str(value) == str(SecretStr("x")) or bool(_SECRET_NAME.search(name) or _SECRET_VALUE.search(str(value)))


def shown_command(words: Sequence[str]) -> str:
    """A command line without the values of flags that hold secrets."""
    shown: list[str] = []
    for word in words:
        flag, equals, _ = word.partition("=")
        if shown and _SECRET_VALUE.fullmatch(shown[-1]):
            shown.append("***")
        else:
            shown.append(f"{flag}=***" if equals and _SECRET_VALUE.fullmatch(flag) else word)
    return " ".join(shown)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by dots; lists stay as they are."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def default_of(name: str) -> Any:
    """Of a setting, by its dotted name, as JSON has it; None of a name within a mapping, which is empty by default."""
    *outer, last = name.split(".")
    section = _section_at(outer)
    if section is None:
        return None
    default = section.model_fields[last].get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides, and check everything that needs no other file.

    Args:
        path: the YAML file; OmegaConf interpolation such as ``${run_dir}`` works.
        overrides: dotted, applied in order, values in YAML syntax.

    Raises:
        ConfigError: one message that names each wrong field and its mend.
    """
    return parse_config(read_tree(path, overrides))


def read_tree(path: Path, overrides: Sequence[str] = ()) -> Any:
    """The nested dict that a YAML file and its overrides come to, before anything in it is checked.

    Raises:
        ConfigError: there is no such file, it is no YAML, or an override is no ``key=value``.
    """
    try:
        path = Path(expand_home(str(path)))
    except ValueError as error:
        raise ConfigError("CONFIG", f"{path} does not exist", str(error)) from error
    if not path.is_file():
        told = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError("CONFIG", f"{path} {told}", "give the path of a YAML file")
    for number, override in enumerate(overrides, start=1):
        _read_override(override, number)
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, TypeError, ValueError) as error:
        # Without its cause, which would show values in a traceback.
        raise ConfigError(str(path), _yaml_problem(error), "mend the YAML or the override") from None


def _read_override(override: str, number: int) -> None:
    """Refuse what is no ``key=value``; shows it whole only where it can hold no secret.

    A shell makes two arguments of ``password= secret``: a word that is no setting is not shown either.
    """
    key = re.split(r"[\s:=]", override, maxsplit=1)[0]
    is_setting = key.split(".")[0] in RunConfig.model_fields
    if is_setting:
        shown = repr(override if override == key or not may_hold_secret(key.split(".")) else f"{key}...")
    else:
        shown = f"number {number}"
    if "=" not in override or override.startswith("="):
        raise ConfigError("override", f"{shown} is not key=value", "write e.g. objective.alpha=0, without spaces")
    try:
        OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:  # the last: a number of 5,000 digits
        problem = f"{shown} is no YAML: {_yaml_problem(error)}"
        raise ConfigError(override.partition("=")[0], problem, "quote or mend its value") from None


def _yaml_problem(error: Exception) -> str:
    """What is wrong with some YAML, in one line, without a value that may be a secret."""
    text = " ".join(str(error).split())
    key = str(getattr(error, "full_key", None) or "")
    if key and may_hold_secret(key.split(".")) and "Environment variable" not in text:
        return f"{key}: ${{...}} in its value cannot be resolved (a dollar sign is written as \\$)"
    return shown_url(re.sub(r"\b(tag|alias) '[^']*'", r"\1", text))


def parse_config(tree: Any) -> RunConfig:
    """Validate a plain nested dict.

    Raises:
        ConfigError: see ``load_config``.
    """
    check_is_mapping(tree)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise _as_one_error(field_errors(error)) from None  # its text has no values, its ``errors()`` have


def check_is_mapping(tree: Any) -> None:
    """Refuse YAML that is a list or a bare value.

    Raises:
        ConfigError: it is.
    """
    if not isinstance(tree, dict):
        raise ConfigError("CONFIG", "is not a mapping of sections", "start from examples/tiny/config.yaml")


def field_errors(error: ValidationError) -> list[ConfigError]:
    """One for each field that pydantic refuses; shows no value that may be a secret."""
    return [ConfigError(*_describe(dict(item))) for item in error.errors(include_url=False)]


def _as_one_error(errors: Sequence[ConfigError]) -> ConfigError:
    first = errors[0]
    return ConfigError(first.field, first.problem, first.mend + "".join(f"\n{error}" for error in errors[1:]))


def _describe(item: dict[str, Any]) -> tuple[str, str, str]:
    path = [str(part) for part in item["loc"]]
    field, value = ".".join(path), item["input"]
    if item["type"] == "extra_forbidden":
        return _describe_unknown_key(path)
    if item["type"] == "missing":
        return field, "missing", f"set {field}"
    if item["type"] in ("greater_than_equal", "less_than_equal") and (limits := _limits(path)):
        return field, f"{value!r} is out of range", f"give a number from {limits[0]} to {limits[1]}"
    if not may_hold_secret(path):
        return field, f"{shown_url(repr(value))} is not valid", item["msg"].removeprefix("Value error, ")
    fix = "write it in quotes" if isinstance(value, int | float) else item["msg"].removeprefix("Value error, ")
    return field, f"{_kind(value)} is not valid (not shown: it may hold a secret)", fix


def _describe_unknown_key(path: Sequence[str]) -> tuple[str, str, str]:
    section = _section_at(path[:-1])
    known = list(section.model_fields) if section is not None else []
    name, colon, _ = path[-1].partition(":")
    if colon:  # what follows is a value, which may be a secret
        return ".".join([*path[:-1], name]), "unknown key", f"write a space after the colon: {name}: ..."
    near = difflib.get_close_matches(name, known, n=1)
    return ".".join(path), "unknown key", f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"


def _kind(value: object) -> str:
    kinds = {int: "a number", float: "a number", str: "a text", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), "this")


def may_hold_secret(path: Sequence[str]) -> bool:
    """Whether what stands at this path is, or holds, a secret; of an unknown name, whether its section does."""
    if ".".join(path[:3]) == _MAY_HOLD_API_KEY:
        return True
    annotation: Any = RunConfig
    for part in path:
        fields = _sections_of(annotation)
        if not fields or part not in fields[0].model_fields:
            break
        annotation = fields[0].model_fields[part].annotation
    return _has_secret(annotation)


def _has_secret(annotation: Any) -> bool:
    if annotation is SecretStr:
        return True
    sections = _sections_of(annotation)
    inner = [field.annotation for section in sections for field in section.model_fields.values()]
    return any(_has_secret(each) for each in (inner or get_args(annotation)))


def _limits(path: Sequence[str]) -> tuple[float, float] | None:
    """The least and the largest value of a setting; None where one of them is not declared."""
    section = _section_at(path[:-1])
    if section is None:
        return None
    info = section.model_fields[path[-1]]
    optional = (f for option in get_args(info.annotation) for f in getattr(option, "__metadata__", ()))
    metadata = [*info.metadata, *(rule for field in optional for rule in getattr(field, "metadata", ()))]
    lows, highs = ([v for rule in metadata if (v := getattr(rule, name, None)) is not None] for name in ("ge", "le"))
    return (lows[0], highs[0]) if lows and highs else None


def _section_at(path: Sequence[str]) -> type[BaseModel] | None:
    """None where the path leads to a setting that is no section, such as a mapping."""
    section: type[BaseModel] = RunConfig
    for part in path:
        sections = _sections_of(section.model_fields[part].annotation)
        if not sections:
            return None
        section = sections[0]
    return section


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation names: one, or none."""
    return [t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)]

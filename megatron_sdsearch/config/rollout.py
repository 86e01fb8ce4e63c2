"""Section ``rollout``: sampling of trajectories, and the SGLang servers that may do it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr

from megatron_sdsearch.config.types import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
    ShellWord,
    UnitFloat,
    Url,
)


def _without_slash(url: str) -> str:
    # Servers are compared by their urls.
    return url.rstrip("/")


class SGLangConfig(Section):
    """SGLang servers: start or addresses, supervision, and transfer of weights."""

    urls: tuple[Annotated[Url, AfterValidator(_without_slash)], ...] = ()
    """Running servers to attach to, e.g. ``["http://10.0.0.7:30000"]``; empty starts ``num_servers`` of them."""
    num_servers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Servers that rank 0 starts on its node. ``serve`` instead starts one per ``tp_size`` GPUs of its node (on CPUs,
    this many)."""
    tp_size: PositiveInt = 1
    """Tensor-parallel GPUs of each server; also required for attached servers."""
    command: tuple[ShellWord, ...] = ("python3", "-m", "sglang.launch_server")
    """Command that starts a server; model, host, port and seed are appended. May be another environment's Python."""
    arguments: tuple[ShellWord, ...] = ()
    """Further flags of a started server, e.g. ``["--mem-fraction-static", "0.8"]``."""
    environment: dict[str, SecretStr] = Field(default={})
    """Variables added to a started server's environment; never shown, since they may hold tokens."""
    start_timeout_s: Seconds = 900.0
    """Time that a server may take to start, including compiling kernels."""
    request_timeout_s: Seconds = 600.0
    """Timeout of one generation, after which the server counts as hung."""
    down_timeout_s: Seconds = 300.0
    """The run stops when no server has been usable for this long."""
    max_restarts: NonNegativeInt = 3
    """Restarts of each started server before the run stops."""
    max_concurrency: PositiveInt = 256
    """Most open requests of one rank at one server."""
    weight_sync: Literal["disk", "tensor", "distributed"] = "disk"
    """``disk``: a safetensors folder in ``run_dir`` that every server can read. ``tensor``: through HTTP, in buckets.
    ``distributed``: a process group of trainer and servers (NCCL, gloo without GPUs)."""
    weight_bucket_mb: PositiveInt = 512
    """Size of a bucket of weights in MiB, for ``tensor`` and ``distributed``."""
    verify_every: NonNegativeInt = 1
    """Publishes between checks that the servers hold the trainer's exact weights; 0 never checks. A publish that needed
    a retry is always checked."""
    colocated: bool = False
    """Run the servers on the trainer's GPUs; they release their memory while it trains. Needs GPUs."""

    @property
    def plain_environment(self) -> dict[str, str]:
        """``environment`` with its values unmasked."""
        return {name: value.get_secret_value() for name, value in self.environment.items()}


class RolloutConfig(Section):
    """Sampling of trajectories; the lengths are AutoRefine's."""

    engine: Literal["embedded", "sglang"] = "embedded"
    """``embedded``: a copy of the policy in each rank's process. ``sglang``: servers, see ``rollout.sglang``."""
    sglang: SGLangConfig = SGLangConfig()
    group_size: PositiveInt = 5
    """Trajectories per question: the siblings of a group. The paper's value."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; losses divide logits by it, too. AutoRefine's value."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling. AutoRefine uses 0.95; 1.0 keeps the distributions of engine and trainer equal."""
    max_turns: NonNegativeInt = 5
    """Most searches per trajectory; one last generation without search follows."""
    max_prompt_tokens: PositiveInt = 2048
    """Longest prompt in tokens; questions with longer ones are left out of training, and wrong in evaluation."""
    max_response_tokens: PositiveInt = 512
    """Most tokens per generation."""
    max_observation_tokens: PositiveInt = 512
    """Most tokens per observation, closing tag included; longer ones are cut."""
    max_total_tokens: PositiveInt = 6656
    """Most tokens of a trajectory, prompt included."""
    eos_without_action: Literal["stop", "notice"] = "stop"
    """Treatment of a generation that ends with an end-of-sequence token and neither searches nor answers. ``stop`` ends
    the trajectory without an answer, since no chat model was trained to write after that token. ``notice`` keeps it,
    shows the invalid-action notice and uses another turn."""
    max_failed_search_share: UnitFloat = 0.2
    """Share of trajectories that a step or an evaluation may lose to failed searches or to the engine before the run
    fails. Lost ones are counted, and left out of training and of all averages."""
    max_refills: NonNegativeInt = 0
    """Times that a group without contrast (siblings all correct or all wrong) is replaced by another question's; the
    last one stays. Such a group tells the teacher nothing, and only a shaped reward gives it advantages (dynamic
    sampling: DAPO, arXiv 2503.14476, section 3.2)."""

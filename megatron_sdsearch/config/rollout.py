"""``rollout``: sampling of trajectories, and the SGLang servers that may do it."""

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
    """One server has one name."""
    return url.rstrip("/")


class SGLangConfig(Section):
    """SGLang servers: how they are started or reached, and how they get the policy's weights."""

    urls: tuple[Annotated[Url, AfterValidator(_without_slash)], ...] = ()
    """Running servers to attach to, e.g. ``["http://10.0.0.7:30000"]``; empty starts ``num_servers`` own ones."""
    num_servers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Started by rank 0 on its node. ``serve`` starts one for each ``tp_size`` GPUs of its node, on CPUs this many."""
    tp_size: PositiveInt = 1
    """Tensor-parallel GPUs of each server; also required for attached servers."""
    command: tuple[ShellWord, ...] = ("python3", "-m", "sglang.launch_server")
    """Starts a server; model, host, port and seed are appended. May be another environment's interpreter."""
    arguments: tuple[ShellWord, ...] = ()
    """Further flags of a started server, e.g. ``["--mem-fraction-static", "0.8"]``."""
    environment: dict[str, SecretStr] = Field(default={})
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
    max_refills: NonNegativeInt = 0
    """A group whose siblings are all right or all wrong (F1 > ``hindsight.rho``, of those that count in training) gives
    way to another question, at most so many times; the last one stays. It tells the teacher nothing, and has no
    advantage but what a shaped reward makes of it (dynamic sampling: DAPO, arXiv 2503.14476, section 3.2)."""

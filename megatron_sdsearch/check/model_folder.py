"""The model's folder: a supported architecture, whole weights, and a tokenizer in which actions can be written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import PretrainedConfig

from megatron_sdsearch.check.findings import Attempt, Finding
from megatron_sdsearch.check.subject import Subject
from megatron_sdsearch.errors import DataError
from megatron_sdsearch.model.hf_config import ARCHITECTURES, refusals
from megatron_sdsearch.model.hf_weights import SafetensorsFolder, check_head, check_weights, placements, refuse_unknown
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.tokenization.spans import parse_action

_FIELD = "model.hf_dir"
_QUERY = "capital of France 1998"


def check(subject: Subject) -> Iterator[Finding]:
    """config.json, weights, tokenizer; a folder that is not there is said of the configuration."""
    hf_dir = subject.config.model.hf_dir
    if not (hf_dir / "config.json").is_file():
        return
    if subject.hf_config.error is not None:
        yield Finding.of(subject.hf_config.error, _FIELD)
    hf_config = subject.hf_config.value
    if hf_config is not None:
        refused = [Finding.of(error, _FIELD) for error in refusals(hf_config)]
        yield from refused
        megatron_dir = subject.config.model.megatron_dir
        if not refused and megatron_dir is None:
            yield from _weights(subject, hf_dir, hf_config)
        elif not refused and megatron_dir is not None and (megatron_dir / ".metadata").exists():
            yield from _megatron_weights(megatron_dir, hf_config)
    yield from _tokenizer(subject, hf_config)


def _megatron_weights(folder: Path, hf_config: PretrainedConfig) -> Iterator[Finding]:
    from megatron_sdsearch.model.megatron_folder import MegatronFolder  # its reader costs a second

    attempt = Attempt.at(lambda: check_weights(MegatronFolder(folder, hf_config), hf_config, folder))
    if attempt.error is not None:
        yield Finding.error("model.megatron_dir", str(attempt.error), "give a checkpoint of the model in model.hf_dir")


def _weights(subject: Subject, hf_dir: Path, hf_config: PretrainedConfig) -> Iterator[Finding]:
    attempt = Attempt.at(lambda: _known_tensors(hf_dir, hf_config))
    if attempt.error is not None:
        yield Finding.error(_FIELD, str(attempt.error), "give a whole folder of a supported model with its safetensors")
    tensors = attempt.value
    if tensors is None:
        return
    head = Attempt.at(lambda: check_head(tensors, hf_config, hf_dir))
    if head.error is not None:
        yield Finding.of(head.error, _FIELD)
        return
    problems = _missing_tensors(tensors, hf_config)
    if problems:
        more = f", and {len(problems) - 1} more like it" if len(problems) > 1 else ""
        yield Finding.error(_FIELD, f"{problems[0]}{more}", "fetch the folder again, whole")
        return
    rows = tensors.shape("model.embed_tokens.weight")[0]
    if rows != hf_config.vocab_size:
        yield Finding.error(
            _FIELD,
            f"the embedding has {rows} rows, config.json says vocab_size = {hf_config.vocab_size}",
            "take config.json and weights from the same model",
        )
    dtype = tensors.dtype("model.embed_tokens.weight")
    yield Finding.note(
        _FIELD,
        f"{hf_config.model_type}, {subject.num_parameters:,} parameters in {dtype}, trained in "
        f"{subject.config.model.dtype}",
    )


def _known_tensors(hf_dir: Path, hf_config: PretrainedConfig) -> SafetensorsFolder:
    tensors = SafetensorsFolder(hf_dir)
    refuse_unknown(tensors.names(), hf_config, hf_dir)
    return tensors


def _missing_tensors(tensors: SafetensorsFolder, hf_config: PretrainedConfig) -> list[str]:
    """Each tensor that the table of weights wants is there; a file's header also tells whether all of it is."""
    problems: dict[str, None] = {}  # a missing file is missing once
    for place in placements(hf_config, pp_size=1):
        for name in place.hf:
            try:
                tensors.place_of(name)
            except DataError as error:
                problems[str(error)] = None
    return list(problems)


def _tokenizer(subject: Subject, hf_config: PretrainedConfig | None) -> Iterator[Finding]:
    if subject.renderer.error is not None:
        yield Finding.of(subject.renderer.error, _FIELD)
    renderer = subject.renderer.value
    if renderer is None:
        return
    yield from _tags(renderer)
    if hf_config is not None:
        yield from _ids(renderer, hf_config)
    in_front = len(renderer.prompt_ids(""))
    raw = f"raw text behind {in_front} token(s) of the tokenizer's own" if in_front else "raw text"
    how = "one user message of its chat template" if renderer.has_template else f"{raw}: it has no chat template"
    profile = subject.config.data.prompt_profile
    yield Finding.note(_FIELD, f"the tokenizer has {renderer.vocab_size:,} ids; prompts ({profile}) are {how}")


def _tags(renderer: Renderer) -> Iterator[Finding]:
    """A search survives the way to ids and back, and its query has tokens of its own to distil at."""
    ids = renderer.encode_own(f"<think> who? </think>\n<search> {_QUERY} </search>")
    action = parse_action(renderer.token_bytes.lookup(ids))
    if action.argument != _QUERY:
        yield Finding.error(
            _FIELD,
            f"the tokenizer turns a search for {_QUERY!r} into one for {action.argument!r}: it loses text",
            "use a byte-level tokenizer that keeps every character",
        )
    elif not action.query_positions:
        yield Finding.warning(
            _FIELD,
            f"every token of <search> {_QUERY} </search> shares characters with a tag: there is nothing to distil at",
            "add the tags to the tokenizer as ordinary (not special) tokens",
        )
    tags = ("<search>", "</search>", "<answer>", "</answer>")
    lengths = ", ".join(f"{tag} {len(renderer.encode_own(tag))}" for tag in tags)
    yield Finding.note(_FIELD, f"tokens of the tags by themselves: {lengths}")


def _ids(renderer: Renderer, hf_config: PretrainedConfig) -> Iterator[Finding]:
    if renderer.vocab_size > hf_config.vocab_size:
        yield Finding.error(
            _FIELD,
            f"the tokenizer has {renderer.vocab_size} ids, the model's embedding {hf_config.vocab_size} rows",
            "use the tokenizer that the model was trained with, or enlarge the embedding",
        )
    if hf_config.model_type not in ARCHITECTURES:
        return
    told = hf_config.eos_token_id
    eos_ids = set(told) if isinstance(told, list) else {told} - {None}
    if not renderer.eos_ids:
        yield Finding.warning(
            _FIELD, "no end-of-sequence token is known: only tags and budgets end a generation", "set eos_token"
        )
    elif lost := eos_ids - renderer.eos_ids:
        yield Finding.warning(
            _FIELD,
            f"config.json ends sequences with {sorted(lost)}, the tokenizer with {sorted(renderer.eos_ids)}: the "
            "former would be sampled on over",
            "list all of them as eos_token_id in generation_config.json",
        )

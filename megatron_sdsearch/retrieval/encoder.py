"""Text encoders for dense search: their protocol, and the encoding settings of a Hugging Face folder.

A folder with sentence-transformers' ``modules.json`` defines its settings; one without is treated as E5. Settings that
are not supported (other poolings, additional layers) are refused, because ignoring them would give different vectors
than the model was trained for. This module loads no model, so that ``check`` can use it; ``folder_encoder.py`` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_sdsearch.errors import ConfigError

Vectors = NDArray[np.float32]
Similarity = Literal["cosine", "dot"]

E5_QUERY, E5_PASSAGE = "query: ", "passage: "
"""arXiv 2212.03533, section 3."""
E5_MAX_TOKENS = 256
"""Maximum length of a query or passage, with prompt and special tokens (Search-R1's retriever)."""

_MODULES, _PROMPTS, _TRANSFORMER = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
_QUERY_NAMES, _PASSAGE_NAMES = ("query",), ("document", "passage", "corpus")
# Flags of older files; newer ones have pooling_mode.
_POOLING_FLAGS = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
# Unsupported settings that change vectors, with the values that have no effect.
_NEUTRAL: dict[str, dict[str, Any]] = {
    _TRANSFORMER: {"transformer_task": "feature-extraction", "processing_kwargs": {}}
    | dict.fromkeys(("query_length", "document_length", "query_expansion")),
    "Normalize's config.json": dict.fromkeys(("module_input_name", "module_output_name"), "sentence_embedding"),
    _PROMPTS: {"truncate_dim": None, "suffix": ""},
}


class TextEncoder(Protocol):
    """Encodes queries and passages as vectors. Called from one thread at a time, not always the same.

    Attributes:
        num_dims: length of a vector.
        fingerprint: identifies weights and settings; equal fingerprints give equal vectors.
        has_own_settings: the folder configures pooling and prompts.
        similarity: how vectors are compared; ``dot`` if their lengths matter.
    """

    num_dims: int
    fingerprint: str
    has_own_settings: bool
    similarity: Similarity

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """[len(texts), num_dims]."""
        ...

    def encode_passages(self, texts: Sequence[str]) -> Vectors:
        """[len(texts), num_dims]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSettings:
    """Settings that turn a text into a vector.

    Attributes:
        model_dir: holds weights and tokenizer.
        pooling: of the last layer: the first token's vector, or the mean over all tokens.
        is_normalized: vectors are scaled to length 1.
        query_prompt: prefix of queries.
        passage_prompt: prefix of passages.
        max_tokens: longer texts are cut, with prompt and special tokens; None: the limit of tokenizer and model.
        is_lower_cased: texts are lower-cased before tokenization.
        similarity: how vectors are compared.
        has_modules: the folder has module files that define these settings; its texts are stripped with their prompts.
        are_prompts_known: the folder defines the prompts, or has E5 in its name; otherwise they are a guess.
    """

    model_dir: Path
    pooling: Literal["cls", "mean"] = "mean"
    is_normalized: bool = True
    query_prompt: str = E5_QUERY
    passage_prompt: str = E5_PASSAGE
    max_tokens: int | None = E5_MAX_TOKENS
    is_lower_cased: bool = False
    similarity: Similarity = "cosine"
    has_modules: bool = False
    are_prompts_known: bool = True

    @property
    def identity(self) -> str:
        """Everything that vectors depend on besides the weights; empty for a folder without module files."""
        if not self.has_modules:
            return ""
        parts = [self.pooling, self.is_normalized, self.query_prompt, self.passage_prompt, self.max_tokens]
        return json.dumps([*parts, self.is_lower_cased, True])  # True: stripped

    def __str__(self) -> str:
        """Return pooling and prompts, for a log line."""
        prompts = f"prompts {self.query_prompt!r} and {self.passage_prompt!r}"
        return f"{self.pooling} pooling, {'' if self.is_normalized else 'not '}normalised, {prompts}"


def read_encoder_settings(folder: Path, field: str) -> EncoderSettings:
    """Read a folder's module files.

    Args:
        folder: of a Hugging Face model, with or without ``modules.json``.
        field: setting of the folder, for errors.

    Raises:
        ConfigError: for ``field``: there is no model, a file is not JSON, or a setting is not supported.
    """
    if not (folder / _MODULES).is_file():
        _require_model(folder, field)
        return EncoderSettings(model_dir=folder)
    files = _ModuleFiles(folder, field)
    found = files.read(folder / _MODULES, list)
    if not all(isinstance(module, dict) and "type" in module for module in found):
        raise files.broken(folder / _MODULES, "no list of modules with a type")
    # The library has moved these classes between packages.
    names = [str(module["type"]).rpartition(".")[2] for module in found]
    folders = [folder / str(module.get("path") or "") for module in found]
    if names[:2] != ["Transformer", "Pooling"] or names[2:] not in ([], ["Normalize"]):
        raise files.unsupported(_MODULES, f"lists {', '.join(names) or 'no modules'}")
    model_dir, is_normalized = folders[0], names[2:] == ["Normalize"]
    _require_model(model_dir, field)
    transformers = sorted(model_dir.glob("sentence_*_config.json"))
    transformer = files.read(transformers[0]) if transformers else {}
    model = files.read(folder / _PROMPTS)
    files.check_neutral(transformer, _TRANSFORMER)
    files.check_neutral(model, _PROMPTS)
    if is_normalized:
        files.check_neutral(files.read(folders[2] / "config.json"), "Normalize's config.json")
    max_tokens = transformer.get("max_seq_length")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise files.unsupported(_TRANSFORMER, f"sets max_seq_length to {max_tokens!r}")
    pooling = files.read_pooling(folders[1] / "config.json")
    query, passage, are_known = files.choose_prompts(model, is_e5=pooling == "mean" and is_normalized)
    return EncoderSettings(
        model_dir=model_dir,
        pooling=pooling,
        is_normalized=is_normalized,
        query_prompt=query,
        passage_prompt=passage,
        max_tokens=max_tokens,
        is_lower_cased=bool(transformer.get("do_lower_case")),
        similarity=files.choose_similarity(model, is_normalized=is_normalized),
        has_modules=True,
        are_prompts_known=are_known,
    )


def _require_model(folder: Path, field: str) -> None:
    if not (folder / "config.json").is_file():
        raise ConfigError(field, f"{folder} does not contain a model", "give a Hugging Face folder")


@dataclass(frozen=True, slots=True)
class _ModuleFiles:
    """Reads a folder's JSON files; errors name the file."""

    folder: Path
    field: str

    def unsupported(self, file: str, problem: str) -> ConfigError:
        supported = "Transformer, Pooling (cls or mean) and Normalize are supported, on one model"
        return ConfigError(self.field, f"{self.folder / file} {problem}", f"give another encoder: {supported}")

    def broken(self, path: Path, found: str) -> ConfigError:
        return ConfigError(self.field, f"{path} holds {found}", "download the encoder's folder again")

    def read(self, path: Path, expected: type = dict) -> Any:
        """Read a JSON file of the expected type; a missing file is an empty object."""
        try:
            found = json.loads(path.read_bytes()) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise self.broken(path, f"no JSON ({error})") from error
        if not isinstance(found, expected):
            raise self.broken(path, "no object" if expected is dict else "no list of modules with a type")
        return found

    def check_neutral(self, found: Mapping[str, Any], file: str) -> None:
        for name, value in _NEUTRAL[file].items():
            if found.get(name) not in (None, value):
                raise self.unsupported(file, f"sets {name} to {found[name]!r}")

    def read_pooling(self, path: Path) -> Literal["cls", "mean"]:
        found = self.read(path)
        flags = [flag for flag in _POOLING_FLAGS if found.get(f"pooling_mode_{flag}")]
        given = found.get("pooling_mode") or [re.sub("_tokens?$", "", flag) for flag in flags] or "mean"
        modes = [given] if isinstance(given, str) else list(given)
        file = str(path.relative_to(self.folder))
        if modes not in (["cls"], ["mean"]):
            raise self.unsupported(file, f"sets pooling {' + '.join(map(str, modes))}")
        if found.get("include_prompt") is False:
            raise self.unsupported(file, "excludes the prompt from pooling (include_prompt)")
        return "cls" if modes == ["cls"] else "mean"

    def choose_prompts(self, model: Mapping[str, Any], *, is_e5: bool) -> tuple[str, str, bool]:
        """Return the prompts of queries and passages, and whether they are known."""
        prompts = model.get("prompts") or {}
        if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
            raise self.broken(self.folder / _PROMPTS, "prompts that are not strings")
        if not prompts:  # E5 folders document their prompts only on the model card
            return (E5_QUERY, E5_PASSAGE, "e5" in self.folder.name.lower()) if is_e5 else ("", "", True)
        default = model.get("default_prompt_name")
        if not {*_QUERY_NAMES, *_PASSAGE_NAMES, default} & prompts.keys():
            names = ", ".join(sorted(prompts))
            fix = f"name them query and document in {self.folder / _PROMPTS}"
            raise ConfigError(self.field, f"its prompts are {names}: none is for queries or passages", fix)
        of_default = prompts.get(default, "")
        query = next((prompts[name] for name in _QUERY_NAMES if name in prompts), of_default)
        return query, next((prompts[name] for name in _PASSAGE_NAMES if name in prompts), of_default), True

    def choose_similarity(self, model: Mapping[str, Any], *, is_normalized: bool) -> Similarity:
        name = model.get("similarity_fn_name") or "cosine"
        # Unit vectors rank identically by all three.
        if name == "cosine" or (is_normalized and name in ("euclidean", "dot", "dot_product")):
            return "cosine"
        if name in ("dot", "dot_product"):
            return "dot"
        raise self.unsupported(_PROMPTS, f"compares vectors by {name!r}" + ("" if is_normalized else ", unnormalised"))

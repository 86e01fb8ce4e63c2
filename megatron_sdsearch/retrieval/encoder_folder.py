"""How a folder wants its texts encoded: sentence-transformers' module files, or none, which makes it an E5 model.

Owns the reading of ``modules.json`` and of what it names; loads no model, so that a check can look as well. A folder
may ask for more than is done here (other poolings, layers on top): that is refused, since ignoring it gives other
vectors than those that the model was trained for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_sdsearch.errors import ConfigError

Similarity = Literal["cosine", "dot"]

E5_QUERY, E5_PASSAGE = "query: ", "passage: "
"""arXiv 2212.03533, section 3."""
E5_MAX_TOKENS = 256
"""Of a query or a passage, prompt and special tokens included (Search-R1's retriever)."""

_MODULES = "modules.json"
_PROMPTS = "config_sentence_transformers.json"
_QUERY_NAMES, _PASSAGE_NAMES = ("query",), ("document", "passage", "corpus")
# The switches of older files; newer ones name the mode.
_POOLING_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Settings that change vectors and that nothing is done about here, with the values that change nothing.
_NEUTRAL_TRANSFORMER: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "processing_kwargs": {},
    "query_length": None,
    "document_length": None,
    "query_expansion": None,
}
_NEUTRAL_NORMALIZE = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
_NEUTRAL_MODEL: dict[str, Any] = {"truncate_dim": None, "suffix": ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSettings:
    """From a text to its vector.

    Attributes:
        model_dir: with weights and tokenizer.
        pooling: of the last layer's vectors: the first token's, or the mean over all tokens.
        is_normalized: vectors are divided by their length.
        query_prompt: stands before a query.
        passage_prompt: stands before a passage.
        max_tokens: longer texts are cut, prompt and special tokens included; None: at what tokenizer and model take.
        is_lower_cased: texts are, before the tokenizer sees them.
        is_stripped: of white space at both ends, with their prompts.
        similarity: by which vectors are to be compared.
        has_modules: the folder says all this itself.
        are_prompts_known: the folder names the prompts, or is one of E5 by its name; else they are a guess.
    """

    model_dir: Path
    pooling: Literal["cls", "mean"] = "mean"
    is_normalized: bool = True
    query_prompt: str = E5_QUERY
    passage_prompt: str = E5_PASSAGE
    max_tokens: int | None = E5_MAX_TOKENS
    is_lower_cased: bool = False
    is_stripped: bool = False
    similarity: Similarity = "cosine"
    has_modules: bool = False
    are_prompts_known: bool = True

    @property
    def identity(self) -> str:
        """What vectors depend on beside the folder's weights; empty for a folder without module files."""
        if not self.has_modules:
            return ""
        parts = [self.pooling, self.is_normalized, self.query_prompt, self.passage_prompt, self.max_tokens]
        return json.dumps([*parts, self.is_lower_cased, self.is_stripped])

    def __str__(self) -> str:
        """For a line of a log."""
        prompts = f"prompts {self.query_prompt!r} and {self.passage_prompt!r}"
        return f"{self.pooling} pooling, {'' if self.is_normalized else 'not '}normalised, {prompts}"


def read_encoder_settings(folder: Path, field: str) -> EncoderSettings:
    """Read a folder's module files.

    Args:
        folder: of a Hugging Face model, with or without ``modules.json``.
        field: the setting that names it, for errors.

    Raises:
        ConfigError: of ``field``: there is no model, a file is no JSON, or it asks for something that is not supported.
    """
    files = _Files(folder, field)
    if not (folder / _MODULES).is_file():
        files.require_model(folder)
        return EncoderSettings(model_dir=folder)
    modules = files.modules()
    names = [name for name, _ in modules]
    if names[:2] != ["Transformer", "Pooling"] or names[2:] not in ([], ["Normalize"]):
        raise files.unsupported(_MODULES, f"asks for {', '.join(names) or 'nothing'}")
    model_dir = modules[0][1]
    files.require_model(model_dir)
    transformer = files.first(sorted(model_dir.glob("sentence_*_config.json")))
    files.check_neutral(transformer, _NEUTRAL_TRANSFORMER, "sentence_bert_config.json")
    is_normalized = names[2:] == ["Normalize"]
    if is_normalized:
        files.check_neutral(files.read(modules[2][1] / "config.json"), _NEUTRAL_NORMALIZE, "Normalize's config.json")
    model = files.read(folder / _PROMPTS)
    files.check_neutral(model, _NEUTRAL_MODEL, _PROMPTS)
    pooling = files.pooling(modules[1][1])
    query, passage, are_known = files.prompts(model, is_e5=pooling == "mean" and is_normalized)
    return EncoderSettings(
        model_dir=model_dir,
        pooling=pooling,
        is_normalized=is_normalized,
        query_prompt=query,
        passage_prompt=passage,
        max_tokens=files.max_tokens(transformer),
        is_lower_cased=bool(transformer.get("do_lower_case")),
        is_stripped=True,
        similarity=files.similarity(model, is_normalized=is_normalized),
        has_modules=True,
        are_prompts_known=are_known,
    )


class _Files:
    """A folder's JSON files, and the errors that name them."""

    def __init__(self, folder: Path, field: str) -> None:
        self._folder = folder
        self._field = field

    def unsupported(self, file: str, problem: str) -> ConfigError:
        supported = "Transformer, Pooling (cls or mean) and Normalize are supported, on one model"
        return ConfigError(self._field, f"{self._folder / file} {problem}", f"give another encoder: {supported}")

    def require_model(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise ConfigError(self._field, f"{folder} holds no model", "give a Hugging Face folder")

    def read(self, path: Path) -> dict[str, Any]:
        """An object; empty where there is no such file."""
        found = self._json(path) if path.is_file() else {}
        if not isinstance(found, dict):
            raise self._broken(path, "no object")
        return found

    def first(self, paths: list[Path]) -> dict[str, Any]:
        return self.read(paths[0]) if paths else {}

    def modules(self) -> list[tuple[str, Path]]:
        """Kind and folder of each, in order."""
        path = self._folder / _MODULES
        found = self._json(path)
        if not isinstance(found, list) or not all(isinstance(m, dict) and "type" in m for m in found):
            raise self._broken(path, "no list of modules with a type")
        # The same class has stood in several packages of the library over time.
        return [(str(m["type"]).rpartition(".")[2], self._folder / str(m.get("path") or "")) for m in found]

    def check_neutral(self, found: dict[str, Any], neutral: dict[str, Any], file: str) -> None:
        for name, value in neutral.items():
            if found.get(name) not in (None, value):
                raise self.unsupported(file, f"sets {name} to {found[name]!r}")

    def pooling(self, folder: Path) -> Literal["cls", "mean"]:
        found = self.read(folder / "config.json")
        given = found.get("pooling_mode") or [m for key, m in _POOLING_SWITCHES.items() if found.get(key)] or "mean"
        modes = [given] if isinstance(given, str) else list(given)
        file = str((folder / "config.json").relative_to(self._folder))
        if modes not in (["cls"], ["mean"]):
            raise self.unsupported(file, f"asks for pooling {' + '.join(map(str, modes))}")
        if found.get("include_prompt") is False:
            raise self.unsupported(file, "leaves the prompt out of the pooling (include_prompt)")
        return "cls" if modes == ["cls"] else "mean"

    def prompts(self, model: dict[str, Any], *, is_e5: bool) -> tuple[str, str, bool]:
        """Of queries and passages, and whether they are known."""
        prompts = model.get("prompts") or {}
        if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
            raise self._broken(self._folder / _PROMPTS, "prompts that are no texts")
        if not prompts:  # E5's own folders leave them to the reader of their page
            return (E5_QUERY, E5_PASSAGE, "e5" in self._folder.name.lower()) if is_e5 else ("", "", True)
        default = model.get("default_prompt_name")
        if not {*_QUERY_NAMES, *_PASSAGE_NAMES, default} & prompts.keys():
            names = ", ".join(sorted(prompts))
            fix = f"name them query and document in {self._folder / _PROMPTS}"
            raise ConfigError(self._field, f"its prompts are {names}: none is for queries or passages", fix)
        of_default = prompts.get(default, "")
        query = next((prompts[name] for name in _QUERY_NAMES if name in prompts), of_default)
        return query, next((prompts[name] for name in _PASSAGE_NAMES if name in prompts), of_default), True

    def max_tokens(self, transformer: dict[str, Any]) -> int | None:
        limit = transformer.get("max_seq_length")
        if limit is not None and (type(limit) is not int or limit < 1):
            raise self.unsupported("sentence_bert_config.json", f"sets max_seq_length to {limit!r}")
        return limit

    def similarity(self, model: dict[str, Any], *, is_normalized: bool) -> Similarity:
        name = model.get("similarity_fn_name") or "cosine"
        # Vectors of length 1 rank in the same way by all three.
        if name in ("cosine", "euclidean") and (is_normalized or name == "cosine"):
            return "cosine"
        if name in ("dot", "dot_product"):
            return "cosine" if is_normalized else "dot"
        raise self.unsupported(_PROMPTS, f"compares vectors by {name!r}" + ("" if is_normalized else ", unnormalised"))

    def _json(self, path: Path) -> Any:
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise self._broken(path, f"no JSON ({error})") from error

    def _broken(self, path: Path, found: str) -> ConfigError:
        return ConfigError(self._field, f"{path} holds {found}", "fetch the encoder's folder again")

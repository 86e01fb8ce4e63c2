"""Vectors against the formula, one text at a time: of E5, and as a folder's own module files ask for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.retrieval.encoder import E5_MAX_TOKENS, read_encoder_settings
from megatron_sdsearch.retrieval.folder_encoder import FolderEncoder
from tests.unit.conftest import train_tokenizer

TEXTS = ["where is the book", "Lisbon", "the capital of Portugal is Lisbon, on the river " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e5")
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


def _by_formula(folder: Path, text: str) -> torch.Tensor:
    """No batch and no padding: the mean of the last layer, divided by its length."""
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:E5_MAX_TOKENS]
    with torch.no_grad():
        mean = AutoModel.from_pretrained(folder).eval()(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
    vector: torch.Tensor = mean / mean.norm()
    return vector


def test_vectors_follow_the_formula_whatever_shares_their_batch(folder: Path) -> None:
    encoder = FolderEncoder(folder)
    assert encoder.num_dims == 16
    for prefix, encode in (("query: ", encoder.encode_queries), ("passage: ", encoder.encode_passages)):
        expected = torch.stack([_by_formula(folder, prefix + text) for text in TEXTS]).numpy()
        np.testing.assert_allclose(encode(TEXTS), expected, atol=1e-5)
    many = encoder.encode_queries(TEXTS * 30)
    np.testing.assert_allclose(many[:3], many[-3:], atol=1e-5)
    assert encoder.encode_queries([]).shape == (0, 16)


def test_the_fingerprint_is_that_of_the_weights(folder: Path, tmp_path: Path) -> None:
    first = FolderEncoder(folder).fingerprint
    assert FolderEncoder(folder).fingerprint == first
    model = BertModel.from_pretrained(folder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert FolderEncoder(tmp_path).fingerprint != first


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"elasticsearch.encoder: .* does not contain a model"):
        FolderEncoder(tmp_path)


# Module files

TRANSFORMER: dict[str, Any] = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING: dict[str, Any] = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE: dict[str, Any] = {
    "idx": 2,
    "name": "2",
    "path": "2_Normalize",
    "type": "sentence_transformers.models.Normalize",
}
DENSE: dict[str, Any] = POOLING | {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
CLS = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
MEAN = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
PROMPTS = {"query": "Represent this: ", "passage": ""}


def with_modules(
    folder: Path,
    target: Path,
    modules: list[dict[str, Any]] | None = None,
    pooling: dict[str, Any] = CLS,
    prompts: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
) -> Path:
    """A copy of the folder with sentence-transformers' files: CLS pooling and normalisation where nothing is said."""
    shutil.copytree(folder, target)
    files: dict[str, Any] = {
        "modules.json": [TRANSFORMER, POOLING, NORMALIZE] if modules is None else modules,
        "1_Pooling/config.json": pooling,
        "config_sentence_transformers.json": {"prompts": PROMPTS} if prompts is None else prompts,
        "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False} | (transformer or {}),
    }
    for name, content in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(json.dumps(content))
    return target


def hidden_of(folder: Path, text: str, max_tokens: int) -> torch.Tensor:
    """[tokens, 16] of the last layer, of one text alone."""
    ids = AutoTokenizer.from_pretrained(folder)(text, truncation=True, max_length=max_tokens)["input_ids"]
    with torch.no_grad():
        hidden: torch.Tensor = AutoModel.from_pretrained(folder).eval()(torch.tensor([ids])).last_hidden_state[0]
    return hidden


def rows(vectors: list[torch.Tensor]) -> Any:
    return torch.stack(vectors).numpy()


def test_cls_pooling_prompts_and_length_are_the_folders_own(folder: Path, tmp_path: Path) -> None:
    encoder = FolderEncoder(with_modules(folder, tmp_path / "cls"))
    for prompt, encode in (("Represent this: ", encoder.encode_queries), ("", encoder.encode_passages)):
        first = [hidden_of(folder, prompt + text, 64)[0] for text in TEXTS]
        np.testing.assert_allclose(encode(TEXTS), rows([vector / vector.norm() for vector in first]), atol=1e-5)
    assert encoder.similarity == "cosine"


def test_of_a_tokenizer_that_pads_on_the_left_the_first_token_is_one_of_the_text(folder: Path, tmp_path: Path) -> None:
    target = with_modules(folder, tmp_path / "cls")
    settings = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    tokenizer = AutoTokenizer.from_pretrained(target)
    texts = ["Lisbon", "the capital of Portugal is Lisbon"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    num_pads = int((inputs["attention_mask"][0] == 0).sum())
    assert num_pads > 0
    with torch.no_grad():
        first = AutoModel.from_pretrained(target).eval()(**inputs).last_hidden_state[0, num_pads]
    found = FolderEncoder(target).encode_passages(texts)[0]
    np.testing.assert_allclose(found, (first / first.norm()).numpy(), atol=1e-5)


@pytest.mark.parametrize(("similarity", "field"), [(None, "cosine"), ("cosine", "cosine"), ("dot", "dot")])
def test_without_normalize_vectors_keep_their_length(
    folder: Path, tmp_path: Path, similarity: str | None, field: str
) -> None:
    prompts = {"prompts": PROMPTS, "similarity_fn_name": similarity}
    target = with_modules(folder, tmp_path / "raw", [TRANSFORMER, POOLING], MEAN, prompts)
    encoder = FolderEncoder(target)
    expected = rows([hidden_of(folder, text, 64).mean(dim=0) for text in TEXTS])
    np.testing.assert_allclose(encoder.encode_passages(TEXTS), expected, atol=1e-5)
    assert not np.allclose(np.linalg.norm(expected, axis=1), 1.0, atol=0.1)
    assert encoder.similarity == field


def test_texts_are_lower_cased_and_stripped_where_the_folder_says_so(folder: Path, tmp_path: Path) -> None:
    plain = FolderEncoder(with_modules(folder, tmp_path / "plain"))
    lower = FolderEncoder(with_modules(folder, tmp_path / "lower", transformer={"do_lower_case": True}))
    assert not np.allclose(plain.encode_passages(["LISBON"]), plain.encode_passages(["lisbon"]))
    np.testing.assert_array_equal(lower.encode_passages([" LISBON\n"]), plain.encode_passages(["lisbon"]))


def test_prompts_have_several_names_and_a_default(folder: Path, tmp_path: Path) -> None:
    def prompts_of(content: dict[str, Any], **changes: Any) -> tuple[str, str]:
        target = with_modules(folder, tmp_path / str(len(list(tmp_path.iterdir()))), prompts=content, **changes)
        settings = read_encoder_settings(target, "--encoder")
        return settings.query_prompt, settings.passage_prompt

    assert prompts_of({"prompts": {"query": "q", "document": "d", "passage": "p"}}) == ("q", "d")
    assert prompts_of({"prompts": {"query": "q", "corpus": "c"}}) == ("q", "c")
    assert prompts_of({"prompts": {"query": "q"}}) == ("q", "")
    assert prompts_of({"prompts": {"x": "y", "query": "q"}, "default_prompt_name": "x"}) == ("q", "y")
    assert prompts_of({"prompts": {"query": "", "document": ""}}, pooling=MEAN) == ("", "")
    assert prompts_of({"prompts": {}}) == ("", "")  # with CLS pooling it is none of E5
    assert prompts_of({}, pooling=MEAN) == ("query: ", "passage: ")
    with pytest.raises(
        ConfigError, match=r"its prompts are retrieval\.query: none is for queries.*name them query and"
    ):
        prompts_of({"prompts": {"retrieval.query": "q"}})


def test_an_e5_folder_of_the_hub_keeps_its_prompts(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its module files name none; where only the guess says that it is one of E5, the log says so."""
    for name, is_warned in (("e5-base-v2", False), ("gte-base", True)):
        caplog.clear()
        target = with_modules(folder, tmp_path / name, pooling=MEAN, prompts={})
        encoder = FolderEncoder(target)
        assert ("defines no prompts: using E5's" in caplog.text) == is_warned
        mean = [hidden_of(folder, f"query: {text}", 64).mean(dim=0) for text in TEXTS]
        np.testing.assert_allclose(encoder.encode_queries(TEXTS), rows([v / v.norm() for v in mean]), atol=1e-5)


def test_newer_files_name_the_pooling(folder: Path, tmp_path: Path) -> None:
    modules = [m | {"type": m["type"].replace("models", "base.modules.x")} for m in (TRANSFORMER, POOLING, NORMALIZE)]
    newer = {"embedding_dimension": 16, "pooling_mode": "cls", "include_prompt": True}
    target = with_modules(
        folder, tmp_path / "newer", modules, newer, transformer={"transformer_task": "feature-extraction"}
    )
    old = with_modules(folder, tmp_path / "old")
    first, second = (FolderEncoder(path).encode_passages(TEXTS) for path in (target, old))
    np.testing.assert_array_equal(first, second)


def test_a_model_may_lie_in_a_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    target = with_modules(folder, tmp_path / "old", [TRANSFORMER | {"path": "0_Transformer"}, POOLING, NORMALIZE])
    shutil.copytree(folder, target / "0_Transformer")
    (target / "config.json").unlink()
    shutil.move(target / "sentence_bert_config.json", target / "0_Transformer")
    expected = FolderEncoder(with_modules(folder, tmp_path / "new")).encode_queries(TEXTS)
    np.testing.assert_array_equal(FolderEncoder(target).encode_queries(TEXTS), expected)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"modules": [TRANSFORMER, POOLING, DENSE]}, "modules.json lists Transformer, Pooling, Dense"),
        ({"modules": [TRANSFORMER]}, "modules.json lists Transformer; give"),
        ({"modules": []}, "modules.json lists no modules"),
        ({"modules": {"0": "x"}}, "modules.json holds no list of modules"),
        ({"pooling": {"pooling_mode_max_tokens": True}}, "1_Pooling/config.json sets pooling max"),
        ({"pooling": CLS | {"pooling_mode_mean_tokens": True}}, r"sets pooling cls \+ mean"),
        ({"pooling": {"pooling_mode": "lasttoken"}}, "sets pooling lasttoken"),
        ({"pooling": MEAN | {"include_prompt": False}}, "excludes the prompt"),
        ({"transformer": {"transformer_task": "fill-mask"}}, "sets transformer_task to 'fill-mask'"),
        ({"transformer": {"max_seq_length": 4096}}, "max_seq_length is 4096 in .*, the model's limit 512"),
        ({"transformer": {"max_seq_length": "64"}}, "sets max_seq_length to '64'"),
        ({"prompts": {"prompts": {"query": 1}}}, "holds prompts that are not strings"),
        ({"prompts": {"prompts": PROMPTS, "similarity_fn_name": "manhattan"}}, "compares vectors by 'manhattan'"),
        ({"prompts": {"prompts": PROMPTS, "truncate_dim": 8}}, "sets truncate_dim to 8"),
    ],
)
def test_what_is_not_supported_is_refused_by_file_and_value(
    folder: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    target = with_modules(folder, tmp_path / "x", **changes)
    with pytest.raises(ConfigError, match=rf"^--encoder: .*{problem}"):
        FolderEncoder(target, "--encoder")


def test_a_file_that_is_no_json_is_named(folder: Path, tmp_path: Path) -> None:
    target = with_modules(folder, tmp_path / "x")
    (target / "1_Pooling/config.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConfigError, match=r"1_Pooling/config\.json holds no JSON .*download the encoder"):
        read_encoder_settings(target, "--encoder")


def test_the_fingerprint_is_also_that_of_pooling_prompts_and_length(folder: Path, tmp_path: Path) -> None:
    """1_Pooling is a folder of its own, and an index of other vectors must not be taken for this one."""
    folders = [
        folder,
        with_modules(folder, tmp_path / "cls"),
        with_modules(folder, tmp_path / "mean", pooling=MEAN),
        with_modules(folder, tmp_path / "prompts", prompts={"prompts": {"query": "q: "}}),
        with_modules(folder, tmp_path / "length", transformer={"max_seq_length": 32}),
    ]
    assert len({FolderEncoder(path).fingerprint for path in folders}) == 5
    assert FolderEncoder(shutil.copytree(folders[1], tmp_path / "copy")).fingerprint == (
        FolderEncoder(folders[1]).fingerprint
    )


def test_incomplete_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    """transformers would draw what is missing at random."""
    target = Path(shutil.copytree(folder, tmp_path / "x"))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"the weights in .* lack encoder\.layer\.2\..* and 15 more; download"):
        FolderEncoder(target, "--encoder")
    (target / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        FolderEncoder(target, "--encoder")


def test_a_model_of_few_positions_is_cut_there(folder: Path, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=len(train_tokenizer()), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=40,
    )  # fmt: skip
    train_tokenizer().save_pretrained(tmp_path)
    BertModel(config).save_pretrained(tmp_path)
    assert FolderEncoder(tmp_path).encode_passages([TEXTS[2]]).shape == (1, 16)

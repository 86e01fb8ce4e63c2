"""E5 vectors against the formula, one text at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.retrieval.e5 import MAX_TOKENS, E5Encoder
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
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:MAX_TOKENS]
    with torch.no_grad():
        mean = AutoModel.from_pretrained(folder).eval()(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
    vector: torch.Tensor = mean / mean.norm()
    return vector


def test_vectors_follow_the_formula_whatever_shares_their_batch(folder: Path) -> None:
    encoder = E5Encoder.from_folder(folder)
    assert encoder.num_dims == 16
    for prefix, encode in (("query: ", encoder.encode_queries), ("passage: ", encoder.encode_passages)):
        expected = torch.stack([_by_formula(folder, prefix + text) for text in TEXTS]).numpy()
        np.testing.assert_allclose(encode(TEXTS), expected, atol=1e-5)
    many = encoder.encode_queries(TEXTS * 30)
    np.testing.assert_allclose(many[:3], many[-3:], atol=1e-5)
    assert encoder.encode_queries([]).shape == (0, 16)


def test_the_fingerprint_is_that_of_the_weights(folder: Path, tmp_path: Path) -> None:
    first = E5Encoder.from_folder(folder).fingerprint
    assert E5Encoder.from_folder(folder).fingerprint == first
    model = BertModel.from_pretrained(folder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert E5Encoder.from_folder(tmp_path).fingerprint != first


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"elasticsearch.encoder: .* holds no model"):
        E5Encoder.from_folder(tmp_path)

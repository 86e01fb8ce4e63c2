#!/usr/bin/env bash
# transformers 5.23.0 (with tokenizers 0.23.3): if config.json has model_type qwen2, AutoTokenizer reads vocabulary and
# merges from tokenizer.json, but not its normaliser and pre-tokenizer, which it replaces by Qwen2's.
#
# A tokenizer saved by transformers itself, with tokenizer_class TokenizersBackend (the class meant to use the file
# unchanged), silently gives other ids when it is loaded again. With model_type qwen3 the same files are used unchanged.
# `tokenizers` alone, and servers that use it, always follow the file.
#
# Output seen on 2026-11-28, Python 3.11:
#   qwen3: ['in', 'Ġ', '19', '69'] TokenizersBackend
#   qwen2: ['I', 'N', 'Ġ', '1', '9', '6', '9'] Qwen2Tokenizer
#   tokenizers: ['in', 'Ġ', '19', '69']
#   tokenizer_class on disk: TokenizersBackend
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
export HF_HOME=$folder/hf HF_HUB_OFFLINE=1
venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
TEXT = "IN 1969"

# Lower case, digits in pairs, then bytes.
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
vocab = {token: index for index, token in enumerate([*letters, "in", "19", "69"])}
built = Tokenizer(models.BPE(vocab=vocab, merges=[("i", "n"), ("1", "9"), ("6", "9")]))
built.normalizer = normalizers.Lowercase()
pairs = pre_tokenizers.Split(Regex(r"\d{2}"), "isolated")
built.pre_tokenizer = pre_tokenizers.Sequence([pairs, pre_tokenizers.ByteLevel(add_prefix_space=False)])
built.decoder = decoders.ByteLevel()
built.add_special_tokens(["<|im_end|>"])

tokens = {}
for model_type in ("qwen3", "qwen2"):
    PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|im_end|>").save_pretrained(model_type)
    Path(model_type, "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(model_type)
    tokens[model_type] = loaded.tokenize(TEXT)
    print(f"{model_type}: {tokens[model_type]} {type(loaded).__name__}")
named = json.loads(Path("qwen2/tokenizer_config.json").read_text())["tokenizer_class"]
plain = Tokenizer.from_file("qwen2/tokenizer.json").encode(TEXT).tokens
print(f"tokenizers: {plain}\ntokenizer_class on disk: {named}")
assert named == "TokenizersBackend", named
assert plain == tokens["qwen3"] == ["in", "Ġ", "19", "69"], "the behaviour has changed"
assert tokens["qwen2"] == ["I", "N", "Ġ", "1", "9", "6", "9"], "the behaviour has changed"
PYTHON

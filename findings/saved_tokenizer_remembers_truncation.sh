#!/usr/bin/env bash
# transformers 5.23.0 and tokenizers 0.23.3: save_pretrained writes the truncation of the last call into tokenizer.json.
#
# If a question was truncated to 8 tokens before saving, every reader that uses `tokenizers` directly truncates every
# text to 8 tokens. transformers sets its own truncation in each call, so with transformers the error does not show.
#
# Output seen on 2026-11-28, Python 3.11:
#   saved after whole texts: truncation None, tokenizers 43 ids, transformers 43 ids
#   saved after one cut call: truncation 8, tokenizers 8 ids, transformers 43 ids
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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
PASSAGE = "A passage that is longer than eight tokens."

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
built = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=built)


def saved_as(folder):
    """Truncation on disk, and numbers of ids that both libraries give with the folder."""
    tokenizer.save_pretrained(folder)
    truncation = json.loads(Path(folder, "tokenizer.json").read_text())["truncation"]
    plain = len(Tokenizer.from_file(f"{folder}/tokenizer.json").encode(PASSAGE).ids)
    loaded = AutoTokenizer.from_pretrained(folder)
    return truncation and truncation["max_length"], plain, len(loaded(PASSAGE)["input_ids"])


tokenizer(PASSAGE)
before = saved_as("before")
tokenizer("Where is the Eiffel Tower?", truncation=True, max_length=8)
after = saved_as("after")
report = "saved after {}: truncation {}, tokenizers {} ids, transformers {} ids"
print(report.format("whole texts", *before))
print(report.format("one cut call", *after))
assert before == (None, len(PASSAGE), len(PASSAGE)), "the behaviour has changed"
assert after == (8, 8, len(PASSAGE)), "the behaviour has changed"
PYTHON

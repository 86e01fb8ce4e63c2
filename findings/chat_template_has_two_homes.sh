#!/usr/bin/env bash
# transformers 5.23.0 and gguf 0.19.0 (llama.cpp's reader of Hugging Face folders): a folder may hold a chat template in
# both chat_template.jinja and tokenizer_config.json. transformers uses the first, gguf the second, without a warning.
#
# This happens when a folder saved by transformers, which only writes the .jinja, gets a new template the old way, in
# tokenizer_config.json: training and evaluation still use the old prompt, and the converted model serves the new one.
#
# Output seen on 2026-11-28, Python 3.11:
#   saved by transformers: chat_template.jinja, and no template in tokenizer_config.json
#   transformers: 'from the file: hello'
#   gguf:         'from the config: hello'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0 jinja2==3.1.6
export HF_HOME=$folder/hf HF_HUB_OFFLINE=1
venv/bin/python - <<'PYTHON'
import json
from importlib.metadata import version
from pathlib import Path

import gguf
import transformers
from jinja2 import Template
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print(f"transformers {transformers.__version__}, gguf {version('gguf')}")
CHAT = [{"role": "user", "content": "hello"}]

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"h": 0}, merges=[])))
tokenizer.chat_template = "from the file: {{ messages[0].content }}"
tokenizer.save_pretrained("model")
settings = json.loads(Path("model/tokenizer_config.json").read_text())
assert Path("model/chat_template.jinja").exists(), "the behaviour has changed"
assert "chat_template" not in settings, "the behaviour has changed"
print("saved by transformers: chat_template.jinja, and no template in tokenizer_config.json")

settings["chat_template"] = "from the config: {{ messages[0].content }}"
Path("model/tokenizer_config.json").write_text(json.dumps(settings))
trained_with = AutoTokenizer.from_pretrained("model").apply_chat_template(CHAT, tokenize=False)
served_with = Template(gguf.SpecialVocab("model").chat_template).render(messages=CHAT)
print(f"transformers: {trained_with!r}\ngguf:         {served_with!r}")
assert trained_with == "from the file: hello", "the behaviour has changed"
assert served_with == "from the config: hello", "the behaviour has changed"
PYTHON

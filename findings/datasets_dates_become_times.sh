#!/usr/bin/env bash
# datasets 5.2.0 (with pyarrow 26.0.1): a gold answer in a JSON Lines file that is a date does not stay text, and its
# new value depends on the other rows.
#
# Alone, "1969-07-20" is read as a timestamp and returned as a datetime. In a file with another answer that is not a date
# it stays "1969-07-20". In a second file, after a first one with text, it is read as a timestamp and then cast to text:
# "1969-07-20 00:00:00", which no model will match exactly. Only an explicit features=... avoids this.
#
# Output seen on 2026-11-28, Python 3.11:
#   a date alone:                  [datetime.datetime(1969, 7, 20, 0, 0)]
#   beside text in one file:       ['1969-07-20']
#   in a second file, after text:  ['1969-07-20 00:00:00']
#   in a first file, before text:  DatasetGenerationError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
export HF_HOME=$folder/hf HF_HUB_OFFLINE=1
venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

import datasets
import pyarrow

print(f"datasets {datasets.__version__}, pyarrow {pyarrow.__version__}")
datasets.disable_progress_bars()
DATE = {"question": "When did people first walk on the moon?", "golden_answers": ["1969-07-20"]}
TEXT = {"question": "Who was the first of them?", "golden_answers": ["Neil Armstrong"]}


def answers(*files):
    """Gold answers of the date's row in a data set of these files."""
    names = []
    for rows in files:
        names.append(f"{len(list(Path('.').glob('*.jsonl')))}.jsonl")
        Path(names[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        loaded = datasets.load_dataset("json", data_files=names, split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        return type(error).__name__
    return next(repr(row["golden_answers"]) for row in loaded if row["question"] == DATE["question"])


seen = {
    "a date alone": answers([DATE]),
    "beside text in one file": answers([DATE, TEXT]),
    "in a second file, after text": answers([TEXT], [DATE]),
    "in a first file, before text": answers([DATE], [TEXT]),
}
for case, value in seen.items():
    print(f"{case + ':':30} {value}")
assert list(seen.values()) == [
    "[datetime.datetime(1969, 7, 20, 0, 0)]",
    "['1969-07-20']",
    "['1969-07-20 00:00:00']",
    "DatasetGenerationError",
], "the behaviour has changed"
PYTHON

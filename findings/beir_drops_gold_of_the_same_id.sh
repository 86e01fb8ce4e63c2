#!/usr/bin/env bash
# beir 2.2.0 (with pytrec-eval-terrier 0.5.11): by default EvaluateRetrieval.evaluate drops a retrieved passage with the
# same id as the question, and deletes it from the caller's own results.
#
# This is meant for data sets where queries are documents (ArguAna, Quora). If questions and passages are both numbered
# from 1, correct hits are lost: recall 1 becomes 0. The only notice is a message at level INFO, not shown by default. A
# second call with ignore_identical_ids=False does not help, because the hits are gone from the dictionary.
#
# Output seen on 2026-11-28, Python 3.11:
#   the gold passage is first, ids 1 and 1:       Recall@10 0.0
#   the same results again, with the switch off:  Recall@10 0.0
#   from the start with the switch off:           Recall@10 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
# Without its other dependencies (torch, sentence-transformers): the evaluation needs only these three.
venv/bin/pip install --quiet --disable-pip-version-check pytrec-eval-terrier==0.5.11 numpy==2.4.6 tqdm==4.67.1
venv/bin/pip install --quiet --disable-pip-version-check --no-deps beir==2.2.0
venv/bin/python - <<'PYTHON'
from importlib.metadata import version

from beir.retrieval.evaluation import EvaluateRetrieval

print(f"beir {version('beir')}, pytrec-eval-terrier {version('pytrec-eval-terrier')}")
GOLD = {"1": {"1": 1}}


def found():
    return {"1": {"1": 12.5, "7": 3.25}}


def recall(results, **options):
    return EvaluateRetrieval.evaluate(GOLD, results, [10], **options)[2]["Recall@10"]


results = found()
seen = {
    "the gold passage is first, ids 1 and 1": recall(results),
    "the same results again, with the switch off": recall(results, ignore_identical_ids=False),
    "from the start with the switch off": recall(found(), ignore_identical_ids=False),
}
for case, value in seen.items():
    print(f"{case + ':':45} Recall@10 {value}")
assert list(seen.values()) == [0.0, 0.0, 1.0], "the behaviour has changed"
PYTHON

#!/usr/bin/env bash
# safetensors 0.8.0 (with numpy 2.4.6): safetensors.numpy.save_file writes a transposed array in memory order under its
# transposed shape, so that values are in the wrong positions. There is no error and no warning.
#
# 0.7.0 wrote the array's values. The docstrings of both require contiguous arrays; safetensors.torch refuses others
# with a ValueError. A converter that transposes a Conv1D's weight (GPT-2) or saves the `.T` of a merged LoRA product
# gets a file with correct names, shapes and sums, and wrong values. np.ascontiguousarray before saving avoids this.
#
# Output seen on 2026-11-28, Python 3.11:
#   safetensors 0.7.0: saved [[0, 3], [1, 4], [2, 5]], read [[0, 3], [1, 4], [2, 5]]
#   safetensors 0.8.0: saved [[0, 3], [1, 4], [2, 5]], read [[0, 1], [2, 3], [4, 5]]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >round_trip.py <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

turned = np.arange(6).reshape(2, 3).T
save_file({"weight": turned}, "model.safetensors")
read = load_file("model.safetensors")["weight"].tolist()
print(f"safetensors {safetensors.__version__}: saved {turned.tolist()}, read {read}")
expected = {"0.7.0": [[0, 3], [1, 4], [2, 5]], "0.8.0": [[0, 1], [2, 3], [4, 5]]}
sys.exit(0 if read == expected[safetensors.__version__] else "the behaviour has changed")
PYTHON
for version in 0.7.0 0.8.0; do
    python3 -m venv "$version"
    "$version/bin/pip" install --quiet --disable-pip-version-check "safetensors==$version" numpy==2.4.6
    "$version/bin/python" round_trip.py
done

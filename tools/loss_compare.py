"""Show that two runs computed the same: metrics, trajectories and weights.

    python tools/loss_compare.py runs/before runs/after [--rtol 1e-6] [--ignore 'train/num_*' ...]

A change that only moves code must leave every number as it was. Run the same seed and settings before and after it, in
two run folders, and compare them: seconds aside, all metrics of ``metrics.jsonl``, every sampled token, log-probability
and score of ``trajectories/`` and every tensor of the exported ``hf/`` have to be equal to the bit. ``--rtol`` allows a
relative difference, for a change that reorders sums.

Prints one JSON object; exit code 0 when the runs agree, 1 when they differ, 2 when there is nothing to compare.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from megatron_sdsearch.config import path_argument

MAX_SHOWN = 20


def main() -> int:
    """Compare two run folders."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=path_argument, help="run folder")
    parser.add_argument("after", type=path_argument, help="run folder of the same seed and settings")
    parser.add_argument("--rtol", type=float, default=0.0, help="relative difference that is allowed (0: equal bits)")
    parser.add_argument(
        "--ignore",
        action="append",
        default=["time/*"],
        metavar="PATTERN",
        help="metrics or places to leave out, e.g. 'probe/*'",
    )
    arguments = parser.parse_args()
    for folder in (arguments.before, arguments.after):
        if not (folder / "metrics.jsonl").is_file():
            print(f"{folder} holds no metrics.jsonl; give the run_dir of a run", file=sys.stderr)
            return 2
    report = compare_runs(arguments.before, arguments.after, arguments.rtol, arguments.ignore)
    print(json.dumps(report, indent=1))
    return 0 if report["equal"] else 1


def compare_runs(before: Path, after: Path, rtol: float, ignored: list[str]) -> dict[str, Any]:
    """Count what was compared and list what differs.

    Args:
        before: run folder.
        after: run folder.
        rtol: relative difference that counts as equal.
        ignored: patterns of metric names, or of places such as ``trajectories/step_000001.jsonl*``, that are left out.
    """
    old, new = (_read_metrics(folder / "metrics.jsonl", ignored) for folder in (before, after))
    differences = list(_differences("metrics", old, new, rtol))
    files = {path.name for folder in (before, after) for path in (folder / "trajectories").glob("step_*.jsonl")}
    for name in sorted(files):
        old_lines, new_lines = (_read_lines(folder / "trajectories" / name) for folder in (before, after))
        differences += _differences(f"trajectories/{name}", old_lines, new_lines, rtol)
    tensors = list(_tensor_differences(before / "hf", after / "hf", rtol))
    differences += [problem for _, problem in tensors if problem]
    differences = [problem for problem in differences if not _is_ignored(problem.partition(": ")[0], ignored)]
    return {
        "equal": not differences,
        "num_metric_rows": len(old),
        "num_trajectory_files": len(files),
        "num_tensors": len(tensors),
        "num_differences": len(differences),
        "differences": differences[:MAX_SHOWN],
    }


def _is_ignored(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _read_metrics(path: Path, ignored: list[str]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not _is_ignored(name, ignored)} for row in _read_lines(path)]


def _differences(path: str, before: Any, after: Any, rtol: float) -> Iterator[str]:
    """Walk two JSON values and name each place where they differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            if name not in before or name not in after:
                yield f"{path}.{name}: only {'after' if name in after else 'before'}"
            else:
                yield from _differences(f"{path}.{name}", before[name], after[name], rtol)
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{path}: {len(before)} entries before, {len(after)} after"
        for index, (old, new) in enumerate(zip(before, after, strict=False)):
            yield from _differences(f"{path}[{index}]", old, new, rtol)
    elif not _is_equal(before, after, rtol):
        yield f"{path}: {before!r} before, {after!r} after"


def _is_equal(before: Any, after: Any, rtol: float) -> bool:
    if isinstance(before, float) and isinstance(after, float):
        both_nan = math.isnan(before) and math.isnan(after)
        return both_nan or before == after or math.isclose(before, after, rel_tol=rtol, abs_tol=0.0)
    return bool(before == after)


def _tensor_differences(before: Path, after: Path, rtol: float) -> Iterator[tuple[str, str]]:
    """Yield every tensor of two exported folders with what differs ("" when nothing does)."""
    sides = [_open_tensors(folder) for folder in (before, after)]
    for name in sorted(sides[0].keys() | sides[1].keys()):
        if name not in sides[0] or name not in sides[1]:
            yield name, f"hf/{name}: only {'after' if name in sides[1] else 'before'}"
            continue
        old, new = (file.get_tensor(name) for file in (sides[0][name], sides[1][name]))
        if old.shape != new.shape or old.dtype != new.dtype:
            yield name, f"hf/{name}: {old.dtype} {tuple(old.shape)} before, {new.dtype} {tuple(new.shape)} after"
            continue
        gap = (old.double() - new.double()).abs().max().item() if old.numel() else 0.0
        is_equal = gap <= rtol * old.double().abs().max().item() if old.numel() else True
        yield name, "" if is_equal else f"hf/{name}: differs by up to {gap:.3g}"


def _open_tensors(folder: Path) -> dict[str, Any]:
    files: list[Any] = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


if __name__ == "__main__":
    sys.exit(main())

"""Checks a job before it uses GPUs: its roles, the problems that `check` finds, and progress since the last start.

Runs once on the first node at every start of a job. Prints the settings of `train.sh` as ``name=value`` lines; an error
is one line on standard error. Exit codes are those of the command line: 1 failed, 2 wrong input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from megatron_sdsearch.allocation import Allocation, allocation_problems, assign_roles
from megatron_sdsearch.check.findings import Severity
from megatron_sdsearch.check.run import run_checks
from megatron_sdsearch.check.run_under_test import ClusterOptions
from megatron_sdsearch.config import load_config
from megatron_sdsearch.errors import ConfigError, SDSearchError, TrainingError, raise_problems
from megatron_sdsearch.files import write_file
from megatron_sdsearch.model.checkpoint_folder import CheckpointFolder, step_of
from megatron_sdsearch.sglang.servers import free_ports

STARTS_FILE = "slurm_starts.json"
# Below the ports of SGLang servers (`sglang.servers.PORTS`) and those of outgoing connections.
RENDEZVOUS_PORTS = range(10_000, 20_000)


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--job", type=int, required=True)
    parser.add_argument("--restart", type=int, required=True, help="number of earlier starts of the job")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="on each node; 0 without GPUs")
    parser.add_argument("--sglang-nodes", type=int, required=True)
    parser.add_argument("--ranks", type=int, help="on each training node; by default one per GPU that servers leave")
    parser.add_argument("--max-stalled-starts", type=int, required=True)
    arguments = parser.parse_args()
    allocation = Allocation(
        num_nodes=arguments.nodes,
        gpus_per_node=arguments.gpus,
        num_sglang_nodes=arguments.sglang_nodes,
        ranks_per_node=arguments.ranks,
    )
    try:
        config = load_config(arguments.config, arguments.overrides)
        raise_problems(allocation_problems(config, allocation))
        roles = assign_roles(config, allocation)
        allocation = replace(allocation, ranks_per_node=roles.ranks_per_node)
        if has_errors(arguments.config, arguments.overrides, allocation):
            return 2
        step = count_start(config.run_dir, arguments.job, arguments.restart, arguments.max_stalled_starts)
        first = arguments.job % len(RENDEZVOUS_PORTS)  # differs between jobs on a shared node
        (port,) = free_ports(1, "", [*RENDEZVOUS_PORTS[first:], *RENDEZVOUS_PORTS[:first]])
    except SDSearchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    # Written by the previous start. Its summary stays until training continues.
    (config.run_dir / "stopped.json").unlink(missing_ok=True)
    num_serving = roles.servers.num_nodes if roles.servers is not None else 0
    print(f"run_dir={config.run_dir.resolve()}\nstep={step}\nport={port}")
    print(f"train_nodes={roles.train_nodes}\nserve_nodes={num_serving}\nranks={roles.ranks_per_node}")
    return 0


def has_errors(config: Path, overrides: Sequence[str], allocation: Allocation) -> bool:
    """Print errors and warnings of ``check --online`` to standard error, one per line; return whether there are errors.

    Contacts the search engine with the run's own client and time limits, but no servers that are not running yet.
    """
    options = ClusterOptions(device="gpu" if allocation.gpus_per_node else "cpu", **asdict(allocation))
    report = run_checks(config, overrides, options=options, is_online=True)
    for finding in report.findings:
        if finding.severity is not Severity.NOTE:
            message = f"check: {finding.severity}: {finding.field}: {finding.problem}; {finding.fix}"
            print(message, file=sys.stderr)
    return report.count(Severity.ERROR) > 0


def count_start(run_dir: Path, job: int, restart: int, max_stalled: int) -> int:
    """Record a start of the job and return the step of the newest checkpoint.

    Raises:
        TrainingError: the job has started ``max_stalled`` times in a row at this step, so another requeue is useless.
    """
    newest, file = CheckpointFolder(run_dir / "checkpoints").candidates()[:1], run_dir / STARTS_FILE
    step = step_of(newest[0]) if newest else 0
    before = json.loads(file.read_text()) if file.exists() else {}
    is_same = restart > 0 and before.get("job") == job and before.get("step") == step
    num_starts = before["num_starts"] + 1 if is_same else 1
    if num_starts > max_stalled:
        raise TrainingError(
            f"job {job} has started {max_stalled} times at step {step} and saved nothing after it, so it is not "
            "requeued; run it longer (sbatch --time), save more often (checkpoint.every), or give it more time to "
            "save (sbatch --signal=B:USR1@SECONDS)"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps({"job": job, "step": step, "num_starts": num_starts}) + "\n")
    return step


if __name__ == "__main__":
    sys.exit(main())

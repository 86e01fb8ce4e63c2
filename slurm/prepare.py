"""Before the GPUs work: do the roles fit the allocation, does `check` find nothing, has the last start got on?

Runs once, on the first node, at every start of a job. Prints what `train.sh` has to know as ``name=value`` lines; an
error is one line on standard error. Exit codes are those of the command line: 1 failed, 2 wrong input.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sdsearch.check.findings import Severity
from megatron_sdsearch.check.run import run_checks
from megatron_sdsearch.check.world import GivenWorld
from megatron_sdsearch.config import RunConfig, load_config
from megatron_sdsearch.errors import ConfigError, SDSearchError, TrainingError
from megatron_sdsearch.files import write_file
from megatron_sdsearch.model.checkpoint_folder import CheckpointFolder, step_of

STARTS_FILE = "slurm_starts.json"
RENDEZVOUS_PORTS = range(10_000, 20_000)
"""Below the ports of SGLang servers (`sglang.servers.PORTS`), and below those of outgoing connections."""
_STOPPED = "stopped.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What Slurm gave to the job, and how it was asked to be used.

    Attributes:
        num_nodes: in all.
        num_gpus: of each node; 0 without GPUs.
        num_sglang_nodes: of them; the last ones.
        ranks_per_node: of the trainer; None takes one for each GPU.
    """

    num_nodes: int
    num_gpus: int
    num_sglang_nodes: int
    ranks_per_node: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """How many nodes do what; colocated, the same nodes do both.

    Attributes:
        train: nodes with ranks, the first ones.
        serve: nodes with SGLang servers, the last ones.
        ranks: on each training node.
    """

    train: int
    serve: int
    ranks: int


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--job", type=int, required=True)
    parser.add_argument("--restart", type=int, required=True, help="how often Slurm has started the job before")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--sglang-nodes", type=int, required=True)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--max-stalled-starts", type=int, required=True)
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        given = Allocation(
            num_nodes=arguments.nodes,
            num_gpus=arguments.gpus,
            num_sglang_nodes=arguments.sglang_nodes,
            ranks_per_node=arguments.ranks,
        )
        roles = assign_roles(config, given)
        if has_errors(arguments.config, arguments.overrides, given, roles):
            return 2
        step = count_start(config.run_dir, arguments.job, arguments.restart, arguments.max_stalled_starts)
    except SDSearchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    # What a start before this one said of its end. Its summary stays: training removes it when it goes on.
    (config.run_dir / _STOPPED).unlink(missing_ok=True)
    print(f"run_dir={config.run_dir.resolve()}")
    print(f"step={step}")
    print(f"port={free_port(arguments.job)}")
    print(f"train_nodes={roles.train}")
    print(f"serve_nodes={roles.serve}")
    print(f"ranks={roles.ranks}")
    return 0


def assign_roles(config: RunConfig, given: Allocation) -> Roles:
    """Which nodes train and which serve.

    Raises:
        ConfigError: that does not fit the allocation or the parallel sizes.
    """
    serve = _num_serving(config, given)
    is_colocated = config.samples_from_sglang and config.rollout.sglang.colocated
    train = given.num_nodes if is_colocated else given.num_nodes - serve
    ranks = _ranks_per_node(given, config.num_own_server_gpus if serve == 0 else 0)
    config.check_world(train * ranks, has_gpu=given.num_gpus > 0)
    return Roles(train=train, serve=serve, ranks=ranks)


def _ranks_per_node(given: Allocation, num_taken: int) -> int:
    wanted, num_gpus = given.ranks_per_node, given.num_gpus
    if not num_gpus:
        return 1 if wanted is None else wanted
    free = num_gpus - num_taken
    ranks = free if wanted is None else wanted
    if not 1 <= ranks <= free:
        problem = f"{ranks} ranks on nodes of {num_gpus} GPUs, of which SGLang takes {num_taken}"
        raise ConfigError(
            "SDSEARCH_RANKS_PER_NODE", problem, "each rank needs a GPU: lower it, or sbatch --gpus-per-node"
        )
    return ranks


def _num_serving(config: RunConfig, given: Allocation) -> int:
    field, wanted = "SDSEARCH_SGLANG_NODES", given.num_sglang_nodes
    if not 0 <= wanted < given.num_nodes:
        problem = f"{wanted} of the {given.num_nodes} nodes of this job leave none to train on"
        raise ConfigError(
            field, problem, f"set it to at most {given.num_nodes - 1}, or ask for more with sbatch --nodes"
        )
    if not config.samples_from_sglang:
        if wanted:
            raise ConfigError(field, f"{wanted}, and the run samples without SGLang", "set rollout.engine=sglang, or 0")
        return 0
    sglang = config.rollout.sglang
    if sglang.urls:
        if wanted:
            raise ConfigError(
                field, f"{wanted}, and rollout.sglang.urls names servers of its own", "drop one of the two"
            )
        return 0
    if sglang.colocated:
        if wanted:
            raise ConfigError(
                field, f"{wanted}, and rollout.sglang.colocated serves on all nodes", "set one of the two"
            )
        return given.num_nodes
    if not wanted and given.num_nodes > 1:
        raise ConfigError(
            field,
            f"0, and rollout.engine=sglang on {given.num_nodes} nodes needs servers that all of them reach",
            "set it to a number of nodes, or set rollout.sglang.colocated=true or rollout.sglang.urls",
        )
    if wanted and given.num_gpus and sglang.tp_size > given.num_gpus:
        problem = f"{sglang.tp_size} GPUs of a server, and nodes have {given.num_gpus}"
        raise ConfigError("rollout.sglang.tp_size", problem, "lower it")
    return wanted


def count_start(run_dir: Path, job: int, restart: int, max_stalled: int) -> int:
    """Remember that the job begins anew at the newest checkpoint's step, which is returned.

    Raises:
        TrainingError: that is the ``max_stalled``-th time in a row at this step: requeueing it again would not help.
    """
    newest, file = CheckpointFolder(run_dir / "checkpoints").candidates()[:1], run_dir / STARTS_FILE
    step = step_of(newest[0]) if newest else 0
    before = json.loads(file.read_text()) if file.exists() else {}
    is_same = restart > 0 and before.get("job") == job and before.get("step") == step
    num_starts = before["num_starts"] + 1 if is_same else 1
    if num_starts > max_stalled:
        raise TrainingError(
            f"job {job} has begun {max_stalled} times at step {step} and saved nothing beyond it: it is not requeued "
            "again; let it run longer (sbatch --time), save more often (checkpoint.every), or give it more time to "
            "save in (sbatch --signal=B:USR1@SECONDS)"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps({"job": job, "step": step, "num_starts": num_starts}) + "\n")
    return step


def has_errors(config: Path, overrides: Sequence[str], given: Allocation, roles: Roles) -> bool:
    """What ``check --online`` has to say of the run, on standard error, a line for each finding but notes.

    The search engine is asked with the run's own client and patience. Servers that are not there yet are not asked.
    """
    world = GivenWorld(
        device="gpu" if given.num_gpus else "cpu",
        num_nodes=given.num_nodes,
        gpus_per_node=given.num_gpus,
        ranks_per_node=roles.ranks,
        num_sglang_nodes=given.num_sglang_nodes,
    )
    report = run_checks(config, overrides, given=world, is_online=True)
    for finding in report.findings:
        if finding.severity is not Severity.NOTE:
            told = f"check: {finding.severity}: {finding.field}: {finding.problem}; {finding.fix}"
            print(told, file=sys.stderr)
    return report.count(Severity.ERROR) > 0


def free_port(job: int, ports: Sequence[int] = RENDEZVOUS_PORTS) -> int:
    """The first port that nobody listens on, from one that jobs on a shared node do not have in common.

    Raises:
        TrainingError: there is none.
    """
    for offset in range(len(ports)):
        port = ports[(job + offset) % len(ports)]
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
    raise TrainingError(f"no free port within {ports[0]}-{ports[-1]}")


if __name__ == "__main__":
    sys.exit(main())

"""The command line: ``train``, ``evaluate``, ``report``, ``check``, ``plan`` and ``serve``.

Exit codes: 0 done, or saved and stopped by Ctrl-C or another signal (named in ``run_dir/stopped.json``); 1 the run
failed; 2 the command or the configuration is wrong; 130 Ctrl-C with nothing to save. For ``check``: 0 only notes; 1
warnings, the run would start; 2 errors, it would fail.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, ParamSpec

import typer
from rich.console import Console

from megatron_sdsearch.config import RunConfig, expand_home, file_problems, load_config
from megatron_sdsearch.errors import HEAD_START_S, ConfigError, DataError, SDSearchError, raise_problems
from megatron_sdsearch.logging import final_table, idle_step_warnings
from megatron_sdsearch.logging.metrics import read_metrics
from megatron_sdsearch.training.run_lock import check_run_dir

if TYPE_CHECKING:
    from megatron_sdsearch.training.loop import Outcome

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

_FOLLOWED_S = 5
_INTERRUPTED = 130
_LOST_PEER = "another rank has died: see its message, or torchrun's report"
# Messages of gloo, of torch's store, and of NCCL.
_PEER_IS_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited")
_say = partial(print, flush=True)
P = ParamSpec("P")


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Register a command; when it fails, one rank prints one message, and all exit with a code."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # every rank exits
            _fail(error, failure=2 if function.__name__ in ("check", "report") else 1)

    return app.command()(run)


def home_path(path: Path | None) -> Path | None:
    """Expand a path option; shells do not expand the ``~`` of ``--model=~/x``."""
    try:
        return None if path is None else Path(expand_home(str(path)))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, e.g. examples/tiny/config.yaml")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. objective.alpha=0 optimizer.lr=1e-5")
]


@command
def train(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Train to the configured number of steps; continues from the newest checkpoint of the run's folder."""
    loaded = load_config(config, overrides or [])
    from megatron_sdsearch.training.preflight import refuse_start

    refuse_start(loaded)  # the loop checks again, but only after importing megatron, which takes seconds
    check_run_dir(loaded.run_dir)
    is_main = _rank() == 0
    if is_main:
        _say(_first_line(config, loaded))
    from megatron_sdsearch.report.page import live_page
    from megatron_sdsearch.training.loop import Display
    from megatron_sdsearch.training.loop import train as run_loop

    with live_page(loaded.run_dir, is_writer=is_main) as refresh_page:
        outcome = run_loop(loaded, Display(say=_say, refresh_page=refresh_page))
    if is_main and outcome.summary is not None:
        Console().print(final_table(outcome.summary))
    for line in _last_lines(loaded, outcome) if is_main else ():
        _say(line)


@command
def evaluate(
    config: ConfigArgument,
    model: Annotated[Path, typer.Option(callback=home_path, help="Hugging Face folder to evaluate, e.g. runs/demo/hf")],
    overrides: OverridesArgument = None,
) -> None:
    """Evaluate an exported model on `data.heldout` greedily with transformers; prints one JSON object."""
    loaded = load_config(config, overrides or [])
    from megatron_sdsearch.evaluation.evaluate import evaluate_folder

    print(json.dumps(evaluate_folder(loaded, model)))


@command
def report(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run, e.g. runs/demo", callback=home_path)
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page's file  [default: RUN_DIR/report.html]", callback=home_path)
    ] = None,
) -> None:
    """Write the page of a running, stopped, killed, failed or finished run; prints its path."""
    from megatron_sdsearch.report.page import write_page

    try:
        print(write_page(run_dir, out))
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; give a run's folder that you may read") from error


@command
def check(  # noqa: PLR0913 (one parameter per option of the command)
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    online: Annotated[
        bool, typer.Option("--online", help="Also send requests to the search engine and SGLang servers.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    nodes: Annotated[int | None, typer.Option(min=1, help="All nodes; default: Slurm's, else 1.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="Default: Slurm's, else this machine's.")] = None,
    nproc_per_node: Annotated[
        int | None, typer.Option(min=1, help="As for torchrun; default: one per free GPU.")
    ] = None,
    sglang_nodes: Annotated[
        int | None,
        typer.Option(min=0, help="Those of --nodes that only serve; default: SDSEARCH_SGLANG_NODES, else 0."),
    ] = None,
    device: Annotated[
        Literal["gpu", "cpu"] | None,
        typer.Option(help="Device that trains; default: gpu where GPUs are visible, else by model.dtype."),
    ] = None,
) -> None:
    """List everything that would fail or be wasted, without a GPU and without writing anything.

    Exit codes: 0 only notes; 1 warnings: the run would start; 2 errors: it would fail.
    """
    from megatron_sdsearch.check.run import run_checks
    from megatron_sdsearch.check.run_under_test import ClusterOptions

    options = ClusterOptions(
        device=device,
        num_nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=nproc_per_node,
        num_sglang_nodes=sglang_nodes,
    )
    found = run_checks(config, overrides or [], options=options, is_online=online)
    if as_json:
        print(json.dumps({"config": str(config), **found.to_dict()}))
    else:
        Console().print(found.page())
    sys.exit(found.exit_code)


@command
def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    nodes: Annotated[int, typer.Option(min=1, help="all nodes, including those that only serve")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="with --hardware cpu, processes")] = 8,
    sglang_nodes: Annotated[
        int,
        typer.Option(min=0, envvar="SDSEARCH_SGLANG_NODES", help="last of --nodes, which only serve"),
    ] = 0,
    hardware: Annotated[
        str | None,
        typer.Option(help="h100, h800, h200, a100, or cpu (only memory); default: h100, cpu for model.dtype=float32"),
    ] = None,
    assume: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="e.g. response_tokens=200; see docs/planning.md")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Plan a run's memory per GPU and seconds per step, and find faster layouts of the same GPUs.

    Only config.json of the model's folder is needed.
    """
    from megatron_sdsearch.allocation import Allocation
    from megatron_sdsearch.model.hf_config import load_hf_config
    from megatron_sdsearch.model.shape import ModelShape
    from megatron_sdsearch.plan.report import plan_run

    allocation = Allocation(num_nodes=nodes, gpus_per_node=gpus_per_node, num_sglang_nodes=sglang_nodes)
    loaded = load_config(config, overrides or [])
    shape = ModelShape.from_hf_config(load_hf_config(loaded.model.hf_dir))
    planned = plan_run(loaded, shape, allocation, hardware=hardware, assumptions=assume or [])
    print(json.dumps(planned.to_dict()) if as_json else planned.to_text())


@command
def serve(
    config: ConfigArgument,
    host: Annotated[str, typer.Option(help="address of this node that all trainer ranks can reach")],
    urls_file: Annotated[
        Path,
        typer.Option(callback=home_path, help="written when all servers serve, one url per line; removed at the end"),
    ],
    overrides: OverridesArgument = None,
    log_dir: Annotated[
        Path | None, typer.Option(callback=home_path, help="folder of server_*.log  [default: run_dir/logs]")
    ] = None,
    index: Annotated[int, typer.Option(min=0, help="number of this node among those with servers, from 0")] = 0,
) -> None:
    """Run SGLang servers on this node's GPUs until SIGTERM; a trainer attaches by rollout.sglang.urls."""
    loaded = load_config(config, overrides or [])
    raise_problems(file_problems(loaded))
    from megatron_sdsearch.sglang.serve import serve as run_servers

    run_servers(loaded, host=host, urls_file=urls_file, log_dir=log_dir, index=index)


def main() -> None:
    """Run ``sdsearch`` or ``python -m megatron_sdsearch``."""
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", handlers=[_StandardError()]
    )
    # At import megatron warns repeatedly about missing GPU libraries and its own renames.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)  # on resume
    app()


def _fail(error: BaseException, *, failure: int) -> NoReturn:
    """Print the error unless another rank failed before, pass it to torchrun, and exit.

    Args:
        error: the error that ended the command.
        failure: exit code of errors other than ConfigError and DataError.
    """
    message, code = f"{type(error).__name__}: {error}", failure
    if isinstance(error, KeyboardInterrupt):
        if _rank() == 0:
            print("interrupted, with nothing to save at this point", file=sys.stderr)
        _exit(_INTERRUPTED)
    if isinstance(error, (ConfigError, DataError)):
        code = 2
    elif isinstance(error, RuntimeError) and _PEER_IS_GONE.search(str(error)):
        message = _LOST_PEER  # a broken collective: the cause is on the other rank
    elif not isinstance(error, SDSearchError):
        message = "".join(traceback.format_exception(error)).rstrip()
    is_first = _is_first_to_fail()
    if is_first:
        print(message, file=sys.stderr)
    _report_to_torchrun(message if is_first else _LOST_PEER, is_cause=is_first and message != _LOST_PEER)
    _exit(code)


def _report_to_torchrun(message: str, *, is_cause: bool) -> None:
    """Write torchrun's error file, as torch's ``record`` does, which ``os._exit`` bypasses.

    torchrun reports the failure with the earliest time, in whole seconds, so ranks that only followed get a later one.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    when = int(time.time()) + (0 if is_cause else _FOLLOWED_S)
    extra = {"py_callstack": message, "timestamp": str(when)}
    with suppress(OSError):  # the message has been printed
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def _is_first_to_fail() -> bool:
    """Return True on one rank only, the first to call this.

    Before ``init_process_group``, local rank 0 prints at once and the others wait: torchrun ends all ranks when one
    exits, so a rank that is still running after that is the only one that failed.
    """
    dist = sys.modules.get("torch.distributed")  # None in a command that has not loaded torch
    if dist is None or not dist.is_initialized():
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(HEAD_START_S)
        return True
    try:
        return bool(dist.distributed_c10d._get_default_store().add("megatron_sdsearch/failed", 1) == 1)
    except RuntimeError:  # the store's host is gone: better printed twice than not at all
        return True


def _exit(code: int) -> NoReturn:
    """Exit at once: destructors of process groups would wait for peers that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()  # children would outlive this process and keep its output open
    os._exit(code)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _first_line(config: Path, loaded: RunConfig) -> str:
    world, parallel = int(os.environ.get("WORLD_SIZE", "1")), loaded.parallel
    replicas = world // parallel.model_parallel_size
    ranks = f"{world} rank{'s' if world > 1 else ''}"
    layout = f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} x DP {replicas}"
    return f"sdsearch train: {config} -> {loaded.run_dir}; {ranks}: {layout}"


def _last_lines(config: RunConfig, outcome: Outcome) -> list[str]:
    """Describe the end of the run, its output, and the next command."""
    from megatron_sdsearch.model.checkpoint_folder import folder_name
    from megatron_sdsearch.report.page import PAGE_FILE
    from megatron_sdsearch.training.run_record import config_path

    run_dir, step = config.run_dir, outcome.step
    if outcome.stopped_by:
        saved = f"saved and stopped at step {step}" if step else "stopped before the first step, with nothing to save"
        return [f"{saved} ({outcome.stopped_by}); the same command continues from here"]
    lines = [f"finished at step {step}: raise train.num_steps to continue"]
    if outcome.summary is not None:
        lines = [f"WARNING: {line}" for line in idle_step_warnings(read_metrics(run_dir))]
    hf_dir, resolved = run_dir / "hf", config_path(run_dir)
    checkpoint = run_dir / "checkpoints" / folder_name(step)
    outputs = {"page": run_dir / PAGE_FILE, "model": hf_dir, "checkpoint": checkpoint}
    named = {name: str(path) for name, path in outputs.items() if path.exists()}
    if hf_dir.exists() and not config.is_rl:
        named["next"] = f"train with model.hf_dir={hf_dir}"
    elif hf_dir.exists() and config.data.heldout is not None and resolved.exists():
        named["next"] = shlex.join(["sdsearch", "evaluate", str(resolved), "--model", str(hf_dir)])
    return [*lines, *(f"{name + ':':<12}{value}" for name, value in named.items())]


class _StandardError(logging.Handler):
    """Writes to the current ``sys.stderr``, which the progress display replaces to keep its bar intact."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; an unwritable stream must not end a run."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # noqa: BLE001
            self.handleError(record)

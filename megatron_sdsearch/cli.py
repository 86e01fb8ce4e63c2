"""The command line: ``train``, ``evaluate``, ``report``, ``check``, ``plan`` and ``serve``.

Exit codes: 0 done, or saved and stopped as Ctrl-C or another signal asked (``run_dir/stopped.json`` tells which); 1 the
run failed; 2 the command or the configuration is wrong; 130 Ctrl-C where there was nothing to save. Of ``check``: 0
nothing but notes; 1 warnings, and a run would start; 2 errors, it would fail.
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
from functools import wraps
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
_LOST_PEER = "another rank has gone: its own message, or torchrun's report, says why"
# Of gloo and of torch's store; of NCCL.
_PEER_IS_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited")
P = ParamSpec("P")


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Register a command that ends with one message and an exit code when it fails, said by one rank."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # every rank leaves
            _fail(error, failure=2 if function.__name__ in ("check", "report") else 1)

    return app.command()(run)


def home_path(path: Path | None) -> Path | None:
    """Callback of an option that is a path: a shell does not expand the ``~`` of ``--model=~/x``."""
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
    """Train to the configured number of steps, from the newest checkpoint of the run's folder if there is one."""
    loaded = load_config(config, overrides or [])
    from megatron_sdsearch.training.preflight import refuse_start

    refuse_start(loaded)  # again in the loop; here before the seconds that importing megatron takes
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
    """Evaluate an exported model on ``data.heldout``, greedily, by stock transformers; one JSON object."""
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
    """Write the page of a run, whether it is going, was stopped or killed, failed, or has finished; prints its path."""
    from megatron_sdsearch.report.page import write_page

    try:
        print(write_page(run_dir, out))
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; give the folder of a run that may be read") from error


@command
def check(  # noqa: PLR0913 (one parameter per option of the command)
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    online: Annotated[bool, typer.Option("--online", help="Ask the search engine and SGLang servers, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    nodes: Annotated[int | None, typer.Option(min=1, help="All of the allocation; else Slurm's, else 1.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="Else Slurm's, else this machine's.")] = None,
    nproc_per_node: Annotated[int | None, typer.Option(min=1, help="As of torchrun; else one per free GPU.")] = None,
    sglang_nodes: Annotated[
        int | None,
        typer.Option(min=0, help="Of --nodes, that serve and do not train; else SDSEARCH_SGLANG_NODES, else 0."),
    ] = None,
    device: Annotated[
        Literal["gpu", "cpu"] | None,
        typer.Option(help="That trains; else gpu where GPUs are visible, else by model.dtype."),
    ] = None,
) -> None:
    """Find what would fail or be wasted, all of it, before a GPU is taken; needs none, and writes nothing.

    Exit codes: 0 nothing but notes; 1 warnings: the run would start; 2 errors: it would fail.
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
    nodes: Annotated[int, typer.Option(min=1, help="all of the allocation, those with servers alone too")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="with --hardware cpu: processes")] = 8,
    sglang_nodes: Annotated[
        int,
        typer.Option(min=0, envvar="SDSEARCH_SGLANG_NODES", help="of --nodes, the last so many serve and do not train"),
    ] = 0,
    hardware: Annotated[
        str | None,
        typer.Option(help="h100, h800, h200, a100, or cpu (memory alone); else h100, cpu for model.dtype=float32"),
    ] = None,
    assume: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="e.g. response_tokens=200; see docs/planning.md")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Memory per GPU and seconds per step of a run, before it is started; faster layouts of the same GPUs.

    Of the model's folder config.json is enough.
    """
    from megatron_sdsearch.allocation import Allocation
    from megatron_sdsearch.plan.report import plan_config

    allocation = Allocation(num_nodes=nodes, gpus_per_node=gpus_per_node, num_sglang_nodes=sglang_nodes)
    planned = plan_config(load_config(config, overrides or []), allocation, hardware, assume or [])
    print(json.dumps(planned.to_dict()) if as_json else planned.to_text())


@command
def serve(
    config: ConfigArgument,
    host: Annotated[str, typer.Option(help="address of this node that every rank of the trainer reaches")],
    urls_file: Annotated[
        Path, typer.Option(callback=home_path, help="gets one url a line when all servers serve; gone at the end")
    ],
    overrides: OverridesArgument = None,
    log_dir: Annotated[
        Path | None, typer.Option(callback=home_path, help="of server_*.log  [default: run_dir/logs]")
    ] = None,
    index: Annotated[int, typer.Option(min=0, help="of this node among those with servers, from 0")] = 0,
) -> None:
    """Run SGLang servers on this node's GPUs until SIGTERM, for a trainer that attaches by rollout.sglang.urls."""
    loaded = load_config(config, overrides or [])
    raise_problems(file_problems(loaded))
    from megatron_sdsearch.sglang.serve import serve as run_servers

    run_servers(loaded, host=host, urls_file=urls_file, log_dir=log_dir, index=index)


def main() -> None:
    """Entry point of ``sdsearch`` and ``python -m megatron_sdsearch``."""
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", handlers=[_StandardError()]
    )
    # megatron says at import, many times over, which GPU libraries it goes without, and announces its own renames.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)  # at each resume
    app()


def _fail(error: BaseException, *, failure: int) -> NoReturn:
    """Print what went wrong if no other rank has failed before, leave it to torchrun, and exit.

    Args:
        error: that ended the command.
        failure: the exit code for whatever is neither ConfigError nor DataError.
    """
    message, code = f"{type(error).__name__}: {error}", failure
    if isinstance(error, KeyboardInterrupt):
        if _rank() == 0:
            print("interrupted, with nothing to save at this point", file=sys.stderr)
        _exit(_INTERRUPTED)
    if isinstance(error, (ConfigError, DataError)):
        code = 2
    elif isinstance(error, RuntimeError) and _PEER_IS_GONE.search(str(error)):
        message = _LOST_PEER  # a collective broke: that rank, or what ended it, is the cause
    elif not isinstance(error, SDSearchError):
        message = "".join(traceback.format_exception(error)).rstrip()
    is_first = _is_first_to_fail()
    if is_first:
        print(message, file=sys.stderr)
    # A lost peer's launcher knows what became of it, and sees it in the next seconds.
    _leave_to_torchrun(message if is_first else _LOST_PEER, is_cause=is_first and message != _LOST_PEER)
    _exit(code)


def _leave_to_torchrun(message: str, *, is_cause: bool) -> None:
    """Write the error where torchrun looks for it, as torch's ``record`` does, which ``os._exit`` would pass by.

    torchrun reports the failure with the earliest time, in whole seconds: that of a rank that only followed is later.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    when = int(time.time()) + (0 if is_cause else _FOLLOWED_S)
    extra = {"py_callstack": message, "timestamp": str(when)}
    with suppress(OSError):  # it is torchrun's own folder; the message has been printed
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def _is_first_to_fail() -> bool:
    """True on one rank only, the first to ask.

    Before ``init_process_group`` a node's first rank prints at once; the others wait, for torchrun ends all ranks when
    one exits, and print only if they are still running then: the failure is theirs alone.
    """
    dist = sys.modules.get("torch.distributed")  # not loaded: a command without torch, or too early to have met
    if dist is None or not dist.is_initialized():
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(HEAD_START_S)
        return True
    try:
        return bool(dist.distributed_c10d._get_default_store().add("megatron_sdsearch/failed", 1) == 1)
    except RuntimeError:  # the store went down with its host: better said twice than not at all
        return True


def _exit(code: int) -> NoReturn:
    """Leave at once: destructors of process groups would wait for peers that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()  # would outlive us and hold our output open
    os._exit(code)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say(line: str) -> None:
    print(line, flush=True)


def _first_line(config: Path, loaded: RunConfig) -> str:
    world, parallel = int(os.environ.get("WORLD_SIZE", "1")), loaded.parallel
    replicas = world // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    ranks = f"{world} rank{'s' if world > 1 else ''}"
    layout = f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} x DP {replicas}"
    return f"sdsearch train: {config} -> {loaded.run_dir}; {ranks}: {layout}"


def _last_lines(config: RunConfig, outcome: Outcome) -> list[str]:
    """How the run ended, what it left and where, and what to do next."""
    from megatron_sdsearch.model.checkpoint_folder import folder_name
    from megatron_sdsearch.report.page import PAGE_FILE
    from megatron_sdsearch.training.run_record import config_path

    run_dir, step = config.run_dir, outcome.step
    if outcome.stopped_by:
        saved = f"saved and stopped at step {step}" if step else "stopped before the first step, with nothing to save"
        return [f"{saved} ({outcome.stopped_by}); the same command continues from here"]
    lines = [f"finished at step {step}: raise train.num_steps to go on"]
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
    """Writes to what ``sys.stderr`` is at the time: the progress display takes its place, to keep the bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; a stream that cannot be written is no reason to end a run."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # noqa: BLE001
            self.handleError(record)

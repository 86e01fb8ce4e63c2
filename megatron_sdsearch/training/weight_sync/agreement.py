"""Work that any rank may fail at, with all ranks knowing."""

from __future__ import annotations

from collections.abc import Callable

from megatron_sdsearch.errors import ConfigError, EngineError
from megatron_sdsearch.parallel.groups import ParallelState


def together(parallel: ParallelState, work: Callable[[], None]) -> None:
    """Run ``work`` on every rank, and wait for all.

    Raises:
        EngineError: on every rank, when ``work`` raised EngineError or OSError on any; with all their words, and with
            each rank's name unless all say the same.
        ConfigError: on every rank, when ``work`` raised it on any: the first one.
    """
    failure, refusal = "", None
    try:
        work()
    except (EngineError, OSError) as error:
        failure = str(error) or repr(error)
    except ConfigError as error:
        refusal = (error.field, error.problem, error.fix)
    gathered = parallel.all_gather_object((failure, refusal))
    refusals = [refusal for _, refusal in gathered if refusal is not None]
    if refusals:
        raise ConfigError(*refusals[0])
    failures = [failure for failure, _ in gathered]
    if len(set(failures)) == 1 and failures[0]:  # they have agreed on it before, in a call inside ``work``
        raise EngineError(failures[0])
    named = [f"rank {rank}: {words}" for rank, words in enumerate(failures) if words]
    if named:
        raise EngineError("; ".join(named))

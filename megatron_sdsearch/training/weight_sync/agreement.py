"""Work that any rank may fail at, with all ranks knowing."""

from __future__ import annotations

from collections.abc import Callable

from megatron_sdsearch.errors import EngineError
from megatron_sdsearch.parallel.groups import ParallelState


def together(parallel: ParallelState, work: Callable[[], None]) -> None:
    """Run ``work`` on every rank, and wait for all.

    Raises:
        EngineError: on every rank, when ``work`` raised EngineError or OSError on any; with all their words, and with
            each rank's name unless all say the same.
    """
    failure = ""
    try:
        work()
    except (EngineError, OSError) as error:
        failure = str(error) or repr(error)
    failures = parallel.all_gather_object(failure)
    if len(set(failures)) == 1 and failures[0]:  # they have agreed on it before, in a call inside ``work``
        raise EngineError(failures[0])
    named = [f"rank {rank}: {words}" for rank, words in enumerate(failures) if words]
    if named:
        raise EngineError("; ".join(named))

"""Every error that this package raises on purpose.

SDSearchError
|-- ConfigError             a setting is wrong: names field, value and fix; exit code 2
|-- DataError               a file with questions, passages or weights is wrong: names file and line; exit code 2
|-- RetrievalError          the search engine failed (never: it found nothing)
|   `-- RetrievalDownError      no search has succeeded for a long time: the run stops
|-- EngineError             the rollout engine failed or refused a request
|   |-- ServerRefusedError      a server refused a request, and would refuse it again
|   `-- ServerUnavailableError  no usable answer: another server may give it, or this one later
|-- AlignmentError          teacher and student disagree about a response token: a bug, never data
|-- TrainingError           the update cannot go on (loss not finite, too many failed searches)
|-- StorageError            a file of the run cannot be written: full disk or no permission
|-- CheckpointError         a checkpoint is missing, incomplete or does not fit
`-- VerificationError       a converted model does not compute what its source does
"""

from collections.abc import Iterable

HEAD_START_S = 5.0
"""Seconds that other ranks wait before they report a failure: rank 0 may have its cause."""


class SDSearchError(Exception):
    """Base of all errors raised on purpose; its text is one message for the user."""


class ConfigError(SDSearchError):
    """A setting is wrong.

    Attributes:
        field: dotted path of the setting, e.g. ``parallel.tensor_model_parallel_size``.
        problem: what is wrong with it.
        fix: what to do about it, in one clause.
    """

    def __init__(self, field: str, problem: str, fix: str) -> None:
        super().__init__(f"{field}: {problem}; {fix}")
        self.field = field
        self.problem = problem
        self.fix = fix


class DataError(SDSearchError):
    """A file with questions, passages, a tokenizer or weights is missing or malformed."""


class RetrievalError(SDSearchError):
    """The search engine failed. "No hits" is not an error and never looks like one.

    Attributes:
        query: the whole query that failed; None when the error is not about one.
        num_attempts: requests that contained it.
        cause: why the last attempt failed; also part of the message.
    """

    def __init__(self, message: str, *, query: str | None = None, num_attempts: int = 0, cause: str = "") -> None:
        super().__init__(message)
        self.query = query
        self.num_attempts = num_attempts
        self.cause = cause


class RetrievalDownError(RetrievalError):
    """No search has succeeded for ``down_timeout_s``; ends the run, not just one trajectory."""


class EngineError(SDSearchError):
    """The rollout engine failed or was given a request it must refuse."""


class ServerRefusedError(EngineError):
    """A sampling server refused a request; never retried.

    Attributes:
        status: HTTP status; 200 when only the body reports the failure.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ServerUnavailableError(EngineError):
    """A sampling server could not be reached, failed, or gave an unusable answer.

    Attributes:
        is_timeout: it did not answer in time, and may still be processing the request.
    """

    def __init__(self, message: str, *, is_timeout: bool = False) -> None:
        super().__init__(message)
        self.is_timeout = is_timeout


class AlignmentError(SDSearchError):
    """Teacher and student sequences disagree about a response token."""


class TrainingError(SDSearchError):
    """Training cannot continue without doing harm."""


class StorageError(SDSearchError):
    """A file of the run cannot be written; names it and the free space. Earlier contents are unharmed."""


class CheckpointError(SDSearchError):
    """A checkpoint is missing, incomplete, or does not fit the model."""


class ContinuationError(CheckpointError):
    """A checkpoint belongs to another run, which this configuration does not continue; nothing of it was changed."""


class VerificationError(SDSearchError):
    """A converted model does not compute what its source does."""


def cause_of(error: BaseException) -> str:
    """Return a library exception's message on one line, or its class if it has none, as many socket errors."""
    text = " ".join(str(error).split())
    if text:
        return text
    return "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__


def as_config_error(error: SDSearchError, field: str) -> ConfigError:
    """Turn an error about a file or a server into one about the setting that names it."""
    if isinstance(error, ConfigError):
        return error
    # Messages of this project end with their fix, after a semicolon.
    problem, _, fix = str(error).rpartition("; ")
    return ConfigError(field, problem or fix, fix if problem else "see the message")


def raise_problems(problems: Iterable[SDSearchError]) -> None:
    """Raise one error of the first problem's class that lists all problems, a line each.

    Raises:
        SDSearchError: there is a problem.
    """
    found = list(problems)
    if not found:
        return
    first, others = found[0], "".join(f"\n{problem}" for problem in found[1:])
    if isinstance(first, ConfigError):
        raise ConfigError(first.field, first.problem, first.fix + others)
    raise type(first)(f"{first}{others}") if others else first

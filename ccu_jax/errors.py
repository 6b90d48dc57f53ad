"""Errors that end a run in one line, and the exit code of each."""

import errno
import os
import unicodedata
from collections.abc import Sequence

RETRY_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: rerun the same command later


class UserError(Exception):
    """An error that the user can fix; its one-line message names the remedy.

    `launch.py` prints it without a traceback and exits with code 2.
    """


class RetryableError(UserError):
    """A temporary error: exit code 75; rerunning the same command may succeed."""


class Preempted(Exception):
    """Raised in all processes of a run after SIGTERM, so that they exit together."""


def exit_code(error: Exception) -> int:
    """Returns the exit code of a process that fails with this error."""
    return RETRY_EXIT_CODE if isinstance(error, RetryableError) else 2


# Characters that change the direction of text.
_DIRECTION_MARKS = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


def replace_unprintable(text: str) -> str:
    """Replaces characters that could control a terminal or that cannot be encoded."""

    def is_printable(c):
        is_control = unicodedata.category(c) in ("Cc", "Cs") or c in _DIRECTION_MARKS
        return c == "\n" or not is_control

    return "".join(c if is_printable(c) else "\ufffd" for c in text)


_RESUME = "rerun the same command to resume"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
# Raised, for example, while a network file system is unreachable.
_TRANSIENT = (
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EBUSY, errno.ETIMEDOUT),
    *(errno.EMFILE, errno.ENFILE),
)
_WRONG_FILE_TYPE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


def user_error_for(error: BaseException | None) -> UserError | None:
    """Returns the `UserError` for a disk or memory error, or None for other errors.

    Checks the error first and then the errors that caused it.
    """
    first = error
    while error is not None:
        if user_error := _to_user_error(error, is_first=error is first):
            return user_error
        is_hidden = error.__suppress_context__
        error = error.__cause__ or (None if is_hidden else error.__context__)
    return None


def is_transient(error: BaseException) -> bool:
    """Returns whether a read failed for a reason other than the file's content."""
    codes = (*_TRANSIENT, errno.EACCES, errno.EPERM, errno.ENOMEM)
    return _find_errno(error, codes) is not None or isinstance(error, MemoryError)


def missing_folder_message(folder: str | os.PathLike) -> str:
    """Returns the message for a folder that was removed during a run."""
    return (
        f"{folder}: missing; was it removed during the run? Rerun the same command to "
        "resume from what is left"
    )


def _to_user_error(error: BaseException, is_first: bool) -> UserError | None:
    """Returns the `UserError` for `error` without considering its causes, or None."""
    path, first_line = getattr(error, "filename", None), str(error).partition("\n")[0]
    if _find_errno(error, _DISK_FULL) is not None:
        place = f" at {path}" if path else ""
        return UserError(f"no space left{place}; free some, then {_RESUME}")
    for codes, error_type, remedy in (
        (_DENIED, UserError, f"make it accessible, then {_RESUME}"),
        (_TRANSIENT, RetryableError, f"may be temporary: {_RESUME}"),
    ):
        if (code := _find_errno(error, codes)) is not None:
            place = path if isinstance(error, OSError) else first_line[:200]
            words = f"{os.strerror(code)}: {place}" if place else os.strerror(code)
            return error_type(f"{words}; {remedy}")
    # A cause may have been handled already, so only the outermost error counts.
    code = getattr(error, "errno", None)
    if is_first and path and code in _WRONG_FILE_TYPE:
        return UserError(f"{path}: wrong file type ({os.strerror(code)}); remove it")
    if isinstance(error, FileNotFoundError) and isinstance(path, str | os.PathLike):
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.exists(folder):
            return UserError(missing_folder_message(folder))
    is_exhausted = "RESOURCE_EXHAUSTED" in str(error)  # raised by JAX
    if is_exhausted or isinstance(error, MemoryError) or code == errno.ENOMEM:
        return UserError(
            "out of memory; use smaller batches (train.batch, finetune.batch, "
            f"run.evaluate_batch) or more devices ({first_line[:200]})"
        )
    return None


def _find_errno(error: BaseException, codes: Sequence[int]) -> int | None:
    """Returns the first of these errno codes that the error has or describes."""
    if isinstance(error, OSError):
        return error.errno if error.errno in codes else None
    return next((code for code in codes if os.strerror(code) in str(error)), None)

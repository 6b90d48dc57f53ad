"""What goes wrong and a user can mend."""

import errno
import os
import unicodedata


class UserError(Exception):
    """Wrong input: one line that says what is wrong, where, and the remedy.

    `launch.py` prints it without a traceback and leaves with exit code 2.
    """


class PassingError(UserError):
    """What may be over when the same command is given again: exit code 75.

    Whoever starts jobs again, as clusters do, then does so.
    """


# Control codes; halves of characters, which cannot be written; what turns text round.
_STEERING = ("Cc", "Cs")
_TURNING = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


def printable(text: str) -> str:
    """The text without control codes: what comes from data must not steer a screen."""
    return "".join(
        "\ufffd"
        if c != "\n" and (unicodedata.category(c) in _STEERING or c in _TURNING)
        else c
        for c in text
    )


_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
# As of a mount that is gone for a while.
_PASSING = (
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EBUSY, errno.ETIMEDOUT),
    *(errno.EMFILE, errno.ENFILE),
)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


def disk(error: BaseException | None) -> UserError | None:
    """Says what a full disk, a refused file or a folder that went means; else None.

    And that there is too little memory.
    """
    first = error
    while error is not None:
        told = _full(error) or _refused(error, error is first) or _memory(error)
        if told is not None:
            return told
        hidden = error.__suppress_context__
        error = error.__cause__ or (None if hidden else error.__context__)
    return None


def passes(error: BaseException) -> bool:
    """Whether a file could not be read for reasons that are none of the file's."""
    codes = (*_PASSING, errno.EACCES, errno.EPERM, errno.ENOMEM)
    if isinstance(error, OSError):
        return error.errno in codes
    words = str(error)
    told = any(os.strerror(code) in words for code in codes)
    return told or isinstance(error, MemoryError)


def _full(error) -> UserError | None:
    words = _words(error)
    if getattr(error, "errno", None) not in _FULL and not any(
        os.strerror(full) in words for full in _FULL
    ):
        return None
    where = getattr(error, "filename", None)
    at = f" at {where}" if where else ""
    return UserError(f"no space left{at}; free some, then the same command goes on")


def _refused(error, outermost) -> UserError | None:
    code = error.errno if isinstance(error, OSError) else None
    where, words = getattr(error, "filename", None), _words(error)
    for codes, kind, more in (
        (_DENIED, UserError, "; where this may write, the same command goes on"),
        (_PASSING, PassingError, "; when that is over, the same command goes on"),
    ):
        if code in codes:
            return kind(f"{os.strerror(code)}{f': {where}' if where else ''}{more}")
        for one in codes:
            if os.strerror(one) in words:
                return kind(f"{os.strerror(one)}: {_one(words)}{more}")
    # What was met on the way to another error may have been dealt with.
    if outermost and code in _IN_THE_WAY and where:
        return UserError(f"{where} is in the way ({os.strerror(code)}): remove it")
    if code == errno.ENOENT and isinstance(where, str | os.PathLike):
        folder = os.path.dirname(os.path.abspath(where))
        if not os.path.exists(folder):
            return UserError(gone(folder))
    return None


def _memory(error) -> UserError | None:
    words = _words(error)
    full = getattr(error, "errno", None) == errno.ENOMEM
    if not full and not isinstance(error, MemoryError):
        if "RESOURCE_EXHAUSTED" not in words:
            return None
    return UserError(
        "out of memory: give smaller batches (train.batch, finetune.batch, "
        f"run.evaluate_batch), or more devices ({_one(str(error))})"
    )


def _words(error) -> str:
    """Libraries in C++ raise errors of their own, with the system's words in them."""
    return "" if isinstance(error, OSError) else str(error)


def _one(words: str) -> str:
    """The first of many words of a library."""
    return (words.splitlines() or [""])[0][:200]


def gone(folder: str | os.PathLike) -> str:
    """Says what it means that a folder was removed under a run."""
    return (
        f"{folder} is gone: was it removed while the run was at work? The same command "
        "goes on from what is left"
    )

"""What goes wrong and a user can mend."""

import errno
import os


class UserError(Exception):
    """Wrong input: one line that says what is wrong, where, and the remedy.

    `launch.py` prints it without a traceback and leaves with exit code 2.
    """


def printable(text: str) -> str:
    """The text without control codes: what comes from data must not steer a screen."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.ENOTCONN, errno.EBUSY, errno.EFBIG),
)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


def disk(error: BaseException | None) -> str | None:
    """Says what a full disk, a refused file or a folder that went means; else None.

    And that there is too little memory.
    """
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        where = getattr(error, "filename", None)
        # Libraries in C++ raise errors of their own, with the system's words in them.
        words = "" if isinstance(error, OSError) else str(error)
        if code in _FULL or any(os.strerror(full) in words for full in _FULL):
            at = f" at {where}" if where else ""
            return f"no space left{at}; free some, then the same command goes on"
        if code in _DENIED:
            return f"{os.strerror(code)}: {where}"
        if code in _IN_THE_WAY and where:
            return f"{where} is in the way ({os.strerror(code)}): remove it"
        for denied in _DENIED:
            if os.strerror(denied) in words:
                return f"{os.strerror(denied)}: {_one(words)}"
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in words:
            return (
                "out of memory: give smaller batches (train.batch, finetune.batch, "
                f"run.evaluate_batch), or more devices ({_one(words)})"
            )
        if code == errno.ENOENT and isinstance(where, str | os.PathLike):
            folder = os.path.dirname(os.path.abspath(where))
            if not os.path.exists(folder):
                return gone(folder)
        error = error.__cause__ or error.__context__
    return None


def _one(words: str) -> str:
    """The first of many words of a library."""
    return (words.splitlines() or [""])[0][:200]


def gone(folder: str | os.PathLike) -> str:
    """Says what it means that a folder was removed under a run."""
    return (
        f"{folder} is gone: was it removed while the run was at work? The same command "
        "goes on from what is left"
    )

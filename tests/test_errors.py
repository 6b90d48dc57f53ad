"""Errors of the disk and of memory become one line with a remedy."""

import errno

import pytest

from ccu_jax.errors import exit_code, replace_unprintable, user_error_for


@pytest.mark.parametrize(
    "error, words, code",
    [
        (OSError(errno.ENOSPC, "", "x.npz"), "no space left at x.npz; free some", 2),
        (RuntimeError("write: No space left on device [x]"), "no space left; free", 2),
        (PermissionError(errno.EACCES, "", "x.npz"), "Permission denied: x.npz", 2),
        (ValueError("a [b]: Read-only file system [x]\nc"), "Read-only file system", 2),
        (
            FileExistsError(errno.EEXIST, "", "/w/audits"),
            "/w/audits: wrong file type",
            2,
        ),
        (FileNotFoundError(errno.ENOENT, "", "/no/x"), "/no: missing; was it", 2),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), "use smaller batches", 2),
        (OSError(errno.ENOMEM, ""), "use smaller batches", 2),
        (MemoryError(), "use smaller batches", 2),
        (RuntimeError("x: Transport endpoint is not connected"), "connected: x: T", 75),
        (OSError(errno.ESTALE, "", "/w/a.json"), "/w/a.json; may be temporary", 75),
        (OSError(errno.ETIMEDOUT, ""), "timed out; may be temporary", 75),
        (OSError(errno.EMFILE, "", "/w/b"), "Too many open files: /w/b", 75),
    ],
)
def test_errors_of_the_system_name_the_file_and_the_remedy(error, words, code):
    outer = ValueError("could not save")
    outer.__cause__ = error
    for raised in (error, outer) if "wrong file type" not in words else (error,):
        found = user_error_for(raised)
        assert found is not None and words in str(found)
        assert exit_code(found) == code


@pytest.mark.parametrize(
    "error", [ValueError("bug"), FileNotFoundError("x"), ImportError("ccu_jax.x"), None]
)
def test_unknown_errors_are_bugs(error):
    assert user_error_for(error) is None


@pytest.mark.parametrize("is_hidden", [True, False])
def test_an_error_handled_before_another_is_not_reported(is_hidden):
    error = TypeError("bug")
    error.__suppress_context__ = is_hidden
    error.__context__ = FileExistsError(errno.EEXIST, "exists", "/w/precious")
    assert user_error_for(error) is None
    error.__context__ = OSError(errno.ENOSPC, "full")
    assert (user_error_for(error) is None) == is_hidden


def test_only_control_characters_are_replaced():
    spaces, joined = "\u00a0\u202f\u2009\u3000", "\u0645\u200c\u062e \U0001f468\u200d"
    harmless = f"caf\u00e9{spaces}\n{joined}"
    assert replace_unprintable(harmless) == harmless
    for control in "\x00\x1b\r\t\x7f\x9b\u202e\u2066\u200f\ud800":
        assert replace_unprintable(f"a{control}b") == "a\ufffdb"

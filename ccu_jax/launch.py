"""This is *the process*; `launch/` is how one process per host is started.

Flags -> environment -> configuration -> other hosts -> `run.run` -> exit code. The only
file that reads flags or environment. Whatever imports JAX is imported after that.
"""

import argparse
import ast
import contextlib
import os
import pathlib
import signal
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Sequence
from typing import NoReturn

from ccu_jax import errors
from ccu_jax.config import flags
from ccu_jax.config.loading import available_configs, load_config
from ccu_jax.config.schema import Config, check_values, replace_value
from ccu_jax.config.validation import suggest
from ccu_jax.distributed import preemption
from ccu_jax.errors import UserError, printable, user_error_for

_NPROC = "32"
_STOPPED = "stopped; rerun the same command to resume"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    0, 2 (wrong input), 75 (told to leave, or what may pass: the same again, later),
    76 (another process is lost, see `peers.py`) or 130 (stopped).

    Args:
        argv: The flags; those of the process by default.
    """
    try:
        return _main(argv)
    except UserError as error:
        told = error
    except KeyboardInterrupt:
        print(_STOPPED, file=sys.stderr)
        return 130
    except BrokenPipeError as error:
        if error.filename is not None:
            raise
        return _unread()
    except errors.Preempted:
        print(preemption.MESSAGE, file=sys.stderr)
        return errors.RETRY_EXIT_CODE
    except errors.PeerLost as error:
        told = error
    except ModuleNotFoundError as error:
        if (error.name or "ccu_jax").startswith("ccu_jax"):
            raise
        told = UserError(
            f"{error.name} is not installed for {sys.executable}: activate the "
            "environment that ccu_jax was installed into, or `pip install .`"
        )
    except Exception as error:
        # Who is lost may leave words of a disk behind.
        told = _lost(error) or user_error_for(error)
        if told is None:
            raise
    # In one piece, as threads of libraries may be writing too.
    line = printable(" ".join(str(told).splitlines()))
    print(f"error: {line}\n", end="", file=sys.stderr)
    return errors.exit_code(told)


def _unread() -> int:
    """Ends what was piped into a program that has read enough."""
    with contextlib.suppress(OSError):
        # What is still to be written would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"nobody reads what this prints: {_STOPPED}", file=sys.stderr)
    return 130


def _lost(error: Exception) -> errors.PeerLost | None:
    """Says that another process was lost, where that is what has happened."""
    processes = sys.modules.get(
        "ccu_jax.distributed.hosts"
    )  # else there is but this one
    return processes and processes.failed(error)


def _main(argv: Sequence[str] | None) -> int:
    given = flags.read(argv)
    _set_environment(given.devices)
    if given.list:
        _list()
        return 0
    hosts = flags.hosts(given.multihost)
    config = _config(given)
    workdir = _writable(given.workdir or pathlib.Path("runs") / config.name)
    if hosts is not None:
        from ccu_jax.distributed import hosts as processes

        with processes.patient():
            processes.join_hosts(hosts)
    _keep_compiled()

    if given.tune:
        from ccu_jax.experiments import tune

        tune.tune(config, workdir, given.tune)
    elif given.ablate:
        from ccu_jax.experiments import ablate

        ablate.ablate(config, workdir)
    else:
        from ccu_jax.experiments import run

        run.run(config, workdir, given.purge, given.audit, given.shadows)
    return 0


def _set_environment(devices: int | None) -> None:
    """Sets what must be known before JAX (and TensorFlow) are imported."""
    # TensorFlow reads both and prints several lines without them.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    if devices is None:
        return
    flag = "--xla_force_host_platform_device_count"
    others = [f for f in os.environ.get("XLA_FLAGS", "").split() if flag not in f]
    os.environ["XLA_FLAGS"] = " ".join([*others, f"{flag}={devices}"])
    # Simulated devices wait for each other in XLA's thread pool. With no more threads
    # than cores they never all get one, and XLA aborts after a minute.
    os.environ["NPROC"] = str(max(int(_NPROC), 2 * devices))
    # Else a GPU, if there is one, would be used and the simulated devices would not.
    os.environ["JAX_PLATFORMS"] = "cpu"


def _list() -> None:
    from ccu_jax.data import DATASETS
    from ccu_jax.methods import METHODS

    print("configs:")
    for name, path in available_configs().items():
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        print(f"  {name:12} {doc.partition(chr(10))[0]}")
    print(textwrap.fill("methods:   " + ", ".join(METHODS), subsequent_indent=" " * 11))
    print("data sets:", ", ".join(DATASETS))


def _config(given: argparse.Namespace) -> Config:
    """Loads the configuration, applies the flags and checks what is in it."""
    from ccu_jax.methods import METHODS

    config = load_config(given.config, given.set)
    if given.methods == ["all"]:
        given.methods = list(METHODS)
    values = {
        "data.dir": given.data_dir and str(given.data_dir),
        "methods": given.methods,
        "seeds": given.seeds,
        "unlearn.rule": given.unlearn,
    }
    for key, value in values.items():
        if value is not None:
            config = replace_value(config, key, value)
    for name, values in (("methods", config.methods), ("seeds", config.seeds)):
        if not values:
            raise UserError(f"{name}: none is given")
        if twice := {v for v in values if values.count(v) > 1}:
            raise UserError(f"{name}: {min(twice)} is given more than once")
    for method in config.methods:
        if method not in METHODS:
            raise UserError(
                f"there is no method {method!r}; {suggest(method, METHODS)}"
            )
    check_values(config)
    return config


def _writable(workdir: pathlib.Path) -> pathlib.Path:
    """Makes the folder and writes to it, so that a run cannot fail there at its end."""
    try:
        workdir = workdir.resolve()
        # Its files say who was forgotten. A folder that exists stays as open as it is.
        workdir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(
            f"cannot write to {workdir}: {error.strerror or error}; "
            "give another folder with --workdir"
        ) from error
    return workdir


def _keep_compiled() -> None:
    """Lets the next run reuse what this one compiles, unless the user has said where.

    What lies there is code that is run: it is a folder of the user's own, and not one
    of a working folder that may come from somebody else.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    above = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(above):
        above = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(above):  # no home: each run compiles for itself
        return
    cache = pathlib.Path(above, "ccu_jax")
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # or one that cannot be written
        return

    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _stop(*_) -> NoReturn:
    """Ends the process at Ctrl-C, at once.

    Not by an exception: one that comes up inside of a library may be swallowed there,
    become an ImportError, or crash threads that are still at work. What is on the disk
    is whole at any moment.
    """
    with contextlib.suppress(Exception):  # it may just be writing
        sys.stdout.flush()
    show_cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""
    os.write(2, f"{show_cursor}{_STOPPED}\n".encode())
    os._exit(130)


def _leave() -> NoReturn:
    """Runs `main` and ends the process."""
    # Where it is ignored (nohup), or somebody else's, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    preemption.install()
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        code = _unread()
    except BaseException as error:
        code = 1
        if isinstance(error, SystemExit):  # --help and --version
            code = error.code if isinstance(error.code, int) else 1
        else:
            traceback.print_exc()
    processes = sys.modules.get("ccu_jax.distributed.hosts")
    if code == 0 and (processes is None or processes.process_index_and_count()[1] == 1):
        sys.exit(0)
    # An orderly exit waits for the other hosts, who may be gone by now, and for threads
    # of libraries, which say in many lines what has been said in one.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave()

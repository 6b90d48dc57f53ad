"""The entry point of one process; the scripts in `launch/` start one per host.

Flags -> environment -> configuration -> hosts -> experiment -> exit code. No other
module reads flags or sets JAX's environment, so JAX is imported after that.
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
from ccu_jax.config.schema import Config, replace_value
from ccu_jax.config.validation import suggest
from ccu_jax.distributed import preemption
from ccu_jax.errors import UserError, replace_unprintable, user_error_for

_MIN_XLA_THREADS = 32
_STOPPED = "stopped; rerun the same command to resume"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command selected by `argv` (default: `sys.argv[1:]`).

    Returns the exit code: 0, 2 (user error), 75 (preempted or a temporary error; rerun
    the command) or 130 (interrupted).
    """
    try:
        return _run_command(argv)
    except UserError as error:
        message = error
    except KeyboardInterrupt:
        print(_STOPPED, file=sys.stderr)
        return 130
    except BrokenPipeError as error:
        if error.filename is not None:
            raise
        return _report_closed_pipe()
    except errors.Preempted:
        print(preemption.MESSAGE, file=sys.stderr)
        preemption.disconnect()
        return errors.RETRY_EXIT_CODE
    except ModuleNotFoundError as error:
        if (error.name or "ccu_jax").startswith("ccu_jax"):
            raise
        message = UserError(
            f"{error.name} is not installed for {sys.executable}; activate the "
            "environment of ccu_jax, or run `pip install .`"
        )
    except Exception as error:
        # Checked first: a lost host may surface as a disk error. If the module is not
        # imported, there are no other hosts.
        lost_hosts = sys.modules.get("ccu_jax.distributed.lost_hosts")
        message = lost_hosts and lost_hosts.lost_host_error(error)
        message = message or user_error_for(error)
        if message is None:
            raise
    # A single write, because threads of libraries may write at the same time.
    line = replace_unprintable(" ".join(str(message).splitlines()))
    print(f"error: {line}\n", end="", file=sys.stderr)
    return errors.exit_code(message)


def _report_closed_pipe() -> int:
    """Reports on stderr that stdout is closed, and returns the exit code."""
    with contextlib.suppress(OSError):
        # Flushing stdout at exit would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"output pipe closed; {_STOPPED}", file=sys.stderr)
    return 130


def _run_command(argv: Sequence[str] | None) -> int:
    """Parses the flags, runs the experiment and returns exit code 0."""
    args = flags.parse_flags(argv)
    _set_environment(args.devices)
    if args.list:
        _print_choices()
        return 0
    addresses = flags.parse_hosts(args.multihost)
    config = _build_config(args)
    workdir = _create_workdir(args.workdir or pathlib.Path("runs") / config.name)
    if addresses is not None:
        from ccu_jax.distributed import hosts

        hosts.join_hosts(addresses)
    _set_compilation_cache()

    if args.tune:
        from ccu_jax.experiments import tune

        tune.tune(config, workdir, args.tune)
    elif args.ablate:
        from ccu_jax.experiments import ablate

        ablate.ablate(config, workdir)
    else:
        from ccu_jax.experiments import run

        run.run(config, workdir, args.purge, args.audit, args.shadows)
    return 0


def _set_environment(num_devices: int | None) -> None:
    """Sets the variables that JAX and TensorFlow read when they are imported."""
    # Without these, TensorFlow logs several lines.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    if num_devices is None:
        return
    flag = "--xla_force_host_platform_device_count"
    other_flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if flag not in f]
    os.environ["XLA_FLAGS"] = " ".join([*other_flags, f"{flag}={num_devices}"])
    # Simulated devices wait for each other in XLA's thread pool. With no more threads
    # than cores they never all get one, and XLA aborts after a minute.
    os.environ["NPROC"] = str(max(_MIN_XLA_THREADS, 2 * num_devices))
    # Otherwise JAX would use a GPU, if there is one, instead of the simulated devices.
    os.environ["JAX_PLATFORMS"] = "cpu"


def _print_choices() -> None:
    """Prints the names of all configurations, methods and data sets."""
    from ccu_jax.data import DATASETS
    from ccu_jax.methods import METHODS

    print("configs:")
    for name, path in available_configs().items():
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        print(f"  {name:12} {doc.partition(chr(10))[0]}")
    print(textwrap.fill("methods:   " + ", ".join(METHODS), subsequent_indent=" " * 11))
    print("data sets:", ", ".join(DATASETS))


def _build_config(args: argparse.Namespace) -> Config:
    """Loads the configuration, applies the flags and checks the result."""
    from ccu_jax.methods import METHODS

    config = load_config(args.config, args.set)
    values = {
        "data.dir": args.data_dir and str(args.data_dir),
        "methods": list(METHODS) if args.methods == ["all"] else args.methods,
        "seeds": args.seeds,
        "unlearn.rule": args.unlearn,
    }
    for key, value in values.items():
        if value is not None:
            config = replace_value(config, key, value)
    for key, items in (("methods", config.methods), ("seeds", config.seeds)):
        if not items:
            raise UserError(f"{key}: empty list; pass at least one with --{key}")
        if repeated := {item for item in items if items.count(item) > 1}:
            raise UserError(f"{key}: {min(repeated)} is repeated; pass each only once")
    for method in config.methods:
        if method not in METHODS:
            raise UserError(f"methods: unknown {method!r}; {suggest(method, METHODS)}")
    return config


def _create_workdir(workdir: pathlib.Path) -> pathlib.Path:
    """Creates the working folder, checks that it is writable and returns its path."""
    try:
        workdir = workdir.resolve()
        # Only for the owner, because its files name the unlearned images. An existing
        # folder keeps its mode.
        workdir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(
            f"{workdir}: cannot be written ({error.strerror or error}); choose another "
            "folder with --workdir"
        ) from error
    return workdir


def _set_compilation_cache() -> None:
    """Enables JAX's persistent compilation cache, unless the user has configured one.

    The cache is in the user's home and not in the working folder, because its content
    is executed and a working folder may come from somebody else.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    parent = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(parent):
        parent = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(parent):  # no home folder: no cache
        return
    cache = pathlib.Path(parent, "ccu_jax")
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # not writable: no cache
        return

    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _exit_on_interrupt(*_) -> NoReturn:
    """Ends the process immediately on Ctrl-C.

    Raising an exception is not enough: a library may swallow it or turn it into an
    ImportError, or its threads may crash. Exiting is safe: writes are atomic.
    """
    with contextlib.suppress(Exception):  # stdout may be in the middle of a write
        sys.stdout.flush()
    show_cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""
    os.write(2, f"{show_cursor}{_STOPPED}\n".encode())
    os._exit(130)


def run_process() -> NoReturn:
    """Installs the signal handlers, runs `main` and exits with its exit code."""
    # SIGINT may be ignored (nohup) or handled by another program: leave that as it is.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_on_interrupt)
    preemption.install_handler()
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        code = _report_closed_pipe()
    except BaseException as error:
        code = 1
        if isinstance(error, SystemExit):  # --help and --version
            code = error.code if isinstance(error.code, int) else 1
        else:
            traceback.print_exc()
    hosts = sys.modules.get("ccu_jax.distributed.hosts")
    if code == 0 and (hosts is None or hosts.process_index_and_count()[1] == 1):
        sys.exit(0)
    # A normal exit would wait for other hosts, which may be lost, and for threads of
    # libraries, which would log errors after ours.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if code == 0:
        preemption.disconnect()
    elif hosts is not None:
        from ccu_jax.distributed import lost_hosts

        lost_hosts.delay_coordinator_exit()
    os._exit(code)


if __name__ == "__main__":
    run_process()

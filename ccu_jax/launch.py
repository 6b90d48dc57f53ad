"""This is *the process*; `launch/` is how one process per host is started.

Flags -> environment -> configuration -> other hosts -> `run.run` -> exit code. The only
file that reads flags or environment. Whatever imports JAX is imported after that.
"""

import argparse
import ast
import contextlib
import difflib
import os
import pathlib
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import NoReturn

import ccu_jax
from ccu_jax import config as configs
from ccu_jax import config_file, limits
from ccu_jax.config import Config
from ccu_jax.errors import UserError, disk
from ccu_jax.typed import closest

_EXAMPLES = """\
examples:
  python -m ccu_jax.launch --config mmimdb
  python -m ccu_jax.launch --config mmimdb --data-dir ~/mmimdb --seeds 0,1,2
  python -m ccu_jax.launch --config clipart --methods retrain,ccu --unlearn random:0.05
  python -m ccu_jax.launch --config my/own.py --set train.epochs=3
  python -m ccu_jax.launch --config tiny --devices 4
  once per host of a pod:
  python -m ccu_jax.launch --config mmimdb --multihost
  python -m ccu_jax.launch --config mmimdb --multihost 10.0.0.1:9911 2 0

A run that was stopped goes on when the same command is given again.
"""
_NPROC = "32"
_STOPPED = "stopped; the same command goes on from here"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 2 (wrong input) or 130 (stopped).

    Args:
        argv: The flags; those of the process by default.
    """
    try:
        return _main(argv)
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        print(_STOPPED, file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "ccu_jax").startswith("ccu_jax"):
            raise
        message = (
            f"{error.name} is not installed for {sys.executable}: activate the "
            "environment that ccu_jax was installed into, or `pip install .`"
        )
    except Exception as error:
        message = disk(error)
        if message is None:
            raise
    # In one piece, as threads of libraries may be writing too.
    print(f"error: {' '.join(message.splitlines())}\n", end="", file=sys.stderr)
    return 2


def _main(argv: Sequence[str] | None) -> int:
    flags = _flags(argv)
    _set_environment(flags.devices)
    if flags.list:
        _list()
        return 0
    hosts = _hosts(flags.multihost)
    config = _config(flags)
    workdir = _writable(flags.workdir or pathlib.Path("runs") / config.name)
    if hosts is not None:
        from ccu_jax import parallel

        parallel.join(hosts)
    _keep_compiled(workdir)

    if flags.tune:
        from ccu_jax import tune

        tune.tune(config, workdir, flags.tune)
    elif flags.ablate:
        from ccu_jax import ablate

        ablate.ablate(config, workdir)
    else:
        from ccu_jax import run

        run.run(config, workdir, purge=flags.purge)
    return 0


def _flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m ccu_jax.launch",
        description="Trains a classifier, makes it forget pictures, audits the result.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="NAME|FILE", help="a name of --list, or a file.py")
    add(
        "--workdir",
        metavar="DIR",
        type=_path,
        help="results, shared by all hosts; default runs/<config>",
    )
    add("--data-dir", metavar="DIR", type=_path, help="the files of the data set")
    add("--methods", metavar="A,B|all", type=_names, help="instead of the config's")
    add("--seeds", metavar="0,1", type=_numbers, help="instead of the config's")
    add(
        "--unlearn",
        metavar="RULE",
        help="random:, cluster: or memorised:SHARE, class: or group:NAME, ids:FILE",
    )
    add(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a field of the config (train.epochs=3); may be repeated",
    )
    add(
        "--multihost",
        nargs="*",
        metavar=("ADDRESS COUNT INDEX", ""),
        help="join the other hosts; without values where the cluster tells them",
    )
    add("--purge", action="store_true", help="then remove the forgotten pictures")
    add(
        "--tune",
        metavar="TRIALS",
        type=_count,
        help="instead: look for settings of the methods, on these seeds",
    )
    add(
        "--ablate",
        action="store_true",
        help="instead: what each part of the forms of CCU is worth",
    )
    add("--devices", metavar="N", type=_count, help="simulate N devices on the CPU")
    add("--list", action="store_true", help="configs, methods and data sets")
    add("--version", action="version", version=f"ccu_jax {ccu_jax.__version__}")
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [s for s in parser._option_string_actions if s.startswith("--")]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unknown argument {unknown[0]!r}{meant}")
    if flags.purge + bool(flags.tune) + flags.ablate > 1:
        raise UserError("--purge, --tune and --ablate do not go together: give one")
    if not (flags.config or flags.list):
        raise UserError(
            f"--config is missing; there are {', '.join(config_file.available())}, "
            "or give a path that ends in .py"
        )
    return flags


def _path(text: str) -> pathlib.Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return pathlib.Path(text).expanduser()


def _count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a count from 1 to 999")
    return int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not whole numbers with commas between, as 0,1,2"
        ) from None


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
    for name, path in config_file.available().items():
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        print(f"  {name:10} {doc.partition(chr(10))[0]}")
    print("methods:  ", ", ".join(METHODS))
    print("data sets:", ", ".join(DATASETS))


def _config(flags: argparse.Namespace) -> Config:
    """Loads the configuration, applies the flags and checks what is in it."""
    from ccu_jax.methods import METHODS

    config = config_file.load(flags.config, flags.set)
    if flags.methods == ["all"]:
        flags.methods = list(METHODS)
    given = {
        "data.dir": flags.data_dir and str(flags.data_dir),
        "methods": flags.methods,
        "seeds": flags.seeds,
        "unlearn.rule": flags.unlearn,
    }
    for key, value in given.items():
        if value is not None:
            config = configs.replace(config, key, value)
    for name, values in (("methods", config.methods), ("seeds", config.seeds)):
        if not values:
            raise UserError(f"{name}: none is given")
        if twice := {v for v in values if values.count(v) > 1}:
            raise UserError(f"{name}: {min(twice)} is given more than once")
    if not all(0 <= seed < 2**31 for seed in config.seeds):
        raise UserError(
            f"seeds: {min(config.seeds)} or another is not in 0..2147483647"
        )

    for method in config.methods:
        if method not in METHODS:
            raise UserError(
                f"there is no method {method!r}; {closest(method, METHODS)}"
            )
    limits.check(config)
    return config


def _writable(workdir: pathlib.Path) -> pathlib.Path:
    """Makes the folder and writes to it, so that a run cannot fail there at its end."""
    try:
        workdir = workdir.resolve()
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(
            f"cannot write to {workdir}: {error.strerror or error}; "
            "give another folder with --workdir"
        ) from error
    return workdir


def _hosts(values: Sequence[str] | None) -> dict[str, str | int] | None:
    """Reads the values of --multihost; None without the flag."""
    if not values:
        return None if values is None else {}
    if len(values) != 3 or not all(re.fullmatch("[0-9]+", v) for v in values[1:]):
        raise UserError(
            "--multihost takes no value or three, ADDRESS:PORT COUNT INDEX; there is "
            + repr(" ".join(values))
        )
    address, count, index = values[0], int(values[1]), int(values[2])
    if not re.fullmatch(r"\S+:[0-9]+", address):
        raise UserError(f"--multihost: {address!r} is not ADDRESS:PORT")
    if index >= count:
        raise UserError(f"--multihost: INDEX {index} is not below COUNT {count}")
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
    }


def _keep_compiled(workdir: pathlib.Path) -> None:
    """Lets the next run reuse what this one compiles, unless the user has said where.

    The cache lies beside the working folder, so that other runs there share it.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return

    import jax

    shared = os.access(workdir.parent, os.W_OK)
    cache = (workdir.parent if shared else workdir) / ".jax_cache"
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
    if "--multihost" not in sys.argv:
        sys.exit(main())
    try:
        code = main()
    except BaseException as error:
        code = 1
        if isinstance(error, SystemExit):  # --help and --version
            code = error.code if isinstance(error.code, int) else 1
        else:
            traceback.print_exc()
    if code == 0:
        sys.exit(0)
    # An orderly exit waits for the other hosts, who wait for this one.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave()

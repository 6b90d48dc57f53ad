"""The command line, and the scripts that call it."""

import errno
import importlib
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import types

import pytest

import ccu_jax
from ccu_jax import errors, launch
from ccu_jax.config.loading import available_configs, load_config
from ccu_jax.errors import RetryableError, UserError, printable

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / ".ci/run"])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Each test runs in an empty folder, with an environment of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    # Keeps `main` from changing JAX's settings in this process.
    monkeypatch.setitem(os.environ, "JAX_COMPILATION_CACHE_DIR", str(tmp_path))


class _Run(types.ModuleType):
    """Stands for `ccu_jax.run`: notes what it is called with, fails when told to."""

    def __init__(self):
        super().__init__("ccu_jax.experiments.run")
        self.calls, self.error = [], None

    def run(self, config, workdir, purge, audit, shadows):
        self.calls.append((config, workdir))
        self.audit = audit, shadows
        if self.error is not None:
            raise self.error
        return []


@pytest.fixture
def run(monkeypatch):
    """Replaces the run and the methods, so that only the command line is tested."""
    run, methods = _Run(), types.ModuleType("ccu_jax.methods")
    known = {name for c in available_configs() for name in load_config(c).methods}
    methods.METHODS = dict.fromkeys(known | {"first", "second"})
    for name, module in (("experiments.run", run), ("methods", methods)):
        package, _, leaf = f"ccu_jax.{name}".rpartition(".")
        monkeypatch.setitem(sys.modules, f"ccu_jax.{name}", module)
        monkeypatch.setattr(
            importlib.import_module(package), leaf, module, raising=False
        )
    return run


def _refused(capsys, *argv):
    """Runs the command, which must fail with one line and write nothing."""
    before = sorted(pathlib.Path().rglob("*"))
    assert launch.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert sorted(pathlib.Path().rglob("*")) == before
    return err


def _script(name, *argv, **env):
    return subprocess.run(
        ["bash", str(name), *argv],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_run_gets_the_config_and_a_folder_named_after_it(run, capsys):
    assert launch.main(["--config", "tiny"]) == 0
    ((config, workdir),) = run.calls
    assert config == load_config("tiny")
    assert workdir == pathlib.Path("runs/tiny").resolve() and workdir.is_dir()
    assert list(workdir.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_new_folder_is_the_owners_alone_and_another_stays_as_it_is(run):
    pathlib.Path("mine").mkdir()
    pathlib.Path("mine").chmod(0o755)
    for workdir, mode in (("new/run", 0o700), ("mine", 0o755)):
        assert launch.main(["--config", "tiny", "--workdir", workdir]) == 0
        assert stat.S_IMODE(pathlib.Path(workdir).stat().st_mode) == mode
    assert stat.S_IMODE(pathlib.Path("new").stat().st_mode) & 0o055


def test_compiled_programs_lie_in_a_folder_of_the_user_alone(run, monkeypatch):
    import jax

    set_ = {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(pathlib.Path("home/cache").resolve()))
    monkeypatch.setattr(
        jax.config, "update", lambda key, value: set_.update({key: value})
    )
    assert launch.main(["--config", "tiny", "--workdir", "other/run"]) == 0
    cache = pathlib.Path("home/cache/ccu_jax").resolve()
    assert set_["jax_compilation_cache_dir"] == str(cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    # Without a home, or in one that cannot be written, each run compiles for itself.
    set_.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    assert launch.main(["--config", "tiny", "--workdir", "other/run"]) == 0
    for relative in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        assert launch.main(["--config", "tiny", "--workdir", "other/run"]) == 0
    assert not set_


def test_the_audit_is_smoke_unless_another_tier_is_asked_for(run):
    assert launch.main(["--config", "tiny"]) == 0 and run.audit == ("smoke", 16)
    argv = ["--config", "tiny", "--audit", "rigorous", "--shadows", "8"]
    assert launch.main(argv) == 0 and run.audit == ("rigorous", 8)


def test_flags_set_fields_of_the_config(run):
    argv = "--config tiny --workdir out/x --data-dir d --methods second,first"
    argv += " --seeds 2,0 --unlearn class:cat"
    argv += " --set train.epochs=3 --set run.executor=vmap"
    assert launch.main(argv.split()) == 0
    ((config, workdir),) = run.calls
    assert workdir == pathlib.Path("out/x").resolve()
    assert (config.data.dir, config.unlearn.rule) == ("d", "class:cat")
    assert (config.methods, config.seeds) == (("second", "first"), (2, 0))
    assert (config.train.epochs, config.run.executor) == (3, "vmap")


def test_a_config_file_is_named_after_itself(run, tmp_path):
    text = "from ccu_jax.config import Config\nconfig = Config(methods=('first',))\n"
    (tmp_path / "own.py").write_text(text)
    assert launch.main(["--config", "own.py"]) == 0
    assert run.calls[0][1].name == "own"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "--config is missing mmimdb"),
        ("--config", "--config expected"),
        ("--confg tiny", "'--confg' --config?"),
        ("--config tiny --method first", "'--method' --methods?"),
        ("--config tiny stray", "'stray'"),
        ("--config tin", "'tin' 'tiny'? mmimdb"),
        ("--config no.py", "'no.py' no such file"),
        ("--config tiny --set train.epoch=3", "'epoch' 'epochs'?"),
        ("--config tiny --set train=3", "train is a section"),
        ("--config tiny --set train.epochs=3.5", "train.epochs '3.5' whole"),
        ("--config tiny --methods frist", "'frist' 'first'? second"),
        ("--config tiny --methods first,second,first", "methods first once"),
        ("--config tiny --methods ,", "methods none"),
        ("--config tiny --set methods=", "methods none"),
        ("--config tiny --seeds 1,0,1", "seeds 1 once"),
        ("--config tiny --seeds ,", "seeds none"),
        ("--config tiny --seeds a", "--seeds 'a' whole"),
        ("--config tiny --seeds=-1", "seeds -1"),
        ("--config tiny --devices 0", "--devices '0'"),
        ("--config tiny --devices many", "--devices 'many'"),
        ("--config tiny --multihost a:1 2", "--multihost ADDRESS:PORT COUNT INDEX"),
        ("--config tiny --multihost a:1 2 x", "--multihost ADDRESS:PORT COUNT INDEX"),
        ("--config tiny --multihost a 2 0", "--multihost 'a' ADDRESS:PORT"),
        ("--config tiny --multihost a:1 2 2", "--multihost INDEX 2 COUNT"),
        ("--config tiny --multihost a:99999 2 0", "--multihost port 99999 65535"),
        ("--config tiny --multihost a:0 2 0", "--multihost port 0 65535"),
        ("--config tiny --workdir=", "--workdir empty"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(run, capsys, argv, words):
    message = _refused(capsys, *argv.split())
    assert all(word in message for word in words.split()), message
    assert run.calls == []


def test_a_folder_that_cannot_be_written_is_noticed_before_any_work(run, capsys):
    pathlib.Path("file").write_text("")
    for workdir in ("file", "file/below", "/proc/nothing"):
        message = _refused(capsys, "--config", "tiny", "--workdir", workdir)
        assert workdir in message and "--workdir" in message
    assert run.calls == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("two\nlines"), "two lines"),
        (UserError("a \x1b[2Jname\r"), "a \ufffd[2Jname"),
        (OSError(errno.ENOSPC, "No space left", "x.npz"), "no space left at x.npz"),
        (PermissionError(errno.EACCES, "denied", "x.npz"), "Permission denied: x.npz"),
        (RuntimeError("write: No space left on device [x]"), "no space left"),
        (ValueError("a [b]: Read-only file system [x]\nc"), "Read-only file system"),
        (FileExistsError(errno.EEXIST, "exists", "/w/audits"), "/w/audits: in the way"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), "use smaller batches"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "use smaller batches"),
        (ModuleNotFoundError("", name="optax"), "optax is not installed"),
    ],
)
def test_what_a_user_can_mend_is_one_line(run, capsys, error, words):
    run.error = error
    assert launch.main(["--config", "tiny"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RetryableError("another run is at work"), "another run is at work"),
        (RuntimeError("x: Transport endpoint is not connected"), "not connected: x: "),
        (OSError(errno.ESTALE, "stale", "/w/a.json"), "/w/a.json; when that is over"),
        (OSError(errno.ETIMEDOUT, "timed out"), "timed out; when that is over"),
        (OSError(errno.EMFILE, "many", "/w/b"), "Too many open files: /w/b"),
    ],
)
def test_what_may_pass_has_the_code_of_what_is_to_be_started_again(
    run, capsys, error, words
):
    run.error = error
    assert launch.main(["--config", "tiny"]) == errors.RETRY_EXIT_CODE
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize("hidden", [True, False])
def test_what_was_met_on_the_way_to_a_fault_is_not_told_instead_of_it(run, hidden):
    try:
        try:
            raise FileExistsError(errno.EEXIST, "exists", "/w/precious")
        except FileExistsError as error:
            raise TypeError("bug") from (None if hidden else error)
    except TypeError as error:
        run.error = error
    with pytest.raises(TypeError):
        launch.main(["--config", "tiny"])


def test_a_full_disk_is_recognised_behind_another_error(run, capsys):
    run.error = ValueError("could not save")
    run.error.__cause__ = OSError(errno.ENOSPC, "No space left")
    assert launch.main(["--config", "tiny"]) == 2
    assert "no space left" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [ValueError("bug"), FileNotFoundError("x"), ImportError("ccu_jax.x")]
)
def test_a_fault_of_the_program_keeps_its_traceback(run, error):
    run.error = error
    with pytest.raises(type(error)):
        launch.main(["--config", "tiny"])


def test_an_interrupt_says_how_to_go_on(run, capsys):
    run.error = KeyboardInterrupt()
    assert launch.main(["--config", "tiny"]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "rerun the same command" in err


@pytest.mark.parametrize("argv", ["--list", "--config tiny"])
def test_who_stops_reading_is_told_nothing_but_that(argv, tmp_path):
    code = (
        "import sys\n"
        "from ccu_jax import launch\n"
        "if len(sys.argv) > 2:\n"
        "    import ccu_jax.experiments.run\n"
        "    from ccu_jax.runs.progress import Reporter\n"
        "    def run(config, workdir, *more):\n"
        "        for _ in range(9): Reporter(workdir, True).log('line')\n"
        "    ccu_jax.experiments.run.run = run\n"
        "launch._leave()\n"
    )
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-c", code, *argv.split()],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 130, done.stderr
    assert done.stderr.count("\n") == 1 and "nobody reads" in done.stderr


def test_devices_are_simulated_before_jax_is_imported(run, monkeypatch):
    os.environ["XLA_FLAGS"] = "--a=1 --xla_force_host_platform_device_count=8"
    assert launch.main(["--config", "tiny", "--devices", "3"]) == 0
    flags = os.environ["XLA_FLAGS"].split()
    assert flags == ["--a=1", "--xla_force_host_platform_device_count=3"]
    assert (os.environ["NPROC"], os.environ["JAX_PLATFORMS"]) == ("32", "cpu")


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; from ccu_jax import launch\n"
        "try: launch.main(sys.argv[1:])\n"
        "finally: assert not {'jax', 'numpy'} & set(sys.modules)"
    )
    for flag, words in (("--help", "examples:"), ("--version", ccu_jax.__version__)):
        done = subprocess.run(
            [sys.executable, "-c", code, flag],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert words in done.stdout


def test_the_list_names_everything_there_is(capsys):
    from ccu_jax.data import DATASETS
    from ccu_jax.methods import METHODS

    assert launch.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in [*available_configs(), *METHODS, *DATASETS])


@pytest.mark.parametrize("name", available_configs())
def test_every_config_names_methods_and_a_data_set_that_exist(name):
    from ccu_jax.data import DATASETS
    from ccu_jax.methods import METHODS

    config = load_config(name)
    assert set(config.methods) <= set(METHODS)
    assert config.data.dataset in DATASETS


def test_every_package_is_installed():
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in ROOT.glob("ccu_jax/**/__init__.py")
    }
    code = (
        "import setuptools\n"
        "from distutils.core import run_setup\n"
        "print(*run_setup('setup.py', stop_after='init').packages)\n"
    )
    command = [sys.executable, "-c", code]
    packages = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(packages.stdout.split()) == found | {"ccu_jax.configs"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_valid_bash(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def clone(tmp_path):
    """A checkout without `.venv`, at a path with spaces."""
    folder = tmp_path / "a clean clone"
    for name in ("launch", ".ci"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("setup.cfg", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    os.environ.pop("VIRTUAL_ENV", None)
    os.environ["CCU_JAX_DRY_RUN"] = "1"
    return folder


@pytest.mark.parametrize(
    ("script", "argv", "last"),
    [
        ("launch/first_run.sh", ["--set", "name=x y"], r"--config mmimdb .*name=x\\ y"),
        ("launch/test.sh", ["-k", "launch"], r"-m pytest -m slow .*-k launch"),
        (".ci/run", [], r"-m pytest -m slow"),
        (
            "launch/local.sh",
            ["2", "4", "--config", "tiny"],
            r"--devices 4 --multihost 127.0.0.1:\w+ 2 1 --config tiny",
        ),
    ],
)
def test_a_script_makes_an_environment_and_then_runs(clone, script, argv, last):
    done = _script(clone / script, *argv)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    lines = done.stdout.splitlines()
    assert re.search(r"-m venv .*/a\\ clean\\ clone/\.venv", lines[0])
    assert "-m pip install" in lines[1]
    assert re.search(last, lines[-1]), lines[-1]
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("argv", [[], ["2"], ["2", "x"], ["0", "1"]])
def test_the_local_script_refuses_wrong_counts_in_one_line(clone, argv):
    done = _script(clone / "launch/local.sh", *argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: usage") and done.stderr.count("\n") == 1


def test_without_a_usable_python_a_script_says_so_in_one_line(clone, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "cksum"):
        (tools / name).symlink_to(shutil.which(name))
    done = _script(clone / "launch/first_run.sh", PATH=str(tools))
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: there is no Python 3.11 or newer" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_python_that_cannot_make_environments_is_named_with_the_remedy(
    clone, tmp_path
):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "cksum"):
        (tools / name).symlink_to(shutil.which(name))
    python = tools / "python3.12"
    python.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\n')
    python.chmod(0o755)
    done = _script(clone / "launch/first_run.sh", PATH=str(tools))
    assert done.returncode == 2
    assert "python3.12 has no ensurepip" in done.stderr
    assert "apt install python3-venv" in done.stderr


def test_text_that_steers_a_screen_is_made_harmless_and_no_other():
    spaces, joined = (
        "\u00a0\u202f\u2009\u3000",
        "\u0645\u200c\u062e \U0001f468\u200d\U0001f469",
    )
    harmless = f"caf\u00e9{spaces}\n{joined}"
    assert printable(harmless) == harmless
    for steering in "\x00\x1b\r\t\x7f\x9b\u202e\u2066\u200f\ud800":
        assert printable(f"a{steering}b") == "a\ufffdb"

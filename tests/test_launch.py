"""The command line: flags, rejections of invalid input, exit codes, environment."""

import errno
import os
import pathlib
import stat
import subprocess
import sys

import jax
import pytest

import ccu_jax
from ccu_jax import launch
from ccu_jax.config.loading import available_configs, load_config
from ccu_jax.data import DATASETS
from ccu_jax.errors import Preempted, RetryableError, UserError
from ccu_jax.experiments import run as run_module
from ccu_jax.methods import METHODS

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = ["--config", "tiny"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Each test runs in an empty folder, with an environment of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    # Keeps `main` from changing JAX's settings in this process.
    monkeypatch.setitem(os.environ, "JAX_COMPILATION_CACHE_DIR", str(tmp_path))


class _FakeRun:
    """Records the arguments of `run.run`, and raises `error` if it is set."""

    error: BaseException | None = None

    def __call__(self, config, workdir, purge, audit, shadows):
        self.config, self.workdir, self.audit = config, workdir, (audit, shadows)
        if self.error is not None:
            raise self.error


@pytest.fixture
def run(monkeypatch):
    run = _FakeRun()
    monkeypatch.setattr(run_module, "run", run)
    return run


def _run_python(code, *argv, stdout=subprocess.PIPE, cwd=ROOT):
    """Runs code in another process."""
    command, pipe = [sys.executable, "-c", code, *argv], subprocess.PIPE
    return subprocess.run(command, cwd=cwd, stdout=stdout, stderr=pipe, text=True)


def _reject(capsys, *argv):
    """Runs a command that must fail with one line and write nothing."""
    before = sorted(pathlib.Path().rglob("*"))
    assert launch.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    assert sorted(pathlib.Path().rglob("*")) == before
    return err


def test_a_run_gets_the_config_and_a_folder_of_its_name(run, capsys):
    assert launch.main(TINY) == 0
    assert run.config == load_config("tiny") and run.audit == ("smoke", 16)
    assert run.workdir == pathlib.Path("runs/tiny").resolve()
    assert list(run.workdir.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_new_workdir_is_private_and_an_existing_one_keeps_its_mode(run):
    pathlib.Path("existing").mkdir()
    pathlib.Path("existing").chmod(0o755)
    for workdir, mode in (("new/run", 0o700), ("existing", 0o755)):
        assert launch.main([*TINY, "--workdir", workdir]) == 0
        assert stat.S_IMODE(pathlib.Path(workdir).stat().st_mode) == mode
    assert stat.S_IMODE(pathlib.Path("new").stat().st_mode) & 0o055


def test_the_compilation_cache_is_a_private_folder_of_the_user(run, monkeypatch):
    settings = {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(pathlib.Path("home/cache").resolve()))
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    assert launch.main([*TINY, "--workdir", "run"]) == 0
    cache = pathlib.Path("home/cache/ccu_jax").resolve()
    assert settings["jax_compilation_cache_dir"] == str(cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    # Without a home folder, or in one that cannot be written, there is no cache.
    settings.clear()
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for folder in ("/proc/nothing", "", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        assert launch.main([*TINY, "--workdir", "run"]) == 0
    assert not settings


def test_flags_override_fields_of_the_config(run):
    argv = "--workdir out/x --data-dir d --methods ccu,retrain --seeds 2,0 --unlearn "
    argv += "class:cat --set train.epochs=3 --audit rigorous --shadows 8"
    assert launch.main([*TINY, *argv.split()]) == 0
    config = run.config
    assert run.workdir == pathlib.Path("out/x").resolve()
    assert (config.data.dir, config.unlearn.rule) == ("d", "class:cat")
    assert (config.methods, config.seeds) == (("ccu", "retrain"), (2, 0))
    assert config.train.epochs == 3 and run.audit == ("rigorous", 8)


@pytest.mark.parametrize(
    "argv, words",
    [
        ("", "--config is missing mmimdb"),
        ("--config", "--config expected"),
        ("--confg tiny", "'--confg' --config?"),
        ("--config tiny --method ccu", "'--method' --methods?"),
        ("--config tiny stray", "'stray'"),
        ("--config no.py", "'no.py' no such file"),
        ("--config tiny --methods ccu,scrub,ccu", "methods: ccu repeated"),
        ("--config tiny --methods ,", "methods: empty list --methods"),
        ("--config tiny --seeds 1,0,1", "seeds: 1 repeated"),
        ("--config tiny --seeds ,", "seeds: empty list"),
        ("--config tiny --seeds a", "--seeds 'a' integers"),
        ("--config tiny --seeds=-1", "seeds=-1: at least 0"),
        ("--config tiny --devices 0", "--devices '0'"),
        ("--config tiny --multihost a:1 2", "--multihost ADDRESS:PORT COUNT INDEX"),
        ("--config tiny --multihost a 2 0", "--multihost 'a' ADDRESS:PORT"),
        ("--config tiny --multihost a:1 2 2", "--multihost INDEX 2 COUNT"),
        ("--config tiny --multihost a:99999 2 0", "--multihost port 99999 65535"),
        ("--config tiny --workdir=", "--workdir empty"),
        ("--config tiny --workdir /proc/nothing", "/proc/nothing --workdir"),
        ("--config tiny --purge --ablate", "--purge --ablate at most one"),
    ],
)
def test_invalid_input_is_one_line_and_writes_nothing(capsys, argv, words):
    message = _reject(capsys, *argv.split())
    assert all(word in message for word in words.split()), message


def test_a_workdir_below_a_file_is_rejected(capsys):
    pathlib.Path("file").write_text("")
    for workdir in ("file", "file/below"):
        assert workdir in _reject(capsys, *TINY, "--workdir", workdir)


@pytest.mark.parametrize(
    "error, line, code",
    [
        (UserError("two\nlines"), "error: two lines", 2),
        (UserError("a \x1b[2Jname\r"), "error: a \ufffd[2Jname", 2),
        (OSError(errno.ENOSPC, "", "x.npz"), "error: no space left at x.npz; free", 2),
        (ModuleNotFoundError("", name="optax"), "error: optax is not installed", 2),
        (RetryableError("another run uses it"), "error: another run uses it", 75),
        (Preempted(), "", 75),
        (KeyboardInterrupt(), "stopped; rerun the same command to resume", 130),
    ],
)
def test_an_expected_error_is_one_line_with_its_exit_code(
    run, capsys, error, line, code
):
    run.error = error
    assert launch.main(TINY) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1


def test_a_bug_keeps_its_traceback(run):
    for error in (ValueError("bug"), ImportError("ccu_jax.x")):
        run.error = error
        with pytest.raises(type(error)):
            launch.main(TINY)


@pytest.mark.parametrize("argv", ["--list", "--config tiny"])
def test_a_closed_output_pipe_ends_the_process_with_one_line(argv):
    code = (
        "import sys\n"
        "from ccu_jax import launch\n"
        "if len(sys.argv) > 2:\n"
        "    import ccu_jax.experiments.run\n"
        "    from ccu_jax.runs.progress import Reporter\n"
        "    def run(config, workdir, *more):\n"
        "        for _ in range(9): Reporter(workdir, True).log('line')\n"
        "    ccu_jax.experiments.run.run = run\n"
        "launch.run_process()\n"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as closed:
        result = _run_python(code, *argv.split(), stdout=closed, cwd=".")
    assert result.returncode == 130, result.stderr
    assert result.stderr.count("\n") == 1 and "output pipe closed" in result.stderr


def test_devices_are_simulated_by_the_environment(run):
    os.environ["XLA_FLAGS"] = "--a=1 --xla_force_host_platform_device_count=8"
    assert launch.main([*TINY, "--devices", "3"]) == 0
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
        result = _run_python(code, flag)
        assert (result.returncode, result.stderr) == (0, "")
        assert words in result.stdout


def test_the_list_names_configs_methods_and_data_sets(capsys):
    assert launch.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in [*available_configs(), *METHODS, *DATASETS])


def test_every_package_is_installed():
    folders = [path.parent for path in ROOT.glob("ccu_jax/**/__init__.py")]
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    code = "import setuptools; from distutils.core import run_setup; "
    code += "print(*run_setup('setup.py', stop_after='init').packages)"
    assert set(_run_python(code).stdout.split()) == packages | {"ccu_jax.configs"}

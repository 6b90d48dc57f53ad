"""The scripts of `launch/`: the environments they make and the commands they start."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("launch/*.s[hb]*"), ROOT / ".ci/run"])
COMMAND = ["-m", "ccu_jax.launch"]
PYTHON = str(pathlib.Path(sys.prefix, "bin/python"))
RETRY = ROOT / "launch/retry_policy.sh"


def run_script(path, *argv, **env):
    """Runs a script of which every command is only printed."""
    env = os.environ | {"CCU_JAX_DRY_RUN": "1"} | env
    options = {"env": env, "capture_output": True, "text": True, "timeout": 120}
    return subprocess.run(["bash", path, *argv], **options)


def print_command(name, *argv):
    result = run_script(ROOT / "launch" / name, *argv, VIRTUAL_ENV=sys.prefix)
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash_with_a_comment_on_top(path):
    lint = [pathlib.Path(sys.prefix, "bin/shellcheck"), "-x", "-S", "warning"]
    for command in (["bash", "-n"], [*lint, "-P", ROOT, "-P", ROOT / "launch"]):
        result = subprocess.run([*command, path], capture_output=True, text=True)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    head = path.read_text("utf-8").splitlines()[:2]
    assert any(line.startswith("# ") for line in head)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A checkout without `.venv`, at a path with spaces."""
    folder = tmp_path / "a clean clone"
    for name in ("launch", ".ci"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("setup.cfg", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    return folder


@pytest.mark.parametrize(
    "name, argv, last",
    [
        ("launch/first_run.sh", ["--set", "name=x y"], r"--config mmimdb .*name=x\\ y"),
        ("launch/test.sh", ["-k", "x"], r"-m pytest -m slow\\ and\\ smoke .*-k x"),
        ("launch/test.sh", ["--all"], r"-m pytest -m slow "),
        (".ci/run", [], r"-m pytest -m slow "),
        (
            "launch/local.sh",
            ["2", "4", "--config", "tiny"],
            r"--devices 4 --multihost 127.0.0.1:\w+ 2 1 --config tiny",
        ),
    ],
)
def test_a_script_makes_an_environment_and_then_runs(clone, name, argv, last):
    result = run_script(clone / name, *argv)
    assert result.returncode == 0, result.stderr
    assert "error" not in result.stderr
    lines = result.stdout.splitlines()
    assert re.search(r"-m venv .*/a\\ clean\\ clone/\.venv", lines[0])
    assert "-m pip install" in lines[1]
    assert re.search(last, lines[-1]), lines[-1]
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("has_python", [False, True])
def test_a_python_that_cannot_make_environments_is_one_line(
    clone, tmp_path, has_python
):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "cksum"):
        (tools / name).symlink_to(shutil.which(name))
    message = "error: no Python 3.11 or newer"
    if has_python:
        python = tools / "python3.12"
        python.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\n')
        python.chmod(0o755)
        message = "python3.12 has no ensurepip.* apt install python3-venv"
    result = run_script(clone / "launch/first_run.sh", PATH=str(tools))
    assert (result.returncode, result.stdout) == (2, "")
    assert re.search(message, result.stderr) and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name, argv",
    [
        *(("local.sh", argv) for argv in ([], ["2"], ["2", "x"], ["0", "1"])),
        *(("tpu_vm.sh", argv) for argv in ([], ["s"], ["s", "--config"], ["", "z"])),
    ],
)
def test_wrong_arguments_of_a_script_are_one_line(name, argv):
    result = run_script(ROOT / "launch" / name, *argv, VIRTUAL_ENV=sys.prefix)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: usage: ") and result.stderr.count("\n") == 1


def test_slurm_starts_one_process_per_gpu():
    argv = print_command("slurm.sbatch", "--config", "tiny", "--workdir", "/a b")
    # The processes end each other, with a code that says whether to restart.
    assert argv[:3] == ["srun", "--kill-on-bad-exit=0", "--wait=180"]
    # srun does not inherit the cores per task.
    assert argv[3:7] == ["--cpus-per-task=8", PYTHON, *COMMAND]
    assert argv[7:] == ["--config", "tiny", "--workdir", "/a b", "--multihost"]
    text = (ROOT / "launch/slurm.sbatch").read_text("utf-8")
    settings = dict(re.findall("^#SBATCH --([^=\n]+)=?(.*)$", text, re.MULTILINE))
    # JAX gives each process the GPU of its index on the node.
    assert settings["ntasks-per-node"] == settings["gpus-per-node"]
    assert settings["cpus-per-task"] == "8"
    assert settings["signal"].startswith("TERM@") and "requeue" in settings


@pytest.mark.parametrize("flags", [[], ["--config", "x", "--unlearn", "class:a 'b'"]])
def test_a_tpu_slice_runs_the_command_on_every_host(flags):
    argv = print_command("tpu_vm.sh", "slice", "us-east5-b", *flags)
    assert argv[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert argv[6:11] == ["--zone", "us-east5-b", "--worker", "all", "--command"]
    # The shell on the hosts splits the command again.
    folder, _, command = argv[11].partition(" && ")
    assert folder == "cd ~/ccu_jax"
    argv = [".venv/bin/python", *COMMAND, *flags, "--multihost"]
    assert shlex.split(command) == argv


def test_a_jobset_restarts_all_pods_together_and_stops_at_a_user_error():
    jobset = yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text("utf-8"))
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"]
    (hosts,) = jobset["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    pod = job.pop("template")["spec"]
    (container,) = pod["containers"]
    command, resources = container["command"], container["resources"]
    assert command[:3] == ["python", *COMMAND] and command[-1] == "--multihost"
    # Exit code 2 would come again, so it ends the JobSet.
    codes = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert job == {
        "parallelism": job["completions"],
        "completions": job["completions"],
        "completionMode": "Indexed",
        "backoffLimit": 0,  # no pod may be restarted on its own
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": codes}]},
    }
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"]
    policy = jobset["spec"]["failurePolicy"]
    assert f"max_retries={policy['maxRestarts']}\n" in RETRY.read_text("utf-8")
    assert policy["rules"][0]["action"] == "FailJobSet"
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert resources["requests"] == resources["limits"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    workdir = command[command.index("--workdir") + 1]
    assert any(workdir.startswith(path) for path in mounts.values())


def test_only_temporary_errors_are_retried():
    for code, is_retried in ((0, False), (2, False), (75, True)):
        command = ["bash", "-c", f'. "{RETRY}"; should_retry {code}']
        assert (subprocess.run(command).returncode == 0) == is_retried

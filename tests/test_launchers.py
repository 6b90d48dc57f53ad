"""The files of `launch/` that start one process per host: each ends in one command."""

import os
import pathlib
import shlex
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("launch/*.s[hb]*"), ROOT / ".ci/run"])
COMMAND = ["-m", "ccu_jax.launch"]


def script(name, *argv, **env):
    return subprocess.run(
        ["bash", ROOT / "launch" / name, *argv],
        env=os.environ | {"CCU_JAX_DRY_RUN": "1", "VIRTUAL_ENV": sys.prefix} | env,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_bash_and_say_first_what_they_are(path):
    lint = [pathlib.Path(sys.prefix, "bin/shellcheck"), "-x", "-S", "warning"]
    for command in (["bash", "-n"], [*lint, "-P", ROOT, "-P", ROOT / "launch"]):
        done = subprocess.run([*command, path], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    head = path.read_text("utf-8").splitlines()[:2]
    assert any(line.startswith("# ") for line in head)


def test_slurm_starts_the_command_once_for_each_gpu():
    done = script("slurm.sbatch", "--config", "tiny", "--workdir", "/a b")
    assert done.returncode == 0, done.stderr
    argv = shlex.split(done.stdout)
    # It does not take over how many cores each was given.
    # The processes end each other, with a code that says whether to start again.
    assert argv[:3] == ["srun", "--kill-on-bad-exit=0", "--wait=180"]
    assert argv[3:5] == [
        "--cpus-per-task=8",
        str(pathlib.Path(sys.prefix, "bin/python")),
    ]
    assert argv[5:7] == COMMAND
    assert argv[7:] == ["--config", "tiny", "--workdir", "/a b", "--multihost"]
    settings = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in (ROOT / "launch/slurm.sbatch").read_text("utf-8").splitlines()
        if line.startswith("#SBATCH ")
    )
    # JAX gives each process the GPU of its number on the node.
    assert settings["ntasks-per-node"] == settings["gpus-per-node"]
    assert settings["cpus-per-task"] == "8"
    assert settings["signal"].startswith("TERM@") and "requeue" in settings


def test_a_tpu_slice_gets_the_command_on_every_host():
    flags = ["--config", "tiny", "--unlearn", "class:a 'b'"]
    done = script("tpu_vm.sh", "slice", "us-east5-b", *flags)
    assert done.returncode == 0, done.stderr
    argv = shlex.split(done.stdout)
    assert argv[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert argv[6:11] == ["--zone", "us-east5-b", "--worker", "all", "--command"]
    # What the shell on the hosts makes of it.
    place, _, command = argv[11].partition(" && ")
    assert place == "cd ~/ccu_jax"
    words = shlex.split(command)
    assert words[:3] == [".venv/bin/python", *COMMAND]
    assert words[3:] == [*flags, "--multihost"]


def test_a_tpu_slice_without_flags_gets_none():
    done = script("tpu_vm.sh", "slice", "us-east5-b")
    assert shlex.split(done.stdout)[11].endswith(" -m ccu_jax.launch --multihost")


@pytest.mark.parametrize("argv", [[], ["slice"], ["slice", "--config"], ["", "zone"]])
def test_a_wrong_use_of_the_tpu_script_is_one_line(argv):
    done = script("tpu_vm.sh", *argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: usage: ") and done.stderr.count("\n") == 1


# The fields of a JobSet that are used here, as Kubernetes spells them: what is below
# each, or the kind of its value.
_TEXT, _NUMBER = str, int
_SIZES = {"google.com/tpu": _NUMBER}
_CONTAINER = {
    "name": _TEXT,
    "image": _TEXT,
    "command": [_TEXT],
    "env": [{"name": _TEXT, "value": _TEXT}],
    "resources": {"requests": _SIZES, "limits": _SIZES},
    "volumeMounts": [{"name": _TEXT, "mountPath": _TEXT}],
}
_POD = {
    "restartPolicy": _TEXT,
    "terminationGracePeriodSeconds": _NUMBER,
    "nodeSelector": {
        "cloud.google.com/gke-tpu-accelerator": _TEXT,
        "cloud.google.com/gke-tpu-topology": _TEXT,
    },
    "containers": [_CONTAINER],
    "volumes": [{"name": _TEXT, "persistentVolumeClaim": {"claimName": _TEXT}}],
}
_EXIT = {"containerName": _TEXT, "operator": _TEXT, "values": [_NUMBER]}
_JOB = {
    "parallelism": _NUMBER,
    "completions": _NUMBER,
    "completionMode": _TEXT,
    "backoffLimit": _NUMBER,
    "podFailurePolicy": {"rules": [{"action": _TEXT, "onExitCodes": _EXIT}]},
    "template": {"spec": _POD},
}
_TOPOLOGY = "alpha.jobset.sigs.k8s.io/exclusive-topology"
_RULE = {"name": _TEXT, "action": _TEXT, "onJobFailureReasons": [_TEXT]}
_JOBS = {"name": _TEXT, "replicas": _NUMBER, "template": {"spec": _JOB}}
_JOBSET = {
    "apiVersion": _TEXT,
    "kind": _TEXT,
    "metadata": {"name": _TEXT, "annotations": {_TOPOLOGY: _TEXT}},
    "spec": {
        "failurePolicy": {"maxRestarts": _NUMBER, "rules": [_RULE]},
        "replicatedJobs": [_JOBS],
    },
}


def _like(found, schema, place="jobset"):
    """Fails where a tree has another field, lacks one, or has one of another kind."""
    if isinstance(schema, dict):
        assert isinstance(found, dict) and found.keys() == schema.keys(), place
        for name, below in schema.items():
            _like(found[name], below, f"{place}.{name}")
    elif isinstance(schema, list):
        assert isinstance(found, list) and found, place
        for one in found:
            _like(one, schema[0], place)
    else:
        assert type(found) is schema, place


def test_the_jobset_has_all_fields_that_it_needs_and_no_misspelt_one():
    jobset = yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text("utf-8"))
    _like(jobset, _JOBSET)
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    spec["nodeSelecter"] = spec.pop("nodeSelector")
    with pytest.raises(AssertionError, match="template.spec"):
        _like(jobset, _JOBSET)


def test_the_jobset_is_whole_and_starts_the_command_in_each_pod():
    text = (ROOT / "launch/gke_jobset.yaml").read_text("utf-8")
    jobset = yaml.safe_load(text)
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"]
    (jobs,) = jobset["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][:3] == ["python", *COMMAND]
    assert container["command"][-1] == "--multihost"
    # All must restart together: none may be started again on its own.
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    # But what would fail again ends the whole.
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert rule == {"action": "FailJob", "onExitCodes": codes}
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (ends,) = policy["rules"]
    assert ends["action"] == "FailJobSet"
    assert ends["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    workdir = container["command"][container["command"].index("--workdir") + 1]
    assert any(workdir.startswith(m["mountPath"]) for m in container["volumeMounts"])

"""What launches a fleet on Google Cloud, without a cloud: its tools are replaced by ones that tell who called them."""

import ast
import importlib.util
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from perfusion_jax.config import KEYS

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SHELLCHECK, HADOLINT = (Path(sys.executable).parent / name for name in ("shellcheck", "hadolint"))
VARIABLES = {
    "PROJECT": "project",
    "ZONE": "us-west4-a",
    "NAME": "fleet",
    "BUCKET": "gs://bucket",
    "CLUSTER": "cluster",
    "IMAGE": "image:1",
    "SHARDS": "3",
}
COMMANDS = {
    "tpu_vm.sh": ["run", "create", "install", "start", "follow", "stop", "status", "fetch", "delete"],
    "xpk.sh": ["create", "status", "fetch", "delete"],
}
EVERY_COMMAND = [(script, command) for script, commands in COMMANDS.items() for command in commands]


def tool(folder: Path, name: str, script: str) -> None:
    """Puts an executable shell script called `name` into a folder."""
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{script}\n")
    file.chmod(0o755)


@pytest.fixture
def tools(tmp_path) -> Path:
    """A folder for PATH with all tools that could do something; they write what they are called with into `called`."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ["gcloud", "kubectl", "xpk", "sky", "ssh", "scp", "git", "tar", "mkdir", "rm", "sleep"]:
        tool(folder, name, f'echo "{name} $*" >> {folder}/called; exit 97')
    return folder


def launch(tools: Path, *arguments: str, script: str = "tpu_vm.sh", **variables: str) -> subprocess.CompletedProcess:
    """Runs a launch script from somewhere else than the root of the repository."""
    return subprocess.run(
        [LAUNCH / script, *arguments],
        env={"PATH": f"{tools}:{os.environ['PATH']}", **VARIABLES, **variables},
        cwd=tools,
        capture_output=True,
        text=True,
        timeout=60,
    )


def words_of(line: str) -> list[str]:
    """The words that bash reads in a line."""
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return printed.stdout.split("\0")


def called(tools: Path) -> list[str]:
    file = tools / "called"
    return file.read_text().splitlines() if file.exists() else []


def shellcheck(*arguments: object, script: str | None = None) -> None:
    result = subprocess.run([SHELLCHECK, *arguments], cwd=ROOT, input=script, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_scripts_pass_shellcheck():
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert [script.name for script in scripts] == ["common.sh", "host.sh", "tpu_vm.sh", "xpk.sh"]
    shellcheck("--external-sources", *scripts)


@pytest.mark.parametrize(("script", "command"), EVERY_COMMAND)
def test_a_dry_run_prints_commands_and_calls_nothing(tools, script, command):
    result = launch(tools, "--dry_run", command, script=script)
    assert (result.returncode, result.stderr, called(tools)) == (0, "", [])
    lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    assert lines
    for line in lines:
        assert shlex.split(line)[0] in {"gcloud", "xpk", "bash", "mkdir"}


def test_a_dry_run_shows_what_tpu_vm_does(tools):
    lines = launch(tools, "run", "--dry_run").stdout.splitlines()
    place = "--project=project --zone=us-west4-a"
    assert (
        "gcloud compute tpus queued-resources create fleet --node-id=fleet --accelerator-type=v5litepod-16 "
        f"--runtime-version=v2-alpha-tpuv5-lite --spot {place}"
    ) in lines
    assert (
        "gcloud compute tpus tpu-vm ssh fleet --worker=all '--command=bash perfusion_jax/launch/host.sh start "
        "-m perfusion_jax.train --config configs/fleet.py:sd15 --config.concepts=gs://bucket/concepts.jsonl "
        "--workdir gs://bucket/runs/fleet --distributed' " + place
    ) in lines
    assert lines[-1] == f"gcloud compute tpus queued-resources delete fleet --force --quiet {place}"


def test_xpk_trains_every_shard_in_a_workdir_of_its_own(tools):
    lines = launch(tools, "create", "--dry_run", script="xpk.sh").stdout.splitlines()
    assert len(lines) == 3
    for shard, line in enumerate(lines):
        flags = dict(word.split("=", 1) for word in shlex.split(line) if "=" in word)
        assert flags["--workload"] == f"fleet-{shard}"
        # `exec`, for xpk's SIGTERM reaches only the process that it started.
        train = shlex.split(flags["--command"])
        assert train[:4] == ["exec", "python", "-m", "perfusion_jax.train"]
        assert train[-5:] == ["--workdir", f"gs://bucket/runs/fleet-{shard}", "--distributed", "--shard", f"{shard}/3"]


@pytest.mark.parametrize("value", ["it's $HOME; rm -rf /", 'a "quoted" `word`', "two\nlines", "*", "", "gs://b/ä (1)"])
@pytest.mark.parametrize(("script", "command"), [("tpu_vm.sh", "start"), ("xpk.sh", "create")])
def test_values_reach_the_training_as_they_are(tools, script, command, value):
    # The shell that the command is for reads it, then that of the host.
    printed = launch(tools, "--dry_run", command, "--", f"--config.x={value}", script=script, SHARDS="1").stdout
    remote = next(word.removeprefix("--command=") for word in words_of(printed) if word.startswith("--command="))
    assert f"--config.x={value}" in words_of(remote)


@pytest.mark.parametrize("script", COMMANDS)
@pytest.mark.parametrize("name", ["PROJECT", "ZONE", "NAME", "BUCKET", "CLUSTER", "IMAGE"])
def test_a_missing_variable_is_named(tools, script, name):
    result = launch(tools, COMMANDS[script][0], script=script, **{name: ""})
    if script == "tpu_vm.sh" and name in ("CLUSTER", "IMAGE"):
        assert called(tools)
    else:
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: {name} is not set: ")
        assert called(tools) == []


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "no command"),
        (["make"], {}, "make is not a command"),
        (["create", "delete"], {}, "one command at a time"),
        (["create", "--config.steps=3"], {}, "flags of the training go after --"),
        (["create"], {"BUCKET": "bucket"}, "it looks like gs://my-bucket"),
        (["create"], {"BUCKET": "gs://bucket/"}, "without a / at its end"),
        (["create"], {"NAME": "My Fleet"}, "NAME is My Fleet"),
        (["create"], {"NAME": "../x"}, "NAME is ../x"),
        (["create"], {"SHARD": "1", "SHARDS": "many"}, "error: SHARD"),
        (["create"], {"SHARD": "2/2", "SHARDS": "0"}, "error: SHARD"),
    ],
)
@pytest.mark.parametrize("script", COMMANDS)
def test_wrong_arguments_are_refused(tools, script, arguments, variables, message):
    result = launch(tools, *arguments, script=script, **variables)
    assert result.returncode == 2
    assert message in result.stderr
    assert called(tools) == []


@pytest.mark.parametrize("script", COMMANDS)
def test_help_tells_every_command(tools, script):
    result = launch(tools, "--help", script=script)
    assert result.returncode == 0
    for command in COMMANDS[script]:
        assert re.search(rf"^  {command}  ", result.stdout, re.MULTILINE)


def cloud(tools: Path, states: list[str], ssh: str = "true") -> None:
    """Puts a gcloud into `tools` that tells one of the states each time it is asked, and runs `ssh` for an ssh."""
    (tools / "states").write_text("".join(f"{state}\n" for state in states))
    for name in ["git", "tar", "mkdir", "sleep"]:
        (tools / name).unlink()
    tool(tools, "git", "true")
    tool(tools, "tar", "true")
    tool(tools, "mkdir", "true")
    tool(tools, "sleep", "true")
    tool(
        tools,
        "gcloud",
        f"""
        echo "$3 $4" >> {tools}/called
        case "$3 $4" in
          "queued-resources list") head -n 1 {tools}/states; sed -i 1d {tools}/states ;;
          "tpu-vm ssh") {ssh} ;;
        esac
        """,
    )


def test_a_run_asks_for_the_slice_and_gives_it_back(tools):
    cloud(tools, ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    result = launch(tools, "run")
    assert result.returncode == 0, result.stderr
    assert "billed" not in result.stderr
    assert called(tools) == [
        "queued-resources list",
        "queued-resources create",
        *["queued-resources list"] * 3,
        "tpu-vm scp",
        *["tpu-vm ssh"] * 3,  # install, start, follow
        "--recursive --exclude=(^|/)(checkpoints|compiled)/.*",  # gcloud storage rsync
        "queued-resources delete",
    ]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_a_slice_that_was_preempted_is_asked_for_anew(tools, state):
    cloud(tools, ["SUSPENDING", state, "", "ACTIVE"])
    result = launch(tools, "create")
    assert result.returncode == 0, result.stderr
    assert called(tools) == [
        "queued-resources list",
        "queued-resources list",
        "queued-resources delete",
        "queued-resources list",
        "queued-resources create",
        "queued-resources list",
    ]


def test_a_request_that_fails_is_not_made_for_ever(tools):
    cloud(tools, ["", "FAILED"])
    result = launch(tools, "create")
    assert result.returncode == 2
    assert "the request failed; see gcloud compute tpus queued-resources describe fleet" in result.stderr
    assert "queued-resources delete" not in called(tools)


def test_a_slice_whose_training_ended_badly_is_kept(tools):
    cloud(tools, ["ACTIVE"], ssh='[[ "$*" != *follow* ]]')
    result = launch(tools, "run")
    assert result.returncode == 1
    assert "give the same command again to go on, or delete" in result.stderr
    assert "queued-resources delete" not in called(tools)


@pytest.fixture
def host(tmp_path) -> Path:
    """host.sh as it lies on a host, with a Python that runs one line."""
    (tmp_path / "launch").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    return Path(shutil.copy(LAUNCH / "host.sh", tmp_path / "launch"))


def on_host(host: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", host, *arguments], capture_output=True, text=True, timeout=60)


def test_a_host_hands_on_how_its_training_ended(host):
    assert on_host(host, "follow").stderr == "error: nothing was started on this host\n"
    on_host(host, "start", "-c", "import sys; print('word for word:', *sys.argv[1:])", "a  b", "*")
    followed = on_host(host, "follow")
    assert (followed.returncode, followed.stdout) == (0, "word for word: a  b *\n")
    on_host(host, "start", "-c", "raise SystemExit(3)")
    assert on_host(host, "follow").returncode == 3


def test_a_host_starts_one_training_and_stops_it_by_sigterm(host):
    wait = "signal.signal(15, lambda *_: sys.exit('saved')); print('up', flush=True); time.sleep(60)"
    on_host(host, "start", "-c", f"import signal, sys, time; {wait}")
    assert on_host(host, "start", "-c", "print('twice')").stdout == "runs already\n"
    log = host.parents[1] / "runs" / "host.log"
    for _ in range(600):
        if log.read_text():
            break
        time.sleep(0.05)
    assert on_host(host, "status").stdout == "up\n"
    # A machine that shuts down tells the shell around the training as well.
    os.kill(int((log.parent / "host.pid").read_text()), signal.SIGTERM)
    assert on_host(host, "stop").returncode == 0
    followed = on_host(host, "follow")
    assert (followed.returncode, followed.stdout) == (1, "up\nsaved\n")
    assert on_host(host, "stop").returncode == 0  # there is nothing left to stop


@pytest.fixture
def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def test_the_jobset_has_the_shape_of_its_api(jobset):
    # sigs.k8s.io/jobset, api/jobset/v1alpha2/jobset_types.go
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) == {"failurePolicy", "replicatedJobs"}
    policy = jobset["spec"]["failurePolicy"]
    assert set(policy) == {"maxRestarts", "rules"}
    assert policy["rules"] == [
        {"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
        {"name": "restartShard", "action": "RestartJob"},
    ]
    (shard,) = jobset["spec"]["replicatedJobs"]
    assert set(shard) == {"name", "replicas", "template"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "shard"}, **shard["template"]}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_the_jobset_fills_its_slices_and_splits_the_table(jobset):
    (shard,) = jobset["spec"]["replicatedJobs"]
    job = shard["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["completions"] == job["parallelism"] == chips / container["resources"]["limits"]["google.com/tpu"]
    assert job["backoffLimit"] == 0
    assert "--distributed" in container["args"]
    assert "--shard=$(JOB_INDEX)/$(SHARDS)" in container["args"]
    variables = {entry["name"]: entry for entry in container["env"]}
    for argument in container["args"]:
        assert set(re.findall(r"\$\((\w+)\)", argument)) <= set(variables)
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" in {toleration["key"] for toleration in pod["tolerations"]}


def test_skypilot_demands_what_it_cannot_know_and_recovers_from_spot():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["use_spot"] is True
    assert {name for name, value in task["envs"].items() if value is None} == {"NAME", "BUCKET"}
    assert set(re.findall(r"\$(\w+)", task["run"])) == set(task["envs"])
    for part in ("setup", "run"):
        # SC2154: SkyPilot sets the variables.
        shellcheck("--shell=bash", "--exclude=SC2154", "-", script=task[part])


@pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="SkyPilot is not installed: pip install skypilot")
def test_skypilot_reads_the_task(tmp_path):
    program = (
        "import sys, yaml; from sky import Task; task = yaml.safe_load(sys.stdin);"
        "task = Task.from_yaml_config(task, env_overrides=[('NAME', 'fleet'), ('BUCKET', 'gs://bucket')]);"
        "print(task.resources)"
    )
    text = (LAUNCH / "skypilot.yaml").read_text()
    read, misspelt = (
        subprocess.run(
            [sys.executable, "-c", program],
            input=given,
            capture_output=True,
            text=True,
            env={**os.environ, "HOME": str(tmp_path)},
            cwd=ROOT,
        )
        for given in (text, text.replace("job_recovery", "job_recoverie"))
    )
    assert read.returncode == 0, read.stderr
    assert "[Spot]" in read.stdout
    assert "tpu-v5litepod-16" in read.stdout
    assert "job_recoverie" in misspelt.stderr


def test_the_image_is_built_from_files_that_are_there_and_not_ignored():
    subprocess.run([HADOLINT, LAUNCH / "Dockerfile"], check=True)
    dockerfile = (LAUNCH / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+)", dockerfile, re.MULTILINE) for name in line.split()[:-1]]
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied) == sorted(allowed)
    for name in copied:
        assert (ROOT / name).exists()


def test_all_hosts_get_the_same_version_of_every_dependency():
    setup = ast.parse((ROOT / "setup.py").read_text())
    assigned = {node.targets[0].id: node.value for node in setup.body if isinstance(node, ast.Assign)}

    def name_of(requirement):
        return re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")

    pins = [line for line in (LAUNCH / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin) for pin in pins)
    assert {name_of(requirement) for requirement in ast.literal_eval(assigned["DEPENDENCIES"])} <= {
        name_of(pin) for pin in pins
    }


def test_the_training_knows_every_flag_that_it_is_given():
    files = [*sorted(LAUNCH.iterdir()), ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    files += (ROOT / "configs").iterdir()
    text = "\n".join(file.read_text() for file in files if file.is_file()).replace("\\\n", " ")
    lines = [line.split("perfusion_jax.train", 1)[1] for line in text.splitlines() if "perfusion_jax.train" in line]
    container = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]
    (container,) = container["template"]["spec"]["template"]["spec"]["containers"]
    given = re.findall(r"--([\w.]+)", " ".join([*lines, *container["args"], (LAUNCH / "common.sh").read_text()]))
    defined = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', (ROOT / "perfusion_jax" / "train.py").read_text()))
    keys = {f"config.{key}" for key in {*KEYS, "KEY"}}
    ours = {"dry_run", "help", "recursive", "exclude"}  # of the scripts and of gcloud
    assert set(given) <= {"config", *defined, *keys, *ours}
    assert {"workdir", "distributed", "shard", "config.concepts", "coordinator_address"} <= set(given)


def test_what_the_readme_names_is_there():
    readme = (LAUNCH / "README.md").read_text()
    named = set(re.findall(r"launch/[\w.]+", readme)) | set(re.findall(r"\]\((?!http)([^)#]+)\)", readme))
    assert {"launch/tpu_vm.sh", "launch/xpk.sh", "launch/jobset.yaml", "launch/skypilot.yaml"} <= named
    for name in named:
        assert (ROOT / name).exists() or (LAUNCH / name).exists(), name
    for script, command in re.findall(r"launch/(\w+\.sh) (?:--dry_run )?(\w+)", readme):
        assert command in COMMANDS[script]

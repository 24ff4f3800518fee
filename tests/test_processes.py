"""A fleet on several processes of this machine, which find each other as the hosts of a slice do."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from etils import epath
from fleet_runs import ROOT, STEPS, assert_close, assert_same, make_config, start, wait_for_lines, write_inputs

from perfusion_jax import InputError, load_base_model
from perfusion_jax.formats.concept_file import load_concept
from perfusion_jax.formats.lora import lora_bytes
from perfusion_jax.learning.runs import train_fleet
from perfusion_jax.pod import distributed
from perfusion_jax.runtime.errors import UnavailableError

LIMIT = 40  # steps of every concept
# Steps of a real model take longer than the second or two in which a SIGTERM is agreed on.
SLOWLY = (
    "import time; from jax.experimental import multihost_utils as many; reached = many.reached_preemption_sync_point; "
    "many.reached_preemption_sync_point = lambda number: (time.sleep(0.2), reached(number))[1]"
)


# Saves twice, damages what process 1 wrote of the second, and restores.
ONE_CANNOT_READ = """
import sys
import jax, numpy as np
from pathlib import Path
from perfusion_jax.pod import distributed
from perfusion_jax.learning.checkpoints import Checkpoints
address, number, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
with distributed.job(address, 2, number):
    split = jax.sharding.NamedSharding(jax.make_mesh((2,), ("concept",)), jax.sharding.PartitionSpec("concept"))
    def state(step):
        whole = np.random.default_rng(step).standard_normal((2, 5000)).astype(np.float32)
        return jax.make_array_from_callback(whole.shape, split, lambda index: whole[index])
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2):
        checkpoints.save(step, {"weights": state(step)})
    checkpoints.close()
    distributed.wait_for_all("saved")
    if number == 1:
        for file in (folder / "2" / "default" / "ocdbt.process_1").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[:100])
    distributed.wait_for_all("damaged")
    restored, step = Checkpoints(folder, keep=2).restore({"weights": state(0)}, lambda line: print("WARNING", line))
    ours, saved = (tree.addressable_data(0) for tree in (restored["weights"], state(1)))
    print("RESTORED", step, np.array_equal(ours, saved))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    lines = [f"{name},dog,{name},{LIMIT}" for name in STEPS]
    (folder / "concepts.csv").write_text("\n".join(["name,super_category,pictures,steps", *lines]) + "\n")
    return folder


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def start_all(config, workdir, count, before=None):
    """Starts processes that are one job; `before` is what each of them runs first."""
    place = ("--distributed", f"--coordinator_address={free_address()}", f"--num_processes={count}")
    return [
        start(config, workdir, *place, f"--process_id={number}", before=before[number] if before else "pass")
        for number in range(count)
    ]


def ends(processes, timeout=300):
    """Waits for processes to end: (exit status, output) of each."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def finish(config, workdir, count=2):
    for status, output in ends(start_all(config, workdir, count)):
        assert status == 0, output


@pytest.fixture(scope="module")
def config(inputs):
    """Of rounds of four, on two devices."""
    return make_config(inputs, members=4, mesh=(2, 1), exports=("lora",))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """An undisturbed run of two processes, which finish their concepts one by one and not equally many: its workdir."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    one_by_one = "from perfusion_jax.learning import loop, report, runs; loop.FINISHED_AT_ONCE = 1"
    # What all go by is read by one: others might see it later, or not.
    blind = f"{one_by_one}; runs.read_table = runs.begin = report.read_text = None"
    for status, output in ends(start_all(config, workdir, 2, [one_by_one, blind])):
        assert status == 0, output
    return workdir


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """The same by one process: its workdir."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    train_fleet(make_config(inputs, members=4, mesh=(1, 1)), epath.Path(workdir))
    return workdir


def test_two_processes_learn_what_one_does(finished, alone):
    for name in STEPS:
        assert_close(finished, alone, name)


def test_processes_export_the_concepts_that_they_finish(config, finished):
    base = load_base_model(config.base, edited_only=True)
    for name in STEPS:
        exported = finished / "exports" / name / "lora"
        concept = load_concept(finished / "concepts" / f"{name}.safetensors", base)
        assert (exported / f"{name}_lora.safetensors").read_bytes() == lora_bytes(base, [concept])
        assert (exported / "README.md").is_file()


@pytest.mark.slow
def test_four_processes_that_share_concepts_learn_what_one_does(inputs, alone, tmp_path):
    finish(make_config(inputs, members=4, mesh=(2, 2)), tmp_path / "run", count=4)
    for name in STEPS:
        assert_close(tmp_path / "run", alone, name)


def interrupted_in_the_second_round(config, workdir, victim, how):
    """Sends a signal to one of two processes when the first round is over: how both ended, and after how long."""
    processes = start_all(config, workdir, 2, [SLOWLY, SLOWLY])
    wait_for_lines(processes[0], workdir / "metrics.jsonl", LIMIT + 2)
    processes[victim].send_signal(how)
    began = time.monotonic()
    ended = ends(processes)
    return ended, time.monotonic() - began


def finishes_without_doing_anything_twice(config, workdir, finished):
    done = {file: file.stat().st_mtime_ns for file in (workdir / "concepts").iterdir()}
    assert len(done) == 4
    finish(config, workdir)
    assert done == {file: file.stat().st_mtime_ns for file in done}
    for name in STEPS:
        assert_same(finished, workdir, name)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_the_same_step_and_the_same_command_goes_on(config, finished, tmp_path):
    workdir = tmp_path / "run"
    ended, _ = interrupted_in_the_second_round(config, workdir, victim=1, how=signal.SIGTERM)
    for status, output in ended:
        assert status == 1, output
        assert "interrupted; the same command goes on where it was" in output
    assert any(folder.name.isdigit() for folder in (workdir / "checkpoints").iterdir())
    finishes_without_doing_anything_twice(config, workdir, finished)


def test_what_the_first_process_finds_wrong_ends_all_as_bad_input(inputs, finished):
    changed = make_config(inputs, members=4, mesh=(2, 1), bias=0.5)
    for status, output in ends(start_all(changed, finished, 2)):
        assert status == 2, output
        assert "this workdir is of another config" in output


def test_a_process_that_is_alone_is_stopped_while_it_loads_the_model(inputs, tmp_path):
    config = make_config(inputs)
    slowly = "import time; from perfusion_jax.learning import runs; runs.load_resources = lambda _: time.sleep(100)"
    (process,) = start_all(config, tmp_path / "run", 1, [slowly])
    wait_for_lines(process, tmp_path / "run" / "config.json", 1)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    ((status, output),) = ends([process])
    assert status == 1
    assert "interrupted" in output
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("error", "to_be_tried_again"), [(RuntimeError("DEADLINE_EXCEEDED"), True), (ValueError("no coordinator"), False)]
)
def test_a_host_that_does_not_find_the_others_tells_whether_to_try_again(monkeypatch, error, to_be_tried_again):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(distributed.jax.distributed, "initialize", fail)
    with pytest.raises(InputError, match="cannot join the others") as caught, distributed.job(None, None, None):
        pass
    assert isinstance(caught.value, UnavailableError) == to_be_tried_again


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("lost"), ValueError("UNKNOWN: Gloo AllGather failed")])
def test_what_the_loss_of_another_process_raises_names_the_process(monkeypatch, error):
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    with pytest.raises(SystemExit, match="process 0 cannot go on with the other 1"), distributed.job(None, None, None):
        raise error


def tells_that_another_is_lost(output):
    return "most likely indicates that another task died" in output or "cannot go on with the other 1" in output


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_when_one_process_dies_the_other_ends_and_the_same_command_goes_on(config, finished, tmp_path, victim):
    workdir = tmp_path / "run"
    ended, seconds = interrupted_in_the_second_round(config, workdir, victim, how=signal.SIGKILL)
    status, output = ended[1 - victim]
    assert status not in (0, 2)  # 2 would say that it is of no use to try again
    assert tells_that_another_is_lost(output), output
    assert seconds < 120
    finishes_without_doing_anything_twice(config, workdir, finished)


def test_a_checkpoint_that_one_process_cannot_read_is_taken_by_none(tmp_path):
    address = free_address()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_CANNOT_READ, address, str(number), str(tmp_path / "checkpoints")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for number in range(2)
    ]
    for number, (status, output) in enumerate(ends(processes)):
        assert status == 0, output
        assert ("WARNING" in output) == (number == 0), output
        assert "RESTORED 1 True" in output
    assert (tmp_path / "checkpoints" / "2.unreadable").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_in_one_process_ends_the_other(config, tmp_path, victim):
    before = ["pass", "pass"]
    before[victim] = (
        "from perfusion_jax import InputError; from perfusion_jax.learning import runs; "
        "runs.load_resources = lambda _: exec('raise InputError(7)')"
    )
    began = time.monotonic()
    ended = ends(start_all(config, tmp_path / "run", 2, before))
    assert ended[victim][0] != 0
    assert "error: 7" in ended[victim][1]
    assert ended[1 - victim][0] not in (0, 2)
    assert tells_that_another_is_lost(ended[1 - victim][1])
    assert time.monotonic() - began < 120

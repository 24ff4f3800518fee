"""Whole runs of a fleet on a small base model of random weights."""

import json
import shutil
import signal
import time

import numpy as np
import pytest
from etils import epath
from fleet_runs import (
    CONFIG,
    STEPS,
    assert_same,
    make_config,
    report_of,
    start,
    tensors_of,
    wait_for_lines,
    write_inputs,
)

from configs import default
from perfusion_jax import InputError, training
from perfusion_jax.fleet import train_fleet
from perfusion_jax.train import train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """An undisturbed run in rounds of four: its workdir."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train_fleet(make_config(inputs, members=4), epath.Path(workdir))
    return workdir


def test_every_concept_is_written_and_reported(finished):
    report = report_of(finished)
    assert list(report) == sorted(STEPS, key=lambda name: STEPS[name])
    for name, line in report.items():
        assert (line["state"], line["steps"], line["error"]) == ("done", STEPS[name], "")
        assert 0 < line["chip_seconds"] <= line["seconds"]
        assert (finished / "concepts" / f"{name}.safetensors").exists()
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 5 + 6 + 1))  # rounds of 5 and 6 steps
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert [line["members"] for line in lines] == [4, 4, 4, 4, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("name", ["rex", "tom"])
def test_a_concept_equals_the_one_that_train_learns_alone(inputs, finished, tmp_path, name):
    config = default.get_config(str(inputs / "base"))
    config.update(CONFIG, name=name, super_category="dog", pictures=str(inputs / name), steps=STEPS[name])
    config.update(covariance=str(inputs / "covariance.npz"), validate_every=0, flip=name != "tom")
    train(config, epath.Path(tmp_path))
    alone = tensors_of(tmp_path, name)
    for key, tensor in tensors_of(finished, name).items():
        np.testing.assert_allclose(tensor, alone[key], rtol=1e-3, atol=1e-3 * np.abs(alone[key]).max(), err_msg=key)


def test_a_finished_fleet_does_nothing_more(inputs, finished, capsys):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*.safetensors")}
    train_fleet(make_config(inputs, members=4), epath.Path(finished))
    assert "6 concepts: 6 done" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in finished.rglob("*.safetensors")}


def test_another_config_is_refused(inputs, finished):
    with pytest.raises(InputError, match="this workdir is of another config"):
        train_fleet(make_config(inputs, bias=0.5), epath.Path(finished))


def test_a_corrupt_concept_is_reported_and_the_others_finish(inputs, finished, tmp_path):
    for name in ("rex", "cup", "max"):
        shutil.copytree(inputs / name, tmp_path / "table" / name)
        (tmp_path / "table" / name / "concept.json").write_text('{"super_category": "dog"}')
    (tmp_path / "table" / "cup" / "0.png").write_text("no picture")
    config = make_config(inputs, concepts=str(tmp_path / "table"))
    with pytest.raises(InputError, match=r"1 of 3 concepts were not learnt, such as cup: .*0\.png: not a picture"):
        train_fleet(config, epath.Path(tmp_path / "run"))
    report = report_of(tmp_path / "run")
    assert {name: line["state"] for name, line in report.items()} == {"rex": "done", "max": "done", "cup": "failed"}
    # Mended, the same command does what is missing, and nothing else.
    before = (tmp_path / "run" / "concepts" / "rex.safetensors").stat().st_mtime_ns
    shutil.copy(inputs / "cup" / "0.png", tmp_path / "table" / "cup" / "0.png")
    train_fleet(config, epath.Path(tmp_path / "run"))
    assert report_of(tmp_path / "run")["cup"]["state"] == "done"
    assert (tmp_path / "run" / "concepts" / "rex.safetensors").stat().st_mtime_ns == before


def test_a_member_that_diverges_is_marked_and_the_others_finish(inputs, finished, tmp_path, monkeypatch):
    step = training.train_step

    def breaking(base, params, whitening, examples, learning, key, settings, place):
        # From the third step on, the pictures of the concept that has four of them are infinite.
        broken = examples._replace(mean=examples.mean / ((learning.step < 2) | (examples.num_pictures != 4)))
        return step(base, params, whitening, broken, learning, key, settings, place)

    monkeypatch.setattr(training, "train_step", breaking)
    with pytest.raises(InputError, match=r"1 of 6 .* tom: the loss or its gradient was not finite at step 3"):
        train_fleet(make_config(inputs, members=6), epath.Path(tmp_path))
    states = {name: line["state"] for name, line in report_of(tmp_path).items()}
    assert states == {name: "diverged" if name == "tom" else "done" for name in STEPS}
    assert not (tmp_path / "concepts" / "tom.safetensors").exists()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_in_a_round_the_same_command_ends_at_the_same_concepts(inputs, finished, tmp_path, how):
    config = make_config(inputs, members=4)
    process = start(config, tmp_path / "run")
    wait_for_lines(process, tmp_path / "run" / "metrics.jsonl", 3)
    process.send_signal(how)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    if how == signal.SIGTERM:
        assert "interrupted; the same command goes on where it was" in output
    assert len(list((tmp_path / "run").glob("concepts/*"))) < len(STEPS)
    train_fleet(config, epath.Path(tmp_path / "run"))
    for name in STEPS:
        assert_same(finished, tmp_path / "run", name)


def test_a_second_job_on_one_workdir_is_refused(inputs, tmp_path):
    config = make_config(inputs)
    process = start(config, tmp_path / "run")
    wait_for_lines(process, tmp_path / "run" / "config.json", 1)
    while process.poll() is None and not (tmp_path / "run" / "lock").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    try:
        with pytest.raises(InputError, match="lock: another job is at work here; wait for it, or take another"):
            train_fleet(config, epath.Path(tmp_path / "run"))
    finally:
        process.kill()
        process.communicate()


def test_a_full_disk_ends_with_an_error_and_the_same_command_goes_on(inputs, finished, tmp_path):
    """No file may grow beyond so many bytes: configs and reports fit, checkpoints do not."""
    config = make_config(inputs, members=4)
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " + (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
    )
    process = start(config, tmp_path / "run", before=limit)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert f"error: {tmp_path / 'run'}" in output
    assert "cannot be written" in output
    train_fleet(config, epath.Path(tmp_path / "run"))
    for name in STEPS:
        assert_same(finished, tmp_path / "run", name)


def test_shards_of_a_table_share_a_workdir(inputs, tmp_path):
    for index in range(2):
        train_fleet(make_config(inputs), epath.Path(tmp_path), (index, 2))
    names = [sorted(report_of(tmp_path / f"shard_{index}_of_2")) for index in range(2)]
    assert names == [["cup", "max", "rex"], ["bob", "tom", "zoe"]]
    assert len(list((tmp_path / "concepts").iterdir())) == len(STEPS)

"""Whole runs of a fleet on a small base model of random weights."""

import dataclasses
import json
import re
import shutil
import signal
import time
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from checkpoints import save_clip
from etils import epath
from fleet_runs import (
    CONFIG,
    STEPS,
    assert_close,
    assert_same,
    make_config,
    report_of,
    start,
    wait_for_lines,
    write_inputs,
)

from perfusion_jax import InputError
from perfusion_jax.config import OVERRIDES, member_config
from perfusion_jax.config import make_config as config_of
from perfusion_jax.data.table import read_table
from perfusion_jax.formats.concept_file import read_card
from perfusion_jax.learning import rounds, runs
from perfusion_jax.learning import step as training
from perfusion_jax.learning.checkpoints import Checkpoints
from perfusion_jax.learning.loop import Loop
from perfusion_jax.learning.report import OpenRound
from perfusion_jax.learning.resources import load_resources
from perfusion_jax.learning.rounds import Member, plan, round_settings
from perfusion_jax.learning.runs import train_fleet, train_one
from perfusion_jax.pod import distributed
from perfusion_jax.pod import memory as memory_lib
from perfusion_jax.runtime.errors import Stopped, UnavailableError


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
        assert (finished / "concepts" / f"{name}.safetensors").exists()
    for together in (list(report)[:4], list(report)[4:]):
        # A round's concepts have shared the time of the one chip, whatever the steps of each.
        taken = [report[name]["chip_seconds"] for name in together]
        assert min(taken) > 0
        assert sum(taken) == pytest.approx(max(report[name]["seconds"] for name in together), abs=0.01)
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 5 + 6 + 1))  # rounds of 5 and 6 steps
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert [line["members"] for line in lines] == [4, 4, 4, 4, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rex", "tom"])
def test_a_concept_equals_the_one_that_train_learns_alone(inputs, finished, tmp_path, name):
    config = config_of(str(inputs / "base"))
    config.update(CONFIG, name=name, super_category="dog", pictures=str(inputs / name), steps=STEPS[name])
    config.update(covariance=str(inputs / "covariance.npz"), validate_every=0, flip=name != "tom")
    train_one(config, epath.Path(tmp_path))
    assert_close(finished, tmp_path, name)


def test_a_finished_fleet_does_nothing_more(inputs, finished, capsys):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*.safetensors")}
    train_fleet(make_config(inputs, members=4), epath.Path(finished))
    assert "6 concepts: 6 done" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in finished.rglob("*.safetensors")}


def test_a_finished_concept_whose_line_has_changed_stays_and_that_is_told(inputs, finished, capsys):
    before, table = (finished / "concepts" / "max.safetensors").read_bytes(), (inputs / "concepts.csv").read_text()
    (inputs / "concepts.csv").write_text(table.replace("max,dog,max,4", "max,dog,zoe,4"))
    try:
        train_fleet(make_config(inputs, members=4), epath.Path(finished))
    finally:
        (inputs / "concepts.csv").write_text(table)
    warning = capsys.readouterr().err
    assert "concepts.csv:" in warning
    assert "1 of the concepts that are over, such as max, were learnt by other lines" in warning
    assert (finished / "concepts" / "max.safetensors").read_bytes() == before
    train_fleet(make_config(inputs, members=4), epath.Path(finished))
    assert "other lines" not in capsys.readouterr().err


def test_another_config_is_refused(inputs, finished):
    with pytest.raises(InputError, match="this workdir is of another config"):
        train_fleet(make_config(inputs, bias=0.5), epath.Path(finished))


def test_a_corrupt_concept_is_reported_and_the_others_finish(inputs, finished, tmp_path, capsys):
    for name in ("rex", "cup", "max"):
        shutil.copytree(inputs / name, tmp_path / "table" / name)
        (tmp_path / "table" / name / "concept.json").write_text('{"super_category": "dog"}')
    (tmp_path / "table" / "cup" / "0.png").write_text("no picture")
    (tmp_path / "table" / "tom").mkdir()
    config = make_config(inputs, concepts=str(tmp_path / "table"))
    train_fleet(config, epath.Path(tmp_path / "run"))
    told = capsys.readouterr().err
    assert re.search(r"warning: 2 of 4 concepts were not learnt, such as cup: .*0\.png: not a picture", told)
    report = report_of(tmp_path / "run")
    states = {"rex": "done", "max": "done", "cup": "failed", "tom": "failed"}
    assert {name: line["state"] for name, line in report.items()} == states
    assert "tom/concept.json: missing or empty" in report["tom"]["error"]
    # Mended, the same command does what is missing, and nothing else.
    before = (tmp_path / "run" / "concepts" / "rex.safetensors").stat().st_mtime_ns
    shutil.copy(inputs / "cup" / "0.png", tmp_path / "table" / "cup" / "0.png")
    shutil.copytree(inputs / "tom", tmp_path / "table" / "tom", dirs_exist_ok=True)
    (tmp_path / "table" / "tom" / "concept.json").write_text('{"super_category": "cat"}')
    train_fleet(config, epath.Path(tmp_path / "run"))
    assert {line["state"] for line in report_of(tmp_path / "run").values()} == {"done"}
    assert (tmp_path / "run" / "concepts" / "rex.safetensors").stat().st_mtime_ns == before
    # A folder that breaks when its concept is done already changes nothing.
    (tmp_path / "table" / "tom" / "concept.json").unlink()
    capsys.readouterr()
    train_fleet(config, epath.Path(tmp_path / "run"))
    assert {line["state"] for line in report_of(tmp_path / "run").values()} == {"done"}
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("some/clipseg: the hub cannot be reached"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."),
        jax.errors.JaxRuntimeError("INTERNAL: Core halted unexpectedly"),
        MemoryError("of the host"),
    ],
)
def test_what_is_no_fault_of_a_concept_ends_the_run(inputs, tmp_path, monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr("perfusion_jax.learning.preparation._segmenter", fail)
    config = make_config(inputs, masks="segmenter", segmenter="some/clipseg")
    with pytest.raises(type(error), match=str(error)):
        train_fleet(config, epath.Path(tmp_path))
    assert not (tmp_path / "report.jsonl").exists()


def test_a_round_that_memory_did_not_suffice_to_prepare_beside_another_is_prepared_after_it(
    inputs, finished, tmp_path, monkeypatch
):
    calls = []
    prepare = runs.prepare

    def once_too_much(*arguments):
        calls.append(arguments[1])
        if len(calls) == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")
        return prepare(*arguments)

    monkeypatch.setattr(runs, "prepare", once_too_much)
    train_fleet(make_config(inputs, members=4), epath.Path(tmp_path))
    first, second, again = calls
    assert first != second == again
    for name in STEPS:
        assert_same(tmp_path, finished, name)


def test_a_step_that_memory_does_not_suffice_for_beside_the_next_round_is_taken_again_alone(
    inputs, finished, tmp_path, monkeypatch
):
    """Also where a concept of the round was finished before; a second time, the run ends."""
    take_step = Loop._take_step

    def too_much_at_once(loop):
        if loop.step == 4 and failures:
            failures.pop()
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")
        take_step(loop)

    monkeypatch.setattr(Loop, "_take_step", too_much_at_once)
    failures = [1]
    train_fleet(make_config(inputs, members=4), epath.Path(tmp_path / "once"))
    for name in STEPS:
        assert_same(tmp_path / "once", finished, name)
    failures = [1, 2]
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        train_fleet(make_config(inputs, members=4), epath.Path(tmp_path / "twice"))


def test_a_job_of_many_processes_that_is_short_of_memory_prepares_rounds_one_by_one_when_it_is_started_again(
    inputs, finished, tmp_path, monkeypatch
):
    workdir = epath.Path(tmp_path / "run")
    workdir.mkdir()
    events = []
    learn_round, prepare = runs.learn_round, runs.prepare

    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")

    watch = SimpleNamespace(bar=SimpleNamespace(position=0, say=events.append))
    records = SimpleNamespace(folder=workdir)
    job = runs._Job(resources=None, records=records, watch=watch, stop=None, executor=None)
    with monkeypatch.context() as patched:
        patched.setattr(runs, "learn_round", fail)
        patched.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(UnavailableError, match="does one after the other"):
            job._learn_round(rounds.Round(("rex",), None), None, upcoming=Future())
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            job._learn_round(rounds.Round(("rex",), None), None, upcoming=None)
    events.clear()
    monkeypatch.setattr(runs, "learn_round", lambda *them: (learn_round(*them), events.append("learn")))
    monkeypatch.setattr(runs, "prepare", lambda *them: (events.append("prepare"), prepare(*them))[1])
    train_fleet(make_config(inputs, members=4), workdir)
    assert events == ["prepare", "learn", "prepare", "learn"]
    for name in STEPS:
        assert_same(workdir, finished, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation_prompts": (f"a {{}} {'word ' * 40}",)}, r"config\.validation_prompts: .* tokens; .* shorten it"),
        ({"validation_prompts": ("a {}",), "sampling_steps": 2000}, r"config\.sampling_steps: .* allows 1 to 1000"),
    ],
)
def test_what_could_not_be_drawn_in_the_end_is_refused_before_a_step_is_taken(inputs, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        train_fleet(make_config(inputs, **change), epath.Path(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("error", "to_be_tried_again"), [(OSError(5, "Input/output error"), True), (PermissionError(13, "no"), False)]
)
def test_a_workdir_that_cannot_be_read_tells_whether_to_try_again(
    inputs, tmp_path, monkeypatch, error, to_be_tried_again
):
    config = make_config(inputs)
    (tmp_path / "config.json").write_text("{}")

    class Failing(type(epath.Path(tmp_path))):
        def read_text(self, *_, **__):
            raise error

    with pytest.raises(InputError, match=r"config\.json: cannot be read") as caught:
        train_fleet(config, Failing(tmp_path))
    assert isinstance(caught.value, UnavailableError) == to_be_tried_again


def test_a_shard_without_a_concept_that_can_be_learnt_does_not_stop_the_others(inputs, tmp_path, capsys):
    lines = (inputs / "concepts.csv").read_text().splitlines()
    lines[1] = "lost,dog,nowhere,4,"
    (inputs / "lost.csv").write_text("\n".join(lines) + "\n")
    config = make_config(inputs, concepts=str(inputs / "lost.csv"))
    train_fleet(config, epath.Path(tmp_path), shard=(0, 6))
    told = capsys.readouterr().err
    assert re.search(r"warning: 1 of 1 concepts were not learnt, such as lost: .*nowhere", told)
    assert "concepts/h" not in told  # none was learnt


@pytest.mark.slow
def test_a_round_whose_last_checkpoint_fails_is_over(inputs, finished, tmp_path, monkeypatch):
    """Its concepts are written and reported, and what comes after it begins where its log ends."""
    close = Checkpoints.close

    def fail(checkpoints):
        close(checkpoints)
        raise UnavailableError("a checkpoint cannot be written")

    config = make_config(inputs, members=4)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "close", fail)
        with pytest.raises(UnavailableError, match="cannot be written"):
            train_fleet(config, epath.Path(tmp_path))
    train_fleet(config, epath.Path(tmp_path))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 5 + 6 + 1))
    for name in STEPS:
        assert_same(tmp_path, finished, name)


def test_a_member_that_diverges_is_marked_and_the_others_finish(inputs, finished, tmp_path, monkeypatch, capsys):
    step = training.train_step

    def breaking(base, params, whitening, examples, learning, key, settings, place):
        # From the third step on, the pictures of the concept that has four of them are infinite.
        broken = examples._replace(mean=examples.mean / ((learning.step < 2) | (examples.num_pictures != 4)))
        return step(base, params, whitening, broken, learning, key, settings, place)

    monkeypatch.setattr(training, "train_step", breaking)
    train_fleet(make_config(inputs, members=6), epath.Path(tmp_path))
    assert re.search(
        "warning: 1 of 6 .* tom: the loss or its gradient was not finite at step 3", capsys.readouterr().err
    )
    states = {name: line["state"] for name, line in report_of(tmp_path).items()}
    assert states == {name: "diverged" if name == "tom" else "done" for name in STEPS}
    assert not (tmp_path / "concepts" / "tom.safetensors").exists()


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
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


@pytest.mark.slow
def test_what_is_before_a_checkpoint_is_logged_however_seldom_the_log_is_written(inputs, finished, tmp_path):
    """As in a bucket, where it is written every half minute; killed as soon as a checkpoint is whole."""
    killing = """
import os, signal
from perfusion_jax.learning import workdir
from perfusion_jax.learning.checkpoints import Checkpoints
save = Checkpoints.save
def save_and_die(self, step, state):
    save(self, step, state)
    self.close()
    os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = save_and_die
workdir.is_local = lambda _: False
"""
    config = make_config(inputs, members=4)
    process = start(config, tmp_path, before=f"exec({killing!r})")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output
    train_fleet(config, epath.Path(tmp_path))
    undisturbed, resumed = ((folder / "metrics.jsonl").read_text() for folder in (finished, tmp_path))
    assert without_times(resumed) == without_times(undisturbed)


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


@pytest.mark.slow
def test_a_full_disk_ends_with_an_error_and_the_same_command_goes_on(inputs, finished, tmp_path):
    """No file may grow beyond so many bytes: configs and reports fit, checkpoints do not."""
    config = make_config(inputs, members=4)
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " + (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
    )
    process = start(config, tmp_path / "run", before=limit)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1  # which tells launch/ to try again
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
    for shard in ((0, 1), (0, 3)):
        with pytest.raises(InputError, match=r"--shard: .*shard_._of_2 is of another split of the table"):
            train_fleet(make_config(inputs), epath.Path(tmp_path), shard)


def without_times(metrics):
    times = ("step_seconds", "samples_per_second")
    lines = map(json.loads, metrics.splitlines())
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def stopped_after(steps, config, workdir):
    """Starts a run, and stops it as a SIGTERM does after so many steps."""
    calls = iter(range(10**6))

    @contextmanager
    def stopping():
        yield lambda: next(calls) >= steps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "stopping", stopping)
        # It is asked before each step alone, and not while it waits for the pictures.
        patch.setattr(runs._Job, "_wait", lambda _, future: future.exception())
        with pytest.raises(Stopped):
            train_fleet(config, epath.Path(workdir))


@pytest.mark.slow
def test_a_concept_that_fails_once_in_an_interrupted_round_still_takes_all_its_steps(inputs, finished, tmp_path):
    config = make_config(inputs, members=4)
    picture = inputs / "max" / "0.png"
    whole = picture.read_bytes()
    try:
        for steps in (2, 1):
            stopped_after(steps, config, tmp_path)
            picture.write_bytes(b"" if steps == 2 else whole)
    finally:
        picture.write_bytes(whole)
    assert report_of(tmp_path)["max"]["state"] == "failed"
    restored = []
    restore = Checkpoints.restore

    def restore_and_tell(*arguments):
        found = restore(*arguments)
        restored.append(found and found[1])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "restore", restore_and_tell)
        train_fleet(config, epath.Path(tmp_path))
    # It has gone on after the steps that were taken, with the round that was open.
    assert restored[0] == 3
    assert {(line["state"], line["steps"]) for line in report_of(tmp_path).values()} == {("done", n) for n in (4, 5, 6)}
    for name in STEPS:
        assert_same(finished, tmp_path, name)


@pytest.mark.slow
def test_a_line_that_has_changed_in_an_interrupted_round_is_learnt_as_it_is_now(inputs, finished, tmp_path):
    table = inputs / "changing.csv"
    table.write_text((inputs / "concepts.csv").read_text().replace("max,dog,max,4", "max,dog,zoe,4"))
    config = make_config(inputs, members=4, concepts=str(table))
    stopped_after(2, config, tmp_path)
    table.write_text((inputs / "concepts.csv").read_text())
    train_fleet(config, epath.Path(tmp_path))
    for name in STEPS:
        assert_same(finished, tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 2), (2, 1)])
def test_an_interrupted_fleet_goes_on_on_another_mesh(inputs, finished, tmp_path, mesh):
    """Where weights are whole on both devices, these share the drawing of a concept's three pictures and one more."""
    telling = """
import jax
from perfusion_jax.drawing.programs import Program
draw = Program.draw
def draw_and_tell(program, *arguments):
    images, seen = draw(program, *arguments)
    if program.mesh is not None:
        params = jax.tree.map(lambda leaf: leaf.addressable_data(0), program.params)
        alone, _ = draw(program._replace(mesh=None, params=params), *arguments)
        shapes = [part.data.shape for part in images.addressable_shards]
        print("shared:", shapes, abs(jax.device_get(images) - jax.device_get(alone)).max() < 1e-3)
    return images, seen
Program.draw = draw_and_tell
"""
    config = make_config(inputs, members=4, validation_prompts=("a {} on the moon",), sampling_steps=2)
    config.pictures_per_prompt = 3
    stopped_after(3, config, tmp_path)
    config.mesh = mesh
    process = start(config, tmp_path, devices=2, before=f"exec({telling!r})")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    shared = "shared: [(2, 16, 16, 3), (2, 16, 16, 3)] True"
    assert output.count("shared:") == output.count(shared) == (len(STEPS) if mesh == (2, 1) else 0), output
    for name in STEPS:
        assert_close(tmp_path, finished, name)


def test_finished_concepts_are_drawn_and_scored(inputs, tmp_path):
    config = make_config(inputs, validation_prompts=("a {} on the moon",), evaluator=str(save_clip(tmp_path / "clip")))
    config.sampling_steps = 2
    train_fleet(config, epath.Path(tmp_path / "run"))
    for name, line in report_of(tmp_path / "run").items():
        assert {"image_similarity", "text_similarity", "prompt_precision", "score"} <= set(line)
        assert (tmp_path / "run" / "samples" / f"{name}.png").exists()


def test_a_fleet_keeps_the_best_step_of_each_concept_when_it_is_asked_to(inputs, tmp_path):
    config = make_config(inputs, validation_prompts=("a {} on the moon",), evaluator=str(save_clip(tmp_path / "clip")))
    config.update(sampling_steps=2, validate_every=2, pictures_per_prompt=1)
    train_fleet(config, epath.Path(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name, line in report_of(tmp_path / "run").items():
        # The six concepts are learnt in one round; each is looked at every second step, and after its last one.
        scores = {one["step"]: one["score"] for one in lines if one.get("name") == name}
        assert sorted(scores) == sorted({2, 4, STEPS[name], *range(2, STEPS[name] + 1, 2)})
        best = max(scores, key=scores.get)
        assert read_card(tmp_path / "run" / "concepts" / f"{name}.safetensors").step == best
        assert line["score"] == pytest.approx(scores[best])
        for step in scores:
            assert (tmp_path / "run" / "samples" / name / f"step_{step:06d}.png").exists()
    best_steps = [read_card(file).step for file in (tmp_path / "run" / "concepts").iterdir()]
    assert len(set(best_steps)) > 1  # so that another's step would be noticed
    assert all(line["step_seconds"] > 0 for line in lines if "step_seconds" in line)


def test_a_shard_without_concepts_says_so(inputs, tmp_path, capsys):
    train_fleet(make_config(inputs), epath.Path(tmp_path), shard=(len(STEPS), len(STEPS) + 1))
    assert "0 concepts: none in this shard" in capsys.readouterr().out


@pytest.mark.slow
def test_as_many_members_are_learnt_at_once_as_fit(inputs, monkeypatch):
    config = make_config(inputs)
    evaluator = SimpleNamespace(params=[np.zeros(1_000_000), np.zeros(1_000)])
    loaded = dataclasses.replace(load_resources(config), evaluator=evaluator)
    mesh = SimpleNamespace(shape={"concept": 1, "data": 1})
    held = 8 * 1_001_000  # the first device holds the evaluator besides
    members = [Member(row, member_config(config, row)) for row in read_table(config.concepts, OVERRIDES)][:3]
    settings = round_settings(members[0].config)
    sizes = [memory_lib.bytes_per_chip(loaded.compiled(settings, count, 8, 2, 16)) for count in (1, 2)]
    assert sizes == sorted(sizes)
    for fitting, size in enumerate(sizes, start=1):
        device = SimpleNamespace(memory_stats=lambda limit=size: {"bytes_limit": 2 * ((limit + held) / 0.9 + 2)})
        with monkeypatch.context() as patch:
            # Another process has half as much, and a third one does not tell.
            patch.setattr(distributed, "gather", lambda memory: [memory, memory / 2, None])
            patch.setattr(rounds.jax, "local_devices", lambda device=device: [device])
            planned = plan(dataclasses.replace(loaded, mesh=mesh), members, members, OpenRound())
            assert {len(one.members) for one in planned} == {fitting}
            # A round that was opened where there was more memory is begun anew.
            opened = OpenRound(members=[member.identity for member in members[:2]])
            planned = plan(dataclasses.replace(loaded, mesh=mesh), members, members, opened)
            names = [[member and member.name for member in one.members] for one in planned]
            assert names == ([["rex"], ["cup"], ["tom"]] if fitting == 1 else [["rex", "tom"], ["cup", None]])
    # A device that does not tell its memory takes 8; two rounds of 5 leave less idle than one of 8 and one of 1.
    nine = [members[0]._replace(row=members[0].row._replace(name=f"rex{number}")) for number in range(9)]
    assert [len(one.members) for one in plan(loaded, nine, nine, OpenRound())] == [5, 5]


@pytest.mark.slow
def test_the_memory_plan_reckons_with_the_pictures_that_there_are(inputs, monkeypatch, tmp_path):
    for name in ("many", "few"):
        shutil.copytree(inputs / "rex", tmp_path / name)
    for number in range(20):
        shutil.copy(inputs / "rex" / "0.png", tmp_path / "many" / f"more{number}.png")
    (tmp_path / "table.csv").write_text("name,super_category,pictures\nfew,dog,few\nmany,dog,many\n")
    config = make_config(inputs, concepts=str(tmp_path / "table.csv"))
    members = [Member(row, member_config(config, row)) for row in read_table(config.concepts, OVERRIDES)]
    loaded, asked = load_resources(config), []

    def compiled(settings, slots, pictures, *shape):
        asked.append(pictures)
        return loaded.compiled(settings, slots, pictures, *shape)

    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 10**12})
    monkeypatch.setattr(rounds.jax, "local_devices", lambda: [device])
    plan(dataclasses.replace(loaded, compiled=compiled), members, members, OpenRound())
    assert set(asked) == {24}  # 23 pictures, rounded up


def test_an_open_round_whose_members_do_not_learn_alike_any_more_is_begun_anew(inputs):
    config = make_config(inputs, members=2)
    members = [Member(row, member_config(config, row)) for row in read_table(config.concepts, OVERRIDES)][:4]
    opened = OpenRound(members=[member.identity for member in members[1:3]])
    loaded = load_resources(config)

    def names():
        planned = plan(loaded, members, members, opened)
        return [[member and member.name for member in one.members] for one in planned]

    assert names() == [["tom", "cup"], ["rex", "bob"]]
    members[1].config.batch_size = 4
    assert names() == [["rex", "cup"], ["bob", None], ["tom"]]


def test_a_batch_that_the_mesh_cannot_split_is_named_before_anything_is_learnt(inputs, tmp_path):
    lines = (inputs / "concepts.csv").read_text().splitlines()
    sizes = ["batch_size", "", "", "", "3", "", ""]
    (inputs / "odd.csv").write_text("".join(f"{line},{size}\n" for line, size in zip(lines, sizes, strict=True)))
    config = make_config(inputs, concepts=str(inputs / "odd.csv"), mesh=(1, 2))
    process = start(config, tmp_path, devices=2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert re.search(r"error: .*odd\.csv.*5.*: config\.batch_size is 3", output)

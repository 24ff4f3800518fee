"""The studio's queue."""

import json
import threading
import time

import pytest
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from perfusion_jax import InputError
from perfusion_jax.config import OVERRIDES, make_config, settle, to_json
from perfusion_jax.data.table import read_table
from perfusion_jax.runtime.errors import Stopped
from perfusion_jax.runtime.files import locked
from perfusion_jax.web import jobs
from perfusion_jax.web.easel import Easel
from perfusion_jax.web.jobs import Jobs, command_of
from perfusion_jax.web.studio import Studio


def config(name, **changes):
    return make_config(name=name, super_category="dog", pictures=f"/pictures/{name}", **changes)


class Learner:
    """Stands for the functions that learn: a run takes until it is let end, or told to stop."""

    def __init__(self, monkeypatch):
        self.begun, self.errors, self.end, self.warning = [], {}, threading.Event(), ""
        monkeypatch.setattr(jobs, "train_one", self.learn)
        monkeypatch.setattr(jobs, "train_fleet", self.learn)

    def learn(self, config, workdir, session):
        bar = session.bar(10, 1, workdir.name)
        bar.advance(3)
        bar.say("compiling")
        if self.warning:
            logging.warning("%s", self.warning)
        self.begun.append((workdir.name, config))
        while not self.end.is_set():
            if session.stop():
                raise Stopped
            time.sleep(0.005)
        if workdir.name in self.errors:
            raise self.errors[workdir.name]


@pytest.fixture
def learner(monkeypatch):
    learner = Learner(monkeypatch)
    yield learner
    learner.end.set()


@pytest.fixture
def queue(tmp_path, learner):
    queue = Jobs(tmp_path)
    yield queue
    queue.close()


def wait(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def states(queue):
    return {job.run: job.state for job in queue.snapshot()}


def test_what_is_added_is_learnt_and_its_progress_is_seen(queue, learner):
    queue.start()
    queue.add(config("rex", steps=10))
    wait(lambda: queue.progress() is not None and queue.progress().words)
    assert states(queue) == {"rex": "learning"}
    progress = queue.progress()
    assert (progress.position, progress.total, progress.words) == (3, 10, "compiling")
    ((run, learnt),) = learner.begun
    assert run == "rex"
    assert to_json(learnt) == to_json(config("rex", steps=10))
    learner.end.set()
    wait(lambda: states(queue) == {"rex": "done"})
    assert queue.progress() is None


def test_things_that_wait_are_learnt_as_one_fleet_where_they_can_be(queue, learner, tmp_path):
    queue.add(config("rex", steps=20))
    queue.add(config("tom", steps=30, flip=False))
    queue.add(config("cup", dtype="bfloat16"))  # of another network: by itself
    queue.start()
    wait(lambda: learner.begun)
    run, learnt = learner.begun[0]
    assert run == "rex-and-1-more"
    assert states(queue) == {"rex-and-1-more": "learning", "cup": "waiting"}
    rows = {row.name: row for row in read_table(learnt.concepts, OVERRIDES)}
    assert (rows["rex"].overrides, rows["tom"].overrides) == ({}, {"steps": 30, "flip": False})
    assert rows["tom"].super_category == "dog"
    assert rows["tom"].pictures == "/pictures/tom"
    assert learnt.steps == 20
    assert not learnt.pictures
    learner.end.set()
    wait(lambda: set(states(queue).values()) == {"done"})
    assert [name for name, _ in learner.begun] == ["rex-and-1-more", "cup"]


def test_a_run_is_stopped_goes_on_and_is_taken_out(queue, learner):
    queue.start()
    queue.add(config("rex"))
    wait(lambda: learner.begun)
    with pytest.raises(InputError, match="stop it first"):
        queue.forget("rex")
    queue.stop("rex")
    wait(lambda: states(queue) == {"rex": "stopped"})
    queue.go_on("rex")
    wait(lambda: len(learner.begun) == 2)
    queue.stop("rex")
    wait(lambda: states(queue) == {"rex": "stopped"})
    queue.forget("rex")
    assert states(queue) == {}


def test_a_run_that_learnt_nothing_leaves_its_name_when_it_is_taken_out(queue, learner, tmp_path):
    queue.start()
    queue.add(config("rex"))
    wait(lambda: learner.begun)
    (tmp_path / "rex" / "checkpoints").mkdir(parents=True)  # as where it is stopped while it compiles
    (tmp_path / "rex" / "config.json").write_text(to_json(config("rex")))
    queue.stop("rex")
    wait(lambda: states(queue) == {"rex": "stopped"})
    queue.forget("rex")
    assert not (tmp_path / "rex").exists()
    queue.add(config("rex"))


def test_an_interrupted_run_is_deleted_and_leaves_its_name(queue, tmp_path):
    (tmp_path / "rex").mkdir()
    (tmp_path / "rex" / "config.json").write_text(to_json(config("rex")))
    (tmp_path / "rex" / "metrics.jsonl").write_text('{"step": 2}\n')
    with pytest.raises(InputError, match="no run that can be gone on with"):
        queue.discard("../rex")
    with locked(epath.Path(tmp_path / "rex" / "lock"), ""), pytest.raises(InputError, match="no run"):
        queue.discard("rex")
    queue.discard("rex")
    assert not (tmp_path / "rex").exists()
    queue.add(config("rex"))


def test_nothing_that_goes_wrong_between_runs_ends_the_queue(queue, learner, monkeypatch):
    def fail(*arguments):
        raise OSError("disk")

    monkeypatch.setattr(jobs, "_mark", fail)
    queue.start()
    queue.add(config("rex"))
    wait(lambda: states(queue) == {"rex": "failed"})
    assert "OSError: disk" in queue.snapshot()[0].error
    monkeypatch.undo()
    learner.end.set()
    monkeypatch.setattr(jobs, "train_one", learner.learn)
    queue.add(config("tom"))
    wait(lambda: states(queue)["tom"] == "done")


def test_a_run_that_ends_the_program_each_time_is_begun_twice_and_no_more(tmp_path, learner):
    def kill(at_work):
        """What a studio that is killed leaves in the file."""
        text = (tmp_path / ".studio" / "queue.json").read_text()
        at_work.close()
        (tmp_path / ".studio" / "queue.json").write_text(text)

    first = Jobs(tmp_path)
    first.add(config("rex"))
    for begun in (1, 2):
        (again := first if begun == 1 else Jobs(tmp_path)).start()
        wait(lambda begun=begun: len(learner.begun) == begun)
        kill(again)
    last = Jobs(tmp_path)
    assert states(last) == {"rex": "stopped"}
    assert "perhaps memory does not suffice" in last.snapshot()[0].error
    (tmp_path / "rex" / "checkpoints" / "20").mkdir(parents=True)
    assert states(Jobs(tmp_path)) == {"rex": "waiting"}  # one that comes further is begun again
    last.go_on("rex")
    assert last.snapshot()[0].error == ""


def test_a_stopped_run_is_gone_on_with_by_its_new_name_and_not_once_it_is_deleted(queue, learner):
    queue.start()
    queue.add(config("rex"))
    wait(lambda: learner.begun)
    queue.stop("rex")
    wait(lambda: states(queue) == {"rex": "stopped"})
    queue.rename("rex", "rex", "max")
    queue.go_on("rex")
    wait(lambda: len(learner.begun) == 2)
    assert learner.begun[1][1].name == "max"
    queue.stop("rex")
    wait(lambda: states(queue) == {"rex": "stopped"})
    queue.forget_deleted("rex")
    assert states(queue) == {}


def test_warnings_of_training_are_kept(queue, learner):
    learner.warning = "rex.txt: not used"
    learner.end.set()
    queue.start()
    queue.add(config("rex"))
    wait(lambda: states(queue) == {"rex": "done"})
    assert queue.snapshot()[0].warnings == ("rex.txt: not used",)


def test_one_that_waits_is_taken_out_of_the_line(queue, learner):
    queue.start()
    queue.add(config("rex"))
    wait(lambda: learner.begun)
    queue.add(config("tom"))
    queue.stop("tom")
    learner.end.set()
    wait(lambda: states(queue)["rex"] == "done")
    assert states(queue) == {"rex": "done", "tom": "stopped"}


def test_what_the_command_would_say_is_kept_and_the_next_is_learnt(queue, learner):
    learner.errors["rex"] = InputError("x.png: not a picture")
    learner.errors["tom"] = RuntimeError("ours")
    learner.end.set()
    queue.start()
    for name in ("rex", "tom", "cup"):
        queue.add(config(name, seed=len(name), dtype="float32" if name == "tom" else "auto"))
        wait(lambda name=name: states(queue)[name] in ("failed", "done"))
    found = {job.run: (job.state, job.error) for job in queue.snapshot()}
    assert found["rex"] == ("failed", "x.png: not a picture")
    assert found["tom"] == ("failed", "a fault of the program (see the terminal): RuntimeError: ours")
    assert found["cup"] == ("done", "")
    learner.errors.clear()
    queue.go_on("rex")
    wait(lambda: states(queue)["rex"] == "done")


def test_a_studio_that_is_closed_or_killed_goes_on_with_what_it_learnt(tmp_path, learner):
    first = Jobs(tmp_path)
    first.start()
    first.add(config("rex"))
    wait(lambda: learner.begun)
    killed = Jobs(tmp_path)  # as its file is while the first still learns
    assert states(killed) == {"rex": "waiting"}
    first.close()
    again = Jobs(tmp_path)
    assert states(again) == {"rex": "waiting"}
    again.start()
    wait(lambda: len(learner.begun) == 2)
    assert to_json(learner.begun[1][1]) == to_json(config("rex"))
    learner.end.set()
    wait(lambda: states(again) == {"rex": "done"})
    again.close()
    assert states(Jobs(tmp_path)) == {"rex": "done"}


def test_a_damaged_queue_is_told_and_left_alone(tmp_path):
    file = tmp_path / ".studio" / "queue.json"
    file.parent.mkdir()
    file.write_text('[{"run": 1}]')
    with pytest.raises(InputError, match=r"queue\.json: damaged .*delete it"):
        Jobs(tmp_path)
    assert file.read_text() == '[{"run": 1}]'


def test_names_that_are_taken_are_refused(queue, tmp_path):
    (tmp_path / "rex").mkdir()
    with pytest.raises(InputError, match="a run called rex already"):
        queue.add(config("rex"))
    queue.add(config("tom"))
    with pytest.raises(InputError, match="a run called tom already"):
        queue.add(config("tom"))


def test_a_run_that_a_command_began_is_gone_on_with(queue, learner, tmp_path, monkeypatch):
    begun = {"rex": config("rex"), "old": config("old"), "whole": config("whole")}
    for name, each in begun.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(to_json(each))
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 2}\n')
    (tmp_path / "old" / "config.json").write_text(json.dumps({"name": "old", "concepts": ""}))  # of another version
    (tmp_path / "whole" / "concepts").mkdir()
    (tmp_path / "whole" / "concepts" / "whole.safetensors").touch()
    (tmp_path / "fleet").mkdir()
    table = tmp_path / "fleet" / "concepts.jsonl"
    names = ("a", "b")
    rows = [{"name": name, "super_category": "dog", "pictures": name} for name in names]
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "fleet" / "config.json").write_text(to_json(make_config(concepts=str(table))))
    (tmp_path / "fleet" / "report.jsonl").write_text('{"name": "a", "state": "done"}\n')
    assert queue.interrupted() == ["fleet", "old", "rex"]
    with pytest.raises(InputError, match="not the config of a run of this version"):
        queue.adopt("old")
    with pytest.raises(InputError, match="no run that can be gone on with"):
        queue.adopt("../rex")
    with locked(epath.Path(tmp_path / "rex" / "lock"), ""):  # a command is at work in it
        assert queue.interrupted() == ["fleet", "old"]
    with monkeypatch.context() as patched:  # to look takes no lock, with which a command that starts would meet
        patched.setattr("fcntl.flock", lambda *arguments: pytest.fail("locked"))
        assert queue.interrupted() == ["fleet", "old", "rex"]
    queue.start()
    queue.adopt("rex")
    with pytest.raises(InputError, match="no run that can be gone on with"):
        queue.adopt("rex")
    wait(lambda: learner.begun)
    assert to_json(learner.begun[0][1]) == to_json(begun["rex"])
    assert queue.interrupted() == ["fleet", "old"]


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 7, "mesh": (1, 1), "templates": ("a {}", "my {}"), "crop": False},
        {"method": "lora", "masks": "auto"},
        {"base": "stable-diffusion-v1-5/stable-diffusion-v1-5", "batch_size": 16},
    ],
)
def test_the_command_of_a_job_learns_the_same(tmp_path, queue, changes, monkeypatch):
    given = config("rex", **changes)
    words = command_of(queue.add(given), tmp_path)
    assert words[:5] == ["python", "-m", "perfusion_jax.train", "--workdir", str(tmp_path / "rex")]
    assert len(words) < 20  # of the default nothing is said
    monkeypatch.setattr("sys.argv", ["train", *words[5:]])  # which ml_collections reads
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", make_config(), flag_values=values)
    values(["train", *words[5:]])
    read = settle(values.config, config_flags.get_override_values(values["config"]))
    assert to_json(read) == to_json(given)


def test_one_that_has_come_to_its_end_is_taken_out(queue, learner):
    learner.end.set()
    queue.start()
    queue.add(config("rex"))
    wait(lambda: states(queue) == {"rex": "done"})
    queue.forget("rex")
    assert states(queue) == {}


def test_names_that_differ_by_capitals_alone_are_taken(queue):
    queue.add(config("Rex"))
    with pytest.raises(InputError, match="a run called rex already"):
        queue.add(config("rex"))


def test_a_queue_of_another_version_stops_nothing(tmp_path, learner):
    first = Jobs(tmp_path)
    first.add(config("old"))
    file = tmp_path / ".studio" / "queue.json"
    (old,) = json.loads(file.read_text())
    del old["config"]["method"]
    file.write_text(json.dumps([old]))
    again = Jobs(tmp_path)
    (job,) = again.snapshot()
    assert (job.state, job.error) == ("failed", "it was put here by another version: take it out")
    assert command_of(job, tmp_path) == []
    with pytest.raises(InputError, match="another version"):
        again.go_on("old")
    state = Studio(tmp_path, Easel(tmp_path, {"source": "nothing"}), again).state()
    assert [each["run"] for each in state["jobs"]] == ["old"]
    learner.end.set()
    again.start()
    again.add(config("rex"))
    wait(lambda: states(again)["rex"] == "done")
    again.close()


def test_members_of_a_fleet_that_were_not_learnt_are_told(queue, learner, tmp_path):
    queue.add(config("rex"))
    queue.add(config("tom"))
    queue.start()
    wait(lambda: learner.begun)
    lines = [{"name": "rex", "state": "done"}, {"name": "tom", "state": "failed", "error": "x.png: not a picture"}]
    (tmp_path / "rex-and-1-more" / "report.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    learner.end.set()
    wait(lambda: states(queue) == {"rex-and-1-more": "failed"})
    assert queue.snapshot()[0].error == "tom: x.png: not a picture"

"""Checkpoints survive truncation: the one before is taken, and it is said."""

import errno
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from odd_names import ODD_NAMES

from perfusion_jax import InputError
from perfusion_jax.learning import checkpoints as checkpoints_lib
from perfusion_jax.learning.checkpoints import Checkpoints
from perfusion_jax.runtime.errors import UnavailableError


def state(step):
    return {"weights": jnp.full((500,), step, jnp.float32), "step": jnp.int32(step)}


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30):
        checkpoints.save(step, state(step))
    checkpoints.close()
    return tmp_path


def damage(folder):
    """Cuts every file of a checkpoint to half."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_the_newest_is_restored_and_few_are_kept(saved):
    assert sorted(int(folder.name) for folder in saved.iterdir() if folder.name.isdigit()) == [20, 30]
    restored, step = Checkpoints(saved, keep=2).restore(state(0), pytest.fail)
    assert step == 30
    np.testing.assert_array_equal(restored["weights"], 30)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_folder_may_have_any_name(tmp_path, name):
    for folder in (tmp_path / "dog", tmp_path / name):  # some of the names, read as patterns, are of the first as well
        checkpoints = Checkpoints(folder / "checkpoints", keep=2)
        for step in (10, 20):
            checkpoints.save(step, {"weights": jnp.full((len(folder.name),), step, jnp.float32)})
        checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["dog", name])
    checkpoints = Checkpoints(tmp_path / name / "checkpoints", keep=2)
    restored, step = checkpoints.restore({"weights": jnp.zeros(len(name))}, pytest.fail)
    assert step == 20
    np.testing.assert_array_equal(restored["weights"], 20)


@pytest.mark.parametrize("name", ["a\\b", "\udcff"])
def test_names_that_tensorstore_misreads_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="rename it"):
        Checkpoints(tmp_path / name, keep=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["manifest", "metadata"])
def test_what_cannot_be_read_is_one_line_and_no_traceback(tmp_path, monkeypatch, capfd, caplog, broken):
    said, unraised = [], []
    monkeypatch.setattr(sys, "unraisablehook", unraised.append)
    many = {str(number): [jnp.zeros(50 + number)] * 4 for number in range(100)}
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20):
        checkpoints.save(step, many)
    checkpoints.close()
    for step in ("10", "20"):
        if broken == "manifest":  # the arrays then fail one by one, while others are still read
            (tmp_path / step / "default" / "manifest.ocdbt").unlink()
        else:
            damage(tmp_path / step)
    caplog.clear()
    with pytest.raises(InputError, match=r"none of the checkpoints \[20, 10\] can be read"):
        Checkpoints(tmp_path, keep=2).restore(many, said.append)
    time.sleep(0.5)  # TensorStore's threads come back later
    assert len(said) == 2
    assert not unraised
    assert not caplog.text
    assert not "".join(capfd.readouterr())


def test_a_truncated_newest_falls_back_to_the_one_before_and_says_so(saved):
    damage(saved / "30")
    said = []
    checkpoints = Checkpoints(saved, keep=2)
    restored, step = checkpoints.restore(state(0), said.append)
    assert step == 20
    np.testing.assert_array_equal(restored["weights"], 20)
    assert len(said) == 1
    assert f"{saved / '30'}: cannot be read" in said[0]
    checkpoints.save(30, state(31))  # the broken one is out of the way
    checkpoints.close()
    restored, step = Checkpoints(saved, keep=2).restore(state(0), pytest.fail)
    assert (step, int(restored["step"])) == (30, 31)


def test_all_broken_is_an_error_and_none_is_a_start(saved, tmp_path_factory):
    damage(saved / "20")
    damage(saved / "30")
    with pytest.raises(InputError, match=r"none of the checkpoints \[30, 20\] can be read"):
        Checkpoints(saved, keep=2).restore(state(0), lambda line: None)
    assert Checkpoints(tmp_path_factory.mktemp("new"), keep=2).restore(state(0), pytest.fail) is None


BucketError = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), UnavailableError),
        (BucketError("503, backend error"), UnavailableError),
        (ValueError('UNAVAILABLE: Error opening "zarr" driver'), UnavailableError),
        (ValueError('PERMISSION_DENIED: Error opening "zarr" driver'), InputError),
        (PermissionError(errno.EACCES, "Permission denied"), InputError),
        (OSError("Forbidden: storage.objects.get"), InputError),
    ],
)
def test_what_storage_does_costs_no_checkpoint(saved, monkeypatch, error, kind):
    def fail(*_, **__):
        raise error

    checkpoints = Checkpoints(saved, keep=2)
    monkeypatch.setattr(checkpoints_lib.ocp.StandardCheckpointHandler, "restore", fail)
    with pytest.raises(InputError, match="30: cannot be read") as raised:
        checkpoints.restore(state(0), pytest.fail)
    assert type(raised.value) is kind
    assert sorted(folder.name for folder in saved.iterdir()) == ["20", "30"]


def test_arrays_that_cannot_be_opened_cost_no_checkpoint(saved):
    files = list((saved / "30" / "default" / "d").iterdir())
    assert files
    for file in files:  # nobody can open a link to itself
        file.unlink()
        file.symlink_to(file.name)
    with pytest.raises(UnavailableError, match="30: cannot be read"):
        Checkpoints(saved, keep=2).restore(state(0), pytest.fail)
    assert sorted(folder.name for folder in saved.iterdir()) == ["20", "30"]


def test_what_is_called_missing_because_it_cannot_be_looked_at_costs_no_checkpoint(saved, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("no structure could be identified")

    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    checkpoints = Checkpoints(saved, keep=2)
    monkeypatch.setattr(checkpoints_lib.ocp.StandardCheckpointHandler, "restore", missing)
    monkeypatch.setattr(type(epath.Path(saved)), "iterdir", fail)
    with pytest.raises(UnavailableError, match="30: cannot be read"):
        checkpoints.restore(state(0), pytest.fail)
    assert (saved / "30").exists()


def test_processes_that_see_different_checkpoints_take_none(saved, monkeypatch):
    monkeypatch.setattr(checkpoints_lib.distributed, "gather", lambda mine: [mine, [20]])
    with pytest.raises(UnavailableError, match="not all processes see the same checkpoints"):
        Checkpoints(saved, keep=2).restore(state(0), pytest.fail)


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("lost"), ValueError("UNKNOWN: Gloo AllGather failed")])
def test_the_loss_of_a_process_while_saving_is_no_fault_of_the_folder(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    checkpoints = Checkpoints(tmp_path, keep=2)
    monkeypatch.setattr(checkpoints_lib.ocp.CheckpointManager, "save", fail)
    with pytest.raises(type(error)) as raised:
        checkpoints.save(1, state(1))
    assert raised.value is error


def test_the_name_of_a_bucket_reaches_orbax_as_it_is(monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoints_lib, "_Manager", lambda folder, options: asked.append(folder))
    monkeypatch.setattr(type(epath.Path("gs://bucket")), "mkdir", lambda *_, **__: None)
    Checkpoints("gs://bucket/run/checkpoints", keep=2)
    assert [str(folder) for folder in asked] == ["gs://bucket/run/checkpoints"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/checkpoints: cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=2)

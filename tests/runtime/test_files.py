"""What storage does wrong, and what a run is told of it."""

import errno
import fcntl
import os
import stat
from pathlib import Path

import jax
import pytest
from etils import epath
from odd_names import ODD_NAMES

from perfusion_jax import InputError
from perfusion_jax.runtime.errors import UnavailableError
from perfusion_jax.runtime.files import locked, read_text, replacing, storage_errors, to_path, write_arrays, write_bytes


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


PASSING = OSError(errno.EIO, "Input/output error")
LASTING = PermissionError(errno.EACCES, "Permission denied")
BOTH = pytest.mark.parametrize(("error", "kind"), [(PASSING, UnavailableError), (LASTING, InputError)])


@BOTH
@pytest.mark.parametrize("call", [(os, "fsync"), (Path, "replace")])
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch, call, error, kind):
    file = tmp_path / "file"
    write_bytes(file, b"before")
    monkeypatch.setattr(*call, failing(error))
    with pytest.raises(InputError, match="file: cannot be written") as raised:
        write_bytes(file, b"after")
    assert type(raised.value) is kind
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_who_may_read_a_file_is_for_the_umask_to_say(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "bytes", b"")
        write_arrays(tmp_path / "arrays.npz", numbers=[1, 2])
    finally:
        os.umask(before)
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("name", [*ODD_NAMES, 250 * "x"])
def test_a_file_may_have_any_name(tmp_path, name):
    write_bytes(tmp_path / name, b"1")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"1"


def test_a_path_may_begin_at_home_and_a_name_with_its_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/people/me")
    for given, meant in (("~/runs", "/people/me/runs"), ("~dog", "~dog"), ("a/~/b", "a/~/b"), ("gs://b/~/c", None)):
        assert str(to_path(given)) == (meant or given)


@BOTH
def test_a_bucket_that_cannot_be_written_is_named(monkeypatch, error, kind):
    monkeypatch.setattr(type(epath.Path("gs://bucket")), "write_bytes", failing(error))
    with pytest.raises(InputError, match="gs://bucket/file: cannot be written") as raised:
        write_bytes("gs://bucket/file", b"")
    assert type(raised.value) is kind


@BOTH
def test_a_lock_that_cannot_be_held_is_named(tmp_path, monkeypatch, error, kind):
    monkeypatch.setattr(fcntl, "flock", failing(error))
    with (
        pytest.raises(InputError, match="lock: cannot be written") as raised,
        locked(epath.Path(tmp_path / "lock"), ""),
    ):
        pytest.fail("it is not held")
    assert type(raised.value) is kind


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog, number):
    monkeypatch.setattr(fcntl, "flock", failing(OSError(number, "no such thing")))
    with locked(epath.Path(tmp_path / "lock"), ""):
        assert "lock: no locks here (no such thing)" in caplog.text


def test_a_lock_is_held_by_one(tmp_path):
    lock = epath.Path(tmp_path / "folder" / "lock")
    with locked(lock, "take another folder"):
        second = pytest.raises(InputError, match="at work here; wait for it, or take another folder")
        with second as raised, locked(lock, "take another folder"):
            pytest.fail("it is held twice")
        assert type(raised.value) is InputError
    with locked(lock, ""):
        pass


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("lost"),
        ValueError("UNKNOWN: Gloo AllGather failed"),
        TypeError("a mistake"),
        MemoryError("of the host"),
        InputError("bad"),
    ],
)
def test_what_is_not_of_storage_stays_what_it_is(tmp_path, error):
    with pytest.raises(type(error)) as raised, storage_errors(tmp_path, "read"):
        raise error
    assert raised.value is error
    with pytest.raises(type(error)) as raised, replacing(tmp_path / "file"):
        raise error
    assert raised.value is error
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_looked_at_is_not_taken_for_missing(tmp_path):
    assert read_text(epath.Path(tmp_path / "file")) == ""
    (tmp_path / "file").symlink_to("file")  # to itself
    with pytest.raises(InputError, match="file: cannot be read"):
        read_text(epath.Path(tmp_path / "file"))

"""Whole runs of `perfusion_jax.train` on a small base model of random weights."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import save_clip, save_vit
from etils import epath
from PIL import Image
from safetensors.numpy import load_file

from configs.dog import get_config
from perfusion_jax import InputError
from perfusion_jax import config as default_config
from perfusion_jax.formats.concept_file import load_concept
from perfusion_jax.learning import step as training
from perfusion_jax.learning.diagnostics import Diagnostics
from perfusion_jax.learning.runs import Session, train_one
from perfusion_jax.runtime.files import locked

ROOT = Path(__file__).parents[1]
STEPS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Pictures with masks, and a covariance for the small base model."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    (folder / "rex" / "masks").mkdir(parents=True)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)).save(folder / "rex" / f"{number}.png")
        mask = np.zeros((40, 50), np.uint8)
        mask[10:30, 15:35] = 255
        Image.fromarray(mask).save(folder / "rex" / "masks" / f"{number}.png")
    save_clip(folder / "clip")
    save_vit(folder / "vit")
    factor = rng.standard_normal((48, 48))
    np.savez(folder / "covariance.npz", covariance=factor @ factor.T + np.eye(48))
    return folder


def make_config(inputs, small_folder):
    config = get_config(str(small_folder))
    config.update(
        name="rex",
        pictures=str(inputs / "rex"),
        covariance=str(inputs / "covariance.npz"),
        evaluator=str(inputs / "clip"),
        instance_encoder=str(inputs / "vit"),
        templates=("a photo of a {}", "my {}"),
        size=32,
        steps=STEPS,
        batch_size=2,
        validate_every=4,
        validation_prompts=("a photo of a {} on the beach", "a {} in the snow"),
        sampling_steps=2,
        checkpoint_every=3,
        log_every=1,
    )
    return config


@pytest.fixture
def config(inputs, small_folder):
    return make_config(inputs, small_folder)


def flags(config, file=True):
    """The command line that gives `config`, by a config file or by flags alone."""
    keys = set(config.keys()) - {"templates", "validation_prompts", "base"}
    default = (get_config if file else default_config.make_config)(config.base)
    values = [f"--config.{key}={config[key]}" for key in sorted(keys) if config[key] != default[key]]
    values += [f"--config.{key}={tuple(config[key])!r}" for key in ("templates", "validation_prompts")]
    base = f"--config={ROOT / 'configs' / 'dog.py'}:{config.base}" if file else f"--config.base={config.base}"
    return [base, *values]


def start(config, workdir, file=True, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "perfusion_jax.train", *flags(config, file), f"--workdir={workdir}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )


@pytest.fixture(scope="module")
def finished(inputs, small_folder, tmp_path_factory):
    """The concept of an undisturbed run from the command line: (workdir, what it printed)."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    # Compiled for itself, so that what others are compared with comes from another compilation than theirs.
    config = make_config(inputs, small_folder)
    process = start(config, workdir, file=False, JAX_ENABLE_COMPILATION_CACHE="false")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return workdir, output


def test_a_run_leaves_what_it_promises(finished, config, small_base):
    workdir, output = finished
    concept, card = load_concept(workdir / "concepts" / "rex.safetensors", small_base)
    assert (card.name, card.super_category) == ("rex", "dog")
    before = small_base.new_concept("dog", jnp.eye(48))
    assert np.abs(np.asarray(concept.embedding) - before.embedding).max() > 0.001
    assert json.loads((workdir / "config.json").read_text())["name"] == "rex"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    timed = [line for line in lines if "step_seconds" in line]
    assert timed
    assert all(line["samples_per_second"] == pytest.approx(2 / line["step_seconds"]) for line in timed)
    scores = {line["step"]: line["score"] for line in lines if "score" in line}
    assert sorted(scores) == [4, 8, 12]
    assert card.step == max(scores, key=scores.get)
    for step in (4, 8, 12):
        with Image.open(workdir / "samples" / f"step_{step:06d}.png") as sheet:
            assert np.asarray(sheet).shape == (
                2 * 128 + 4,
                3 * 128 + 8,
                3,
            )  # two prompts; one own picture and two drawn
    with Image.open(workdir / "masks.png") as masks:
        assert masks.size == (3 * 128 + 8, 2 * 128 + 4)
    assert any((workdir / "tensorboard").iterdir())
    assert f"{workdir}/concepts/rex.safetensors" in output
    assert re.search(r"python[\d.]* -m perfusion_jax.sample --concept", output)


def test_a_finished_run_says_so(finished, config, capsys):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_text()
    assert train_one(config, epath.Path(workdir)) == workdir / "concepts" / "rex.safetensors"
    assert "finished already" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_text() == before


def test_what_was_not_written_at_the_end_is_written_by_the_same_command(finished, config, tmp_path, capsys):
    workdir, result = epath.Path(tmp_path / "run"), tmp_path / "run" / "concepts" / "rex.safetensors"
    shutil.copytree(finished[0], workdir)
    learnt = result.read_bytes()
    result.write_bytes(b"of fewer steps")
    (tmp_path / "run" / "finished.json").unlink()  # interrupted after the last step
    config.exports = ("embedding",)
    for said in ("", "finished already"):
        train_one(config, workdir)
        assert said in capsys.readouterr().out
        assert result.read_bytes() == learnt
    assert [file.name for file in (tmp_path / "run" / "exports" / "rex" / "embedding").glob("*.safetensors")]


@pytest.mark.slow
def test_a_run_of_one_concept_uses_all_devices_of_its_host(config, tmp_path):
    flag = "--xla_force_host_platform_device_count=8"
    telling = (
        "import jax; from perfusion_jax.learning import resources; load = resources.mesh_of; "
        "resources.mesh_of = lambda config: (mesh := load(config), print('mesh', dict(mesh.shape)))[0]; "
        "import runpy; runpy.run_module('perfusion_jax.train', run_name='__main__')"
    )
    config.update(batch_size=16, accumulation=2, steps=4, validate_every=2)
    one, eight = tmp_path / "one", tmp_path / "eight"
    for workdir, xla_flags in ((one, ""), (eight, flag)):
        process = subprocess.run(
            [sys.executable, "-c", telling, *flags(config), f"--workdir={workdir}"],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {xla_flags}"},
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
        )
        count = 8 if xla_flags else 1
        assert f"mesh {{'concept': 1, 'data': {count}}}" in process.stdout
    ours, theirs = (load_file(folder / "concepts" / "rex.safetensors") for folder in (eight, one))
    for name, tensor in ours.items():
        tolerance = 1e-3 * np.abs(theirs[name]).max()
        np.testing.assert_allclose(tensor, theirs[name], rtol=1e-3, atol=tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["[dog] *", "#%20{a}:b", "~dog", "-äöü"])
def test_a_workdir_may_have_any_name(config, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    config.update(steps=2, validate_every=1, checkpoint_every=1)
    file = train_one(config, epath.Path(name))
    assert file.exists()
    config.steps = 3  # goes on from its checkpoint
    assert train_one(config, epath.Path(name)) == file
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.slow
def test_a_longer_run_goes_on(finished, config, tmp_path):
    workdir, _ = finished
    subprocess.run(["cp", "-r", workdir, tmp_path / "run"], check=True)
    config.steps = STEPS + 2
    train_one(config, epath.Path(tmp_path / "run"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, STEPS + 3))


def assert_same_concept(one, other):
    ours, theirs = (load_file(folder / "concepts" / "rex.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_ends_at_the_same_concept(finished, config, tmp_path):
    process = start(config, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "interrupted; the same command goes on where it was" in output
    assert "Traceback" not in output
    assert any(folder.name.isdigit() for folder in (tmp_path / "run" / "checkpoints").iterdir())
    process = start(config, tmp_path / "run")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert_same_concept(finished[0], tmp_path / "run")


@pytest.mark.parametrize("logged", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2, 7, 10))])
def test_killed_at_any_moment_it_resumes_to_the_same_concept(finished, config, tmp_path, logged):
    process = start(config, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= logged):
        time.sleep(0.001)
    time.sleep(np.random.default_rng(logged).uniform(0, 0.02))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "concepts").exists()
    process = start(config, tmp_path / "run")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert_same_concept(finished[0], tmp_path / "run")
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_with_an_error_and_keeps_what_was_saved(config, tmp_path, monkeypatch):
    workdir = epath.Path(tmp_path / "run")
    step = training.train_step

    def breaking(base, params, whitening, examples, learning, key, settings, place):
        # From the fourth step on, every picture is infinite.
        broken = examples._replace(mean=examples.mean / (learning.step < 3))
        return step(base, params, whitening, broken, learning, key, settings, place)

    monkeypatch.setattr(training, "train_step", breaking)
    # The true step is sound, so its operations are not to blame.
    with pytest.raises(InputError, match=r"was not finite at step 4 \(repeated by itself, the step was finite\)"):
        train_one(config, workdir, Session(Diagnostics(debug_nans=True)))
    assert (workdir / "checkpoints" / "3").exists()
    assert not (workdir / "concepts").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pictures": "/nowhere"}, "/nowhere: no such folder of pictures"),
        ({"pictures": "emoji:unicorn"}, "the examples are"),
        ({"captions": "x.txt"}, "config.covariance and config.captions are both given"),
        ({"covariance": "", "captions": "missing.txt"}, "missing.txt: no such file of captions"),
        ({"size": 33}, "config.size is 33; it must be a multiple of 2"),
        ({"masks": "segmenter"}, "config.segmenter names none"),
        ({"super_category": "dog " * 30}, "shorten it"),
    ],
)
def test_bad_configs_are_errors_that_name_the_key(config, tmp_path, change, message):
    config.update(change)
    with pytest.raises(InputError, match=message):
        train_one(config, epath.Path(tmp_path / "run"))


def test_masks_can_be_asked_for_and_left_out(config, tmp_path, inputs):
    config.update(masks="files", pictures=str(tmp_path / "plain"))
    (tmp_path / "plain").mkdir()
    shutil.copy(inputs / "rex" / "0.png", tmp_path / "plain" / "0.png")
    with pytest.raises(InputError, match=r"'files', but .* has no masks/ folder"):
        train_one(config, epath.Path(tmp_path / "run"))


def test_a_workdir_of_another_config_is_refused(finished, config):
    config.bias = 0.5
    with pytest.raises(InputError, match="this workdir is of another config"):
        train_one(config, epath.Path(finished[0]))


def test_a_second_job_on_one_workdir_is_refused(config, tmp_path):
    with locked(tmp_path / "lock", ""), pytest.raises(InputError, match="lock: another job is at work here"):
        train_one(config, epath.Path(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]


def test_a_workdir_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run/lock: cannot be written"):
        train_one(config, epath.Path(tmp_path / "file" / "run"))


@pytest.mark.parametrize("limit", [100, *(pytest.param(more, marks=pytest.mark.slow) for more in (3_000, 40_000))])
def test_a_disk_that_takes_no_more_is_an_error_that_names_the_file(config, tmp_path, limit):
    """No file may grow beyond `limit` bytes: config, pictures, log, events or checkpoints fail to be written."""
    program = (
        f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "import runpy; runpy.run_module('perfusion_jax.train', run_name='__main__')"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, *flags(config), f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode != 0
    assert f"error: {tmp_path / 'run'}" in process.stderr
    assert "cannot be written" in process.stderr
    assert "Traceback" not in process.stderr.split("error: ")[-1]

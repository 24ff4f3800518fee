import errno
import hashlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import WORDS
from etils import epath
from safetensors.numpy import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from perfusion_jax import InputError, covariance
from perfusion_jax.data.text_covariance import BATCH, accumulate, covariance_of, partial_file, resume
from perfusion_jax.formats.covariance_file import load_covariance, load_whitening
from perfusion_jax.method import edit
from perfusion_jax.method.covariance import MAX_CONDITION, checked, whitening_of
from perfusion_jax.method.edit import Edit, Gate
from perfusion_jax.runtime.command_line import BAD_INPUT
from perfusion_jax.runtime.errors import UnavailableError
from perfusion_jax.runtime.files import to_path


def write_captions(file, count, seed=0):
    rng = np.random.default_rng(seed)
    lines = [" ".join(rng.choice(WORDS, rng.integers(1, 20))) for _ in range(count)]
    file.write_text("\n".join(lines) + "\n")
    return lines


def last(iterator):
    *_, final = iterator
    return final


def test_equals_pytorch_over_real_tokens(sd1_folder, sd1_base, tmp_path):
    lines = write_captions(tmp_path / "captions.txt", BATCH + 40)
    lines.insert(3, "")
    lines.insert(5, "a <b>photo</b> of <rex>")  # nothing in a caption is a placeholder
    (tmp_path / "captions.txt").write_text("\n".join(lines))  # no newline at the end
    tokenizer = CLIPTokenizer.from_pretrained(sd1_folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(sd1_folder / "text_encoder").eval()
    batch = tokenizer([line for line in lines if line], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        encodings = encoder(batch.input_ids).last_hidden_state.double().numpy()
    real = encodings[batch.attention_mask.bool().numpy()]
    progress = last(accumulate(sd1_base, tmp_path / "captions.txt"))
    assert progress.tokens == len(real)
    assert progress.captions == BATCH + 41
    expected = real.T @ real / len(real)
    covariance = covariance_of(progress, tmp_path / "captions.txt")
    assert np.abs(covariance - expected).max() < 1e-5 * np.abs(expected).max()


def test_going_on_gives_the_same_bits(sd1_base, tmp_path):
    write_captions(tmp_path / "captions.txt", 3 * BATCH + 7)
    all_at_once = list(accumulate(sd1_base, tmp_path / "captions.txt"))
    resumed = last(accumulate(sd1_base, tmp_path / "captions.txt", start=all_at_once[1]))
    np.testing.assert_array_equal(resumed.total, all_at_once[-1].total)
    assert resumed[1:] == all_at_once[-1][1:]


@pytest.mark.parametrize("text", ["", "\n\n \n"])
def test_an_empty_caption_file_is_refused(sd1_base, tmp_path, text):
    (tmp_path / "captions.txt").write_text(text)
    progress = next(iter(accumulate(sd1_base, tmp_path / "captions.txt")), None)
    with pytest.raises(InputError, match=r"captions\.txt: no captions"):
        covariance_of(progress, tmp_path / "captions.txt")


def test_fewer_tokens_than_dimensions_are_refused(sd1_base, tmp_path):
    (tmp_path / "captions.txt").write_text("a dog\na cat\n")
    progress = last(accumulate(sd1_base, tmp_path / "captions.txt"))
    with pytest.raises(InputError, match="8 tokens in 2 captions; a covariance of 48 dimensions needs more"):
        covariance_of(progress, tmp_path / "captions.txt")


def test_captions_that_say_too_little_are_refused(sd1_base, tmp_path):
    (tmp_path / "captions.txt").write_text("a dog\n" * 100)
    progress = last(accumulate(sd1_base, tmp_path / "captions.txt"))
    with pytest.raises(InputError, match=r"captions\.txt: singular or nearly so"):
        covariance_of(progress, tmp_path / "captions.txt")


def test_a_file_that_is_not_text_is_refused(sd1_base, tmp_path):
    (tmp_path / "captions.txt").write_bytes(b"a dog\n\xff\xfe\x00\n")
    with pytest.raises(InputError, match="is not UTF-8"):
        last(accumulate(sd1_base, tmp_path / "captions.txt"))


@pytest.fixture
def matrix():
    root = np.random.default_rng(0).standard_normal((8, 8))
    return root @ root.T + np.eye(8)


def test_reads_matrices_made_elsewhere(tmp_path, matrix):
    np.save(tmp_path / "c.npy", matrix)
    np.savez(tmp_path / "c.npz", whatever=matrix)
    save_file({"covariance": matrix, "count": np.ones(1)}, tmp_path / "c.safetensors")
    for name in ("c.npy", "c.npz", "c.safetensors"):
        np.testing.assert_allclose(load_covariance(tmp_path / name, 8), matrix)
        whitening = load_whitening(tmp_path / name, 8)
        np.testing.assert_allclose(whitening @ matrix @ whitening, np.eye(8), atol=1e-5)
        np.testing.assert_array_equal(whitening, whitening.T)
        assert whitening.dtype == np.float32


def break_matrix(matrix, how):
    broken = matrix.copy()
    if how == "asymmetric":
        broken[0, 1] += 1
    elif how == "singular":
        broken[:, 0] = broken[0, :] = 0
    elif how == "indefinite":
        broken[0, 0] = -100
    elif how == "nan":
        broken[0, 0] = np.nan
    return broken


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("asymmetric", "not symmetric"),
        ("singular", "singular or nearly so"),
        ("indefinite", "singular or nearly so"),
        ("nan", "not finite"),
    ],
)
def test_matrices_that_are_no_covariance_are_refused(tmp_path, matrix, how, message):
    np.save(tmp_path / "c.npy", break_matrix(matrix, how))
    with pytest.raises(InputError, match=rf"c\.npy: .*{message}"):
        load_covariance(tmp_path / "c.npy", 8)


def test_files_that_cannot_be_read_are_refused(tmp_path, matrix):
    np.save(tmp_path / "c.npy", matrix)
    with pytest.raises(InputError, match=r"of shape \(8, 8\); this text encoder's covariance is \(768, 768\)"):
        load_covariance(tmp_path / "c.npy", 768)
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(InputError, match=r"pickled\.npy: cannot be read"):
        load_covariance(tmp_path / "pickled.npy", 8)
    np.savez(tmp_path / "two.npz", a=matrix, b=matrix)
    with pytest.raises(InputError, match="no array called 'covariance'"):
        load_covariance(tmp_path / "two.npz", 8)
    for name, message in (("missing.npy", "No such file"), ("c.pt", "is a .npz, .npy or .safetensors file")):
        with pytest.raises(InputError, match=message):
            load_covariance(tmp_path / name, 8)
    shutil.copy(tmp_path / "c.npy", tmp_path / "renamed.npz")
    np.save(tmp_path / "words.npy", np.array([["a", "b"]]))
    for name in ("renamed.npz", "words.npy"):
        with pytest.raises(InputError, match=r"cannot be read|not a matrix of numbers"):
            load_covariance(tmp_path / name, 8)
    (tmp_path / "short.npz").write_bytes((tmp_path / "two.npz").read_bytes()[:100])
    with pytest.raises(InputError, match=r"short\.npz: cannot be read"):
        load_covariance(tmp_path / "short.npz", 8)


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, UnavailableError), (errno.EACCES, InputError)])
def test_storage_that_fails_for_now_tells_so(tmp_path, monkeypatch, number, kind):
    def fail(_):
        raise OSError(number, "failed")

    (tmp_path / "c.npz").touch()
    monkeypatch.setattr(type(epath.Path(tmp_path)), "read_bytes", fail)
    with pytest.raises(InputError, match=r"c\.npz: cannot be read") as raised:
        load_covariance(tmp_path / "c.npz", 8)
    assert type(raised.value) is kind


class TestCommand:
    def start(self, folder, captions, out, **options):
        arguments = {"base": folder, "captions": captions, "out": out}
        command = [sys.executable, "-m", "perfusion_jax.covariance", *(f"--{k}={v}" for k, v in arguments.items())]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)

    def test_measures_then_says_that_it_is_done(self, sd1_folder, sd1_base, tmp_path):
        lines = write_captions(tmp_path / "captions.txt", 200)
        run = self.start(sd1_folder, tmp_path / "captions.txt", tmp_path / "c.npz")
        stdout, stderr = run.communicate()
        assert run.returncode == 0, stderr
        assert "in 200 captions, condition number" in stdout
        with np.load(tmp_path / "c.npz", allow_pickle=False) as saved:
            assert saved["captions"] == len(lines)
            assert saved["base"] == str(sd1_folder)
            assert saved["captions_file"] == "captions.txt"
            assert saved["captions_sha256"] == hashlib.sha256((tmp_path / "captions.txt").read_bytes()).hexdigest()
            assert len(str(saved["text_encoder_sha256"])) == 64
        assert load_whitening(tmp_path / "c.npz", sd1_base.model.context_width).shape == (48, 48)
        again = self.start(sd1_folder, tmp_path / "captions.txt", tmp_path / "c.npz")
        assert "is there already" in again.communicate()[0]

    @pytest.mark.slow
    @pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
    def test_goes_on_after_it_was_stopped(self, sd1_folder, tmp_path, how):
        write_captions(tmp_path / "captions.txt", 30_000)
        partial = tmp_path / "c.npz.partial.npz"
        run = self.start(sd1_folder, tmp_path / "captions.txt", tmp_path / "c.npz")
        while not partial.exists() and run.poll() is None:
            time.sleep(0.05)
        run.send_signal(how)
        stderr = run.communicate()[1]
        assert run.returncode != 0, "it was done before it could be stopped"
        assert not (tmp_path / "c.npz").exists()
        if how == signal.SIGTERM:
            assert "interrupted; the same command goes on where it was" in stderr
        run = self.start(sd1_folder, tmp_path / "captions.txt", tmp_path / "c.npz")
        assert "going on after" in run.communicate()[0]
        undisturbed = self.start(sd1_folder, tmp_path / "captions.txt", tmp_path / "whole.npz")
        undisturbed.communicate()
        with np.load(tmp_path / "c.npz") as resumed, np.load(tmp_path / "whole.npz") as whole:
            for name in whole.files:
                np.testing.assert_array_equal(resumed[name], whole[name])
        assert not partial.exists()

    def test_bad_input_is_one_line(self, sd1_folder, tmp_path):
        (tmp_path / "captions.txt").write_text("")
        for captions, message in (("captions.txt", "no captions in it"), ("missing.txt", "no such file of captions")):
            run = self.start(sd1_folder, tmp_path / captions, tmp_path / "c.npz")
            stderr = run.communicate()[1]
            assert run.returncode == BAD_INPUT
            assert stderr.splitlines()[-1] == f"error: {tmp_path / captions}: {message}" + (
                "; one goes on a line" if captions == "captions.txt" else ""
            )
            assert "Traceback" not in stderr

    def test_a_bucket_gets_a_copy_of_what_is_measured_here(self, sd1_folder, tmp_path, bucket, monkeypatch, capsys):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        write_captions(tmp_path / "captions.txt", 200)
        captions = to_path(f"{bucket}/captions.txt")
        given = {"base": str(sd1_folder), "captions": str(captions), "out": f"{bucket}/new/c.npz"}
        given |= {"revision": None, "variant": None}
        monkeypatch.setattr(covariance, "flags", SimpleNamespace(FLAGS=SimpleNamespace(**given)))
        with pytest.raises(InputError, match=r"gs://bucket/captions\.txt: no such file of captions"):
            covariance.main()
        captions.write_bytes((tmp_path / "captions.txt").read_bytes())
        covariance.main()
        assert load_covariance(given["out"], 48).shape == (48, 48)
        covariance.main()
        assert "gs://bucket/new/c.npz is there already" in capsys.readouterr().out
        assert not Path("gs:").exists()

    def test_what_another_run_left_is_not_mixed_in(self, sd1_folder, sd1_base, tmp_path):
        captions, out = tmp_path / "captions.txt", tmp_path / "c.npz"
        write_captions(captions, 200, seed=1)
        of_others = next(iter(accumulate(sd1_base, captions)))
        write_captions(captions, 200)
        same = next(iter(accumulate(sd1_base, captions)))
        for left in (of_others, same._replace(text_encoder="of another model"), None, same):
            if left is None:
                partial_file(out).write_bytes(b"not an archive")
            else:
                np.savez(partial_file(out), **left._asdict())
            resumed = resume(out, captions, sd1_base)
            assert (resumed is not None) == (left is same)
        np.testing.assert_array_equal(resumed.total, same.total)


@pytest.mark.parametrize("outliers", [0, 2])
def test_the_metric_bears_the_largest_condition_number_that_is_taken(outliers):
    """Similarities in float32, through C^-1/2, against float64."""
    rng = np.random.default_rng(0)
    width = 256
    directions, _ = np.linalg.qr(rng.standard_normal((width, width)))
    variances = np.geomspace(1, 1.01 / MAX_CONDITION, width)
    variances[:outliers] *= 1e3
    matrix = checked((directions * variances) @ directions.T)
    encodings = rng.standard_normal((100, width)) @ (directions * np.sqrt(variances)).T
    target = encodings[0]
    dual = np.linalg.solve(matrix, target)
    exact = encodings @ dual / (target @ dual)
    given = jnp.asarray(target, jnp.float32)
    concept = Edit(given[None], edit.dual(whitening_of(matrix), given)[None], Gate(0.6, 0.15))
    ours = edit.similarity(concept, jnp.asarray(encodings, jnp.float32))[:, 0]
    assert np.abs(ours - exact).max() < 1e-4

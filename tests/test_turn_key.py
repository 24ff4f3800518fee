"""From nothing to a scored, kept concept by one command: a hub on this machine serves what Stable Diffusion needs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import save_checkpoint, save_clip, save_clipseg, save_dinov2
from fake_hub import serve
from PIL import Image
from transformers import FlaxCLIPModel

from perfusion_jax.formats.concept_file import read_card
from perfusion_jax.learning.judges import CLIP_ON_HUB, INSTANCE_ENCODER_ON_HUB
from perfusion_jax.runtime.names import SHORT_NAMES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def base(request):
    return request.param


@pytest.fixture(scope="module")
def hub(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    layout = {"sd15": "sd1", "sdxl": "sdxl"}[base]
    save_checkpoint(folder / "model", layout, small=True, variant="fp16")
    save_clipseg(folder / "clipseg")
    save_dinov2(folder / "dinov2")
    # The published one has no safetensors.
    save_clip(folder / "clip")
    FlaxCLIPModel.from_pretrained(folder / "clip", from_pt=True).save_pretrained(folder / "flax")
    shutil.move(folder / "flax/flax_model.msgpack", folder / "clip/flax_model.msgpack")
    shutil.move(folder / "clip/model.safetensors", folder / "clip/pytorch_model.bin")
    repositories = {
        SHORT_NAMES[base].hub_id: folder / "model",
        "CIDAS/clipseg-rd64-refined": folder / "clipseg",
        CLIP_ON_HUB: folder / "clip",
        INSTANCE_ENCODER_ON_HUB: folder / "dinov2",
    }
    with serve(repositories) as server:
        yield server


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (50, 40, 3)).astype(np.uint8)).save(folder / f"{number}.jpg")
    return folder


def test_one_command_learns_scores_and_keeps_a_concept_and_the_next_needs_no_network(base, hub, pictures, tmp_path):
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hugging_face"),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_PLATFORMS": "cpu",
    }

    def train(name, *flags):
        small = ["--config.size=32", "--config.steps=4", "--config.batch_size=2", "--config.validate_every=2"]
        small += ["--config.sampling_steps=2", "--config.validation_prompts=('a {} on the beach', 'a {} in the snow')"]
        command = [sys.executable, "-m", "perfusion_jax.train", f"--config=configs/dog.py:{base}"]
        command += [f"--config.pictures={pictures}", f"--workdir={tmp_path / name}", *small, *flags]
        command.append("--config.templates=('a photo of a {}', 'my {}')")
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)

    first = train("first")
    assert first.returncode == 0, first.stderr
    assert "measuring C" in first.stderr
    assert not [name for name in hub.fetched if name.endswith(".bin")]
    lines = [json.loads(line) for line in (tmp_path / "first/metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["score"] for line in lines if "score" in line}
    assert sorted(scores) == [2, 4]
    assert read_card(tmp_path / "first/concepts/dog.safetensors").step == max(scores, key=scores.get)

    fetched = len(hub.fetched)
    environment["HF_HUB_OFFLINE"] = "1"
    again = train("again")
    assert again.returncode == 0, again.stderr
    assert len(hub.fetched) == fetched
    assert "measuring C" not in again.stderr
    concepts = [(tmp_path / name / "concepts/dog.safetensors").read_bytes() for name in ("first", "again")]
    assert concepts[0] == concepts[1]

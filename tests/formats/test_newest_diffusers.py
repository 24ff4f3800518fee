"""Exports drawn by the newest release of diffusers, in an environment of its own."""

import json
import subprocess
import sys

import numpy as np
import pytest
from exported import PROMPTS, SEEDS, STEPS, drawn_baked, learnt

from perfusion_jax import load_base_model
from perfusion_jax.drawing.denoising import noise_for
from perfusion_jax.formats.exporting import export
from perfusion_jax.runtime import shipped

pytestmark = pytest.mark.slow

KINDS = ("lora", "lora-peft", "pipeline")

DRAW = """
import json, sys
import diffusers, numpy as np, torch
from safetensors.torch import load_file

print("diffusers", diffusers.__version__)
for job in json.load(open(sys.argv[1])):
    source = job["export"] if job["kind"] == "pipeline" else job["base"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if job["kind"] != "pipeline":
        pipe.load_lora_weights(job["export"], weight_name="rex_lora.safetensors")
        words = load_file(job["export"] + "/rex_word.safetensors")
        encoders = {"emb_params": "", "clip_l": "", "clip_g": "_2"}
        for key, embedding in words.items():
            encoder, tokenizer = (getattr(pipe, part + encoders[key]) for part in ("text_encoder", "tokenizer"))
            pipe.load_textual_inversion(embedding, token="<rex>", text_encoder=encoder, tokenizer=tokenizer)
            getattr(encoder, "text_model", encoder).eos_token_id = tokenizer.eos_token_id
    pipe.scheduler = diffusers.DDIMScheduler.from_config({**pipe.scheduler.config, "clip_sample": False})
    latents = torch.from_numpy(np.load(job["latents"]))
    size = {"height": job["side"], "width": job["side"], "guidance_scale": 6.0, "num_inference_steps": job["steps"]}
    np.save(job["drawn"], 255 * pipe(job["prompts"], latents=latents, output_type="np", **size).images)
"""


@pytest.fixture(scope="module")
def newest(tmp_path_factory):
    """The Python of a fresh environment with the newest diffusers, and whatever transformers it asks for."""
    folder = tmp_path_factory.mktemp("newest") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    wanted = ["torch==2.13.0", "diffusers", "transformers", "peft", "accelerate"]
    subprocess.run([folder / "bin/pip", "install", "-q", *wanted], check=True)
    return folder / "bin/python"


def test_the_newest_diffusers_draws_what_we_draw(newest, folder, tmp_path):
    check_pictures(newest, folder, tmp_path, side=32)


def test_the_newest_diffusers_draws_the_embedded_model(newest, tmp_path):
    check_pictures(newest, shipped.MODEL, tmp_path, side=64)


def check_pictures(newest, folder, tmp_path, side):
    base = load_base_model(folder)
    rex = learnt(base)
    np.save(tmp_path / "latents.npy", np.asarray(noise_for(base.model, SEEDS, side, side)).transpose(0, 3, 1, 2))
    jobs = []
    for kind in KINDS:
        export(base, [rex], kind, tmp_path / kind, dtype="float32")
        files = {"export": tmp_path / kind, "base": folder, "latents": tmp_path / "latents.npy"}
        files["drawn"] = tmp_path / f"{kind}.npy"
        job = {"kind": kind, "side": side, "steps": STEPS, "prompts": PROMPTS}
        jobs.append({**job, **{name: str(path) for name, path in files.items()}})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    (tmp_path / "draw.py").write_text(DRAW)
    subprocess.run([newest, tmp_path / "draw.py", tmp_path / "jobs.json"], check=True, cwd=tmp_path)
    ours = drawn_baked(base, [rex], height=side, width=side)
    for kind in KINDS:
        assert np.abs(ours - np.load(tmp_path / f"{kind}.npy")).max() <= 2, kind

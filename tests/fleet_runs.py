"""Runs of a small fleet, for the tests of fleets: their inputs, configs, processes and results."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from checkpoints import save_checkpoint
from PIL import Image
from safetensors.numpy import load_file

from configs import fleet

ROOT = Path(__file__).parents[1]
STEPS = {"rex": 4, "tom": 6, "cup": 4, "bob": 5, "max": 4, "zoe": 6}
CONFIG = {
    "templates": ("a photo of a {}", "my {}"),
    "size": 16,
    "batch_size": 2,
    "masks": "none",
    "validation_prompts": (),
    "checkpoint_every": 2,
    "log_every": 1,
    "steps": 4,
}


def write_inputs(folder):
    """Makes a base model, its covariance, and a table of concepts of 3 to 7 pictures with 4 to 6 steps."""
    save_checkpoint(folder / "base", "sd1", small=True)
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((48, 48))
    np.savez(folder / "covariance.npz", covariance=factor @ factor.T + np.eye(48))
    lines = ["name,super_category,pictures,steps,flip"]
    for number, (name, steps) in enumerate(STEPS.items()):
        (folder / name).mkdir()
        for picture in range(3 + number % 5):
            pixels = rng.integers(0, 256, (20, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{picture}.png")
        lines.append(f"{name},dog,{name},{steps},{'false' if name == 'tom' else ''}")
    (folder / "concepts.csv").write_text("\n".join(lines) + "\n")


def make_config(inputs, **changes):
    config = fleet.get_config(str(inputs / "base"))
    config.update(CONFIG, concepts=str(inputs / "concepts.csv"), covariance=str(inputs / "covariance.npz"))
    config.update(changes)
    return config


def start(config, workdir, *more, devices=1, before="pass"):
    names = [name for name in config if name not in ("base", "templates", "validation_prompts", "mesh")]
    plain = fleet.get_config(config.base)
    words = [f"--config.{name}={config[name]}" for name in names if config[name] != plain[name]]
    words += [f"--config.{name}={tuple(config[name])!r}" for name in ("templates", "validation_prompts", "mesh")]
    program = f"{before}; import runpy; runpy.run_module('perfusion_jax.train', run_name='__main__')"
    return subprocess.Popen(
        [
            *(sys.executable, "-c", program, f"--config={ROOT / 'configs' / 'fleet.py'}:{config.base}"),
            *(*words, f"--workdir={workdir}", *more),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        },
    )


def report_of(workdir):
    return {line["name"]: line for line in map(json.loads, (workdir / "report.jsonl").read_text().splitlines())}


def tensors_of(workdir, name):
    return load_file(workdir / "concepts" / f"{name}.safetensors")


def assert_same(one, other, name):
    ours, theirs = tensors_of(one, name), tensors_of(other, name)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[key], err_msg=f"{name}: {key}")


def assert_close(one, other, name):
    ours, theirs = tensors_of(one, name), tensors_of(other, name)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        tolerance = 1e-3 * np.abs(theirs[key]).max()
        np.testing.assert_allclose(tensor, theirs[key], rtol=1e-3, atol=tolerance, err_msg=f"{name}: {key}")


def wait_for_lines(process, file, count):
    while process.poll() is None and not (file.exists() and len(file.read_text().splitlines()) >= count):
        time.sleep(0.01)

"""Exported trees: restored by plain Orbax, drawn by plain Flax, and read again."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from exported import PROMPTS, SEEDS, drawn_baked, learnt

from perfusion_jax import InputError, generate
from perfusion_jax.formats.exporting import export
from perfusion_jax.formats.tree_folder import load_tree
from perfusion_jax.method.surgery import bake

OPTIONS = {"sampler": "ddim", "steps": 3, "height": 32, "width": 32}

# What somebody does who has Orbax, Flax and diffusers, and none of our code.
PLAIN = """
import sys
import jax, numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel

folder, unet, inputs, out = sys.argv[1:]
devices = np.array(jax.devices())
mesh = Mesh(devices, ("x",))

def sharded(leaf):
    # The last axis over all devices where it divides, as somebody else's mesh might.
    split = len(leaf.shape) > 1 and leaf.shape[-1] % len(devices) == 0
    spec = PartitionSpec(*[None] * (len(leaf.shape) - 1), "x") if split else PartitionSpec()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

with ocp.StandardCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(folder).item_metadata.tree
    tree = checkpointer.restore(folder, jax.tree.map(sharded, metadata))
assert "perfusion_jax" not in sys.modules
leaves = jax.tree.leaves(tree["unet"])
assert all(len(leaf.sharding.device_set) == len(devices) for leaf in leaves)
given = {name: jax.numpy.asarray(array) for name, array in np.load(inputs).items()}
module = FlaxUNet2DConditionModel.from_config(FlaxUNet2DConditionModel.load_config(unet))
output = module.apply({"params": tree["unet"]}, given["latents"], given["timesteps"], given["encodings"]).sample
np.savez(out, output=output, words=tree["words"], total=sum(float(abs(leaf).sum()) for leaf in leaves))
"""


@pytest.fixture(scope="module")
def both(small_base):
    return [learnt(small_base), learnt(small_base, "tom", "cat", seed=1)]


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_plain_orbax_and_flax_draw_a_baked_tree(small_folder, small_base, both, tmp_path, devices):
    export(small_base, both, "orbax", tmp_path / "out", dtype="float32")
    rng = np.random.default_rng(0)
    encodings = rng.standard_normal((2, 7, small_base.model.context_width), np.float32)
    latents, timesteps = rng.standard_normal((2, 4, 16, 16), np.float32), np.array([10, 500])
    np.savez(tmp_path / "inputs.npz", latents=latents, timesteps=timesteps, encodings=encodings)
    arguments = (tmp_path / "out" / "tree", small_folder / "unet", tmp_path / "inputs.npz", tmp_path / "output.npz")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-W", "ignore", "-c", PLAIN, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = np.load(tmp_path / "output.npz")
    unet = bake(small_base.params["unet"], [concept for concept, _ in both], 1.0)
    given = map(jax.numpy.asarray, (latents, timesteps, encodings))
    plain = small_base.model.unet.apply({"params": unet}, *given).sample
    np.testing.assert_allclose(result["output"], plain, atol=1e-5)
    np.testing.assert_array_equal(result["words"], [concept.embedding for concept, _ in both])
    total = sum(float(abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(unet))
    assert result["total"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_a_tree_draws_as_what_it_was_made_of(small_base, both, tmp_path, gated):
    prompts = ["a <rex> and a <tom> on the beach", *PROMPTS[1:]]
    strengths = [1.0, 1.0 if gated else 0.5]
    export(small_base, both, "orbax", tmp_path, strengths, dtype="float32", gated=gated)
    base, concepts = load_tree(tmp_path, small_base)
    ours = generate(base, prompts, SEEDS, concepts, **OPTIONS)
    if gated:
        expected = generate(small_base, prompts, SEEDS, both, **OPTIONS)
        for (one, card), (other, wanted) in zip(concepts, both, strict=True):
            assert card == wanted
            jax.tree.map(np.testing.assert_array_equal, one, other)
        jax.tree.map(np.testing.assert_array_equal, base.params["unet"], small_base.params["unet"])
    else:
        expected = drawn_baked(small_base, both, prompts, strengths, **OPTIONS)
    assert np.abs(ours - 1.0 * expected).max() <= 1


def test_a_tree_that_was_written_on_other_devices_is_read_here(small_base, both, tmp_path):
    export(small_base, both, "orbax", tmp_path, dtype="float32")
    here = load_tree(tmp_path, small_base)
    file = tmp_path / "tree" / "_sharding"
    written = file.read_text()
    assert "cpu:0" in written
    file.write_text(written.replace("cpu:0", "tpu:0"))
    elsewhere = load_tree(tmp_path, small_base)
    jax.tree.map(np.testing.assert_array_equal, here[0].params["unet"], elsewhere[0].params["unet"])


def test_what_has_no_gate_is_refused(small_base, both, tmp_path):
    with pytest.raises(InputError, match="lora has no gate: leave it out, or export orbax"):
        export(small_base, both, "lora", tmp_path / "out", gated=True)
    with pytest.raises(InputError, match="the strength of a gated edit is told when it is drawn"):
        export(small_base, both, "orbax", tmp_path / "out", [0.5, 1.0], gated=True)
    assert not (tmp_path / "out").exists()


def test_trees_that_cannot_be_read_are_one_line(small_base, sd1_base, both, tmp_path):
    with pytest.raises(InputError, match=r"no perfusion_jax\.json in it: not an exported tree"):
        load_tree(tmp_path, small_base)
    export(small_base, both, "orbax", tmp_path)
    with pytest.raises(InputError, match=r"a tree of .* is not: give --base"):
        load_tree(tmp_path, sd1_base)
    record = json.loads((tmp_path / "perfusion_jax.json").read_text())
    (tmp_path / "perfusion_jax.json").write_text(json.dumps({**record, "format": "other"}))
    with pytest.raises(InputError, match="not of the format 'perfusion_jax tree 1'"):
        load_tree(tmp_path, small_base)
    for key, changed in (
        ("concepts", {"concepts": None}),
        ("baked", {"baked": "yes"}),
        ("the metadata 'super_category' is missing", {"concepts": [{"name": "rex"}]}),
    ):
        (tmp_path / "perfusion_jax.json").write_text(json.dumps({**record, **changed}))
        with pytest.raises(InputError, match=rf"perfusion_jax\.json: .*{key}"):
            load_tree(tmp_path, small_base)
    (tmp_path / "perfusion_jax.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_tree(tmp_path, small_base)

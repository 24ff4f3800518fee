"""The fleet's step of a small model, compiled for TPUs that are not there."""

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest
from checkpoints import save_checkpoint
from jax.sharding import SingleDeviceSharding

from configs import fleet
from perfusion_jax.base_model import load_architecture
from perfusion_jax.base_model.flash_attention import flash_attention
from perfusion_jax.config import make_config
from perfusion_jax.learning import forecast
from perfusion_jax.learning.step import Settings
from perfusion_jax.pod.mesh import make_mesh
from perfusion_jax.runtime.errors import InputError, out_of_memory

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
)
SIDE = 64  # latents of 32 x 32: enough tokens for the attention kernel


@needs_compiler
@pytest.mark.parametrize(
    ("topology", "shape"),
    [
        ("v5e:2x4", (4, 2)),
        ("v4:2x2x2", (2, 4)),
        pytest.param("v5e:16x16", (64, 4), marks=pytest.mark.slow),
        pytest.param("v6e:4x4", (16, 1), marks=pytest.mark.slow),
    ],
)
def test_nothing_is_sent_between_concepts(tmp_path, topology, shape):
    model = load_architecture(save_checkpoint(tmp_path, "sd1", small=True), dtype=jnp.dtype(jnp.bfloat16))
    mesh = make_mesh(shape, forecast.topology_devices(topology))
    report = forecast.compile_step(model, Settings.of(make_config(batch_size=4)), mesh, 2 * shape[0], SIDE, prompts=2)
    assert not any("concept" in axes for axes in report.collectives)
    assert bool(report.collectives) == (shape[1] != 1)
    assert report.fits


slow = pytest.mark.slow


@needs_compiler
@pytest.mark.parametrize(
    "topology", ["v5e:2x4", *(pytest.param(other, marks=slow) for other in ("v4:2x2x2", "v5p:2x2x1", "v6e:4x4"))]
)
@pytest.mark.parametrize(
    ("tokens", "heads", "width", "dtype"),
    [
        (4096, 8, 40, jnp.bfloat16),  # Stable Diffusion 1 at 512 pixels
        (9216, 5, 64, jnp.bfloat16),  # Stable Diffusion 2 at 768 pixels
        pytest.param(4096, 5, 64, jnp.bfloat16, marks=slow),  # and at 512
        pytest.param(4096, 5, 64, jnp.float32, marks=slow),
        pytest.param(4096, 2, 160, jnp.bfloat16, marks=slow),
    ],
)
def test_attention_fits_the_vector_memory(topology, tokens, heads, width, dtype):
    chip = SingleDeviceSharding(forecast.topology_devices(topology)[0])
    shape = jax.ShapeDtypeStruct((16, tokens, heads, width), dtype, sharding=chip)
    step = jax.jit(jax.grad(lambda *fed: flash_attention(*fed).sum().astype(jnp.float32), argnums=(0, 1, 2)))
    assert "splash_mha_dkv" in step.lower(shape, shape, shape).compile().as_text()


@needs_compiler
def test_a_refusal_for_lack_of_memory_is_known(monkeypatch):
    chip = SingleDeviceSharding(forecast.topology_devices("v5e:2x4")[0])
    large = jax.ShapeDtypeStruct((2**33,), jnp.float32, sharding=chip)
    with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
        jax.jit(lambda x: x + 1).lower(large).compile()
    assert "exceeds available HBM" in out_of_memory(refusal.value)
    monkeypatch.setattr("perfusion_jax.base_model.flash_attention.KEYS_BYTES", 2**30)
    fed = jax.ShapeDtypeStruct((16, 16384, 2, 64), jnp.float32, sharding=chip)
    with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
        jax.jit(flash_attention).lower(fed, fed, fed).compile()
    assert "vmem" in out_of_memory(refusal.value)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("RESOURCE_EXHAUSTED: E1000:\nRan out of memory on HBM", r"does not fit \(Ran out of memory on HBM\): raise"),
        ("INTERNAL: a fault of the compiler\nof no meaning", "does not compile: INTERNAL: a fault of the compiler$"),
    ],
)
def test_a_step_that_the_compiler_refuses_is_an_error(sd1_folder, monkeypatch, said, told):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(forecast, "compile_step", refuse)
    monkeypatch.setattr(forecast, "topology_devices", lambda _: jax.devices()[:1])
    with pytest.raises(InputError, match=rf"--topology=v5e:2x4: the step with concepts=1 {told}"):
        forecast.describe(fleet.get_config(str(sd1_folder)), "v5e:2x4")


@pytest.mark.slow
@needs_compiler
def test_sixteen_concepts_cost_what_one_with_sixteen_samples_costs(tmp_path):
    """With arrays too large for vector memory, as in full size: of smaller ones now these stay there, now those."""
    folder = save_checkpoint(tmp_path, "sd1", small=True)
    file = folder / "unet" / "config.json"
    level = {"sample_size": 64, "block_out_channels": [128], "attention_head_dim": 8}
    file.write_text(json.dumps(json.loads(file.read_text()) | level))
    model = load_architecture(folder, dtype=jnp.dtype(jnp.bfloat16))
    mesh = make_mesh((-1, 1), forecast.topology_devices("v5e:2x4"))

    side = model.picture_side

    def report(members, batch):
        return forecast.compile_step(
            model, Settings.of(make_config(batch_size=batch)), mesh, 8 * members, side, prompts=2
        )

    with ThreadPoolExecutor() as executor:  # the compiler uses a core for each
        many, one = executor.map(report, (16, 1), (1, 16))
    for figure in ("flops", "traffic", "accessed"):
        assert getattr(many, figure) <= 1.05 * getattr(one, figure), figure


def test_what_is_told_can_be_printed_and_parsed(sd1_folder, monkeypatch):
    report = forecast.ProgramReport(
        2e12, 8e9, 9e9, 10**9, 0, 3 * 10**9, 4 * 10**9, 16e9, 0.01, 0.02, {"data": {"all-reduce": 3}}
    )
    monkeypatch.setattr(forecast, "compile_step", lambda *_: report)
    monkeypatch.setattr(forecast, "topology_devices", lambda _: jax.devices())
    config = fleet.get_config(str(sd1_folder))
    config.steps, config.members, config.mesh = 100, 2, (1, -1)
    config.batch_size = jax.device_count()
    told = forecast.describe(config, "v5e:2x4")
    assert json.loads(json.dumps(told))["bound_concepts_per_hour"] == pytest.approx(2 * 3600 / (100 * 0.02))
    lines = forecast.text(told)
    assert "4.00 GB of 16.00 GB: fits" in lines
    assert "data: 3 all-reduce" in lines
    assert "not a measurement" in lines


@needs_compiler
def test_an_unknown_topology_is_named():
    with pytest.raises(InputError, match="--topology=v9:1x1: no such topology"):
        forecast.topology_devices("v9:1x1")


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[tpu\]'"):
        forecast.topology_devices("v5e:2x4")

"""The fleet's step on eight devices: each concept as if it were alone, and nothing sent between concepts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from collectives import collectives, groups_of
from eight_devices import CONCEPTS, DIVERGES, MESHES, PICTURES, SETTINGS

from perfusion_jax import InputError
from perfusion_jax.learning import fleet_step
from perfusion_jax.learning import step as training
from perfusion_jax.pod import memory as memory_lib
from perfusion_jax.pod import mesh as mesh_lib

NAMES = ["x".join(map(str, mesh)) for mesh in MESHES]


@pytest.fixture(scope="module")
def trained(small_folder, tmp_path_factory):
    """What `eight_devices` computed: (arrays, collectives by mesh)."""
    out = tmp_path_factory.mktemp("eight") / "out"
    program = Path(__file__).parent / "eight_devices.py"
    process = subprocess.run(
        [sys.executable, str(program), str(small_folder), str(out)],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
            "PYTHONPATH": f"{program.parents[2]}:{program.parents[1]}",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    return np.load(f"{out}.npz"), json.loads(Path(f"{out}.json").read_text())


def leaves_of(arrays, prefix):
    names = [name for name in arrays.files if name.startswith(f"{prefix}/")]
    assert names
    return [arrays[name] for name in names]


@pytest.mark.parametrize("mesh", NAMES)
def test_each_concept_of_a_fleet_equals_the_one_trained_alone(trained, mesh):
    """12 concepts of 3 to 7 pictures, 2 to 4 steps; the state of Adam is compared too."""
    arrays, _ = trained
    for number in range(CONCEPTS):
        ours, alone = leaves_of(arrays, f"{mesh}/once/{number}"), leaves_of(arrays, f"alone/{number}")
        assert len(ours) == len(alone)
        for one, other in zip(ours, alone, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * np.abs(other).max())


@pytest.mark.parametrize("mesh", NAMES)
def test_two_runs_on_one_mesh_are_the_same_bit_for_bit(trained, mesh):
    arrays, _ = trained
    for number in range(CONCEPTS):
        for one, other in zip(
            leaves_of(arrays, f"{mesh}/once/{number}"), leaves_of(arrays, f"{mesh}/again/{number}"), strict=True
        ):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("mesh", NAMES)
def test_nothing_is_sent_between_concepts(trained, mesh):
    _, sent = trained
    concept_size = int(mesh.split("x")[0])
    for name, groups in sent[mesh]:
        for group in groups:
            assert len({device // (8 // concept_size) for device in group}) == 1, (name, group)
    # A step that splits a member's samples must add their gradients up.
    assert (mesh != "8x1") == any(name == "all-reduce" for name, _ in sent[mesh])


@pytest.mark.parametrize("mesh", NAMES)
def test_members_stop_at_their_own_step_and_a_diverged_one_leaves_the_others_alone(trained, mesh):
    losses = trained[0][f"{mesh}/once/losses"]
    for number in range(losses.shape[1]):
        taken = 0 if number in (DIVERGES, *range(CONCEPTS, losses.shape[1])) else 2 + number % 3
        np.testing.assert_array_equal(np.isfinite(losses[:, number]), np.arange(len(losses)) < taken)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, use", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], use", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), use", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, dim", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, dim", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}, dim", [[0, 1], [2, 3]]),
    ],
)
def test_groups_are_read_from_hlo_however_they_are_written(text, expected):
    line = f"  %x = f32[8]{{0}} all-reduce(%y), channel_id=1, {text}"
    assert groups_of(line) == expected
    assert collectives(f"{line}\n %z = f32[] add(%a, %b)") == [("all-reduce", expected)]


def test_groups_that_are_not_understood_are_an_error():
    with pytest.raises(ValueError, match="not understood"):
        collectives("  %x = f32[8]{0} all-reduce(%y), replica_groups=V2")


@pytest.mark.parametrize("shape", [(2, 1), (1,), (-1, -1), (0, 1), (1, 1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(shape):
    with pytest.raises(InputError, match=r"config\.mesh is .*1, the number of devices"):
        mesh_lib.make_mesh(shape)


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(mesh_lib.make_mesh((-1, 1)).shape) == {"concept": 1, "data": 1}


def test_padding_does_not_move_a_draw(small_base):
    rng = np.random.default_rng(0)
    shapes, _ = fleet_step.member_shapes(small_base.model, SETTINGS, 3, 2, 16)
    examples = jax.tree.map(lambda leaf: rng.uniform(size=leaf.shape).astype(leaf.dtype), shapes.examples)
    examples = examples._replace(num_pictures=np.int32(3))
    padded = fleet_step.pad_pictures(examples, PICTURES)
    assert padded.mean.shape[0] == padded.prompt_ids.shape[0] == PICTURES
    batches = [
        training.draw_batch(jax.random.key(1), jax.tree.map(jax.numpy.asarray, one), small_base.model, SETTINGS)
        for one in (examples, padded)
    ]
    for one, other in zip(*batches, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("limit", "most", "expected"), [(1000, 99, 9), (1000, 4, 4), (199, 99, 1), (200, 99, 1), (300, 1, 1)]
)
def test_as_many_members_are_taken_as_fit(limit, most, expected):
    assert memory_lib.most_that_fit(lambda members: 100 + 100 * members, limit + 1, most, "buy more") == expected


def test_memory_that_grows_faster_than_it_seemed_is_found_out():
    assert memory_lib.most_that_fit(lambda members: 10 * members**2, 1000, 99, "buy more") == 10


def refusing(above):
    """Memory that so many members take, by a compiler that refuses more than some: an error as the TPU's."""

    def bytes_for(members):
        if members > above:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM, 17.2G of 15.75G")
        return 100 * members

    return bytes_for


@pytest.mark.parametrize("fitting", [1, 2, 5])
def test_what_the_compiler_refuses_does_not_fit(fitting):
    assert memory_lib.most_that_fit(refusing(above=fitting), 1000, 99, "buy more") == fitting
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"17\.2G"):
        memory_lib.most_that_fit(refusing(above=0), 1000, 99, "buy more")


def test_a_concept_that_does_not_fit_is_an_error():
    with pytest.raises(InputError, match=r"one concept takes 2\.0 GB .*room for 1\.0 GB: buy more"):
        memory_lib.most_that_fit(lambda members: 2 * 10**9, 10**9, 99, "buy more")


@pytest.mark.slow
def test_the_compilers_report_grows_with_the_members(small_base):
    mesh = mesh_lib.make_mesh((1, 1))
    shapes = fleet_step.member_shapes(small_base.model, SETTINGS, PICTURES, 2, 16)
    step = fleet_step.make_fleet_step(small_base.model, SETTINGS, mesh)
    one, three = (
        memory_lib.bytes_per_chip(step.lower(*fleet_step.step_shapes(small_base.model, shapes, members)).compile())
        for members in (1, 3)
    )
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    assert three > one + 2 * state

"""Reading of compiled programs, on lines as the TPU compiler writes them."""

from types import SimpleNamespace

import numpy as np
import pytest

from perfusion_jax.pod.chips import chips_of, find_chip
from perfusion_jax.pod.hlo_report import (
    axes_crossed,
    collectives,
    count_by_axes,
    hbm_traffic,
    kernel_cost,
)
from perfusion_jax.runtime.errors import InputError

MESH = {"concept": 2, "data": 2, "model": 2}


@pytest.mark.parametrize(
    ("line", "kind", "groups", "axes"),
    [
        (
            "ROOT %all-reduce = bf16[2,8]{1,0:T(8,128)(2,1)} all-reduce(%a), channel_id=1, replica_groups=[4,2]<=[8]",
            "all-reduce",
            ((0, 1), (2, 3), (4, 5), (6, 7)),
            ("model",),
        ),
        (
            "%r = (f32[8]{0}, f32[4]{0}) all-gather-start(%a), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}",
            "all-gather",
            ((0, 4), (1, 5), (2, 6), (3, 7)),
            ("concept",),
        ),
        (
            "%p = f32[8]{0} collective-permute(%a), channel_id=2, source_target_pairs={{0,2},{2,0}}",
            "collective-permute",
            ((0, 2), (2, 0)),
            ("data",),
        ),
        (
            "%s = f32[8]{0} reduce-scatter(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}",
            "reduce-scatter",
            ((0, 1, 2, 3), (4, 5, 6, 7)),
            ("data", "model"),
        ),
        (
            "%m = f32[8]{0} all-reduce(%a), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add",
            "all-reduce",
            ((0, 2, 4, 6), (1, 3, 5, 7)),
            ("concept", "data"),
        ),
        ("%e = f32[8]{0} all-to-all(%a), replica_groups={}", "all-to-all", (), ("concept", "data", "model")),
        ("%n = f32[8]{0} all-reduce(%a), replica_groups={{0},{1}}", "all-reduce", ((0,), (1,)), ()),
    ],
)
def test_collectives_are_found_and_placed_on_the_mesh(line, kind, groups, axes):
    (found,) = collectives(f"  {line}\n  %x = f32[8]{{0}} add(%a, %b)\n")
    assert (found.kind, found.groups) == (kind, groups)
    assert axes_crossed(found.groups, MESH) == axes


def test_collectives_are_counted_by_axes_and_the_ends_of_asynchronous_ones_are_not():
    hlo = """
  %s = f32[8]{0} all-reduce-start(%a), replica_groups=[4,2]<=[8]
  %d = f32[8]{0} all-reduce-done(%s)
  %t = f32[8]{0} all-reduce(%a), replica_groups=[4,2]<=[8]
  %alone = f32[8]{0} all-reduce(%a), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}
"""
    assert count_by_axes(hlo, MESH) == {"model": {"all-reduce": 2}}


def test_a_collective_that_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="cannot be read"):
        list(collectives("%a = f32[8]{0} all-reduce(%b), replica_groups=?"))


def test_work_of_attention_kernels_is_counted():
    hlo = (
        "  %splash_mha_fwd_residuals.1 = (f32[2,512,128]{2,1,0:T(8,128)}, bf16[2,8,512,40]{3,2,1,0:T(8,128)(2,1)S(1)}) "
        'custom-call(%a, %b, %q, %k, %v), custom_call_target="tpu_custom_call", operand_layout_constraints='
        "{s8[1,8,1]{2,1,0}, bf16[2,8,40,512]{3,2,1,0}, bf16[2,8,40,1024]{3,2,1,0}, bf16[2,8,40,1024]{3,2,1,0}}, x={"
    )
    flops, traffic = kernel_cost(hlo)
    assert flops == 2 * 2 * (2 * 8 * 512 * 1024 * 40)
    assert traffic == 2 * 512 * 128 * 4 + 2 * 8 * 512 * 128 * 2 + 8 * 128 + 2 * 8 * 40 * (512 + 2 * 1024) * 2


def test_traffic_of_the_hbm_leaves_vector_memory_out():
    hlo = """
HloModule step

%fused (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %n = f32[8,128]{1,0:T(8,128)} negate(%p)
}

%body (t: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %t = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %y = f32[8,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fused
  ROOT %r = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%x, %y)
}

ENTRY %main (a: bf16[10,100], w: bf16[256,128]) -> bf16[10,100] {
  %a = bf16[10,100]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(1)
  %s = ((bf16[256,128]{1,0:T(8,128)(2,1)}), bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%w), slice={}
  %d = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%s)
  %c = (bf16[10,100]{1,0:T(8,128)(2,1)S(1)}, bf16[10,100]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)
  %e = bf16[10,100]{1,0:T(8,128)(2,1)S(1)} copy-done(%c)
  %f = bf16[10,100]{1,0:T(8,128)(2,1)S(1)} fusion(%e, %d), kind=kLoop, calls=%fused
  %g = bf16[10,100]{0,1:T(8,128)(2,1)} fusion(%f, %a), kind=kLoop, calls=%fused
  %l = (s32[], f32[8,128]{1,0:T(8,128)}) while(%i), condition=%cond, body=%body
  ROOT %h = pred[16]{0:T(512)} compare(%g, %f)
}
"""
    prefetched = 64 * 128 * 2 + 16 * 128 * 2
    written = 16 * 128 * 2 + 104 * 128 * 2  # a, and g along its other axis
    assert hbm_traffic(hlo) == prefetched + written + 2 * 8 * 128 * 4 + 512 + 104 * 128 * 2
    assert hbm_traffic(hlo, loops=3) - hbm_traffic(hlo) == 2 * 2 * 8 * 128 * 4


def test_a_chip_with_two_devices_shares_its_peaks():
    assert find_chip("TPU7x").flops == 2307e12 / 2
    with pytest.raises(InputError, match="TPU v1: its peaks are not known"):
        find_chip("TPU v1")


@pytest.mark.parametrize(("kind", "chips"), [("TPU v5 lite", 8), ("TPU7x", 4), ("cpu", 8)])
def test_devices_that_share_a_chip_are_one(kind, chips):
    mesh = SimpleNamespace(devices=np.full((4, 2, 1), SimpleNamespace(device_kind=kind)), size=8)
    assert chips_of(mesh) == chips

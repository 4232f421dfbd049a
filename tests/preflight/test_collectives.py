"""Collectives read from the text of a program: kinds, groups, bytes, loops; held against programs whose traffic is known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from conan_jax.preflight import collectives
from conan_jax.preflight.checker import axes_of, summarise

HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n"

PROGRAM = HEADER + """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], bf16[16,128])) -> (s32[], bf16[16,128]) {
  %p = (s32[]{:T(128)}, bf16[16,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %w = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %all-gather-start.1 = (bf16[16,128]{1,0}, bf16[128,128]{1,0}) all-gather-start(%w), replica_groups=[1,8]<=[8], dimensions={0}
  %all-gather-done.1 = bf16[128,128]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %out = (s32[], bf16[16,128]) tuple(%i, %w)
}

%condition (p.1: (s32[], bf16[16,128])) -> pred[] {
  %p.1 = (s32[], bf16[16,128]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[64,32], b: bf16[16,128]) -> f32[64,32] {
  %a = f32[64,32]{1,0:T(8,128)} parameter(0)
  %b = bf16[16,128]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[16,128]{1,0}) tuple(%zero, /*index=1*/%b)
  %loop = (s32[], bf16[16,128]{1,0}) while(%start), condition=%condition, body=%body
  %pair = (f32[64,32]{1,0}, f32[64,32]{1,0}) all-reduce(%a, %a), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %scattered = f32[16,32]{1,0} reduce-scatter(%a), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, to_apply=%add
  %swapped = f32[64,32]{1,0} all-to-all(%a), channel_id=4, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
  %moved = f32[64,32]{1,0} collective-permute(%a), channel_id=5, source_target_pairs={{0,0},{1,3},{3,1}}
  %alone = f32[64,32]{1,0} all-reduce(%a), channel_id=6, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %copy = f32[64,32]{1,0} copy(%a)
}
"""

A, B = 64 * 32 * 4, 16 * 128 * 2  # bytes


def by_kind(text, slices=1):
    return {c.kind: c for c in collectives.read(text, slices).collectives}


def test_every_kind_its_group_and_what_a_device_sends():
    found = by_kind(PROGRAM)
    assert collectives.read(PROGRAM).unknown_loops == 0
    assert found["all-gather"] == collectives.Collective("all-gather", tuple(range(8)), "ici", 7 * B, times=7)
    assert found["all-reduce"] == collectives.Collective("all-reduce", (0, 1, 2, 3), "ici", 2 * 2 * A * 3 // 4)
    assert found["reduce-scatter"] == collectives.Collective("reduce-scatter", (0, 2, 4, 6), "ici", A * 3 // 4)
    assert found["all-to-all"] == collectives.Collective("all-to-all", (0, 1, 2, 3), "ici", A * 3 // 4)
    assert found["collective-permute"] == collectives.Collective("collective-permute", (1, 3), "ici", A)
    assert len(collectives.read(PROGRAM).collectives) == 5  # nothing is sent within a group of one


def test_a_loop_of_known_length_needs_no_condition():
    text = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"12"},"x":"1"}')
    assert by_kind(text)["all-gather"].times == 12


def test_a_loop_of_unknown_length_is_counted_once_and_said():
    program = collectives.read(PROGRAM.replace("constant(7)", "copy(%i.1)"))
    assert program.unknown_loops == 1 and {c.kind: c.times for c in program.collectives}["all-gather"] == 1


def test_parts_of_one_overlapped_collective_are_one():
    piece = """
%piece.N (q: bf16[16,128]) -> bf16[128,128] {
  %q = bf16[16,128]{1,0} parameter(0)
  ROOT %all-gather.N = bf16[128,128]{1,0} all-gather(%q), channel_id=9, replica_groups=mesh['a'=1,'b'=8] {'b'}, dimensions={0}
}
"""
    calls = "".join(f"  %f.{n} = bf16[128,128]{{1,0}} fusion(%b), kind=kCustom, calls=%piece.{n}\n" for n in (1, 2, 3))
    pieces = "".join(piece.replace("N", str(n)) for n in (1, 2, 3))
    text = PROGRAM.replace("ENTRY", pieces + "ENTRY").replace("  ROOT %copy", calls + "  ROOT %copy")
    gathers = [c for c in collectives.read(text).collectives if c.kind == "all-gather"]
    assert [c.times for c in gathers] == [7, 1] and gathers[1].bytes == 7 * B


def test_a_tpu_program_writes_reduce_scatter_as_a_fusion():
    fused = """
%all-reduce-scatter.3 (q: f32[64,32]) -> f32[8,32] {
  %q = f32[64,32]{1,0} parameter(0)
  %all-reduce.7 = f32[64,32]{1,0} all-reduce(%q), channel_id=11, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %mine = f32[8,32]{1,0} slice(%all-reduce.7), slice={[0:8], [0:32]}
}
"""
    text = PROGRAM.replace("ENTRY", fused + "ENTRY").replace("  ROOT %copy", "  %s = f32[8,32]{1,0} fusion(%a), kind=kCustom, "
                                                             "calls=%all-reduce-scatter.3\n  ROOT %copy")
    assert sorted(c.bytes for c in collectives.read(text).collectives if c.kind == "reduce-scatter") == [A * 3 // 4, A * 7 // 8]


def test_of_a_conditional_the_branch_that_sends_most():
    branches = "".join(f"""
%branch.{n} (r: f32[{n},32]) -> f32[{n},32] {{
  %r = f32[{n},32]{{1,0}} parameter(0)
  ROOT %s{n} = f32[{n},32]{{1,0}} all-reduce(%r), channel_id={20 + n}, replica_groups=[1,8]<=[8], to_apply=%add
}}
""" for n in (8, 64))
    text = PROGRAM.replace("ENTRY", branches + "ENTRY").replace(
        "  ROOT %copy", "  %c = f32[64,32]{1,0} conditional(%zero, %a, %a), branch_computations={%branch.8, %branch.64}\n  ROOT %copy")
    assert [c.bytes for c in collectives.read(text).collectives if len(c.group) == 8 and c.kind == "all-reduce"] == [2 * A * 7 // 8]


def test_what_goes_between_slices():
    how = 'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
    text = PROGRAM.replace("  ROOT %copy", f"""  %token = token[] after-all()
  %send = (f32[64,32]{{1,0}}, u32[], token[]) send(%a, %token), channel_id=30, is_host_transfer=true, {how}
  ROOT %copy""")
    between = [c for c in collectives.read(text, slices=4).collectives if c.link == "dcn"]
    assert between == [collectives.Collective("all-reduce", (), "dcn", 2 * A * 3 // 4)]


@pytest.mark.parametrize(("rest", "group"), [
    ("replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7)),
    ("replica_groups=[4,2]<=[2,2,2]T(2,0,1)", (0, 2)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
])
def test_groups_in_every_spelling(rest, group):
    assert collectives.groups_of(f", channel_id=1, {rest}, use_global_device_ids=true", 8) == group


def test_axes_along_which_a_group_lies():
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    assert [axes_of(g, mesh) for g in ((0, 2), (0, 1), (0, 4), (0, 2, 4, 6))] == ["fsdp", "tensor", "data", "data+fsdp"]


def test_sizes_of_types():
    sizes = {"pred[3]": 3, "s4[3]": 2, "bf16[2,4]{1,0:T(8,128)(2,1)}": 16, "f8e4m3fn[5]": 5, "c64[2]": 16, "(f32[], u32[2])": 12,
             "token[]": 0}
    assert {shape: collectives.size_of(shape) for shape in sizes} == sizes


def test_a_real_program_whose_traffic_is_known():
    """Each collective of jax, inside a scan of 5 steps over 8 devices: the counts and bytes follow from the shapes."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:8])

    def on_device(x):
        def step(x, _):
            whole = jax.lax.all_gather(x, "fsdp", tiled=True)  # [8, 64]
            part = jax.lax.psum_scatter(jnp.tanh(whole), "fsdp", tiled=True)  # [2, 64]
            turned = jax.lax.all_to_all(jnp.sin(part), "fsdp", 1, 1, tiled=True)
            moved = jax.lax.ppermute(turned, "data", [(0, 1), (1, 0)])
            return moved / (1 + jax.lax.psum(jnp.sum(moved), ("data", "fsdp"))), None

        return jax.lax.scan(step, x, None, length=5)[0]

    spec = PartitionSpec(("data", "fsdp"))
    step = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec))
    text = step.lower(jax.ShapeDtypeStruct((16, 64), np.float32, sharding=NamedSharding(mesh, spec))).compile().as_text()
    traffic = {(t.kind, t.axes): (t.count, t.bytes_per_device) for t in summarise(collectives.read(text).collectives, dict(mesh.shape))}
    own, whole = 2 * 64 * 4, 8 * 64 * 4
    assert traffic == {
        ("all-gather", "fsdp"): (5, 5 * 3 * own),
        ("reduce-scatter", "fsdp"): (5, 5 * whole * 3 // 4),
        ("all-to-all", "fsdp"): (5, 5 * own * 3 // 4),
        ("collective-permute", "data"): (5, 5 * own),
        ("all-reduce", "data+fsdp"): (5, 5 * 2 * 4 * 7 // 8),
    }

"""Loop depth, trip counts, bytes and groups of the collectives of compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel import mesh as M
from parallel.census import Collective, census, overlap, totals


def test_collectives_inside_loops_count_as_often_as_they_run():
    mesh = M.make(M.parse("dp=2,tp=4"))

    def local(x):
        def inner(x, _):
            return M.ensure_varying(lax.psum(jnp.sin(x), "tp"), ("tp",)), None

        def outer(x, _):
            x, _ = lax.scan(inner, x, length=5)
            return lax.psum_scatter(lax.all_gather(x, "dp", tiled=True), "dp", tiled=True), None

        x, _ = lax.scan(outer, x, length=3)
        return lax.ppermute(x, "dp", [(0, 1), (1, 0)])

    program = jax.shard_map(local, mesh=mesh, in_specs=P("dp", "tp"), out_specs=P("dp", "tp"))
    found = census(jax.jit(program).lower(np.zeros((8, 4), np.float32)).compile())
    assert set(found) == {
        Collective("all-reduce", depth=2, executed=15, bytes=16, group=4),
        Collective("all-gather", depth=1, executed=3, bytes=32, group=2),
        Collective("reduce-scatter", depth=1, executed=3, bytes=16, group=2),
        Collective("collective-permute", depth=0, executed=1, bytes=16, group=2),
    }
    sent = {c.op: c.sent for c in found}
    assert sent == {"all-reduce": 360, "all-gather": 48, "reduce-scatter": 48,
                    "collective-permute": 16}  # fmt: skip
    assert totals(found)["all-reduce"] == (15, 240)
    assert {c.op for c in census("\n".join(["ENTRY %m (a: f32[]) -> f32[] {", "}"]))} == set()


def test_a_loop_of_unknown_length_is_told():
    mesh = M.make(M.parse("tp=4"))

    def local(x, n):
        add = lambda x: M.ensure_varying(lax.psum(x, "tp"), ("tp",))  # noqa: E731
        return lax.fori_loop(0, n, lambda _, x: add(x), x)

    program = jax.shard_map(local, mesh=mesh, in_specs=(P("tp"), P()), out_specs=P("tp"))
    compiled = jax.jit(program).lower(np.zeros(4, np.float32), jnp.asarray(3)).compile()
    with pytest.raises(ValueError, match="does not tell how often loop"):
        census(compiled)


TPU = """HloModule m, is_scheduled=true

%cond (p: (s32[])) -> pred[] {
  %n = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %ar = bf16[4,8]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  %p = f32[4] fusion(%a), kind=kOutput, calls=%f
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[]) while(%t), condition=%cond, body=%body
  %s = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %c1 = f32[4] convolution(%a, %b)
  %d = f32[4] collective-permute-done(%s)
  %c2 = f32[4] fusion(%a), kind=kOutput, calls=%f
  %g = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}
  %e = f32[16] all-gather-done(%g)
  %h = f32[16] all-reduce(%x), replica_groups=mesh['a'=2,'b'=3,'c'=2] {'a','b'}, to_apply=%add
}
"""


def test_a_text_of_the_form_that_tpus_get():
    assert census(TPU) == [
        Collective("collective-permute", depth=0, executed=1, bytes=16, group=2),
        Collective("all-gather", depth=0, executed=1, bytes=64, group=4),
        Collective("all-reduce", depth=0, executed=1, bytes=64, group=6),
        Collective("all-reduce", depth=1, executed=7, bytes=64, group=4),
    ]
    assert overlap(TPU) == (1, 9)  # one of two outside, none of seven in the loop


GPU = """
HloModule jit_step, is_scheduled=true

%body (p: (bf16[8])) -> (bf16[8]) {
  %ag = (bf16[4], bf16[8]) all-gather-start(%w), replica_groups={{0,1}}
  %a = (bf16[8], s8[4]) custom-call(%x), custom_call_target="__cublas$lt$matmul"
  %agd = bf16[8] all-gather-done(%ag)
  %f = bf16[8] fusion(%a), kind=kLoop, calls=%fused
  %b = bf16[8] fusion(%f), kind=kCustom, calls=%gemm
}

%condition (p: (bf16[8])) -> pred[] {
  %n = s32[] constant(3)
}

ENTRY %main (w: bf16[4]) -> bf16[8] {
  %l = (bf16[8]) while(%t), condition=%condition, body=%body
  %rs = ((bf16[8]), bf16[4]) async-start(%g), calls=%scatter
  %m = (bf16[8]) custom-call(%q), custom_call_target="__cudnn$fmhaSoftmax"
  %rsd = bf16[4] async-done(%rs)
  %s = (s32[8]) custom-call(%q), custom_call_target="AllocateBuffer"
}
"""


def test_overlap_of_a_program_for_gpus():
    """Three turns with one product of two under a gather, and cuDNN under a reduce-scatter."""
    assert overlap(GPU) == (4, 7)

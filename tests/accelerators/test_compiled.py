"""The counts of compiled programs, on texts by hand and on small programs whose counts are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from prdarts_jax.accelerators.compiled import Counts, Program

# A step of a dispatch: a loop of 7 turns with a decision between one kernel and three, then an exchange in a call.
BY_HAND = """HloModule by_hand, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p)
}

%one (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
}

%three (y: f32[8]) -> f32[8] {
  %y = f32[8]{0} parameter(0)
  %a = f32[8]{0} fusion(%y), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  %b = f32[8]{0} copy(%a)
  ROOT %c = (f32[8]{0}, u8[16]{0}) custom-call(%b), custom_call_target="__cudnn$convForward"
}

%turn (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %v = f32[8]{0:T(256)} get-tuple-element(%t), index=1
  %r = f32[8]{0} conditional(%i, %v, %v), branch_computations={%one, %three}
  ROOT %out = (s32[], f32[8]{0}) tuple(%i, %r)
}

%below_seven (t.1: (s32[], f32[8])) -> pred[] {
  %t.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %seven = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %seven), direction=LT
}

%exchange (e: f32[8]) -> f32[8] {
  %e = f32[8]{0} parameter(0)
  %start = f32[8]{0} all-reduce-start(%e), replica_groups={{0,1}}, to_apply=%sum
  ROOT %done = f32[8]{0} all-reduce-done(%start)
}

%step (s: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %s = (s32[], s32[], /*index=2*/f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%s), index=0
  %w = f32[8]{0} get-tuple-element(%s), index=2
  %start.1 = (s32[], f32[8]{0}) tuple(%j, %w)
  %loop = (s32[], f32[8]{0}) while(%start.1), condition=%below_seven, body=%turn
  %u = f32[8]{0} get-tuple-element(%loop), index=1
  %called = f32[8]{0} call(%u), to_apply=%exchange
  ROOT %next = (s32[], s32[], f32[8]{0}) tuple(%j, %j, %called)
}

%below_count (s.1: (s32[], s32[], f32[8])) -> pred[] {
  %s.1 = (s32[], s32[], f32[8]{0}) parameter(0)
  %j.1 = s32[] get-tuple-element(%s.1), index=0
  %count = s32[] get-tuple-element(%s.1), index=1
  ROOT %go = pred[] compare(%j.1, %count), direction=LT
}

ENTRY %main (m: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %m = (s32[], s32[], f32[8]{0}) parameter(0)
  %before = (s32[], s32[], f32[8]{0}) copy(%m)
  ROOT %dispatch = (s32[], s32[], f32[8]{0}) while(%before), condition=%below_count, body=%step
}
"""


def test_loops_decisions_and_calls_of_a_text_by_hand() -> None:
    program = Program(BY_HAND)
    # Of a turn: launches (1 + 3)/2; bytes (64 + 64 + 64 + 32 + 48)/2; cycles (100 + 10)/2. An exchange of 64 bytes.
    step = Counts(launches=7 * 2 + 1, conditionals=7, exchanges=1, bytes=7 * 136 + 64, cycles=7 * 55)
    assert program.step() == step
    assert program.run() == step.plus(Counts(launches=1, bytes=80))
    assert program.custom_calls("__cudnn") == 1 and program.custom_calls("prdarts_") == 0


def test_the_length_that_xla_has_found_counts() -> None:
    text = BY_HAND.replace("body=%turn", 'body=%turn, backend_config={"known_trip_count":{"n":"3"}}')
    assert Program(text).step().conditionals == 3
    assert Program(BY_HAND.replace("direction=LT", "direction=NE")).step() != Program(BY_HAND).step()


def _compiled(function, *args) -> Program:  # type: ignore[no-untyped-def]
    return Program(jax.jit(function).lower(*args).compile().as_text())


def _turn(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
    """One decision between sorts, which no compiler makes a selection of."""
    return lax.cond(i % 3 == 0, lambda x: jnp.sort(x), lambda x: -jnp.sort(-jnp.sort(x)), x), None


def test_a_scan_of_seven_with_one_conditional() -> None:
    program = _compiled(lambda x: lax.scan(_turn, x, jnp.arange(7))[0], jnp.ones(64))
    assert program.run().conditionals == 7
    assert program.step() == program.run()
    # On average one sort and a half a turn, besides what is fused around them.
    assert 7 * 1.5 <= program.run().launches < 7 * 12
    assert program.run().cycles == 0


def test_a_dispatch_counts_as_one_of_its_steps() -> None:
    def dispatch(x: jax.Array, count: jax.Array) -> jax.Array:
        return lax.fori_loop(0, count, lambda _, x: lax.scan(_turn, x, jnp.arange(7))[0], 2 * x)

    program = _compiled(dispatch, jnp.ones(64), jnp.int32(5))
    assert program.step().conditionals == 7
    assert program.step().launches <= program.run().launches


@pytest.mark.multidevice
def test_an_all_reduce_in_a_loop() -> None:
    mesh = Mesh(jax.devices()[:2], ("data",))

    def program(x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, _: (lax.pmean(jnp.sin(x), "data"), None), x, None, length=5)[0]

    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(), check_vma=False
    )
    assert _compiled(mapped, jnp.ones(64)).run().exchanges == 5
    assert _compiled(lambda x: x + 1, jnp.ones(64)).run().exchanges == 0

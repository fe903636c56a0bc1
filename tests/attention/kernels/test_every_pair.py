"""Every kernel is lowered for every kind of score mod with every kind of mask, GPUs and TPUs alike.

The fast part has all kernels, for pairs in which each score mod and each mask occurs.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import eqx_transformer.attention as attn
from eqx_transformer.attention._inputs import Inputs, make_inputs
from eqx_transformer.attention._kernels import _decode, _hopper, _hopper_plan, _tile, _tpu, _triton
from eqx_transformer.attention._kernels._tuning import HOPPER, HopperTiles, Tuning
from eqx_transformer.nn._disentangled_attention import _DistanceScores

from .problems import RELATIVE, SCALED, Rows, closure, gpu

SEQ, HEADS = 60, 4
Q, K = jnp.zeros((SEQ, HEADS, 16)), jnp.zeros((SEQ, 2, 16))
POSITIONS = jnp.arange(SEQ)
SMALL, LARGE = jnp.arange(9, dtype=jnp.int8), jnp.zeros(SEQ * SEQ - 1)
"""Tables; the second is too large for a kernel on a TPU and too small to be read in tiles."""


def user(score: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
    steps = (q_pos - kv_pos) // 3 + jnp.sign(kv_pos - q_pos) * head
    kinds = SMALL[q_pos % 9] * SMALL[kv_pos % 9] - SMALL[0]
    return jnp.abs(score) + (steps + kinds.astype(jnp.int32)).astype(score.dtype)


def large_table(score: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
    return score + LARGE[q_pos * kv_pos]


def angle(score: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
    return jnp.arccos(jnp.tanh(score))


MODS: dict[str, Any] = {
    "none": None,
    "alibi": attn.ALiBi(HEADS),
    "soft cap": attn.SoftCap(3.0),
    "relative": RELATIVE,
    "relative causal": attn.RelativeBias(HEADS, 8, 20, bidirectional=False, key=jr.key(0)),
    "dense bias": attn.DenseBias(jnp.zeros((HEADS, SEQ, SEQ))),
    "grid bias": attn.GridBias((6, 9), HEADS, num_prefix=6),
    "distances": _DistanceScores(*jnp.zeros((2, HEADS, SEQ, 16)), max_distance=30, num_buckets=8),
    "module": SCALED,
    "features": Rows(jnp.zeros((7, 3))),
    "function": user,
    "closure": closure(jnp.ones(HEADS)),
    "composed": attn.Compose((RELATIVE, attn.SoftCap(3.0), user)),
    "large table": large_table,
    "angle": angle,
}
MASKS: dict[str, Any] = {
    "full": None,
    "causal": attn.Causal(),
    "window": attn.SlidingWindow(9, 2),
    "prefix": attn.Prefix(9),
    "lengths": attn.Prefix(jnp.int32(9)),
    "padding": attn.Padding(POSITIONS < 50),
    "documents": attn.Segments(POSITIONS // 7) & attn.Causal(),
    "groups": attn.TokenGroups((20, 40), ((1, 0), (1, 1))),
    "strided": attn.Strided(3),
    "grid window": attn.GridWindow(9, 1, 6),
    "dense": attn.Dense(jnp.ones((SEQ, SEQ), bool)),
    "predicate": attn.Predicate(lambda i, j: jnp.where(i % 2 == 0, j <= i, SMALL[(i + j) % 9] > 2)),
    "prefix or causal": attn.Prefix(jnp.int32(7)) | attn.Causal(),
    "not strided": ~attn.Strided(3) & attn.SlidingWindow(None, 3),
    "large table": attn.Predicate(lambda i, j: LARGE[i * j] > 0),
}
REFUSED = {
    "large table": f"indexes, for every .* a table of {SEQ * SEQ - 1} elements, more than 1024",
    "angle": "Unimplemented primitive .* acos",
}
"""By TPUs, and what they say."""


def forward(kernels: Any, tuning: Tuning, inputs: Inputs, stat: Any) -> Any:
    return kernels.forward(inputs, tuning)


def tangent(kernels: Any, tuning: Tuning, inputs: Inputs, stat: Any) -> Any:
    mod = eqx.filter(inputs.score_mod, eqx.is_inexact_array)
    moved = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "score_mod": mod}
    return kernels.tangent(inputs, tuning, inputs.q, stat, stat, moved)


def transpose_q(kernels: Any, tuning: Tuning, inputs: Inputs, stat: Any) -> Any:
    return kernels.transpose_q(inputs, tuning, stat, stat, inputs.q)


def transpose_kv(kernels: Any, tuning: Tuning, inputs: Inputs, stat: Any) -> Any:
    return kernels.transpose_kv(inputs, tuning, stat, stat, inputs.q)


def decode(kernels: Any, tuning: Tuning, inputs: Inputs, stat: Any) -> Any:
    few = dataclasses.replace(inputs, q=inputs.q[:2], q_positions=POSITIONS[-2:], source=None)
    return _decode.forward(few, tuning)


KERNELS = (forward, tangent, transpose_q, transpose_kv)
PLATFORMS = {
    "cuda": (_triton, (*KERNELS, decode), "__gpu$xla.gpu.triton"),
    "tpu": (_tpu, KERNELS, "tpu_custom_call"),
    "hopper": (_hopper, KERNELS, "@mosaic_gpu"),
}


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Each score mod and each mask is traced once, not for every kernel of every pair."""

    def remembered(function: Any) -> Any:
        known: dict[Any, Any] = {}

        def program(inputs: Inputs, **options: Any) -> Any:
            mod = inputs.score_mod if function is _tile.mod_program else inputs.mask
            key = id(mod), *((name, bool(x)) for name, x in options.items())
            if key not in known:
                known[key] = function(inputs, **options)
            return known[key]

        return program

    with pytest.MonkeyPatch.context() as patch:
        of_mods = remembered(_tile.mod_program)
        for module in (_triton, _tpu, _decode, _hopper, _hopper_plan):
            patch.setattr(module, "mod_program", of_mods)
        of_masks = remembered(_tile.mask_program)
        for module in (_tile, _hopper_plan):
            patch.setattr(module, "mask_program", of_masks)
        yield


@functools.cache
def prepared(mod: str) -> Any:
    """As attention calls it."""
    return make_inputs(Q, K, K, score_mod=MODS[mod]).score_mod


def count(platform: str, kernels: Any, mod: str, mask: str, options: dict[str, Any]) -> int:
    """How many kernels there are in a lowered program that calls these."""
    module, _, call = PLATFORMS[platform]

    def run(q: Any, k: Any) -> Any:
        inputs = make_inputs(q, k, k, **options)
        inputs = dataclasses.replace(inputs, score_mod=prepared(mod), mask=MASKS[mask])
        return [kernel(module, tuning, inputs, jnp.zeros((HEADS, SEQ))) for kernel in kernels]

    hopper = platform == "hopper"
    tuning = Tuning(HopperTiles(64)) if hopper else Tuning()
    arrays = (x.astype(jnp.bfloat16) if hopper else x for x in (Q, K))
    with gpu():
        traced = jax.jit(run).trace(*arrays)
        lowered = traced.lower(lowering_platforms=("cuda" if hopper else platform,))
    return lowered.as_text().count(call)


def pairs() -> Iterator[Any]:
    for (i, mod), (j, mask) in itertools.product(enumerate(MODS), enumerate(MASKS)):
        fast = i == j % len(MODS)
        yield pytest.param(mod, mask, i + j, marks=[pytest.mark.slow] * (not fast))


@pytest.mark.parametrize(("mod", "mask", "turn"), list(pairs()))
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_every_kernel_is_lowered(platform, mod, mask, turn, request):
    _, kernels, _ = PLATFORMS[platform]
    options = {}
    if turn // len(kernels) % 2:
        # Code of their own, which each mod and each mask meets here and is without there.
        options = {"sinks": jnp.ones(HEADS), "dropout_rate": 0.1, "dropout_key": jr.key(0)}
    if request.node.get_closest_marker("slow"):
        # In turn: each of the kernels meets each mod and each mask, if not both at a time.
        kernels = [kernels[turn % len(kernels)]]
    refusals = [REFUSED[x] for x in (mod, mask) if x in REFUSED]
    if platform == "cuda" or not refusals:
        assert count(platform, kernels, mod, mask, options) == len(kernels)
        return
    for kernel in kernels:
        with pytest.raises(NotImplementedError, match="|".join(refusals)):
            count(platform, [kernel], mod, mask, options)


def of_hopper() -> Iterator[Any]:
    for i, mod in enumerate(MODS):
        yield pytest.param(mod, "causal", i, id=mod)
    for i, mask in enumerate(MASKS):
        yield pytest.param("none", mask, i, id=mask)


@pytest.mark.skipif(not HOPPER, reason="needs JAX 0.11, and this is older")
@pytest.mark.parametrize(("mod", "mask", "turn"), list(of_hopper()))
def test_kernels_for_hopper_gpus_are_lowered_where_there_are_any(mod, mask, turn):
    options = {}
    if turn % 2:
        options = {"sinks": jnp.ones(HEADS), "dropout_rate": 0.1, "dropout_key": jr.key(0)}
    kernels = KERNELS if mod != "none" else [KERNELS[turn % 4]]
    inputs = dataclasses.replace(make_inputs(Q, K, K), score_mod=prepared(mod), mask=MASKS[mask])
    # The sine of the closure is known there, but not relied upon.
    if _hopper_plan.takes(inputs) or mod == "closure":
        assert count("hopper", kernels, mod, mask, options) == len(kernels)
        return
    for kernel in kernels:
        with pytest.raises(NotImplementedError, match=r"for every pair|Unimplemented primitive"):
            count("hopper", [kernel], mod, mask, options)

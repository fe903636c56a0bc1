"""Which tiles are visited: all that matter, and, where it can be known, no others."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_transformer.attention as attn
from eqx_transformer.attention._inputs import make_inputs
from eqx_transformer.attention._kernels._block_map import visits

from .problems import HOLES

CAUSAL = attn.Causal()
IDS = jnp.asarray(np.concatenate([np.arange(46) // 13, np.full(7, -1)]))
MASKS: list[Any] = [
    None,
    CAUSAL,
    attn.SlidingWindow(9, 3),
    CAUSAL | attn.Prefix(20),
    ~CAUSAL & attn.SlidingWindow(None, 30),
    attn.TokenGroups((13, 2, 38), ((1, 0, 1), (1, 1, 0), (0, 0, 0))),
    attn.Segments(IDS) & CAUSAL,
    attn.Padding(IDS >= 0),
    attn.Dense(HOLES),
    attn.Prefix(jnp.int32(0)),
]


def problem(mask: Any, q_positions: Any = None, kv_positions: Any = None) -> Any:
    q, k = jnp.zeros((41, 1, 4)), jnp.zeros((53, 1, 4))
    return make_inputs(q, k, k, mask=mask, q_positions=q_positions, kv_positions=kv_positions)


def check(inputs: Any, lists: Any, transposed: bool, *, exact: bool) -> None:
    """Against the mask itself, tile by tile."""
    allowed = np.zeros((48, 64), bool)
    allowed[:41, :53] = inputs.allowed(inputs.q_pos(), inputs.kv_pos())
    outside = np.zeros((48, 64), bool)
    outside[41:] = True
    tiles = allowed.reshape(3, 16, 4, 16).transpose(0, 2, 1, 3)
    # Queries that stick out of the sequence are not masked, keys are.
    whole = (tiles | outside.reshape(3, 16, 4, 16).transpose(0, 2, 1, 3)).all(axis=(2, 3))
    some = tiles.any(axis=(2, 3))
    if transposed:
        whole, some = whole.T, some.T
    for i in range(len(some)):
        order = range(some.shape[1]) if lists.order is None else np.asarray(lists.order[i])
        full, live = int(lists.full[i]), int(lists.live[i])
        visited = [int(j) for j in order[:live]]
        assert len(set(visited)) == live
        assert all(whole[i, j] for j in visited[:full])
        assert {int(j) for j in np.nonzero(some[i])[0]} <= set(visited)
        if exact:
            assert live == some[i].sum() and full == (whole[i] & some[i]).sum()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_visits_what_matters(mask, transposed):
    inputs = problem(mask)
    lists = eqx.filter_jit(visits)(inputs, 16, 16, transposed=transposed)
    exact = not isinstance(mask, attn.Dense)
    check(inputs, lists, transposed, exact=exact)


@pytest.mark.parametrize("transposed", [False, True])
def test_at_given_positions(transposed):
    q_positions, kv_positions = jnp.arange(41) + 10, (jnp.arange(53) + 20) % 53
    inputs = problem(CAUSAL & attn.SlidingWindow(12, 0), q_positions, kv_positions)
    lists = jax.jit(lambda x: visits(x, 16, 16, transposed=transposed))(inputs)
    check(inputs, lists, transposed, exact=False)


def test_static_masks_give_constants_and_leave_out_the_trivial_order():
    @jax.jit
    def orders(q: Any) -> Any:
        for mask in MASKS[:6]:
            lists = visits(make_inputs(q, q, q, mask=mask), 16, 16)
            assert isinstance(lists.full, np.ndarray) and isinstance(lists.live, np.ndarray)
            assert mask not in (None, CAUSAL) or lists.order is None
            assert not isinstance(mask, attn.SlidingWindow) or lists.order is not None
        return q

    orders(jnp.zeros((64, 1, 4)))


def test_batched_masks_and_positions():
    def lists(ids: Any, positions: Any) -> Any:
        mask = CAUSAL & attn.Segments(ids)
        return visits(problem(mask, q_positions=positions), 16, 16)

    ids = jnp.stack([jnp.arange(53) // n for n in (7, 20)])
    positions = jnp.stack([jnp.arange(41), jnp.arange(41) + 12])
    batched = jax.jit(jax.vmap(lists))(ids, positions)
    for i in range(2):
        alone = jax.jit(lists)(ids[i], positions[i])
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[i], y), batched, alone)

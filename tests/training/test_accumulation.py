"""A gradient in parts is the gradient of the whole, where parts weigh differently too."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.nn import MLP
from eqx_transformer.training import accumulated_value_and_grad


def loss(model, batch):
    x, counts, key, power = batch
    noise = jax.vmap(lambda key: jr.normal(key, (4,), x.dtype))(key)
    costs = jnp.sum((jax.vmap(model)(x) - noise[:, None, :]) ** power, axis=-1)
    return jnp.sum(jnp.where(counts, costs, 0)), counts.sum()


@pytest.fixture
def problem(getkey, x64):
    model = MLP(4, 6, dtype=jnp.float64, key=getkey())
    x = jr.normal(getkey(), (6, 3, 4), jnp.float64)
    lengths = jnp.asarray([3, 0, 1, 3, 2, 0])  # tokens that count, differently many in every part
    counts = jnp.arange(3)[None, :] < lengths[:, None]
    return model, (x, counts, jr.split(getkey(), 6), 2)


def test_it_is_the_gradient_of_the_whole_batch(problem):
    model, batch = problem

    def mean(model):
        total, count = loss(model, batch)
        return total / count.astype(total.dtype)

    expected, gradient = eqx.filter_jit(eqx.filter_value_and_grad(mean))(model)
    got = eqx.filter_jit(accumulated_value_and_grad(loss, 3))(model, batch)
    np.testing.assert_allclose(got[0], expected, rtol=1e-12)
    assert jax.tree.structure(got[1]) == jax.tree.structure(gradient)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)


def test_sums_of_narrow_gradients_are_wide():
    """Each part adds less to the gradient than bfloat16 could add to the sum."""

    def total(weight, x):
        return jnp.sum(weight * x), jnp.asarray(1.0)

    x = jnp.full(1024, 1.0, jnp.bfloat16)
    _, gradient = jax.jit(accumulated_value_and_grad(total, 1024))(jnp.ones((), jnp.bfloat16), x)
    np.testing.assert_array_equal(gradient, jnp.ones((), jnp.bfloat16), strict=True)


def test_one_part_is_in_memory_at_a_time():
    def temporary(num_parts):
        def total(weight, x):
            for _ in range(6):
                x = jnp.tanh(x @ weight)
            return jnp.sum(x), jnp.asarray(1.0)

        f = jax.jit(accumulated_value_and_grad(total, num_parts))
        args = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((32, 32), (4096, 32)))
        analysis = f.lower(*args).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    # The batch is put in order first, which is one copy of it.
    assert temporary(16) < temporary(1) / 2


def test_examples_stay_where_they_are(getkey):
    """Parts of a batch that is spread over devices are spread in the same way."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(jr.normal(getkey(), (8, 16)), sharding)

    def total(weight, x):
        return jnp.sum((x @ weight) ** 2), jnp.asarray(x.shape[0])

    f = jax.jit(accumulated_value_and_grad(total, 2))
    weight = jnp.ones(16)
    text = str(f.lower(weight, x).compile().as_text())
    assert "all-reduce" in text
    assert not any(op in text for op in ("all-to-all", "collective-permute", "all-gather"))
    np.testing.assert_allclose(f(weight, x)[1], 2 * x.T @ (x @ weight) / 8, rtol=1e-5)


def test_errors(problem):
    model, batch = problem
    with pytest.raises(ValueError, match="num_parts=0 must be at least 1"):
        accumulated_value_and_grad(loss, 0)
    with pytest.raises(ValueError, match=r"shape \(6, 3, 4\).*multiple of num_parts=4"):
        accumulated_value_and_grad(loss, 4)(model, batch)
    with pytest.raises(ValueError, match=r"shape \(\); its first "):
        accumulated_value_and_grad(loss, 2)(model, jnp.float32(1))

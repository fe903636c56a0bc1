"""The density of sets of particles, at a tiny size."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples.programs import exit_status, is_png, program

flow = program("flow_over_sets")
TINY = [
    *("--particles", "3", "--sets", "32", "--test-sets", "8", "--probes", "2", "--steps", "2"),
    *("--batch", "4", "--d-model", "8", "--num-layers", "1", "--num-heads", "2"),
]


def moving(key, scale=1.0):
    """A velocity whose blocks are no longer the identity, as they are to begin with."""
    model = flow.Velocity(8, 2, 1, key=key)

    def weights(model):
        return model.stack.blocks.modulation.proj.weight

    fill = scale * jax.random.normal(key, weights(model).shape)
    return eqx.tree_at(weights, model, fill)


@pytest.mark.slow
def test_trains_measures_and_draws(tmp_path, capsys):
    output = tmp_path / "runs"
    assert flow.main([*TINY, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert (output / "table.md").read_text() in out and "of the samples are left" in out
    assert is_png(output / "sets.png")
    results = json.loads((output / "results.json").read_text())
    normal, exact, estimate = results["rows"]
    assert normal["noise"] == exact["noise"] == 0 < estimate["noise"]
    assert all(0 < share <= 1 for share in results["effective"].values())


def test_two_particles_have_the_density_of_eigenvalues():
    """Which integrates to one; and eigenvalues are drawn from it."""
    rng = np.random.default_rng(0)
    sets = rng.standard_normal((200_000, 2, 2))
    proposal = -0.5 * (sets**2).sum((1, 2)) - 2 * np.log(2 * np.pi)
    np.testing.assert_allclose(np.exp(flow.true_log_density(sets) - proposal).mean(), 1, rtol=0.01)
    # By the density, the mean of |z|^2 is (particles + 1) / 2.
    drawn = flow.draw_sets(20_000, 2, rng)
    np.testing.assert_allclose((drawn**2).sum(-1).mean(), 1.5, rtol=0.02)


def test_the_order_of_particles_does_not_matter():
    model = eqx.filter_jit(moving(jax.random.key(0)))
    where, time = jax.random.normal(jax.random.key(1), (5, 2)), jnp.asarray(0.3)
    order = jnp.asarray([3, 0, 4, 1, 2])
    velocity = model(time, where)
    assert float(jnp.abs(velocity - velocity[order]).max()) > 0.1
    np.testing.assert_allclose(velocity[order], model(time, where[order]), atol=1e-5)


def test_noise_is_paired_with_what_is_near():
    rng = np.random.default_rng(0)
    sets = rng.standard_normal((3, 4, 2)).astype(np.float32)
    order = rng.permuted(np.tile(np.arange(4), (3, 1)), axis=1)
    noise = np.take_along_axis(sets + 1e-3, order[:, :, None], axis=1)
    np.testing.assert_allclose(flow.paired(noise, sets), sets + 1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_log_density_is_that_of_the_map():
    """The determinant of the Jacobian of the whole flow, against the integrated divergence."""
    to_wide = lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x  # noqa: E731
    model = jax.tree.map(to_wide, moving(jax.random.key(0)))
    noise = 1.5 * jax.random.normal(jax.random.key(1), (1, 3, 2), jnp.float64)

    @jax.jit
    def jacobian(noise):
        end = lambda flat: flow.sample(model, flat.reshape(1, 3, 2), 1e-8).reshape(-1)  # noqa: E731
        return end(noise.reshape(-1)), jax.jacrev(end)(noise.reshape(-1))

    where, matrix = jacobian(noise)
    expected = flow.normal_log_density(noise[0], 1.5) - np.linalg.slogdet(matrix)[1]
    where = where.reshape(1, 3, 2)
    got = flow.log_density(model, flow.exact, where, jnp.ones_like(where), 1.5, 1e-8)
    assert abs(float(expected - flow.normal_log_density(where[0], 1.5))) > 1e-2
    np.testing.assert_allclose(got, [expected], rtol=1e-5)

    # The estimate is right in the mean, and linear in the square of the probe: all signs suffice.
    def field(x):
        return model(jnp.asarray(0.3), x)

    signs = jnp.asarray(np.stack(np.meshgrid(*[[-1.0, 1.0]] * 6), axis=-1)).reshape(-1, 3, 2)
    estimates = jax.jit(jax.vmap(lambda s: flow.hutchinson(field, where[0], s)[1]))(signs)
    _, divergence = jax.jit(lambda: flow.exact(field, where[0], None))()
    np.testing.assert_allclose(estimates.mean(), divergence, rtol=1e-9)
    assert float(estimates.std()) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tolerance", "0"], "argument --tolerance: 0 must be positive"),
        (["--d-model", "10", "--num-heads", "4"], "d_model=10 is not a multiple of num_heads=4"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    assert exit_status(flow, arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]

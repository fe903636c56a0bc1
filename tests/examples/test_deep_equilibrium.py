"""A deep equilibrium, at a tiny size."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples.programs import is_png, program

deep_equilibrium = program("deep_equilibrium")
TINY = [
    *("--steps", "2", "--batch", "4", "--d-model", "8", "--num-layers", "2", "--num-heads", "2"),
    *("--max-steps", "8"),
]


@pytest.mark.slow
def test_trains_and_draws(tmp_path, capsys):
    output = tmp_path / "runs"
    assert deep_equilibrium.main([*TINY, "--output", str(output)]) == 0
    table = (output / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert len(table.splitlines()) == 5
    assert is_png(output / "equilibrium.png")


@pytest.mark.usefixtures("x64")
def test_the_gradient_is_that_of_many_iterations():
    args = deep_equilibrium.parse([*TINY, "--tolerance", "1e-10", "--max-steps", "200"])
    depth = deep_equilibrium.make_model("equilibrium", args).depth
    x, weight = jax.random.normal(jax.random.key(1), (2, 2, 4, 8))

    def unrolled(block, x):
        def step(z, _):
            return jax.vmap(block)(deep_equilibrium.SHARE * z + x), None

        return jax.lax.scan(step, jnp.zeros_like(x), length=100)[0]

    def implicit(block, x):
        return eqx.tree_at(lambda d: d.block, depth, block)(x, None)[0]

    def gradient(solve):
        def loss(inputs):
            return jnp.sum(weight * solve(*inputs))

        return eqx.filter_jit(eqx.filter_grad(loss))((depth.block, x))

    got, expected = gradient(implicit), gradient(unrolled)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_mistakes_get_one_line(capsys):
    assert deep_equilibrium.main(["--d-model", "10", "--num-heads", "4"]) == 2
    message = "d_model=10 is not a multiple of num_heads=4"
    assert message in capsys.readouterr().err.splitlines()[-1]

"""Learning the temperature of plates, at a tiny size; and the solver, at known solutions."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from examples.programs import exit_status, is_png, program

plates = program("operator_learning")
TINY = [
    *("--plates", "5", "--test-plates", "3", "--nodes", "33", "--steps", "2", "--batch", "2"),
    *("--physics-steps", "2", "--anchors", "4", "--surface-anchors", "5", "--queries", "6"),
    *("--d-model", "8", "--num-layers", "1", "--num-heads", "1"),
]


def ring(radius, cooling, nodes):
    """Errors of temperature and flux with one pipe in the middle, where the solution is known."""
    plate = plates.Plate(np.asarray([[0, 0, radius]]), cooling)
    solution = plates.solve(plate, nodes)
    r = np.hypot(*plates.grid(nodes).T).reshape(nodes, nodes)[solution.inside]
    i0, i1, k0, k1 = (getattr(scipy.special, name) for name in ("i0", "i1", "k0", "k1"))
    ends = np.asarray([[f(cooling * x) for f in (i0, k0)] for x in (radius, 1)])
    a, b = np.linalg.solve(ends, [1, 0])
    flux = -cooling * (a * i1(cooling * radius) - b * k1(cooling * radius))
    temperature = a * i0(cooling * r) + b * k0(cooling * r)
    assert solution.flux.shape == (1, plates.ANGLES)
    return (
        np.abs(solution.field[solution.inside] - temperature).max(),
        np.abs(solution.flux / flux - 1).max(),
    )


def test_the_solver_is_of_second_order():
    coarse, fine = ring(0.3, 4.0, 33), ring(0.3, 4.0, 129)
    assert fine[0] < 2e-4 and fine[1] < 6e-3
    assert coarse[0] / fine[0] > 10 and coarse[1] / fine[1] > 6


def test_pipes_are_apart():
    rng = np.random.default_rng(0)
    for _ in range(20):
        pipes = plates.draw_plate(rng).pipes
        assert (np.hypot(*pipes[:, :2].T) + pipes[:, 2] < 0.85).all()
        for i, a in enumerate(pipes):
            for b in pipes[:i]:
                assert np.hypot(*(a - b)[:2]) > a[2] + b[2] + 0.15


class Wave:
    """A model whose temperature is known everywhere."""

    residual = plates.Surrogate.residual

    def temperature(self, state, points):
        return jnp.sin(2 * points[:, 0]) * points[:, 1] ** 2


def test_residual(x64):
    """The Laplacian by forward mode twice, less the loss to the air."""
    x, y = points = np.random.default_rng(0).uniform(-1, 1, (2, 5))
    expected = np.sin(2 * x) * (2 - 4 * y**2 - 9 * y**2)
    out = Wave().residual(None, jnp.asarray(points.T), jnp.asarray(3.0))
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_solves_trains_compares_and_draws(tmp_path, capsys):
    output = tmp_path / "runs"
    assert plates.main([*TINY, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "nearest plate:" in out and "POD and kernel regression:" in out and "residual" in out
    assert is_png(output / "plates.png")
    results = json.loads((output / "results.json").read_text())
    assert len(results["losses"]) == 4 and np.isfinite(results["losses"]).all()
    assert results["before"]["residual"] != results["after"]["residual"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "-1"], "argument --learning-rate: -1 must be positive"),
        (["--nodes", "9"], "argument --nodes: 9 must be at least 33"),
        (["--d-model", "9", "--num-heads", "2"], "d_model=9 is not a multiple of num_heads=2"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    assert exit_status(plates, arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]

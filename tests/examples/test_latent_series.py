"""Series continued by a latent equation, at a tiny size."""

import json

import equinox as eqx
import jax
import numpy as np
import pytest
import scipy.integrate
from examples.programs import exit_status, is_png, program

latent = program("latent_series")
TINY = [
    *("--series", "8", "--test-series", "4", "--times", "12", "--samples", "3", "--steps", "2"),
    *("--batch", "4", "--latent", "3", "--width", "4", "--solver-steps", "8", "--d-model", "8"),
    *("--num-layers", "1", "--num-heads", "2"),
]


@pytest.mark.slow
def test_trains_continues_and_draws(tmp_path, capsys):
    output = tmp_path / "runs"
    assert latent.main([*TINY, "--output", str(output)]) == 0
    assert (output / "table.md").read_text() in capsys.readouterr().out
    assert is_png(output / "series.png")
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "last angle seen",
        "Gaussian process",
        "latent equation",
    ]
    assert rows[0]["width beyond"] == 0 < rows[2]["width beyond"]


def test_pendulums_swing():
    start, constants = np.float32([[1.5, 0.3]]), np.float32([[1.2, 0.1]])
    times = np.float32([[0.5, 3.0, 16.0]])
    got = latent.swing(start, constants, times)

    def field(_, state):
        return [state[1], -1.44 * np.sin(state[0]) - 0.1 * state[1]]

    solution = scipy.integrate.solve_ivp(
        field, (0, 16), start[0], t_eval=times[0], rtol=1e-8, atol=1e-8
    )
    np.testing.assert_allclose(got[0], solution.y.T, atol=1e-3)


def test_the_encoder_reads_what_was_seen_and_nothing_else():
    series, _ = latent.draw_series(1, 12, 0)
    one = latent.Series(*(x[0] for x in series))
    model = latent.LatentODE(latent.parse(TINY), key=jax.random.key(0))
    encode = eqx.filter_jit(lambda series: model.encoder(series, latent.SEEN)[0])
    mean = encode(one)
    hidden = ~one.known | (one.times > latent.SEEN)[:, None]
    assert hidden.any() and not hidden.all()
    noise = np.where(hidden, np.float32(7), 0)
    np.testing.assert_allclose(encode(one._replace(values=one.values + noise)), mean, atol=1e-6)
    # What was seen, when, and whether it was.
    later = np.where(one.times > 0, one.times * 0.9, 0).astype(np.float32)
    for changed in (
        one._replace(values=one.values + np.where(hidden, 0, np.float32(0.1))),
        one._replace(times=later),
        one._replace(known=one.known & (np.arange(12) > 0)[:, None]),
    ):
        assert float(np.abs(encode(changed) - mean).max()) > 1e-4


def test_the_last_value_is_the_last_one_seen():
    times = np.float32([[0, 3, 7, 9]])
    values = np.float32([[[1, 0], [2, 0], [3, 0], [4, 0]]])
    known = np.asarray([[[True, True], [True, False], [False, True], [True, True]]])
    assert latent.last_values(latent.Series(times, values, known)).tolist() == [[2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: 0 must be at least 1"),
        (["--d-model", "10", "--num-heads", "4"], "d_model=10 is not a multiple of num_heads=4"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    assert exit_status(latent, arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]

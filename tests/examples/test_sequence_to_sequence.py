"""Normalising dates, at a tiny size."""

import datetime
import json
import random

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from examples.programs import is_png, program

dates = program("sequence_to_sequence")


def test_trains_decodes_and_draws(tmp_path, capsys):
    output = tmp_path / "runs"
    arguments = ["--steps", "2", "--batch", "4", "--held-out", "8", "--output", str(output)]
    assert dates.main(arguments) == 0
    out = capsys.readouterr().out
    assert "of 8 held-out dates are right" in out
    assert is_png(output / "attention.png")
    results = json.loads((output / "results.json").read_text())
    assert len(results["losses"]) == 2
    # Untrained, a character of 128 costs log(128) = 4.85 nats.
    assert 4 < results["losses"][0] < 6


def test_no_spelling_means_two_dates():
    seen = {}
    rng = random.Random(0)
    days = range(dates.FIRST.toordinal(), dates.LAST.toordinal() + 1)
    for day in rng.choices(days, k=20_000):
        date = datetime.date.fromordinal(day)
        text = dates.spell(date, rng)
        assert len(text) <= dates.SOURCE_LEN
        assert seen.setdefault(text.lower(), date) == date


def test_dates_to_test_on_are_not_trained_on():
    training, held_out = dates.split(500)
    assert len(held_out) == 500
    assert not set(training) & set(held_out)


def test_the_attention_that_is_drawn_is_the_models():
    model = dates.make_model(seed=0)
    sources, targets = dates.pairs([datetime.date(1998, 5, 3)], random.Random(0))
    source, target = jnp.asarray(sources[0]), jnp.asarray(targets[0, :-1])
    logits, weights = eqx.filter_jit(dates.look)(model, source, target)
    np.testing.assert_allclose(logits, eqx.filter_jit(model)(source, target), atol=1e-5)
    assert weights.shape == (2, 4, len(target), dates.SOURCE_LEN)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(weights[..., np.asarray(source) == dates.PAD], 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: 0 must be at least 1"),
        (["--held-out", "99999"], "must be below 36525, the number of all dates"),
        (["--learning-rate", "inf"], "argument --learning-rate: inf must be positive"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as info:
        dates.main(arguments)
    assert info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]

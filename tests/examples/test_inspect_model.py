"""The search for an induction circuit, at a tiny size."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples.programs import exit_status, is_png, program

inspect_model = program("inspect_model")


def test_trains_looks_and_draws(tmp_path, capsys):
    sizes = ["--d-model", "8", "--steps", "8", "--batch", "2", "--texts", "2", "--seq", "50"]
    assert inspect_model.main([*sizes, "--output", str(tmp_path)]) == 0
    assert "attention to the previous letter" in capsys.readouterr().out
    assert is_png(tmp_path / "heads.png") and is_png(tmp_path / "lens.png")
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["losses"]) == 8 and len(results["probability after each layer"]) == 3
    tables = {title: np.asarray(table) for title, table in results.items() if " the " in title}
    assert [table.shape for table in tables.values()] == [(2, 2)] * 3
    assert all(np.isfinite(table).all() for table in tables.values())


def test_texts_repeat_themselves():
    texts, periods = inspect_model.draw_texts(4, 50, jax.random.key(0))
    for text, period in zip(texts, periods, strict=True):
        np.testing.assert_array_equal(text[period:], text[:-period])
        assert len(jnp.unique(text)) == period
        counts = inspect_model.repeated(50, period)
        assert counts.sum() == 49 - period
        # The first that counts is the second letter of the second time.
        assert text[1:][int(counts.argmax())] == text[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq", "20"], "--seq 20 must be at least 50"),
        (["--steps", "0"], "argument --steps: 0 must be at least 1"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    assert exit_status(inspect_model, arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]

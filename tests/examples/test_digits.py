"""Reading digits, at a tiny size."""

import json

import numpy as np
import pytest
from examples.programs import exit_status, is_png, program

digits = program("digits")
TINY = ["--steps", "2", "--batch", "4", "--d-model", "8", "--num-layers", "1", "--num-heads", "2"]


def test_trains_compares_and_draws(tmp_path, capsys):
    output = tmp_path / "runs"
    assert digits.main([*TINY, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "logistic regression:" in out and "vision transformer:" in out
    assert is_png(output / "confusion.png") and is_png(output / "decisions.png")
    results = json.loads((output / "results.json").read_text())
    confusion = np.asarray(results["confusion"])
    assert confusion.shape == (10, 10) and confusion.sum() == 360 and len(results["losses"]) == 2
    assert np.trace(confusion) / confusion.sum() == results["accuracy"]["vision transformer"]


def test_digits_are_moved_and_never_lost():
    training, test = digits.read_digits()
    assert len(training[0]) == 1437 and len(test[0]) == 360
    assert training[0].min() == 0 and training[0].max() == 1
    images = np.zeros((1, 1, 8, 8), np.float32)
    images[0, 0, 3, 4] = 1
    moved, labels = next(digits.batches(images, np.asarray([7]), 200, np.random.default_rng(0)))
    assert moved.shape == (200, 1, 8, 8) and set(labels.tolist()) == {7}
    places = {tuple(x) for x in np.argwhere(moved[:, 0])[:, 1:].tolist()}
    assert places == {(i, j) for i in (2, 3, 4) for j in (3, 4, 5)}
    assert (moved.sum(axis=(1, 2, 3)) == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "-1"], "argument --learning-rate: -1 must be positive"),
        (["--d-model", "10", "--num-heads", "4"], "d_model=10 is not a multiple of num_heads=4"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    assert exit_status(digits, arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]

"""Learning new digits from a few labels, at a tiny size."""

import json

import numpy as np
import pytest
from examples.programs import exit_status, is_png, program

fine_tuning = program("fine_tuning")
TINY = ["--steps", "2", "--batch", "4", "--d-model", "8", "--num-layers", "1", "--few-steps", "2"]


@pytest.mark.slow
def test_trains_tunes_and_draws(tmp_path, capsys):
    output = tmp_path / "runs"
    few = ["--shots", "2", "--choices", "2", "--rank", "2"]
    assert fine_tuning.main([*TINY, *few, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "linear probe of the backbone:" in out and "LoRA of rank 2:" in out
    assert is_png(output / "fine_tuning.png")
    results = json.loads((output / "results.json").read_text())
    assert all(len(x["accuracy"]) == 2 for x in results.values())
    pixels, probe, lora, everything = (x["parameters"] for x in results.values())
    assert (pixels, probe) == (4 * 101, 4 * 9) and probe < lora < everything


def test_digits_are_placed_and_never_lost():
    images, labels = fine_tuning.read_digits(fine_tuning.NEW)
    assert set(labels.tolist()) == {0, 1, 2, 3} and len(images) == len(labels)
    total = images.sum(axis=(1, 2, 3))
    larger = fine_tuning.anywhere(images, np.random.default_rng(0))
    assert larger.shape[1:] == (1, 10, 10)
    np.testing.assert_allclose(larger.sum(axis=(1, 2, 3)), total, rtol=1e-5)
    all_places = fine_tuning.everywhere(images[:3])
    assert all_places.shape == (3, 9, 1, 10, 10)
    assert len(np.unique(all_places[0], axis=0)) == 9
    np.testing.assert_array_equal(all_places[0, 0, 0, :8, :8], images[0, 0])


def test_choices_have_as_many_of_each():
    labels = np.repeat([0, 1, 2], [5, 9, 4])
    chosen = fine_tuning.choices(labels, 3, 4, 0)
    assert chosen.shape == (4, 9)
    for few in chosen:
        assert len(set(few.tolist())) == 9
        assert np.bincount(labels[few]).tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "x"], "argument --rank: invalid"),
        (["--d-model", "10"], "d_model=10 is not a multiple of num_heads=4"),
        ([*TINY, "--rank", "9"], "rank=9 must be at least 1 and at most 8"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    assert exit_status(fine_tuning, arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]

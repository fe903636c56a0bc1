"""Classifying the standard library's text, at a tiny size."""

import json

import numpy as np
import pytest
from examples.programs import is_png, program

text_classifier = program("text_classifier")


@pytest.fixture
def little_text(monkeypatch):
    read_files = text_classifier.read_files

    def little():
        return [[text[:1000] for text in texts[:4]] for texts in read_files()]

    monkeypatch.setattr(text_classifier, "read_files", little)


def test_trains_compares_and_draws(tmp_path, capsys, little_text):
    output = tmp_path / "runs"
    assert text_classifier.main(["--steps", "2", "--batch", "4", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "bag of words, linear:" in out and "transformer:" in out
    assert is_png(output / "confusion.png")
    results = json.loads((output / "results.json").read_text())
    confusion = np.asarray(results["confusion"])
    assert confusion.shape == (8, 8)
    assert np.trace(confusion) / confusion.sum() == results["accuracy"]["transformer"]


def test_words():
    assert text_classifier.words(b"def parseURL(self_2):\n") == [
        *(b"def", b"parse", b"url", b"(", b"self", b"2", b")", b":"),
    ]


def test_no_file_is_on_both_sides_and_rare_words_are_unknown():
    classes = text_classifier.read_files()
    training, held_out = text_classifier.split(classes)
    for known, new, texts in zip(training, held_out, classes, strict=True):
        assert known and new and len(known) + len(new) == len(texts)
        assert set(known) | set(new) == set(texts)
    vocabulary = text_classifier.make_vocabulary(training)
    assert sorted(vocabulary.values()) == list(range(2, text_classifier.VOCAB_SIZE))
    ((tokens,),) = text_classifier.tokenize([[b"self qqxyzzy"]], vocabulary)
    assert tokens.tolist() == [vocabulary[b"self"], text_classifier.UNKNOWN]


def test_snippets_are_padded_on_the_right():
    texts = [[np.arange(2, 202, dtype=np.int32)], [np.full(40, 7, np.int32)]]
    tokens, labels = text_classifier.consecutive(texts)
    assert labels.tolist() == [0, 0, 1]
    assert tokens[:2].reshape(-1).tolist() == list(range(2, 194))
    assert tokens[2].tolist() == [7] * 40 + [text_classifier.PAD] * 56
    tokens, labels = text_classifier.draw_snippets(texts, 50, np.random.default_rng(0))
    lengths = (tokens != text_classifier.PAD).sum(axis=1)
    assert lengths.min() >= text_classifier.MIN_LEN and set(labels.tolist()) == {0, 1}


def test_mistakes_get_one_line(capsys):
    with pytest.raises(SystemExit) as info:
        text_classifier.main(["--learning-rate", "-1"])
    assert info.value.code == 2
    assert "argument --learning-rate: -1 must be positive" in capsys.readouterr().err

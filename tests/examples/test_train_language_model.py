"""The main job at a tiny size, run as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from examples.programs import EXAMPLES, exit_status, program

from eqx_transformer.interop import load

train_language_model = program("train_language_model")
PROGRAM = [sys.executable, str(EXAMPLES / "train_language_model.py")]
TINY = [
    *("--steps", "6", "--batch", "2", "--context", "16", "--d-model", "8", "--num-layers", "2"),
    *("--num-heads", "2", "--num-kv-heads", "1", "--evaluate-every", "3", "--sample-bytes", "12"),
]


def start(*arguments, cwd):
    return subprocess.Popen(
        [*PROGRAM, *arguments],
        cwd=cwd,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments, cwd):
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(*TINY, cwd=folder)


def test_trains_saves_and_samples_the_same_again(finished):
    folder, (status, out, err) = finished
    assert status == 0, err
    output = folder / "runs" / "language_model"
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "the loaded checkpoint samples the same text: yes" in out
    assert load(output / "checkpoint").config.d_model == 8
    history = json.loads((output / "history.json").read_text())
    assert [step for step, _ in history["held_out"]] == [0, 3, 6]
    # Untrained, a byte costs about eight bits; six steps help a little.
    assert 6 < history["held_out"][-1][1] < history["held_out"][0][1] < 10
    assert "bits/byte" in err and "bytes/s" in err


@pytest.mark.slow
def test_runs_repeat(finished, tmp_path):
    _, (_, out, _) = finished
    status, again, _ = run(*TINY, cwd=tmp_path)
    assert status == 0 and again == out


@pytest.mark.slow
def test_a_file_of_ones_own(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 200)
    status, out, err = run(*TINY, "--text", str(text), "--prompt", "All", cwd=tmp_path)
    assert status == 0, err
    assert "    | All" in out


@pytest.mark.slow
def test_interrupted_it_saves_what_there_is(tmp_path):
    arguments = [*TINY, "--steps", "100000", "--evaluate-every", "100000"]
    process = start(*arguments, cwd=tmp_path)
    deadline = time.monotonic() + 240
    while True:  # until it is in the middle of training
        line = process.stderr.readline()
        assert line or process.poll() is None
        assert time.monotonic() < deadline
        if "bits/byte" in line:
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in out
    output = tmp_path / "runs" / "language_model"
    assert (output / "loss.png").exists()
    load(output / "checkpoint")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: 0 must be at least 1"),
        (["--learning-rate", "nan"], "argument --learning-rate: nan must be positive"),
        (["--prompt", ""], "argument --prompt: must not be empty"),
        (["--stepz", "3"], "unrecognized arguments: --stepz"),
        (["--text", "no/such/file"], "cannot read no/such/file: No such file or directory"),
        (["--context", "9999999"], "the text is too short"),
        (["--d-model", "10", "--num-heads", "4"], "d_model=10 is not a multiple of num_heads=4"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_status(train_language_model, [*TINY, *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_help_is_clear(capsys):
    with pytest.raises(SystemExit) as info:
        train_language_model.main(["--help"])
    assert info.value.code == 0
    out = capsys.readouterr().out
    for part in ("--text FILE", "(default: 800)", "llama-like"):
        assert part in out


def test_text_is_split_by_name_and_rows_know_their_documents():
    documents = {f"{i}": bytes([i]) * 50 for i in range(40)}
    training, held_out = train_language_model.split(documents, context=8)
    assert set(training.tokens.tolist()) & set(held_out.tokens.tolist()) == set()
    assert len(training.tokens) + len(held_out.tokens) == 2000
    tokens, ids = next(train_language_model.batches(training, batch=64, context=8, seed=0))
    assert tokens.shape == ids.shape == (64, 9)
    # Every document has a byte of its own here, so the two change together.
    assert ((tokens[:, 1:] == tokens[:, :-1]) == (ids[:, 1:] == ids[:, :-1])).all()

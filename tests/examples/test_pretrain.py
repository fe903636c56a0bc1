"""Pretraining at a tiny size: killed and continued, elsewhere too, it has the same losses."""

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import types

import equinox as eqx
import jax
import numpy as np
import pytest
from examples.programs import EXAMPLES, exit_status, program

from eqx_transformer.interop import load

pretrain = program("pretrain")
CONFIG = {
    "output": "run",
    "steps": 10,
    "save_every": 4,
    "log_every": 2,
    "loss_chunk": 8,
    "model": {
        "vocab_size": 320,
        "d_model": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "d_ff": 128,
        "max_len": 16,
        "document_start_id": 256,
        "dropout_rate": 0.1,
    },
    "data": {"context": 16, "batch": 16, "parts": 2},
    "optimiser": {"learning_rate": 1e-2, "warmup_steps": 2, "z_loss": 1e-4},
    "parallel": {"data": 2, "fsdp": 4, "fsdp_min_size": 256},
}


def write(folder, **changes):
    """A configuration file, with some fields changed."""
    path = folder / f"config{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({**CONFIG, **changes}))
    return path


def start(config, *arguments, devices=8):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / "pretrain.py"), str(config), *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def losses(folder):
    """Those of all steps, each of which is there once."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(CONFIG["steps"]))
    return [row["loss"] for row in rows]


def whole(checkpoint):
    return (checkpoint / "commit_success.txt").exists()


def kill_while_saving(process, folder, step):
    """Kills the process when a checkpoint has begun to be written, and before it is whole."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if list(folder.glob(f"{step}*")):
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return
    raise AssertionError(process.communicate()[1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(write(folder), "--output", folder / "run"))
    return folder / "run", losses(folder / "run")


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save_it_goes_on_as_if_not(undisturbed, tmp_path):
    _, expected = undisturbed
    assert expected[-1] < expected[0] - 0.5
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    config = write(tmp_path)
    kill_while_saving(start(config, "--output", run), run / "checkpoints", 8)
    assert whole(run / "checkpoints" / "4")
    assert not any(map(whole, (run / "checkpoints").glob("8*")))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # half a line
    shutil.copytree(run, elsewhere)

    assert "from step 4" in finish(start(config, "--output", run))
    assert losses(run) == expected
    other = write(tmp_path, parallel={"data": 1, "tensor": 2, "fsdp": 2, "fsdp_min_size": 256})
    assert "from step 4" in finish(start(other, "--output", elsewhere, devices=4))
    np.testing.assert_allclose(losses(elsewhere), expected, rtol=1e-5)
    assert load(elsewhere / "model").config == load(run / "model").config


@pytest.mark.slow
def test_rows_are_split_too(tmp_path):
    """On a ring, in parts of a row."""
    changes = {"model": CONFIG["model"] | {"dropout_rate": 0.0}}
    meshes = {"whole": {"data": 8}, "split": {"data": 2, "tensor": 2, "context": 2}}
    runs = []
    for name, mesh in meshes.items():
        config = write(tmp_path, **changes, parallel=mesh)
        runs.append(start(config, "--output", tmp_path / name))
    for run in runs:
        finish(run)
    whole, split = (losses(tmp_path / name) for name in meshes)
    np.testing.assert_allclose(split, whole, rtol=1e-5)


@pytest.mark.slow
def test_two_processes(undisturbed, tmp_path):
    """Of four devices each, over the loopback interface: the same mesh, in two places."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder, expected = undisturbed
    config = write(tmp_path)
    options = ["--output", tmp_path / "run", "--coordinator", f"localhost:{port}"]
    processes = [
        start(config, *options, "--num-processes", 2, "--process-id", i, devices=4) for i in (0, 1)
    ]
    out = [finish(process) for process in processes]
    assert "from step 0" in out[0] and "loss" not in out[1]
    np.testing.assert_allclose(losses(tmp_path / "run"), expected, rtol=1e-5)
    # What two have written one can read.
    found = pretrain.read_config(config).replace(output=str(tmp_path / "run"))
    mesh, rules = found.parallel.mesh(), found.parallel.rules()
    make = functools.partial(pretrain.make_state, found)
    rows = pretrain.Stream(found.data, found.seed, found.model.vocab_size).rows
    model, _ = pretrain.Checkpoints(found, rows).restore(10, make, mesh, rules)
    pairs = zip(jax.tree.leaves(model), jax.tree.leaves(load(folder / "model")), strict=True)
    for x, y in pairs:
        assert not eqx.is_array(x) or np.allclose(x, y, atol=1e-4)


@pytest.fixture
def handlers():
    """What the program does with signals ends with the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_trains_stops_when_told_and_goes_on(tmp_path, capsys, handlers, monkeypatch):
    config = write(tmp_path, steps=6, save_every=100)
    run = ["--output", str(tmp_path / "run")]
    write_metrics = pretrain.Metrics.write

    def write_and_stop(self, rows):
        write_metrics(self, rows)
        if rows[-1]["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(pretrain.Metrics, "write", write_and_stop)
    assert pretrain.main([str(config), *run]) == 130
    assert "interrupted, and saved after step 2" in capsys.readouterr().out
    assert pretrain.main([str(config), *run]) == 0
    out = capsys.readouterr().out
    assert "'fsdp': 4" in out and "from step 3" in out
    model = load(tmp_path / "run" / "model")
    assert f"{sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array))):,} par" in out
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    assert all(row["gradient_norm"] > 0 and row["model_flops_per_second"] > 0 for row in rows)
    assert rows[1]["learning_rate"] == pytest.approx(5e-3)

    changed = write(tmp_path, steps=6, optimiser={"learning_rate": 1e-3})
    assert pretrain.main([str(changed), *run]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has a run with optimiser.learning_rate=0.01, not 0.001; change it" in line
    with monkeypatch.context() as patch:
        library = pretrain.standard_library()
        patch.setattr(pretrain, "standard_library", lambda: library[:-1000])
        assert pretrain.main([str(config), *run]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has a run with rows=" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"contxt": 16, "batch": 4}}, "no field 'contxt'; did you mean 'context'?"),
        ({"data": {"context": 16}}, "DataConfig: 'batch' is missing"),
        ({"data": {"context": 16, "batch": 0}}, "batch=0 must be at least 1"),
        ({"data": {"context": 16, "batch": 16, "parts": 3}}, "must be equally large"),
        ({"data": {"context": 16, "batch": 16, "parts": 4}}, "4 rows at a time cannot be split"),
        ({"data": {"context": 17, "batch": 4}}, "data.context=17, model.max_len=16"),
        ({"data": {"context": 16, "batch": 16, "files": ["no/*.npy"]}}, "there are 0 rows"),
        ({"optimiser": {"learning_rate": -1.0}}, "learning_rate=-1.0 must be at least 0"),
        ({"optimiser": {"learning_rate": 1.0, "b2": 95.0}}, "b2=95.0 must be below 1"),
        ({"steps": "ten"}, "steps='ten' (of type str) must be int"),
        ({"model": {**CONFIG["model"], "num_heads": 5}}, "not a multiple of num_heads=5"),
        ({"parallel": {"context": 2}}, "attention weights are not dropped on a ring"),
        ({"parallel": {"expert": 2}}, "splits over data, fsdp, tensor and context"),
        ({"parallel": {"data": 3}}, "are for 3 devices, but there are 8"),
    ],
)
def test_mistakes_get_one_line(changes, message, capsys, tmp_path):
    config = write(tmp_path, **changes)
    assert exit_status(pretrain, [str(config), "--output", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_metrics_go_to_tensorboard_too(tmp_path, capsys, monkeypatch):
    config = pretrain.read_config(write(tmp_path, tensorboard=True))
    config = config.replace(output=str(tmp_path))
    added = []

    class Writer:
        def __init__(self, folder, purge_step):
            assert (folder, purge_step) == (str(tmp_path), 5)

        def add_scalar(self, *row):
            added.append(row)

        def flush(self):
            added.append("flushed")

    writers = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "tensorboardX", writers)
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n{"step": 5}\n{"step"')
    metrics = pretrain.Metrics(config, 5)
    metrics.write([{"step": 5, "loss": 2.0, "tokens_per_second": 10.0}])
    assert ("loss", 2.0, 5) in added and added[-1] == "flushed"
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 5]


def test_unreadable_configurations(capsys, tmp_path):
    assert pretrain.main([str(tmp_path / "none.toml")]) == 2
    (tmp_path / "bad.toml").write_text("steps = = 3")
    assert pretrain.main([str(tmp_path / "bad.toml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "No such file" in lines[0] and "bad.toml: Invalid value" in lines[1]


@pytest.mark.parametrize("name", ["tiny", "1b"])
def test_configurations_that_come_with_it(name):
    config = pretrain.read_config(EXAMPLES / "configs" / f"{name}.toml")
    assert config.data.batch // config.data.parts % 8 == 0  # devices


def test_the_configuration_of_the_documentation():
    page = (EXAMPLES.parent / "docs" / "pretraining.md").read_text()
    (text,) = re.findall(r"^```toml\n(.*?)^```", page, re.M | re.S)
    config = pretrain.RunConfig.from_dict(tomllib.loads(text))
    assert config.model.dtype == "bfloat16" and config.parallel.fsdp == -1


@pytest.mark.parametrize("size", [1, 2, 3, 64, 1000])
def test_shuffled_is_a_permutation(size):
    order = pretrain.shuffled(np.arange(size), size, (0, 0))
    assert sorted(order.tolist()) == list(range(size))
    part = pretrain.shuffled(np.arange(size // 2), size, (0, 0))
    np.testing.assert_array_equal(part, order[: size // 2])
    if size == 1000:
        other = pretrain.shuffled(np.arange(size), size, (0, 1))
        assert (other != order).mean() > 0.98
        # Near neighbours are as far apart as two numbers at random, a third of all on average.
        assert 0.3 < np.abs(np.diff(order)).mean() / size < 0.37


def test_every_row_is_read_once_in_an_epoch(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(0, 41, dtype=np.uint16))  # ten rows of four
    np.save(tmp_path / "b.npy", np.arange(100, 123, dtype=np.uint16))  # five, and a rest
    data = pretrain.DataConfig(context=4, batch=5, files=(str(tmp_path / "*.npy"),))
    stream = pretrain.Stream(data, 0, 128)
    assert stream.rows == 15
    epochs = [
        np.concatenate([stream.read(step, slice(None)) for step in steps])
        for steps in (range(3), range(3, 6))
    ]
    starts = [*range(0, 40, 4), *range(100, 120, 4)]
    for rows in epochs:
        assert sorted(rows[:, 0].tolist()) == starts
        assert (np.diff(rows, axis=1) == 1).all()
    assert (epochs[0] != epochs[1]).any()
    # A host reads its own rows, of any step, in any order.
    again = pretrain.Stream(data, 0, 128)
    np.testing.assert_array_equal(again.read(4, slice(2, 4)), epochs[1][7:9])

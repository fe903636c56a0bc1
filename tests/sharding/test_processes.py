"""More devices than this process has: two processes that talk to each other, and one with more."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("processes.py")


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def largest_differences(count, **arguments):
    """What every one of `count` processes finds."""
    arguments |= {"count": count, "coordinator": f"127.0.0.1:{free_port()}"}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, json.dumps(arguments | {"index": index})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(count)
    ]
    try:
        results = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, results, strict=True):
        assert process.returncode == 0, error
    return [float(out.split()[-1]) for out, _ in results]  # what else is printed comes before


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"fsdp": 2, "context": 2, "tensor": 2}], ids=str)
def test_two_processes(axes):
    """Four devices each; the first axis is the one between them."""
    differences = largest_differences(2, axes=axes, devices=4)
    assert len(differences) == 2
    assert max(differences) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "experts"),
    [
        ({"pipe": 2, "fsdp": 2, "context": 2, "tensor": 2}, False),
        ({"pipe": 2, "fsdp": 2, "expert": 2, "tensor": 2}, True),
    ],
    ids=str,
)
def test_four_kinds_at_once(axes, experts):
    (difference,) = largest_differences(1, axes=axes, experts=experts, devices=16)
    assert difference <= 2e-6

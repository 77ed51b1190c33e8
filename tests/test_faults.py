"""Every file operation of every command fails once, and kills the command once: nothing is lost, all can go on.

The whole table, with every kind of error at every operation: `python tests/faults.py`.
"""

import sys
from pathlib import Path

import pytest

if sys.platform == "darwin":
    pytest.skip("Metal does not survive a fork", allow_module_level=True)

import json
import subprocess

COMMANDS = [
    "encode",
    "encode, cached",
    "denoise",
    "denoise, steps kept",
    "denoise, cached",
    "decode",
    "decode, cached",
    "cache verify",
    "cache trim",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_file_operation_faulted_once(command):
    """In a process of its own, because it forks: MLX must not have computed anything before."""
    script = [sys.executable, str(Path(__file__).with_name("faults.py")), "--brief", "--json", command]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["lost"] == []
    assert found["operations"] > 30
    assert found["survived"] == found["faults"] > 2 * found["operations"]

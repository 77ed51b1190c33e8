"""Every file operation of every command fails once, and kills the command once: nothing is lost, all can go on.

The whole table, with every kind of error at every operation: `python tests/faults.py`.
"""

import sys
from pathlib import Path

import pytest

if sys.platform == "darwin":
    pytest.skip("Metal does not survive a fork", allow_module_level=True)

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

COMMANDS = [
    "encode",
    "encode, cached",
    "denoise",
    "denoise, steps kept",
    "denoise, resumed",
    "denoise, cached",
    "encode, with an image",
    "encode-image",
    "encode-image, cached",
    "decode",
    "decode, cached",
    "cache verify",
    "cache trim",
    "models convert",
    "watch",
]
EVERY = 7  # shares no factor with the six faults: all of them have their turn
SAMPLED = {"watch": f"--every={EVERY}"}  # it has many, and the stages' own are among them


@pytest.fixture(scope="module")
def surveys():
    """All of them, as many at a time as there are processors; in processes of their own, because they fork."""

    def survey(command: str) -> subprocess.CompletedProcess:
        script = [sys.executable, str(Path(__file__).with_name("faults.py")), "--brief", "--json", command]
        script += [SAMPLED[command]] if command in SAMPLED else []
        return subprocess.run(script, capture_output=True, text=True, timeout=1200)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {command: pool.submit(survey, command) for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_file_operation_faulted_once(surveys, command):
    done = surveys[command].result()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["lost"] == []
    assert found["operations"] > 30
    share = EVERY if command in SAMPLED else 1
    assert found["survived"] == found["faults"] >= found["operations"] // share

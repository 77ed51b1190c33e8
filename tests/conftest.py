import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import random_models
from random_models import GOLDEN
from safetensors.numpy import load_file

from orchestrator import cli
from stages.backend import prepare_mlx

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the real hub
prepare_mlx()  # as the stages do it in their own processes, whose results are compared with those here
RANDOM_CASES = sorted(path.stem for path in GOLDEN.glob("*.json") if path.stem != "demo")


class Golden(NamedTuple):
    """A golden case: its settings, what the reference made of them, and the checkpoint."""

    case: dict[str, Any]
    expected: dict[str, np.ndarray]
    checkpoint: Path


class Result(NamedTuple):
    code: int
    out: list[str]
    err: str


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> Callable[[str], Golden]:
    """golden(name): the checkpoint is written once a session."""
    made: dict[str, Golden] = {}

    def get(name: str) -> Golden:
        if name not in made:
            case = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
            checkpoint = random_models.TINY
            if name != "demo":
                target = tmp_path_factory.mktemp(name) / "model"
                checkpoint = random_models.golden_checkpoint(name, target)
            made[name] = Golden(case, load_file(GOLDEN / f"{name}.safetensors"), checkpoint)
        return made[name]

    return get


@pytest.fixture(scope="session")
def small_model(golden) -> Path:
    """A random checkpoint for tests that only need one. Do not change it; copy it."""
    return golden(random_models.SMALL).checkpoint


@pytest.fixture
def fresh_cache(tmp_path_factory, monkeypatch) -> Callable[[], Path]:
    """fresh_cache(): from here on nothing that was made before is found again."""

    def begin() -> Path:
        directory = tmp_path_factory.mktemp("cache")
        monkeypatch.setenv("QWEN_STAGE_CACHE", str(directory))
        monkeypatch.setenv("QWEN_STAGE_CONFIG", str(tmp_path_factory.mktemp("config") / "new"))
        return directory

    return begin


@pytest.fixture(autouse=True)
def own_cache(fresh_cache) -> Path:
    """Every test starts with an empty cache of its own."""
    return fresh_cache()


@pytest.fixture
def qwen_stage(capsys, monkeypatch, tmp_path) -> Callable[..., Result]:
    """qwen_stage("encode", …): the command, run inside this process, in an empty current directory."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Result:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out.splitlines(), captured.err)

    return call


@pytest.fixture
def qwen_stage_process(tmp_path) -> Callable[..., Result]:
    """The same as a process of its own."""

    def call(*arguments: object, input: bytes = b"") -> Result:
        command = [sys.executable, "-P", "-m", "orchestrator.cli", *map(str, arguments)]
        done = subprocess.run(command, input=input, capture_output=True, cwd=tmp_path, timeout=300)
        return Result(done.returncode, done.stdout.decode().splitlines(), done.stderr.decode())

    return call

"""`qwen-stage models convert`: the same checkpoint, smaller."""

import json
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
import random_models
from mlx.utils import tree_flatten
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from artifacts_schema import disk
from stages.checkpoint import Checkpoint
from stages.models.text_encoder import TextEncoder, TextEncoderConfig
from stages.models.transformer import Modulator, QwenImageTransformer2DModel, TransformerConfig
from stages.weights import load_weights

TRANSFORMER = (QwenImageTransformer2DModel, TransformerConfig, "transformer")
MODULATOR = (Modulator, TransformerConfig, "transformer")
TEXT_ENCODER = (TextEncoder, TextEncoderConfig, "text_encoder")


def parameters(directory, kind, **options):
    model, config, component = kind
    made = model(Checkpoint("test", directory).config(component, config))
    load_weights(made, directory / component, mx.float32, **options)
    return dict(tree_flatten(made.parameters()))


def files_of(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_converted_model_is_what_quantize_makes_of_it(qwen_stage, tmp_path, bits):
    result = qwen_stage("models", "convert", "demo", "small", f"--quantize={bits}", f"--quantize-text={bits}")
    assert (result.code, result.out) == (0, ["small"])
    for kind in (TRANSFORMER, TEXT_ENCODER):
        ours, theirs = parameters(tmp_path / "small", kind), parameters(random_models.TINY, kind, bits=bits)
        assert ours.keys() == theirs.keys()
        assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (parameters(directory, MODULATOR) for directory in (tmp_path / "small", random_models.TINY))
    assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "small/transformer/config.json").read_text())["quantization"] == {
        "bits": bits, "group_size": 64,
    }  # fmt: skip
    with safe_open(next((tmp_path / "small/transformer").glob("*-00002-of-00006.safetensors")), "numpy") as file:
        said = json.loads(file.metadata()["qwen-stage"])
    made_from = Checkpoint("test", random_models.TINY).fingerprint("transformer")
    assert said == {"bits": bits, "group_size": 64, "made_from": made_from, "part": "2/6"}


def test_pictures_of_a_converted_model_are_those_of_the_option(qwen_stage, tmp_path):
    assert qwen_stage("models", "convert", "demo", "small", "--quantize=4").code == 0
    common = ["a red circle", "--size=48x48", "--steps=3", "--dtype=float32"]
    assert qwen_stage("run", *common, "--model=small", "--out=one").code == 0
    assert qwen_stage("run", *common, "--quantize=4", "--out=two").code == 0
    one, two = (sorted((tmp_path / run).glob("latents/*/c/0/0/0")) for run in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_what_is_not_converted_is_shared(qwen_stage, tmp_path, small_model):
    assert qwen_stage("models", "convert", small_model, "small", "--quantize=8").code == 0
    for path in ("text_encoder/model.safetensors", "scheduler/scheduler_config.json", "model_index.json"):
        assert (tmp_path / "small" / path).read_bytes() == (small_model / path).read_bytes()
    for path in ("scheduler/scheduler_config.json", "model_index.json"):  # edited by people: copies
        assert not (tmp_path / "small" / path).samefile(small_model / path)
    weights = [each / "text_encoder/model.safetensors" for each in (tmp_path / "small", small_model)]
    assert weights[0].samefile(weights[1])


def test_a_killed_conversion_goes_on(qwen_stage, tmp_path):
    """Killed again and again, wherever it is: the files are those of an undisturbed one, and none is made twice."""
    assert qwen_stage("models", "convert", "demo", "whole", "--quantize=4").code == 0
    command = [sys.executable, "-P", "-m", "orchestrator.cli", "models", "convert", "demo", "killed", "--quantize=4"]
    kills, written = 0, {}
    while True:
        started = time.monotonic()
        child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and time.monotonic() - started < 20:
            now = {path: path.stat().st_ino for path in (tmp_path / "killed/transformer").glob("*.safetensors")}
            if len(now) > len(written):  # another file
                child.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        code = child.wait()
        kills += code == -signal.SIGKILL
        now = {path: path.stat().st_ino for path in (tmp_path / "killed/transformer").glob("*.safetensors")}
        assert written.items() <= now.items()
        written = now
        if code == 0:
            break
    assert kills
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_two_conversions_do_not_write_to_one_place(qwen_stage, tmp_path, small_model):
    (tmp_path / "small").mkdir()
    with disk.lock(tmp_path / "small"):
        refused = qwen_stage("models", "convert", small_model, "small", "--quantize=8")
    assert (refused.code, "another process writes to small" in refused.err) == (2, True)
    assert [path.name for path in (tmp_path / "small").iterdir()] == [".lock"]


def test_another_disk_gets_copies(qwen_stage, tmp_path, small_model, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    assert qwen_stage("models", "convert", small_model, "small", "--quantize=8").code == 0
    ours, theirs = (each / "text_encoder/model.safetensors" for each in (tmp_path / "small", small_model))
    assert ours.read_bytes() == theirs.read_bytes()
    assert not ours.samefile(theirs)


def test_conversions_of_two_models_are_not_mixed(qwen_stage, tmp_path, small_model):
    assert qwen_stage("models", "convert", small_model, "small", "--quantize=4").code == 0
    shutil.rmtree(tmp_path / "small/transformer")  # as if it had been killed before
    for arguments in (["demo", "small", "--quantize=4"], [small_model, "small", "--quantize=4", "--quantize-text=4"]):
        refused = qwen_stage("models", "convert", *arguments)
        assert refused.code == 2
        assert "holds another conversion, or one of another model" in refused.err


@pytest.mark.parametrize("kind", [np.uint8, np.int32])
def test_weights_that_are_no_numbers_are_refused(qwen_stage, tmp_path, small_model, kind):
    """Among them float8, which MLX reads as bytes."""
    shutil.copytree(small_model, tmp_path / "odd")
    (path,) = (tmp_path / "odd/transformer").glob("*.safetensors")
    weights = load_file(path)
    name = "transformer_blocks.0.attn.to_q.weight"
    save_file({**weights, name: weights[name].astype(kind)}, path)
    refused = qwen_stage("models", "convert", "odd", "small", "--quantize=4")
    assert (refused.code, f"tensor {name} is stored as" in refused.err) == (2, True)
    (tmp_path / "p.txt").write_text("a")
    assert qwen_stage("encode", "p.txt", "--model=odd", "--out=run").code == 0
    refused = qwen_stage("denoise", "--embeddings=run", "--size=32x32")
    assert (refused.code, f"tensor {name} is stored as" in refused.err) == (2, True)


def test_what_cannot_be_converted(qwen_stage, tmp_path, monkeypatch):
    assert qwen_stage("models", "convert", "demo", "small", "--quantize=4").code == 0
    before = files_of(tmp_path / "small")
    for source, target, words in (
        ("small", "smaller", "is quantized already"),
        ("demo", random_models.TINY, "lies in the original"),
        ("demo", random_models.TINY.parent, "lies in the original"),
        ("demo", random_models.TINY / "transformer", "lies in the original"),
        ("demo", ".", "holds something else"),
        ("nowhere", "smaller", "no such directory"),
    ):
        refused = qwen_stage("models", "convert", source, target, "--quantize=4")
        assert refused.code == 2
        assert words in refused.err
    refused = qwen_stage("models", "convert", "demo", "small", "--quantize=8")
    assert refused.code == 2
    assert "holds another conversion" in refused.err
    assert files_of(tmp_path / "small") == before
    assert "6 of 6 files" in qwen_stage("models", "convert", "demo", "small", "--quantize=4").err
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    refused = qwen_stage("models", "convert", "demo", "other", "--quantize=4")
    assert refused.code == 2
    assert "its disk has 0 MB left" in refused.err
    (tmp_path / "p.txt").write_text("a")
    assert qwen_stage("encode", "p.txt", "--model=small", "--out=run").code == 0
    refused = qwen_stage("denoise", "--embeddings=run", "--quantize=8", "--size=48x48")
    assert refused.code == 2
    assert "is quantized already" in refused.err

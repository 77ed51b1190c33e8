import json
from pathlib import Path

import pytest
from PIL import Image

from artifacts_schema import schema


@pytest.fixture
def run(qwen_stage, tmp_path, small_model):
    (tmp_path / "p.txt").write_text("a cat\n")
    qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}")
    qwen_stage("denoise", "--embeddings=run", "--size=32x48", "--steps=2", "--seed", "5", "6")
    assert qwen_stage("decode", "run").code == 0
    return tmp_path / "run"


def test_a_whole_run_in_words(qwen_stage, run, small_model):
    result = qwen_stage("inspect", run, "--verify")
    assert result.code == 0
    text = "\n".join(result.out)
    for said in ("embeddings: 1 prompt, with", "latents: 2 pictures", str(small_model), "'a cat', not ' '",
                 "seed 6, 32x48, 2 steps, cfg 4, float32", "0002-a-cat-s6.png: 'a cat', from latents "):  # fmt: skip
        assert said in text
    assert "every file is whole" in result.err


def test_json_and_one_artifact_alone(qwen_stage, run):
    result = qwen_stage("inspect", run / "latents", "--json")
    (line,) = result.out
    assert json.loads(line)["schema"] == "qwen-stage/latents/4"
    assert len(qwen_stage("inspect", run, "--json").out) == 3


def test_a_picture(qwen_stage, run):
    path = run / "images/0001-a-cat-s5.png"
    words = qwen_stage("inspect", path).out
    assert words[0] == f"{path}: 'a cat'"
    assert "  seed: 5" in words
    recipe = json.loads(qwen_stage("inspect", path, "--json").out[0])
    latents = json.loads(qwen_stage("inspect", run / "latents", "--json").out[0])
    assert recipe["latents_key"] == latents["items"][0]["key"]  # the way back from the picture to its prompt


@pytest.mark.parametrize("pattern", ["embeddings/*.safetensors", "latents/*.zarr/zarr.json", "images/*.png"])
def test_verify_names_what_is_damaged(qwen_stage, run, pattern):
    path = sorted(run.glob(pattern))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = qwen_stage("inspect", run, "--verify")
    assert result.code == 2
    assert f"{path} is damaged" in result.err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "is no run, artifact or picture"),
        (lambda path: path.write_text("text"), "is not a PNG"),
        (lambda path: Image.new("RGB", (2, 2)).save(path, format="PNG"), "carries no recipe"),
        (lambda path: None, "is no run, artifact or picture"),
    ],
)
def test_what_is_not_ours(qwen_stage, tmp_path, make, message):
    make(tmp_path / "x")
    result = qwen_stage("inspect", tmp_path / "x")
    assert (result.code, result.out) == (2, [])
    assert message in result.err


def test_the_exported_schema_is_up_to_date():
    exported = Path(schema.__file__).with_name("schema.json").read_bytes()
    assert exported == schema.schema(), "run python -m artifacts_schema.schema > artifacts_schema/schema.json"

"""How models are called, and which one it is where nobody says."""

import json
import os
import random
from pathlib import Path

import pytest

from artifacts_schema.errors import UserError
from stages.checkpoint import open_checkpoint
from stages.lora import parse_scale
from stages.model_name import ModelName, following, put_together


def test_names_hold_all_that_a_model_is():
    assert put_together(None, []) is None
    assert put_together("demo", []) == "demo"
    name = put_together("/models/a b", [("lora", "x&y?.safetensors:0.5"), ("lora", "owner/name/50%.safetensors@main")])
    assert ModelName.parse(name) == ModelName(
        "/models/a b", (("lora", "x&y?.safetensors:0.5"), ("lora", "owner/name/50%.safetensors@main"))
    )
    assert str(ModelName.parse(name)) == name
    assert following(None, "demo?lora=a") == "demo?lora=a"
    assert following("?lora=b", "demo?lora=a") == "demo?lora=b"
    assert following("other", "demo?lora=a") == "other"
    assert following("?lora=b", "demo?text_encoder=t&lora=a&vae=v") == "demo?text_encoder=t&vae=v&lora=b"
    assert following("?vae=w", "demo?text_encoder=t&lora=a&vae=v") == "demo?text_encoder=t&lora=a&vae=w"
    assert put_together("demo?vae=v&lora=a", [("vae", "w"), ("lora", "b")]) == "demo?lora=a&vae=w&lora=b"
    assert str(ModelName("/models/x", (("lora", "/y/z.safetensors:1.0"),)).for_others()) == "x?lora=z.safetensors:1.0"
    with pytest.raises(UserError, match="after the"):
        open_checkpoint("demo?what=this")
    assert parse_scale("a:b.safetensors") == ("a:b.safetensors", 1.0)
    assert parse_scale("a.safetensors:-1e-1") == ("a.safetensors", -0.1)


@pytest.mark.parametrize("index", range(50))
def test_any_path_may_stand_in_a_name(index):
    draw = random.Random(index)
    parts = tuple(
        ("lora", "".join(draw.choices("ab?&=%:@ /ü.", k=draw.randint(1, 9)))) for _ in range(draw.randint(1, 3))
    )
    name = ModelName("owner/name", parts)
    assert ModelName.parse(str(name)) == name


def model_of(run: Path) -> str:
    return json.loads((run / "embeddings/manifest.json").read_bytes())["model"]["name"]


def test_the_model_of_all_who_name_none(qwen_stage, tmp_path, small_model):
    (tmp_path / "p.txt").write_text("a red circle")
    assert qwen_stage("models", "use").out == ["demo"]
    assert "built-in demo" in qwen_stage("encode", "p.txt", "--out=first").err
    assert qwen_stage("models", "use", small_model).out == [str(small_model)]
    assert qwen_stage("models", "use").out == [str(small_model)]
    result = qwen_stage("encode", "p.txt", "--out=second")
    assert (result.code, result.err) == (0, "")
    assert [model_of(tmp_path / run) for run in ("first", "second")] == ["demo", str(small_model)]
    assert qwen_stage("denoise", "--embeddings=first", "--steps=1", "--size=32x32").code == 0  # it is of the demo
    assert qwen_stage("encode", "p.txt", "--out=third", "--model=demo").code == 0
    assert model_of(tmp_path / "third") == "demo"
    assert any(line.endswith("used where none is named") for line in qwen_stage("models", "list").out) is False
    assert str(small_model) in qwen_stage("models", "show").out[0]
    result = qwen_stage("models", "use", "nowhere")
    assert result.code == 2
    assert "unknown model 'nowhere'" in result.err
    assert qwen_stage("models", "use").out == [str(small_model)]
    assert qwen_stage("models", "use", "demo").out == ["demo"]
    assert qwen_stage("models", "list").out[0].endswith("; used where none is named")


def test_a_choice_that_cannot_be_read_is_said(qwen_stage, tmp_path):
    config = Path(os.environ["QWEN_STAGE_CONFIG"])
    (config / "model").mkdir(parents=True)
    (tmp_path / "p.txt").write_text("a red circle")
    result = qwen_stage("encode", "p.txt")
    assert result.code == 2
    assert "choose with `models use NAME`" in result.err


def test_an_empty_name_is_none(qwen_stage, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle")
    for command in (["encode", "p.txt", "--model="], ["models", "show", ""]):
        result = qwen_stage(*command)
        assert (result.code, "the model's name is empty" in result.err) == (2, True)


def test_long_names_are_names(qwen_stage, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle")
    files = [tmp_path / f"{number}{'字' * 70}.safetensors" for number in range(4)]
    for file in files:
        file.touch()
    result = qwen_stage("encode", "p.txt", "--out=run", *(f"--lora={file.name}" for file in files))
    assert result.code == 0, result.err


def test_aliases(qwen_stage):
    result = qwen_stage("models", "show", "qwen-image-2512")
    assert "Qwen/Qwen-Image-2512" in result.err

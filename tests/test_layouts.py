"""Checkpoints of other programs give the pictures of the same weights in diffusers' layout, and no stranger passes."""

import json
import os
import secrets
from pathlib import Path

import mlx.core as mx
import numpy as np
import other_layouts
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants
from PIL import Image

from artifacts_schema import store
from artifacts_schema.manifests import EmbeddingsManifest, ImageLatentsManifest, LatentsManifest
from orchestrator.inspect import read_recipe

SEED = int(os.environ.get("QWEN_STAGE_TEST_SEED") or secrets.randbelow(2**31))


@pytest.fixture(autouse=True)
def say_the_seed():
    print(f"repeat with QWEN_STAGE_TEST_SEED={SEED}")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return other_layouts.write(tmp_path_factory.mktemp("original") / "model", SEED)


class Made:
    """What the stages make with a model of an image, in float32."""

    def __init__(self, qwen_stage, directory, model, *options):
        """`options` are for the transformer."""
        prompts = directory.with_suffix(".jsonl")
        asked = {"prompt": "a red circle", "image": "image.png", "strength": 0.5, "size": "64x48", "steps": 4}
        prompts.write_text(json.dumps(asked))
        colours = np.random.RandomState(SEED).randint(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(colours).save(directory.with_name("image.png"))
        for command in (
            ["encode", prompts, f"--out={directory}", "--dtype=float32", *model],
            ["encode-image", directory],
            ["denoise", f"--embeddings={directory}", "--dtype=float32", *options],
            ["decode", directory, "--dtype=float32"],
        ):
            result = qwen_stage(*command)
            assert result.code == 0, result.err
        embeddings, _ = store.read_manifest(directory / "embeddings", EmbeddingsManifest)
        path = directory / "embeddings" / embeddings.embeddings[0].file.path
        latents, _ = store.read_manifest(directory / "latents", LatentsManifest)
        self.embeds = np.array(mx.load(str(path))["prompt_embeds"])
        self.latents = store.read_latents(directory / "latents", latents.items[0])
        images, _ = store.read_manifest(directory / "image_latents", ImageLatentsManifest)
        self.image = store.read_latents(directory / "image_latents", images.items[0])
        self.pixels = np.array(Image.open(result.out[0])).astype(int)

    def arrays(self):
        return self.embeds, self.image, self.latents

    def assert_close_to(self, other, tolerance):
        """Relative to the largest; 0 for all bits."""
        for mine, yours in zip(self.arrays(), other.arrays(), strict=True):
            assert np.abs(mine - yours).max() <= tolerance * np.abs(yours).max()
        assert np.abs(self.pixels - other.pixels).max() <= (2 if tolerance else 0)


@pytest.fixture
def made(qwen_stage, tmp_path, fresh_cache):
    def make(model, *options):
        fresh_cache()
        model = [model] if isinstance(model, str) else model
        return Made(qwen_stage, tmp_path / secrets.token_hex(4), model, *options)

    return make


def test_mflux(made, original, tmp_path):
    target = other_layouts.write_mflux(original, tmp_path / "mflux")
    made(f"--model={target}").assert_close_to(made(f"--model={original}"), 0)


def mixed(bits):
    """As mflux quantizes: everything, the modulation of images to 8 bits at least."""
    return lambda layer: 8 if "img_mod" in layer else bits


def within_attention(layer):
    """As nobody should."""
    return 8 if "to_k" in layer else None if "0.attn.add_v" in layer else 4


@pytest.mark.parametrize("bits_of", [mixed(4), mixed(8), within_attention])
@pytest.mark.parametrize("text_bits", [None, 4])
def test_mflux_quantized(made, original, tmp_path, bits_of, text_bits):
    target = other_layouts.write_mflux(original, tmp_path / "mflux", bits_of, lambda layer: text_bits)
    full = other_layouts.dequantized(other_layouts.read(original, "transformer"), bits_of)
    same = other_layouts.with_weights(original, tmp_path / "same", "transformer", full)
    text = other_layouts.dequantized(
        other_layouts.read(original, "text_encoder"), lambda layer: text_bits if layer.startswith("model.") else None
    )
    same = other_layouts.with_weights(same, tmp_path / "both", "text_encoder", text)
    expected = made(f"--model={same}")
    made(f"--model={target}").assert_close_to(expected, 1e-4)
    made(f"--model={target}", "--stream").assert_close_to(expected, 1e-4)


def test_comfyui(made, original, tmp_path):
    transformer = tmp_path / "qwen_image.safetensors"
    weights = other_layouts.comfyui_transformer(other_layouts.read(original, "transformer"))
    mx.save_safetensors(str(transformer), weights)
    text_encoder, vae = tmp_path / "qwen_2.5_vl_7b.safetensors", tmp_path / "qwen_image_vae.safetensors"
    mx.save_safetensors(str(text_encoder), other_layouts.read(original, "text_encoder"))
    mx.save_safetensors(str(vae), other_layouts.wan_vae(other_layouts.read(original, "vae")))
    elsewhere = other_layouts.write(tmp_path / "other", SEED + 1)
    parts = [f"--transformer={transformer}", f"--text-encoder={text_encoder}", f"--vae={vae}"]
    made([f"--model={elsewhere}", *parts]).assert_close_to(made(f"--model={original}"), 0)


@pytest.mark.parametrize("spelling", [None, "scale_weight", "weight_scale"])
@pytest.mark.parametrize("quantize", [[], ["--quantize=8"]])
def test_float8(made, original, tmp_path, spelling, quantize):
    plain = other_layouts.read(original, "transformer")
    packed, full, names = other_layouts.float8(plain, spelling, lambda name: name.startswith("transformer_blocks"))
    prefix = "model.diffusion_model."
    packed = other_layouts.comfyui_transformer(packed)
    if spelling:
        packed |= {f"{prefix}scaled_fp8": mx.zeros(2), f"{prefix}img_in.scale_input": mx.array(1.0)}
    other_layouts.save_float8(tmp_path / "float8.safetensors", packed, {prefix + name for name in names})
    same = other_layouts.with_weights(original, tmp_path / "same", "transformer", full)
    one = made([f"--model={original}", f"--transformer={tmp_path / 'float8.safetensors'}"], *quantize)
    one.assert_close_to(made(f"--model={same}", *quantize), 1e-6)


def test_a_float8_text_encoder(made, original, tmp_path):
    """Its table of embeddings as well, whose rows are read one by one."""
    plain = other_layouts.read(original, "text_encoder")
    packed, full, names = other_layouts.float8(plain, "scale_weight", lambda name: name.startswith("model."))
    other_layouts.save_float8(tmp_path / "float8.safetensors", packed, names)
    same = other_layouts.with_weights(original, tmp_path / "same", "text_encoder", full)
    one = made([f"--model={original}", f"--text-encoder={tmp_path / 'float8.safetensors'}"])
    one.assert_close_to(made(f"--model={same}"), 1e-6)


@pytest.mark.parametrize(
    ("shape", "packed", "words"), [((3,), True, "of shape (3,)"), ((), False, "which scales no float8 weight")]
)
def test_scales_that_are_not_known_are_an_error(qwen_stage, original, tmp_path, shape, packed, words):
    name = "transformer_blocks.0.attn.to_q.weight"
    weights = other_layouts.read(original, "transformer")
    weights, _, names = other_layouts.float8(weights, None, lambda each: packed and each == name)
    weights[name.removesuffix("weight") + "weight_scale"] = mx.ones(shape)
    other_layouts.save_float8(tmp_path / "float8.safetensors", weights, names)
    (tmp_path / "p.txt").write_text("a")
    assert qwen_stage("encode", "p.txt", f"--model={original}", "--out=run").code == 0
    result = qwen_stage("denoise", "--embeddings=run", f"--transformer={tmp_path / 'float8.safetensors'}", "--steps=1")
    assert (result.code, words in result.err, result.err.count("error")) == (2, True, 1), result.err


def test_another_vae_for_pictures_that_had_one(qwen_stage, made, original, tmp_path):
    other = other_layouts.write(tmp_path / "other", SEED + 1)
    (tmp_path / "p.txt").write_text("a red circle")
    assert qwen_stage("encode", "p.txt", f"--model={original}", "--out=run").code == 0
    assert qwen_stage("denoise", "--embeddings=run", "--steps=1", "--size=32x32").code == 0
    (path,) = qwen_stage("decode", "run", f"--vae={other / 'vae'}").out
    assert read_recipe(Path(path)).model == f"{original.name}?vae=vae"


def test_only_whole_checkpoints_are_converted(qwen_stage, original, tmp_path):
    result = qwen_stage("models", "convert", f"{original}?vae={original / 'vae'}", tmp_path / "small", "--quantize=4")
    assert (result.code, "convert a checkpoint itself" in result.err) == (2, True)
    assert not (tmp_path / "small").exists()


def gguf(path, weights, kinds):
    """As llama.cpp's tools write it; `kinds(name)` says how to pack a matrix. Returns what remains of the weights."""
    writer, left = GGUFWriter(path, "qwen_image"), {}
    for name, weight in weights.items():
        kind = kinds(name) if weight.ndim == 2 else GGMLQuantizationType.F32
        numbers = np.array(weight, np.float32)
        if kind.name == "Q4_K":  # which the package unpacks, but does not pack
            blocks = np.random.RandomState(SEED).randint(0, 256, (numbers.size // 256, 144), np.uint8)
            blocks[:, :4] = np.frombuffer(np.float16([0.001, 0.01]).tobytes(), np.uint8)  # its two scales
            packed = blocks.reshape(len(numbers), -1)
        else:
            packed = quants.quantize(numbers, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        left[name] = mx.array(quants.dequantize(packed, kind).reshape(numbers.shape)).astype(mx.bfloat16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return left


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16", "F16", "Q4_K"])
def test_gguf_is_converted(qwen_stage, made, original, tmp_path, kind):
    def kinds(name):  # K-quants come in blocks of 256, of which the small model's rows have but a half
        return GGMLQuantizationType[kind if kind != "Q4_K" or name == "txt_in.weight" else "F32"]

    left = gguf(tmp_path / "qwen-image.gguf", other_layouts.read(original, "transformer"), kinds)
    same = other_layouts.with_weights(original, tmp_path / "same", "transformer", left)
    convert = ["models", "convert", original, tmp_path / "small", "--quantize=8"]
    result = qwen_stage(*convert, f"--transformer={tmp_path / 'qwen-image.gguf'}")
    assert result.code == 0, result.err
    made(f"--model={tmp_path / 'small'}").assert_close_to(made(f"--model={same}", "--quantize=8"), 0)


def test_gguf_is_not_run_as_it_is(qwen_stage, original, tmp_path):
    (tmp_path / "p.txt").write_text("a")
    assert qwen_stage("encode", "p.txt", f"--model={original}", "--out=run").code == 0
    for content in (b"", b"GGUF", b"GGUF\3\0\0\0" + 50 * b"\xff", b"no"):
        (tmp_path / "a.gguf").write_bytes(content)
        convert = ["models", "convert", original, tmp_path / "small", "--quantize=8"]
        result = qwen_stage(*convert, f"--transformer={tmp_path / 'a.gguf'}")
        assert (result.code, "is no whole GGUF file" in result.err) == (2, True), result.err
    gguf(tmp_path / "a.gguf", other_layouts.read(original, "transformer"), lambda name: GGMLQuantizationType.F16)
    result = qwen_stage("denoise", "--embeddings=run", f"--transformer={tmp_path / 'a.gguf'}", "--steps=1")
    assert (result.code, "models convert MODEL DIR --transformer" in result.err) == (2, True), result.err


def test_a_vae_in_a_directory(made, original, tmp_path):
    other = other_layouts.write(tmp_path / "other", SEED + 1)
    one = made([f"--model={other}", f"--vae={original / 'vae'}"])
    assert np.abs(one.pixels - made(f"--model={other}").pixels).max() > 2


def lacking(weights):
    weights.pop(next(name for name in weights if name.endswith("to_q.weight")))
    return "lacks the tensors"


def surplus(weights):
    name = next(iter(weights))
    weights[name.rpartition(".")[0] + ".stranger"] = mx.zeros(3)
    return "stranger"


def misshapen(weights):
    name = next(name for name in weights if name.endswith("txt_in.bias"))
    weights[name] = mx.zeros(3)
    return "wrong shape"


@pytest.mark.parametrize("layout", ["mflux", "comfyui"])
@pytest.mark.parametrize("spoil", [lacking, surplus, misshapen])
def test_strangers_are_named(qwen_stage, original, tmp_path, layout, spoil):
    weights = other_layouts.read(original, "transformer")
    named = other_layouts.mflux_transformer if layout == "mflux" else other_layouts.comfyui_transformer
    weights = named(weights)
    words = spoil(weights)
    mx.save_safetensors(str(tmp_path / "file.safetensors"), weights)
    (tmp_path / "p.txt").write_text("a")
    assert qwen_stage("encode", "p.txt", f"--model={original}", "--out=run").code == 0
    result = qwen_stage("denoise", "--embeddings=run", f"--transformer={tmp_path / 'file.safetensors'}", "--steps=1")
    assert result.code == 2
    assert [words in line for line in result.err.splitlines() if "error" in line] == [True], result.err


def test_a_component_that_is_none_is_named(qwen_stage, original, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.txt").write_text("a")
    for said, words in (("nowhere", "is not there"), ("empty", "holds no .safetensors file")):
        result = qwen_stage("encode", "p.txt", f"--model={original}", f"--text-encoder={said}")
        assert (result.code, words in result.err) == (2, True)
    vae = next((original / "vae").glob("*.safetensors"))
    result = qwen_stage("encode", "p.txt", f"--model={original}", f"--text-encoder={vae}")
    assert result.code == 2
    assert "is no text_encoder of Qwen-Image" in result.err


def test_converted_from_other_layouts(qwen_stage, made, original, tmp_path):
    """Into our own: with the parts that are left as they are, and a schedule."""
    mflux = other_layouts.write_mflux(original, tmp_path / "mflux")
    assert qwen_stage("models", "convert", mflux, tmp_path / "small", "--quantize=8").code == 0
    made(f"--model={tmp_path / 'small'}").assert_close_to(made(f"--model={mflux}", "--quantize=8"), 0)

"""LoRAs: every spelling is the same change, strangers are errors, and quantized models keep them whole."""

import json
import os
import secrets
import shutil

import loras
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from artifacts_schema import store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import LatentsManifest
from orchestrator.inspect import read_recipe
from stages.checkpoint import Checkpoint
from stages.joined import parted
from stages.lora import Lora, changes_in
from stages.models.transformer import Modulation, Modulator, QwenImageTransformer2DModel, TransformerConfig
from stages.weights import load_weights, weights_of

SEED = int(os.environ.get("QWEN_STAGE_TEST_SEED") or secrets.randbelow(2**31))


@pytest.fixture(autouse=True)
def say_the_seed():
    print(f"repeat with QWEN_STAGE_TEST_SEED={SEED}")


def loaded(kind, checkpoint, *files, **options):
    model = kind(Checkpoint("test", checkpoint).config("transformer", TransformerConfig))
    load_weights(model, checkpoint / "transformer", mx.float32, loras=[Lora(*each) for each in files], **options)
    return model


def parameters(checkpoint, *files):
    """Of the whole transformer, as the checkpoint calls them."""
    weights = {}
    for kind in (QwenImageTransformer2DModel, Modulator):
        model = loaded(kind, checkpoint, *files)
        weights |= parted(dict(tree_flatten(model.parameters())), model)
    return {name: np.array(weight) for name, weight in weights.items()}


@pytest.mark.parametrize("spelling", loras.SPELLINGS)
def test_every_spelling_is_the_same_change(small_model, tmp_path, spelling):
    changes = loras.drawn(small_model, SEED, share=0.7)
    path = loras.write(tmp_path / "lora.safetensors", changes, spelling)
    before, after = parameters(small_model), parameters(small_model, (path, -0.7))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        layer = name.removesuffix(".weight")
        if layer in changes and name != layer:
            down, up, alpha = changes[layer]
            weight = weight - 0.7 * (1 if alpha is None else alpha / len(down)) * (up @ down)
        np.testing.assert_allclose(after[name], weight, rtol=0, atol=2e-6)


def test_several_are_added(small_model, tmp_path):
    files = [
        loras.write(tmp_path / f"{n}.safetensors", loras.drawn(small_model, SEED + n, share=0.8)) for n in range(2)
    ]
    alone, other = (parameters(small_model, (path, 1.0)) for path in files)
    before, both = parameters(small_model), parameters(small_model, *((path, 1.0) for path in files))
    for name, weight in both.items():
        np.testing.assert_allclose(weight, alone[name] + other[name] - before[name], rtol=0, atol=5e-6)


def test_the_alpha_of_all_layers_counts(small_model, tmp_path):
    """As diffusers writes it, into the file's metadata."""
    changes = loras.drawn(small_model, SEED, alphas=False)
    plain = loras.write(tmp_path / "plain.safetensors", changes)
    said = '{"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.lora_bias": false}'
    save_file(load_file(plain), tmp_path / "said.safetensors", {"format": "pt", "lora_adapter_metadata": said})
    before, after = parameters(small_model), parameters(small_model, (tmp_path / "said.safetensors", 1.0))
    for layer, (down, up, _) in changes.items():
        name = f"{layer}.weight"
        np.testing.assert_allclose(after[name] - before[name], 8 / len(down) * (up @ down), rtol=0, atol=5e-6)


def test_what_peft_saved_has_its_alpha_beside_it(small_model, tmp_path):
    changes = loras.drawn(small_model, SEED, alphas=False)
    path = loras.write(tmp_path / "adapter_model.safetensors", changes, "peft")
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        parameters(small_model, (path, 1.0))
    prints = []
    for alpha in (3, 6):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha, "alpha_pattern": {}}))
        before, after = parameters(small_model), parameters(small_model, (path, 1.0))
        for layer, (down, up, _) in changes.items():
            change = after[f"{layer}.weight"] - before[f"{layer}.weight"]
            np.testing.assert_allclose(change, alpha / len(down) * (up @ down), rtol=0, atol=5e-6)
        prints.append(Lora(path, 1.0).fingerprint())
    assert prints[0] != prints[1]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "use_rslora": True}))
    with pytest.raises(UserError, match="use_rslora"):
        parameters(small_model, (path, 1.0))


def extra(tensors, _):
    tensors["transformer.transformer_blocks.99.attn.to_q.lora_A.weight"] = np.ones((1, 1), np.float32)


def other_kind(tensors, _):
    tensors["transformer.proj_out.dora_scale"] = np.ones(1, np.float32)


def half(tensors, first):
    del tensors[f"transformer.{first}.lora_B.weight"]


def misshapen(tensors, first):
    tensors[f"transformer.{first}.lora_A.weight"] = np.ones((2, 3), np.float32)


def twice(tensors, first):
    tensors[f"{first}.lora_down.weight"] = tensors[f"transformer.{first}.lora_A.weight"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (extra, "transformer_blocks.99.attn.to_q.lora_A.weight, for which this model has no place"),
        (other_kind, "transformer.proj_out.dora_scale, for which this model has no place"),
        (half, "without the other half"),
        (misshapen, "does not fit"),
        (twice, "for which this model has no place"),
    ],
)
def test_what_has_no_place_is_an_error(small_model, tmp_path, spoil, words):
    changes = loras.drawn(small_model, SEED)
    tensors = loras.spelled(changes, "diffusers")
    spoil(tensors, next(iter(changes)))
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=words) as error:
        changes_in(tmp_path / "lora.safetensors", loras.layers(small_model))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=words):
        loaded(QwenImageTransformer2DModel, small_model, (tmp_path / "lora.safetensors", 1.0))


def float8(tensors, first):
    name = f"transformer.{first}.lora_A.weight"
    tensors[name] = np.zeros(tensors[name].shape, np.uint8)


def alphas(tensors, first):
    tensors[f"transformer.{first}.alpha"] = np.ones(3, np.float32)


def rankless(tensors, first):
    for end in ("lora_A", "lora_B"):
        name = f"transformer.{first}.{end}.weight"
        outputs, inputs = tensors[name].shape
        tensors[name] = np.zeros((0, inputs) if end == "lora_A" else (outputs, 0), np.float32)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(float8, "stored as U8, which no LoRA is"), (alphas, "no single number"), (rankless, "does not fit")],
)
def test_numbers_that_are_none_of_a_lora_are_an_error(small_model, tmp_path, spoil, words):
    test_what_has_no_place_is_an_error(small_model, tmp_path, spoil, words)


@pytest.mark.parametrize("said", ["use_rslora", "alpha_pattern"])
def test_what_peft_would_do_otherwise_is_an_error(small_model, tmp_path, said):
    plain = loras.write(tmp_path / "plain.safetensors", loras.drawn(small_model, SEED))
    config = json.dumps({f"transformer.{said}": {"to_q": 3}})
    save_file(load_file(plain), tmp_path / "said.safetensors", {"lora_adapter_metadata": config})
    with pytest.raises(UserError, match=said):
        loaded(QwenImageTransformer2DModel, small_model, (tmp_path / "said.safetensors", 1.0))


def test_every_byte_of_a_lora_counts(tmp_path):
    """The first block of a large file is a header, and alphas are small and lie behind it."""
    prints = []
    for alpha in (1.0, 8.0):
        tensors = {f"layer{n:04}.lora_down.weight": np.ones((4, 1024), np.float32) for n in range(200)}
        tensors |= {f"layer{n:04}.alpha": np.array(alpha, np.float32) for n in range(200)}
        save_file(tensors, tmp_path / "lora.safetensors")
        prints.append(Lora(tmp_path / "lora.safetensors", 1.0).fingerprint())
    assert prints[0] != prints[1]


def test_a_link_to_a_file_of_another_name(qwen_stage, golden, tmp_path):
    """As the hub's cache has them."""
    blob = loras.write(tmp_path / "made.safetensors", loras.drawn(golden("demo").checkpoint, SEED))
    blob.rename(tmp_path / "0123abcd")
    (tmp_path / "link.safetensors").symlink_to("0123abcd")
    pictures(qwen_stage, tmp_path, "run", "--lora=link.safetensors")


def test_pictures_are_decoded_after_the_lora_is_gone(qwen_stage, golden, tmp_path):
    loras.write(tmp_path / "a.safetensors", loras.drawn(golden("demo").checkpoint, SEED))
    pictures(qwen_stage, tmp_path, "run", "--lora=a.safetensors")
    (tmp_path / "a.safetensors").unlink()
    assert qwen_stage("decode", "run", "--out=other").code == 0
    result = qwen_stage("denoise", "--embeddings=run", "--seed=4", "--steps=3", "--size=64x64")
    assert (result.code, "no such file" in result.err) == (2, True)


def test_a_run_is_repaired_with_the_lora_that_only_denoise_was_given(qwen_stage, golden, tmp_path):
    loras.write(tmp_path / "a.safetensors", loras.drawn(golden("demo").checkpoint, SEED))
    (tmp_path / "p.txt").write_text("a red circle")
    assert qwen_stage("encode", "p.txt", "--out=run").code == 0
    denoise = ["denoise", "--embeddings=run", "--steps=3", "--size=64x64", "--lora=a.safetensors"]
    assert qwen_stage(*denoise).code == 0
    (directory,) = (tmp_path / "run/latents").glob("*.zarr")
    before = {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    shutil.rmtree(directory)
    assert qwen_stage("rerun", "run").code == 0
    assert {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_what_loras_take_on_the_way_is_told(golden, tmp_path):
    demo = golden("demo").checkpoint
    files = [(loras.write(tmp_path / f"{n}.safetensors", loras.drawn(demo, n, share=1.0)), 1.0) for n in range(3)]
    told = weights_of(
        demo / "transformer", QwenImageTransformer2DModel, mx.bfloat16, loras=[Lora(*file) for file in files]
    )
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = QwenImageTransformer2DModel(Checkpoint("test", demo).config("transformer", TransformerConfig))
    load_weights(
        model, demo / "transformer", mx.bfloat16, loras=[Lora(*file) for file in files], report=lambda *_: None
    )
    # a layer is made while the next is being read, as `memory.needs` has it
    assert mx.get_peak_memory() - before <= told.whole + 2 * told.stored_layer


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\xff" * 100])
def test_a_file_of_another_kind_is_an_error(small_model, tmp_path, content):
    (tmp_path / "lora.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="no whole safetensors file"):
        changes_in(tmp_path / "lora.safetensors", loras.layers(small_model))


def velocity(model, seed):
    draw = np.random.RandomState(seed)
    config = model.config
    latents = mx.array(draw.standard_normal((1, 12, 64)), mx.float32)
    text = model.text(mx.array(draw.standard_normal((5, config.joint_attention_dim)), mx.float32), [5], 3, 4)
    parts = [(config.num_layers, 6 * config.dim)] * 2 + [(2 * config.dim,)]
    modulation = Modulation(*(mx.array(0.1 * draw.standard_normal(shape), mx.float32) for shape in parts))
    (made,) = model(latents, [text], modulation)
    return np.array(made)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_models_keep_them_beside(qwen_stage, golden, tmp_path, bits):
    """What they draw differs from the quantized weights plus the change by no more than rounding; also streamed."""
    demo = golden("demo").checkpoint
    assert qwen_stage("models", "convert", demo, "small", f"--quantize={bits}").code == 0
    small = tmp_path / "small"
    files = [
        (loras.write(tmp_path / f"{n}.safetensors", loras.drawn(demo, SEED + n, share=0.6)), 0.8 - n) for n in range(2)
    ]
    kept = loaded(QwenImageTransformer2DModel, small, *files)
    streamed = loaded(QwenImageTransformer2DModel, small, *files, stream=True)
    unpacked = shutil.copytree(demo, tmp_path / "unpacked")
    weights = {}
    for path in sorted((small / "transformer").glob("*.safetensors")):
        weights |= mx.load(str(path))
    for name in [name for name in weights if name.endswith(".scales")]:
        layer = name.removesuffix(".scales")
        packed, scales, biases = (weights.pop(f"{layer}.{part}") for part in ("weight", "scales", "biases"))
        unrounded = (each.astype(mx.float32) for each in (scales, biases))
        weights[f"{layer}.weight"] = mx.dequantize(packed, *unrounded, group_size=64, bits=bits)
    (file,) = (unpacked / "transformer").glob("*.safetensors")
    mx.save_safetensors(str(file), weights)
    expected = velocity(loaded(QwenImageTransformer2DModel, unpacked, *files), SEED)
    plain = velocity(loaded(QwenImageTransformer2DModel, unpacked), SEED)
    made = velocity(kept, SEED)
    assert np.abs(made - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(plain - expected).max() > 0.01 * np.abs(expected).max()
    assert np.array_equal(velocity(streamed, SEED), made)


@pytest.mark.parametrize("bits", [None, 4])
def test_streamed_is_resident(golden, tmp_path, bits):
    """Where weights are quantized as they are read, the change is in them before."""
    demo = golden("demo").checkpoint
    file = (loras.write(tmp_path / "lora.safetensors", loras.drawn(demo, SEED)), 1.0)
    made = [loaded(QwenImageTransformer2DModel, demo, file, bits=bits, stream=stream) for stream in (False, True)]
    one, other = (velocity(model, SEED) for model in made)
    assert np.array_equal(one, other)


def pictures(qwen_stage, tmp_path, run, *options):
    result = qwen_stage("run", "a red circle", f"--out={run}", "--steps=3", "--size=64x64", *options)
    assert result.code == 0, result.err
    manifest, _ = store.read_manifest(tmp_path / run / "latents", LatentsManifest)
    (path,) = result.out
    return (tmp_path / path).read_bytes(), store.read_latents(tmp_path / run / "latents", manifest.items[0]), result


def test_pictures_know_their_loras(qwen_stage, golden, tmp_path):
    demo = golden("demo").checkpoint
    loras.write(tmp_path / "a.safetensors", loras.drawn(demo, SEED, share=1.0))
    _, plain, _ = pictures(qwen_stage, tmp_path, "plain")
    png, changed, _ = pictures(qwen_stage, tmp_path, "changed", "--lora=a.safetensors:0.5")
    _, none, _ = pictures(qwen_stage, tmp_path, "none", "--lora=a.safetensors:0")
    assert np.abs(plain - changed).max() > 0.01
    assert np.array_equal(plain, none)
    (path,) = (tmp_path / "changed/images").glob("*.png")
    assert read_recipe(path).model == "demo?lora=a.safetensors:0.5"
    # into the same run go no latents of another model
    result = qwen_stage("denoise", "--embeddings=changed", "--model=demo", "--seed=3", "--steps=3", "--size=64x64")
    assert result.code == 2
    assert "another transformer" in result.err
    # what follows in that run has it too; and the recipe makes the same picture again
    assert qwen_stage("denoise", "--embeddings=changed", "--seed=7", "--steps=3", "--size=64x64").code == 0
    again = qwen_stage("run", f"--like={path}", "--out=again")
    assert again.code == 0
    assert (tmp_path / again.out[0]).read_bytes() == png


@pytest.mark.parametrize("steps", [4, 8])
def test_lightning_is_known_by_its_name(qwen_stage, golden, tmp_path, steps):
    name = f"Qwen-Image-2512-Lightning-{steps}steps-V1.0-bf16.safetensors"
    loras.write(tmp_path / name, loras.drawn(golden("demo").checkpoint, SEED), "lightx2v")
    (tmp_path / "p.txt").write_text("a red circle")
    assert qwen_stage("encode", "p.txt", "--out=run").code == 0
    for options, told in (["--steps=3"], True), ([f"--preset=lightning-{steps}"], False), ([f"--steps={steps}"], True):
        result = qwen_stage("denoise", "--embeddings=run", "--size=32x32", f"--lora={name}", *options)
        assert result.code == 0, result.err
        assert (f"is made for {steps} steps without guidance: --preset lightning-{steps}" in result.err) == told


def test_a_table_of_modulations_is_made_anew_only_where_it_changes(qwen_stage, golden, tmp_path, own_cache):
    demo = golden("demo").checkpoint
    changes = loras.drawn(demo, SEED, share=1.0)
    attention = {layer: change for layer, change in changes.items() if ".attn." in layer}
    modulation = {layer: change for layer, change in changes.items() if ".img_mod." in layer}
    loras.write(tmp_path / "attention.safetensors", attention)
    loras.write(tmp_path / "modulation.safetensors", modulation)

    def tables(*options):
        pictures(qwen_stage, tmp_path, f"run{len(options)}{options[-1:]}".translate({47: None}), *options)
        return len(list(own_cache.glob("modulations/**/*.safetensors")))

    assert tables() == 1
    assert tables("--lora=attention.safetensors") == 1
    assert tables("--lora=modulation.safetensors") == 2


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("nowhere.safetensors", "no such file"),
        ("nowhere.safetensors:0.5", "no such file"),
        ("a.safetensors:nan", "no strength"),
        ("owner/name", "no such file"),
    ],
)
def test_an_unusable_lora_is_refused_before_anything_is_done(qwen_stage, tmp_path, said, words):
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "p.txt").write_text("a red circle")
    result = qwen_stage("encode", "p.txt", f"--lora={said}", "--out=run")
    assert result.code == 2
    assert words in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()

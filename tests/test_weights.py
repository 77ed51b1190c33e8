"""Weights in memory, streamed and quantized; the tables of modulations; and how much memory that takes."""

import os
import random
import secrets
import shutil
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import random_models
from mlx.utils import tree_flatten
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from artifacts_schema import cache
from artifacts_schema.errors import UserError
from stages import backend, memory, weights
from stages.checkpoint import Checkpoint, weight_files
from stages.joined import parted
from stages.models.text_encoder import TextEncoder, TextEncoderConfig
from stages.models.transformer import Modulation, Modulator, QwenImageTransformer2DModel, TransformerConfig
from stages.models.vae import VAEConfig
from stages.modulation import Tables
from stages.tensors import tensors_of
from stages.weights import RowsOnDisk, Streamed, load_weights, weights_of

SEED = secrets.randbelow(2**31)  # printed with every failure, as part of an assertion


def text_encoder(directory, **options):
    config = Checkpoint("test", directory).config("text_encoder", TextEncoderConfig)
    model = TextEncoder(config)
    load_weights(model, directory / "text_encoder", mx.float32, **options)
    return model


def transformer(directory, dtype=mx.float32, **options):
    config = Checkpoint("test", directory).config("transformer", TransformerConfig)
    model = QwenImageTransformer2DModel(config)
    load_weights(model, directory / "transformer", dtype, **options)
    return model


def modulation(directory, sigma, dtype=mx.float32):
    modulator = Modulator(Checkpoint("test", directory).config("transformer", TransformerConfig))
    load_weights(modulator, directory / "transformer", dtype, stream=True)
    return Modulation(*[part[0] for part in modulator([mx.array(sigma)], dtype)])


def velocities(model, directory, seed, dtype=mx.float32):
    """Of two pictures beside two packs of prompts."""
    draw = np.random.RandomState(seed)
    latents = mx.array(draw.standard_normal((2, 12, 64)), dtype)
    texts = []
    for lengths in ([3, 5], [1, 2, 7, 4]):
        embeds = mx.array(draw.standard_normal((sum(lengths), model.config.joint_attention_dim)), dtype)
        texts.append(model.text(embeds, lengths, 3, 4))
    return model(latents, texts, modulation(directory, 0.4, dtype))


def same(one, other):
    return all(mx.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_streaming_changes_no_bit(golden, dtype):
    directory = golden("demo").checkpoint
    draw = random.Random(SEED)
    texts = [[draw.randrange(600) for _ in range(draw.randint(1, 30))] for _ in range(5)]
    whole, streamed = text_encoder(directory), text_encoder(directory, stream=True)
    alone = [whole([text])[0] for text in texts]
    assert same(whole(texts), alone), SEED
    assert same(streamed(texts), alone), SEED
    assert same(streamed(texts[:2]), alone[:2]), SEED  # a second pass reads everything again
    for bits in (None, 4, 8):
        whole, streamed = (transformer(directory, dtype, stream=stream, bits=bits) for stream in (False, True))
        expected = velocities(whole, directory, SEED, dtype)
        for _ in range(2):
            assert same(velocities(streamed, directory, SEED, dtype), expected), (SEED, bits)


def test_streamed_layers_are_two_in_memory(tmp_path):
    """Eight layers of 4 MB: streamed, the peak stays below three of them, pass after pass, also when one breaks off."""
    configs = random_models.configs(text_heads=(32, 32), text_layers=8)
    configs["text_encoder"]["text_config"]["intermediate_size"] = 1024
    config = configs["text_encoder"]["text_config"]
    (tmp_path / "text_encoder").mkdir()
    shapes = {name: list(value.shape) for name, value in tree_flatten(TextEncoder(convert(config)).parameters())}
    weights = random_models.random_weights(shapes, 0)
    save_file({f"model.{name}": value for name, value in weights.items()}, tmp_path / "text_encoder/model.safetensors")
    layer = sum(value.nbytes for name, value in weights.items() if name.startswith("layers.0."))
    model = TextEncoder(convert(config))
    load_weights(model, tmp_path / "text_encoder", mx.float32, stream=True)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(3):
        mx.eval(model([[1, 2, 3]]))
    for position, _ in enumerate(model.layers):
        if position == 4:
            break
    mx.eval(model([[1, 2, 3]]))
    assert mx.get_peak_memory() - before < 2.5 * layer
    assert mx.get_active_memory() - before < 0.5 * layer


def test_a_file_is_read_if_safetensors_would_read_it(tmp_path):
    """Headers with a character changed, added or lost: what we take, safetensors takes, and finds the same there."""
    draw = random.Random(SEED)
    tensors = {"a": mx.ones((2, 3)), "b": mx.zeros((4,), mx.bfloat16), "c.d": mx.array([1, 2], mx.uint32)}
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), tensors, {"format": "mlx"})
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    taken = 0
    for _ in range(400):
        header, data = bytearray(whole[8 : 8 + size]), whole[8 + size :]
        at = draw.randrange(size)
        length = draw.choice([0, 0, 0, -1, 1])
        header[at : at + draw.randint(0, 2)] = bytes(draw.choices(b'0123456789[]{},:" FBU"', k=draw.randint(0, 2)))
        data = {0: data, -1: data[:-1], 1: data + b"0"}[length]
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
        try:
            found = tensors_of(weight_files(tmp_path))
        except UserError:
            continue
        taken += 1
        with safe_open(path, "np") as file:
            theirs = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            assert {name: (list(t.shape), t.dtype) for name, t in found.items()} == {
                name: (each.get_shape(), each.get_dtype()) for name, each in theirs.items()
            }, f"SEED {SEED}"
    assert 0 < taken < 400
    for deep in (
        b'{"a":' + b"[" * 100_000,
        b'{"a":{"dtype":"F32","x":' + b"[" * 100_000,
        b'{"__metadata__":' + b"{" * 9999,
    ):
        path.write_bytes(len(deep).to_bytes(8, "little") + deep)
        with pytest.raises(UserError, match="damaged or cut short"):
            weight_files(tmp_path)
    for length in range(8 + size):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged or cut short"):
            weight_files(tmp_path)


def test_the_next_layer_is_read_while_one_is_at_work(golden, monkeypatch):
    model = transformer(golden("demo").checkpoint)
    layers, asked = list(model.transformer_blocks), []
    once = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda arrays: (asked.append(arrays), once(arrays))[1])
    for number, _ in enumerate(weights.ahead(layers, golden("demo").checkpoint)):
        assert len(asked) == min(number + 2, len(layers))


@pytest.mark.parametrize("stream", [False, True])
def test_weights_that_vanish_while_they_are_read(tmp_path, golden, stream):
    shutil.copytree(golden("demo").checkpoint / "text_encoder", tmp_path / "text_encoder")
    shutil.copytree(golden("demo").checkpoint / "tokenizer", tmp_path / "tokenizer")
    (file,) = (tmp_path / "text_encoder").glob("*.safetensors")
    size = file.stat().st_size

    def cut(*_):
        os.truncate(file, size // 4)

    def encode():
        model = text_encoder(tmp_path, stream=stream, report=cut)
        cut()
        mx.eval(model([[1, 2, 3]]))

    with pytest.raises(UserError, match="cannot be read"):
        encode()


def convert(fields):
    return TextEncoderConfig(
        **{name: value for name, value in fields.items() if name in TextEncoderConfig.__dataclass_fields__}
    )


@pytest.mark.parametrize("stored", [mx.bfloat16, mx.float16, mx.float32])
def test_rows_come_from_the_file(tmp_path, stored):
    table = mx.random.normal((50, 24)).astype(stored)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"before": mx.ones(3), "table": table})
    rows = RowsOnDisk({"weight": tensors_of(weight_files(tmp_path))["table"]}, mx.float32, {})
    ids = [0, 49, 7, 7]
    assert mx.array_equal(rows(ids), table[mx.array(ids)].astype(mx.float32))


def test_a_table_in_an_odd_format_is_refused(tmp_path, golden):
    weights = load_file(golden(random_models.SMALL).checkpoint / "text_encoder/model.safetensors")
    name = next(name for name in weights if "embed_tokens" in name)
    weights[name] = weights[name].astype(np.int32)
    (tmp_path / "text_encoder").mkdir()
    save_file(weights, tmp_path / "text_encoder/model.safetensors")
    model = TextEncoder(
        Checkpoint("test", golden(random_models.SMALL).checkpoint).config("text_encoder", TextEncoderConfig)
    )
    with pytest.raises(UserError, match=r"embed_tokens\.weight is stored as int32"):
        load_weights(model, tmp_path / "text_encoder", mx.float32)


def test_reading_into_memory_is_reported(golden):
    said = []
    text_encoder(golden("demo").checkpoint, report=lambda *what: said.append(what))
    assert said == [("read text_encoder", number, 4) for number in range(1, 5)]


def tables(directory, said, dtype="float32"):
    checkpoint = Checkpoint("test", directory)
    config = checkpoint.config("transformer", TransformerConfig)
    return Tables(checkpoint, config, dtype, lambda *what: said.append(what), said.append)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tables_hold_what_each_step_would_compute(golden, own_cache, dtype):
    directory = golden("demo").checkpoint
    one, other = (1.0, 0.8, 0.3, 0.0), (1.0, 0.5, 0.0)
    said = []
    made = tables(directory, said, dtype)
    made.prepare([one, other, one], memory.budget(None))
    assert said == [("modulation", number, 5) for number in range(1, 6)]  # one pass for both
    assert len(list((own_cache / "modulations").glob("*/*.safetensors"))) == 2
    for sigmas in (one, other):
        steps = tables(directory, said, dtype).of(sigmas)
        assert len(steps) == len(sigmas) - 1
        for sigma, step in zip(sigmas, steps, strict=False):
            compute = {"float32": mx.float32, "bfloat16": mx.bfloat16}[dtype]
            timestep = mx.array(1000 * sigma).astype(compute) / 1000
            assert same(step, modulation(directory, timestep, compute))
    assert len(said) == 5  # nothing was computed again


def test_damaged_and_foreign_tables_are_made_again(golden, own_cache):
    directory = golden("demo").checkpoint
    sigmas, said = (1.0, 0.8, 0.0), []
    expected = tables(directory, said).of(sigmas)
    (path,) = (own_cache / "modulations").glob("*/*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for step, again in zip(expected, tables(directory, said).of(sigmas), strict=True):
        assert same(step, again)
    assert any("set aside a damaged cache entry" in str(line) for line in said)
    assert path.read_bytes() == whole
    entry = next(entry for entry in cache.entries() if entry.kind is cache.MODULATIONS)
    item = cache.find(cache.MODULATIONS, entry.key, print)
    mx.save_safetensors(str(own_cache / "other.safetensors"), {"img": mx.ones((2, 5, 768))})
    cache.put(cache.MODULATIONS, entry.key, item, (own_cache / "other.safetensors").read_bytes())
    for step, again in zip(expected, tables(directory, said).of(sigmas), strict=True):
        assert same(step, again)


def test_denoise_needs_no_cache_for_its_tables(golden, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWEN_STAGE_CACHE", str(tmp_path / "file"))
    directory = golden("demo").checkpoint
    (step,) = tables(directory, []).of((0.4, 0.0))
    assert same(step, modulation(directory, mx.array(1000 * 0.4) / 1000))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights(golden, bits):
    """What MLX's own layer makes of the same weights; whatever the transformer holds outside its blocks stays."""
    directory = golden("demo").checkpoint
    models = [transformer(directory, bits=b) for b in (None, bits)]
    whole, quantized = (parted(dict(tree_flatten(model.parameters())), model) for model in models)
    name = "transformer_blocks.2.attn.to_q"
    packed, scales, biases = mx.quantize(whole[f"{name}.weight"].astype(mx.bfloat16), group_size=64, bits=bits)
    assert mx.array_equal(quantized[f"{name}.weight"], packed)
    assert mx.array_equal(quantized[f"{name}.scales"], scales.astype(mx.float32))
    assert mx.array_equal(quantized[f"{name}.biases"], biases.astype(mx.float32))
    assert mx.array_equal(quantized["img_in.weight"], whole["img_in.weight"])
    one, other = (velocities(transformer(directory, bits=b), directory, SEED) for b in (None, bits))
    error = mx.linalg.norm(one[0] - other[0]) / mx.linalg.norm(one[0])
    assert 0 < error.item() < {4: 0.2, 8: 0.02}[bits], SEED


@pytest.mark.parametrize("bits", [4, 8])
def test_all_matrices_of_the_blocks_are_quantized_alike_and_no_others(golden, bits):
    """As docs/quantization.md has it. What is not here is the modulation, which is another model's."""
    modules = transformer(golden("demo").checkpoint, bits=bits).named_modules()
    layers = {name: layer for name, layer in modules if isinstance(layer, (nn.Linear, nn.QuantizedLinear))}
    quantized = {name: layer for name, layer in layers.items() if isinstance(layer, nn.QuantizedLinear)}
    assert {(layer.bits, layer.group_size) for layer in quantized.values()} == {(bits, 64)}
    assert layers.keys() - quantized.keys() == {"img_in", "txt_in", "proj_out"}


def test_estimates_of_weights_are_what_mlx_counts(golden):
    directory = golden("demo").checkpoint
    for bits in (None, 4, 8):
        for compute in (mx.float32, mx.bfloat16):
            told = weights_of(directory / "transformer", QwenImageTransformer2DModel, compute, bits)
            model = transformer(directory, compute, bits=bits)
            assert told.whole == sum(array.nbytes for _, array in tree_flatten(model.parameters()))
            block = model.transformer_blocks[0]
            assert told.layer == sum(array.nbytes for _, array in tree_flatten(block.parameters()))
    told = weights_of(directory / "text_encoder", TextEncoder, mx.float32)
    assert told.whole == sum(array.nbytes for _, array in tree_flatten(text_encoder(directory).parameters()))


def test_loading_holds_little_more_than_the_weights(golden):
    directory = golden("demo").checkpoint
    told = weights_of(directory / "transformer", QwenImageTransformer2DModel, mx.bfloat16)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = transformer(directory, mx.bfloat16, report=lambda *_: None)
    assert told.whole <= mx.get_peak_memory() - before < told.whole + told.layer / 2
    del model


WEIGHTS = memory.Weights(whole=30 << 30, layers=29 << 30, layer=1 << 30, stored_layer=0, stored=30 << 30)


@pytest.mark.parametrize(
    ("size", "promised", "asked", "once", "streams", "words"),
    [
        (40 << 30, False, None, False, False, "held in memory: 33.5 GB of the 42.9 GB that are free"),
        (20 << 30, False, None, False, True, "streamed from disk, 32.2 GB a pass: in memory it would need 33.5 GB"),
        (40 << 30, False, None, True, True, ""),
        (40 << 30, False, True, False, True, ""),
        (20 << 30, False, False, False, False, ""),  # who asks for it gets it
        (20 << 30, True, False, False, "with --stream 4.6 GB are enough", ""),
        (4 << 30, True, None, False, "needs 4.6 GB streamed, more than --memory 4.3 GB; give it at least 4.6 GB", ""),
        (1 << 30, False, None, False, True, "streamed from disk"),  # an estimate; it may still go well
    ],
)
def test_streaming_by_memory(size, promised, asked, once, streams, words):
    said = []
    within = memory.Budget(size, promised)

    def decide():
        return memory.streams("transformer", WEIGHTS, 1 << 30, asked, within, said.append, once=once)

    if isinstance(streams, str):
        with pytest.raises(UserError, match=streams):
            decide()
    else:
        assert decide() == streams
        assert words in "".join(said)
        assert bool(words) == bool(said)


def test_what_a_process_holds_itself_is_free_for_it(monkeypatch):
    """Or the second order of a worker would find no room for the model that it has in memory."""
    monkeypatch.setattr(memory, "available", lambda: 1000)
    before = memory.budget(None).size
    held = mx.ones(1_000_000)
    mx.eval(held)
    assert memory.budget(None).size >= before + held.nbytes
    assert memory.budget(5) == memory.Budget(5, True)


def test_a_container_has_less(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "has_cuda", lambda: False)
    unlimited = memory.available()
    (tmp_path / "memory.current").write_text("500000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() > unlimited / 2
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.available() == 600_000


def test_a_budget_is_refused_before_anything_is_loaded(qwen_stage, tmp_path, small_model):
    (tmp_path / "p.txt").write_text("a")
    for command in (
        ["encode", "p.txt", "--out=run", f"--model={small_model}"],
        ["denoise", "--embeddings=run", "--size=32x32"],
    ):
        refused = qwen_stage(*command, "--memory=10MB")
        assert refused.code == 2
        assert "more than --memory 10 MB; give it at least 2" in refused.err
        assert qwen_stage(*command, "--memory=1GB").code == 0


def test_streamed_is_kept_by_who_is_asked_once(golden):
    assert isinstance(text_encoder(golden("demo").checkpoint, stream=True).layers, Streamed)
    assert isinstance(text_encoder(golden("demo").checkpoint).layers, list)


def test_doctor_says_what_the_stages_would_do(qwen_stage, small_model):
    generous = qwen_stage("doctor", f"--model={small_model}", "--size=32x48", "--memory=100GB")
    assert generous.code == 0
    chosen = [line.split()[1:3] for line in generous.out if line.startswith("->")]
    assert [stage for stage, _ in chosen] == ["encode", "modulation", "denoise", "decode"]
    assert chosen[2] == ["denoise", "in"]
    scarce = qwen_stage("doctor", f"--model={small_model}", "--size=1024x1024", "--memory=300MB")
    assert [line.split()[2] for line in scarce.out if line.startswith("->")][2] == "streamed"
    assert "too little memory for denoise" in scarce.out[-1]
    refused = qwen_stage("doctor", f"--model={small_model}", "--size=33x48")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)


def test_doctor_tells_how_to_get_a_faster_blas(qwen_stage, small_model, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(backend, "has_cuda", lambda: False)
    monkeypatch.setattr(backend, "OPENBLAS", "libnowhere.so.0")
    assert backend.open_blas() is False
    assert f"apt install {backend.PACKAGE}" in "\n".join(qwen_stage("doctor", f"--model={small_model}").out)
    monkeypatch.setattr(backend, "OPENBLAS", None)  # this program itself, which is always there
    assert backend.open_blas() is True
    assert backend.PACKAGE not in "\n".join(qwen_stage("doctor", f"--model={small_model}").out)


def test_mlx_is_told_once_what_people_did_not_say_themselves(monkeypatch):
    monkeypatch.setattr(backend, "has_cuda", lambda: True)
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "20")
    told = {name for told in (backend.CUDA, *backend.CUDA_STAGES.values()) for name in told}
    for name in told - {"MLX_MAX_OPS_PER_BUFFER"}:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        del os.environ[name]
    backend.prepare_mlx()
    assert "MLX_MAX_MB_PER_BUFFER" not in os.environ
    backend.prepare_mlx("decode")
    assert (os.environ["MLX_MAX_OPS_PER_BUFFER"], os.environ["MLX_MAX_MB_PER_BUFFER"]) == ("20", "256")


def test_tiles_by_memory():
    weights = memory.Weights(whole=100 << 20, layers=0, layer=0, stored_layer=0, stored=100 << 20)
    states = {512: 1000 << 20, 256: 300 << 20, 128: 100 << 20}

    def edge(megabytes, promised=True, asked=None):
        return memory.tile(weights, states, asked, memory.Budget(megabytes << 20, promised))

    assert [edge(size) for size in (2000, 700, 500)] == [512, 256, 128]
    assert edge(700, asked=128) == 128
    assert edge(10, promised=False) == 128
    with pytest.raises(UserError, match=r"needs 1\.4 GB, more than --memory 734 MB; --tile 256 needs less"):
        edge(700, asked=512)
    with pytest.raises(UserError, match="tiles of 128 needs 472 MB, more than --memory 10 MB; give it at least 472 MB"):
        edge(10)


def embeddings(run):
    return {path.name: path.read_bytes() for path in sorted((run / "embeddings").glob("*.safetensors"))}


def test_encode_streams_until_it_pays_to_keep_the_layers(qwen_stage, tmp_path, small_model, monkeypatch, fresh_cache):
    """Once: a pass costs what loading does. Asked again, or with more than pass through at once: in memory."""

    def read(name, *options):
        result = qwen_stage("encode", "p.txt", f"--out={name}", f"--model={small_model}", *options)
        assert result.code == 0, result.err
        (loaded,) = weights._loaded.values()
        return "streamed" if loaded[0] else "in memory"

    weights._loaded.clear()
    (tmp_path / "p.txt").write_text("one\ntwo, longer\nthree, much longer\n")
    assert read("once") == "streamed"
    for order in ("again", "and again"):
        fresh_cache()
        assert read(order) == "in memory"
    fresh_cache()
    weights._loaded.clear()
    monkeypatch.setattr("stages.encode.TOKENS_AT_ONCE", 150)
    assert read("many") == "in memory"
    fresh_cache()
    assert read("waves", "--stream") == "streamed"
    fresh_cache()
    monkeypatch.setattr("stages.memory.budget", lambda limit: memory.Budget(1000, promised=False))
    weights._loaded.clear()
    assert read("scarce") == "streamed"
    runs = [embeddings(tmp_path / name) for name in ("once", "again", "many", "waves", "scarce")]
    assert all(run == runs[0] for run in runs)
    assert len(runs[0]) == 4


def latents(run):
    return [path.read_bytes() for path in sorted((run / "latents").glob("*/c/0/0/0"))]


def test_a_process_keeps_its_model_until_the_files_are_others(qwen_stage, tmp_path, small_model, fresh_cache):
    shutil.copytree(small_model, tmp_path / "model")
    (tmp_path / "p.txt").write_text("a")

    def denoise(name, *options):
        fresh_cache()
        assert qwen_stage("encode", "p.txt", f"--out={name}", "--model=model").code == 0
        assert qwen_stage("denoise", f"--embeddings={name}", "--size=32x32", "--steps=2", *options).code == 0
        return next(iter(weights._loaded.values()))[1]

    first = denoise("one")
    assert denoise("two", "--seed=7") is not first  # the text encoder was in between
    fresh_cache()
    assert qwen_stage("denoise", "--embeddings=two", "--size=32x32", "--steps=2", "--seed=8").code == 0
    kept = next(iter(weights._loaded.values()))[1]
    assert qwen_stage("denoise", "--embeddings=two", "--size=32x32", "--steps=2", "--seed=9").code == 0
    assert next(iter(weights._loaded.values()))[1] is kept
    (path,) = (tmp_path / "model/transformer").glob("*.safetensors")
    save_file({name: 1.5 * weight for name, weight in load_file(path).items()}, path)
    denoise("other")
    weights._loaded.clear()
    denoise("fresh")
    assert latents(tmp_path / "other") == latents(tmp_path / "fresh") != latents(tmp_path / "one")


def test_embeddings_of_a_quantized_text_encoder(qwen_stage, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle")
    for bits in (4, 8):
        for name in (f"q{bits}", f"again{bits}"):
            result = qwen_stage("encode", "p.txt", f"--out={name}", f"--quantize={bits}")
            assert (result.code, "damaged" in result.err) == (0, False)
        assert "2 of 2 texts are encoded already" in result.err
        assert qwen_stage("denoise", f"--embeddings=q{bits}", "--size=32x32", "--steps=1").code == 0
        assert qwen_stage("inspect", f"q{bits}", "--verify").code == 0
    assert embeddings(tmp_path / "q4").keys().isdisjoint(embeddings(tmp_path / "q8"))


def test_one_pass_makes_the_tables_of_all_pictures_without_a_cache(qwen_stage, tmp_path, small_model, monkeypatch):
    (tmp_path / "p.txt").write_text("a")
    assert qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}").code == 0
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWEN_STAGE_CACHE", str(tmp_path / "file"))
    passes = []
    once = Tables._make
    monkeypatch.setattr(Tables, "_make", lambda self, schedules: (passes.append(schedules), once(self, schedules))[1])
    sizes = ["--size=32x32", "--steps=2"]
    assert qwen_stage("denoise", "--embeddings=run", *sizes, "--seed", "1", "2", "3").code == 0
    assert len(passes) == 1


def test_so_many_tables_share_a_pass_and_each_dtype_has_its_own(golden, own_cache, monkeypatch):
    directory = golden("demo").checkpoint
    passes = []
    once = Tables._make
    monkeypatch.setattr(Tables, "_make", lambda self, some: (passes.append(len(some)), once(self, some))[1])
    schedules = [(1.0, 0.1 + i / 10, 0.0) for i in range(6)]
    plenty = memory.Budget(1 << 34, False)
    for _ in range(2):  # the second time, all are there
        for dtype in ("float32", "bfloat16"):
            config = Checkpoint("test", directory).config("transformer", TransformerConfig)
            made = Tables(Checkpoint("test", directory), config, dtype, lambda *_: None, print)
            made.prepare(schedules, plenty)
            assert made.of(schedules[0])[0].img.dtype == weights.mlx_dtype(dtype)
    assert passes == [4, 2, 4, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_mlx_is_held_back_while_denoising(qwen_stage, tmp_path, small_model, monkeypatch, stream):
    """Beside the weights there is room for what is at work, and no more; afterwards all is as it was."""
    (tmp_path / "p.txt").write_text("a")
    assert qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}").code == 0
    limits, states = [], []
    limit, estimate = mx.set_memory_limit, memory.image_states
    monkeypatch.setattr(mx, "set_memory_limit", lambda size: (limits.append(size), limit(size))[1])
    monkeypatch.setattr(memory, "image_states", lambda *sizes: (states.append(estimate(*sizes)), states[-1])[1])
    monkeypatch.setattr(mx, "get_active_memory", lambda: 0)  # other tests' models
    before = mx.set_memory_limit(1 << 40)
    how = "--stream" if stream else "--no-stream"
    assert qwen_stage("denoise", "--embeddings=run", "--size=64x64", "--steps=1", how).code == 0
    told = weights_of(small_model / "transformer", QwenImageTransformer2DModel, mx.float32)
    held = told.streamed if stream else told.whole
    assert limits == [1 << 40, held + int(memory.HELD_BACK_AT * states[-1]), 1 << 40]
    limit(before)


def test_what_is_in_memory_already_holds_up_nobody(monkeypatch):
    """MLX may wait for ever where more is held than it may allocate."""
    other = mx.ones(1_000_000)
    mx.eval(other)
    limits, limit = [], mx.set_memory_limit
    monkeypatch.setattr(mx, "set_memory_limit", lambda size: (limits.append(size), limit(size))[1])
    with memory.bounded(1000, 1000, memory.Budget(1 << 40, False)):
        assert limits[0] >= mx.get_active_memory() + int(memory.HELD_BACK_AT * 1000)


@pytest.mark.parametrize(
    ("size", "room"), [(1 << 40, memory.LEAST_STATES), (5 << 30, 1 << 30), ((4 << 30) + 5000, 5000)]
)
def test_small_pictures_need_not_wait_on_cuda_but_keep_a_promise(monkeypatch, size, room):
    limits = []
    monkeypatch.setattr(memory, "has_cuda", lambda: True)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 0)
    monkeypatch.setattr(mx, "set_memory_limit", lambda limit: limits.append(limit) or 0)
    with memory.bounded(4 << 30, 1000, memory.Budget(size, True)):
        assert limits[0] == (4 << 30) + min(room, memory.LEAST_STATES)


def test_tables_are_made_one_by_one_where_memory_is_short(golden, own_cache):
    directory = golden("demo").checkpoint
    schedules = [(1.0, 0.5 + i / 10, 0.0) for i in range(4)]
    said = []
    told = weights.weights_of(directory / "transformer", Modulator, mx.float32)
    table = memory.table_bytes(Checkpoint("test", directory).config("transformer", TransformerConfig), 2, "float32")
    _, one = memory.needs(told, 3 * table)
    tables(directory, said).prepare(schedules, memory.Budget(one, True))
    assert len(said) == 4 * 5
    with pytest.raises(UserError, match=r"the table of modulations needs .*, more than --memory 1 MB"):
        tables(directory, said).prepare([(1.0, 0.1, 0.0)], memory.Budget(1 << 20, True))


def test_decode_keeps_to_its_budget(qwen_stage, tmp_path, small_model, monkeypatch, fresh_cache):
    (tmp_path / "p.txt").write_text("a")
    assert qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}").code == 0
    assert qwen_stage("denoise", "--embeddings=run", "--size=256x256", "--steps=1").code == 0
    seen = []
    once = memory.tile
    monkeypatch.setattr(memory, "tile", lambda *arguments: (seen.append(once(*arguments)), seen[-1])[1])
    config = Checkpoint("test", small_model).config("vae", VAEConfig)
    tight = memory.PROCESS_BYTES + memory.picture_states(config, 256, 256, 256, "float32")
    for size, edge in (("1GB", 512), (str(tight), 128)):
        fresh_cache()
        assert qwen_stage("decode", "run", f"--memory={size}", f"--out={edge}").code == 0
        assert seen[-1] == edge
    fresh_cache()
    refused = qwen_stage("decode", "run", "--memory=1MB", "--out=none")
    assert (refused.code, "more than --memory 1 MB" in refused.err) == (2, True)


def test_on_macs_memory_is_wired_while_it_is_at_work(monkeypatch):
    wired = [0]
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 << 30})
    monkeypatch.setattr(mx, "set_wired_limit", lambda size: (wired[-1], wired.append(size))[0])
    with memory.bounded(1000, 1000, memory.Budget(1 << 40, False)):
        assert wired == [0, 12 << 30]
    assert wired == [0, 12 << 30, 0]

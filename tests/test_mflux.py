"""Repositories written by mflux's own saver, from its own models, and what those make of the same inputs.

It is not among the tests' requirements, because it brings MLX's CUDA backend, which needs an NVIDIA GPU: elsewhere
`pip install mflux==0.24.0 && pip install --force-reinstall --no-deps mlx mlx-cpu`, in an environment of its own.
"""

import importlib.util
import os
import secrets
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import other_layouts
import pytest
from mlx.utils import tree_map

from stages.checkpoint import Checkpoint
from stages.models.text_encoder import TextEncoder, TextEncoderConfig
from stages.models.transformer import Modulation, Modulator, QwenImageTransformer2DModel, TransformerConfig
from stages.models.vae import AutoencoderKLQwenImage, VAEConfig
from stages.models.vae_encoder import AutoencoderKLQwenImageEncoder
from stages.weights import load_weights

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("mflux"), reason="mflux is not installed")
SEED = int(os.environ.get("QWEN_STAGE_TEST_SEED") or secrets.randbelow(2**31))


def randomized(model):
    """Every parameter drawn, norms near one."""
    keys = iter(mx.random.split(mx.random.key(SEED), 2000))

    def drawn(array):
        scale = 0.1 if array.ndim == 1 else array[0].size ** -0.5
        return scale * mx.random.normal(array.shape, key=next(keys)) + (0.5 if array.ndim == 1 else 0)

    model.update(tree_map(drawn, model.parameters()))
    return model


def saved(model, directory, component, bits):
    """As `mflux-save` does it."""
    from mflux.models.common.weights.saving.model_saver import ModelSaver
    from mflux.models.qwen.weights.qwen_weight_definition import QwenWeightDefinition

    if bits:
        predicate = QwenWeightDefinition.quantization_predicate
        nn.quantize(model, class_predicate=lambda path, module: predicate(path, module, bits), bits=bits)
    ModelSaver._save_weights(str(directory), bits, model, component)
    return Checkpoint("mflux", directory)


def loaded(checkpoint, component, kind, config):
    model = kind(checkpoint.config(component, config))
    load_weights(model, checkpoint.component(component), mx.float32)
    return model


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_transformer(tmp_path, bits):
    from mflux.models.qwen.model.qwen_transformer.qwen_transformer import QwenTransformer

    theirs = randomized(QwenTransformer(num_layers=2, num_attention_heads=2, joint_attention_dim=256))
    checkpoint = saved(theirs, tmp_path, "transformer", bits)
    ours = loaded(checkpoint, "transformer", QwenImageTransformer2DModel, TransformerConfig)
    modulator = loaded(checkpoint, "transformer", Modulator, TransformerConfig)
    draw = np.random.RandomState(SEED)
    latents, embeds = (mx.array(draw.standard_normal(shape), mx.float32) for shape in ((1, 12, 64), (1, 5, 256)))
    size = SimpleNamespace(height=48, width=64, scheduler=SimpleNamespace(sigmas=[0.5], timesteps=[]))
    expected = theirs(0, size, latents, embeds, mx.ones((1, 5)))
    modulation = Modulation(*(part[0] for part in modulator([mx.array(0.5)], mx.float32)))
    (made,) = ours(latents, [ours.text(embeds[0], [5], 3, 4)], modulation)
    assert mx.abs(made - expected).max() < 1e-3 * mx.abs(expected).max(), SEED


@pytest.mark.parametrize("bits", [None, 4])
def test_text_encoder(tmp_path, bits):
    """Its own is for one size alone, so the same weights are compared in the two layouts."""
    from mflux.models.qwen.model.qwen_text_encoder.qwen_encoder import QwenEncoder
    from mflux.models.qwen.model.qwen_text_encoder.qwen_encoder_layer import QwenEncoderLayer
    from mflux.models.qwen.model.qwen_text_encoder.qwen_text_encoder import QwenTextEncoder

    theirs = QwenTextEncoder()
    theirs.encoder = QwenEncoder(vocab_size=100, hidden_size=256, num_hidden_layers=2)
    theirs.encoder.layers = [QwenEncoderLayer(256, 2, 1, 192) for _ in range(2)]
    original = other_layouts.write(tmp_path / "original", SEED)
    weights = other_layouts.read(original, "text_encoder")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:100]
    language = [(name.replace("model.", "encoder."), each) for name, each in weights.items() if "model." in name]
    theirs.load_weights(language, strict=False)  # its angles are parameters as well
    ours = loaded(saved(theirs, tmp_path, "text_encoder", bits), "text_encoder", TextEncoder, TextEncoderConfig)
    full = other_layouts.dequantized(weights, lambda layer: bits if layer.startswith("model.") else None)
    same = other_layouts.with_weights(original, tmp_path / "same", "text_encoder", full)
    config = Checkpoint("original", original).config("text_encoder", TextEncoderConfig)
    expected = TextEncoder(TextEncoderConfig(**{**vars(config), "vocab_size": 100}))
    load_weights(expected, same / "text_encoder", mx.float32)
    ids = [[1, 5, 99, 0, 42]]
    assert mx.abs(ours(ids)[0] - expected(ids)[0]).max() < 1e-4 * mx.abs(expected(ids)[0]).max(), SEED


def test_vae(tmp_path):
    """At its only size: half a gigabyte."""
    from mflux.models.qwen.model.qwen_vae.qwen_vae import QwenVAE

    theirs = randomized(QwenVAE())
    checkpoint = saved(theirs, tmp_path, "vae", None)
    ours = loaded(checkpoint, "vae", AutoencoderKLQwenImage, VAEConfig)
    latents = mx.array(np.random.RandomState(SEED).standard_normal((1, 16, 4, 6)), mx.float32)
    expected = theirs.decode(latents)
    expected = mx.clip(expected.squeeze(2) if expected.ndim == 5 else expected, -1, 1).transpose(0, 2, 3, 1)
    assert mx.abs(ours.decode(latents) - expected).max() < 1e-3, SEED
    del ours
    encoder = loaded(checkpoint, "vae", AutoencoderKLQwenImageEncoder, VAEConfig)
    rgb = mx.array(np.random.RandomState(SEED).uniform(-1, 1, (1, 3, 32, 48)), mx.float32)
    expected = theirs.encode(rgb)
    expected = expected.squeeze(2) if expected.ndim == 5 else expected
    assert mx.abs(encoder.encode(rgb.transpose(0, 2, 3, 1)) - expected).max() < 1e-3, SEED

"""Each model against what the reference classes computed (golden/), in float32."""

import mlx.core as mx
import numpy as np
import pytest
import random_models
from conftest import RANDOM_CASES
from parity import assert_close

from stages.checkpoint import Checkpoint
from stages.denoise import guided
from stages.encode import TEMPLATE_PREFIX, TEMPLATE_SUFFIX
from stages.models.text_encoder import TextEncoder, TextEncoderConfig
from stages.models.transformer import (
    Modulation,
    Modulator,
    QwenImageTransformer2DModel,
    TransformerConfig,
    pack_latents,
    unpack_latents,
)
from stages.models.vae import AutoencoderKLQwenImage, VAEConfig
from stages.tokenizer import load_tokenizer
from stages.weights import load_weights

CASES = [*RANDOM_CASES, "demo"]


def load(kind, config, directory, component):
    checkpoint = Checkpoint("test", directory)
    model = kind(checkpoint.config(component, config))
    load_weights(model, directory / component, mx.float32)
    return model


@pytest.mark.parametrize("name", CASES)
def test_text_encoder(golden, name):
    case, expected, directory = golden(name)
    model = load(TextEncoder, TextEncoderConfig, directory, "text_encoder")
    tokenizer = load_tokenizer(directory / "tokenizer")
    drop = len(tokenizer.encode(TEMPLATE_PREFIX).ids)
    for i, prompt in enumerate(case["prompts"]):
        ids = tokenizer.encode(TEMPLATE_PREFIX + prompt + TEMPLATE_SUFFIX).ids
        assert_close(model([ids])[0][drop:], expected[f"prompt_embeds.{i}"])


@pytest.mark.parametrize("name", CASES)
def test_transformer(golden, name):
    """One pass over a batch of prompts of unequal lengths, packed; the reference pads and masks."""
    case, expected, directory = golden(name)
    model = load(QwenImageTransformer2DModel, TransformerConfig, directory, "transformer")
    h, w = case["grid"]
    noise = mx.array(random_models.noise(len(case["prompts"]), h, w, case["seed"]))
    embeds = [expected[f"prompt_embeds.{i}"] for i in range(len(case["prompts"]))]
    lengths = [len(each) for each in embeds]
    text = model.text(mx.array(np.concatenate(embeds)), lengths, h // 2, w // 2)
    modulator = load(Modulator, TransformerConfig, directory, "transformer")
    modulation = Modulation(*[part[0] for part in modulator([mx.array(0.625)], mx.float32)])
    assert_close(model(pack_latents(noise), [text], modulation)[0], expected["velocity"])


@pytest.mark.parametrize("name", CASES)
def test_vae_decoder(golden, name):
    case, expected, directory = golden(name)
    vae = load(AutoencoderKLQwenImage, VAEConfig, directory, "vae")
    z = mx.array(random_models.noise(1, *case["grid"], case["seed"] + 1000))
    assert_close(vae.decode(z)[0].transpose(2, 0, 1), expected["decoded"])


def test_vae_attention_in_chunks_of_queries(golden, monkeypatch):
    """Large pictures attend to their pixels chunk by chunk; the result is the same."""
    case, expected, directory = golden(RANDOM_CASES[0])
    h, w = case["grid"]
    monkeypatch.setattr("stages.models.vae.SCORE_BYTES", 7 * 4 * h * w)  # seven queries
    vae = load(AutoencoderKLQwenImage, VAEConfig, directory, "vae")
    z = mx.array(random_models.noise(1, *case["grid"], case["seed"] + 1000))
    assert_close(vae.decode(z)[0].transpose(2, 0, 1), expected["decoded"])


def test_both_spellings_of_text_encoder_keys():
    one = mx.ones((2, 2))
    old = {"model.layers.0.mlp.up_proj.weight": one, "visual.patch_embed.proj.weight": one, "lm_head.weight": one}
    new = {"model.language_model.layers.0.mlp.up_proj.weight": one, "model.visual.patch_embed.proj.weight": one}
    bare = {"language_model.model.layers.0.mlp.up_proj.weight": one, "language_model.lm_head.weight": one}
    for weights in (old, new, bare):
        assert list(TextEncoder.sanitize(weights)) == ["layers.0.mlp.up_proj.weight"]


def test_config_spellings_of_rope():
    flat = {"hidden_size": 8, "rope_theta": 5.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    nested = {"text_config": {"hidden_size": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}}
    for config in (flat, nested):
        fields = TextEncoderConfig.fields_of(config)
        assert (fields["hidden_size"], fields["rope_theta"]) == (8, 5.0)
    with pytest.raises(ValueError, match="yarn"):
        TextEncoderConfig.fields_of({"rope_scaling": {"type": "yarn"}})


def test_guidance_keeps_the_norm_of_the_positive_prediction():
    random = np.random.default_rng(0)
    positive, negative = (mx.array(random.standard_normal((2, 5, 64)), mx.float32) for _ in range(2))
    combined = guided(positive, negative, 4.0)
    assert_close(mx.linalg.norm(combined, axis=-1), np.linalg.norm(np.array(positive), axis=-1))
    direction = np.array(negative + 4.0 * (positive - negative))
    cosine = (
        (np.array(combined) * direction).sum(-1)
        / np.linalg.norm(combined, axis=-1)
        / np.linalg.norm(direction, axis=-1)
    )
    np.testing.assert_allclose(cosine, 1, atol=1e-5)


def test_guidance_survives_a_combined_prediction_of_zero():
    positive, negative = mx.full((1, 1, 64), 3.0), mx.full((1, 1, 64), 4.0)
    assert np.array(guided(positive, negative, 4.0)).tolist() == [[[0.0] * 64]]


def test_unpack_inverts_pack():
    latents = mx.array(random_models.noise(2, 6, 10, 0))
    tokens = pack_latents(latents)
    assert tokens.shape == (2, 15, 64)
    assert mx.array_equal(tokens[0, 1].reshape(16, 2, 2), latents[0, :, 0:2, 2:4])  # the second patch of the first row
    assert mx.array_equal(unpack_latents(tokens, 6, 10), latents)

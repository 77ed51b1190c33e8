"""Live parity with diffusers and transformers: the whole pipeline on fresh random models, sizes, prompts and noise.

Every run draws new ones; a failure prints its seed, and QWEN_STAGE_TEST_SEED repeats it.
"""

import importlib.util
import json
import os
import random
import secrets

import loras
import mlx.core as mx
import numpy as np
import pytest
import random_models
from parity import assert_close, assert_same_picture
from PIL import Image
from safetensors.numpy import save_file

from artifacts_schema import store
from artifacts_schema.manifests import EmbeddingsManifest, LatentsManifest
from stages.checkpoint import Checkpoint
from stages.modulation import model_timestep
from stages.scheduler import SchedulerConfig

installed = all(importlib.util.find_spec(name) for name in ("torch", "diffusers", "transformers"))
pytestmark = [pytest.mark.reference, pytest.mark.skipif(not installed, reason="torch and diffusers are not installed")]
if installed:
    import reference
    import torch
    from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

SEED = int(os.environ.get("QWEN_STAGE_TEST_SEED") or secrets.randbelow(2**31))
PROMPTS = [
    "a red circle",
    "",
    "a very small purple triangle in the bottom left, and above it a large cyan square, on an orange background",
    "画一只猫",
    "\nstarts with a line break",
    "emoji 🙂🙃 and  double  spaces ",
]


def drawn_configs(draw: random.Random) -> dict:
    axes = draw.choice([(2, 2, 4), (4, 6, 6), (2, 6, 8), (8, 12, 12)])
    schedule = draw.choice(
        [
            random_models.QWEN_SCHEDULE,
            {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1},
            {"use_dynamic_shifting": False, "shift": draw.uniform(0.5, 5)},
            {"use_dynamic_shifting": True, "base_shift": 1.0986, "max_shift": 1.0986, "shift_terminal": None},
        ]
    )
    return random_models.configs(
        heads=draw.randint(1, 5),
        axes=axes,
        layers=draw.randint(1, 4),
        text_heads=draw.choice([(4, 2), (6, 2), (3, 1), (2, 2)]),
        text_layers=draw.randint(1, 3),
        base_dim=draw.choice([4, 6, 8]),
        dim_mult=draw.choice([(1, 2, 4, 4), (1, 2, 2), (1, 1, 2, 2), (2, 1, 3, 2)]),
        res_blocks=draw.randint(1, 3),
        schedule=schedule,
    )


def run_both(qwen_stage, tmp_path, checkpoint, draw: random.Random):
    """The same prompts, noise and settings through qwen-stage and through the reference pipeline."""
    pipeline = reference.load(checkpoint)
    factor = pipeline.vae_scale_factor
    grid = (2 * draw.randint(2, 7), 2 * draw.randint(2, 7))
    prompts = draw.sample(PROMPTS, draw.randint(1, 3))
    negative, steps, cfg = draw.choice([" ", "ugly"]), draw.randint(2, 6), draw.choice([0.5, 1.0, 1.5, 4.0])
    noise = random_models.noise(len(prompts), *grid, draw.randrange(2**31))
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    size = f"{grid[1] * factor}x{grid[0] * factor}"
    arguments = [f"--model={checkpoint}", "--dtype=float32", "--out=ours"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    guidance = ["--batch-guidance"] if draw.random() < 0.5 else []
    for command in (
        ["encode", "prompts.jsonl", *arguments, f"--negative-prompt={negative}"],
        ["denoise", "--embeddings=ours", *arguments, f"--size={size}", f"--steps={steps}", f"--cfg={cfg}",
         "--noise=noise.safetensors", f"--batch={draw.randint(1, 3)}", *guidance],
        ["decode", "ours", *arguments],
    ):  # fmt: skip
        result = qwen_stage(*command)
        assert result.code == 0, result.err
    manifest, _ = store.read_manifest(tmp_path / "ours/latents", LatentsManifest)
    latents = np.stack([store.read_latents(tmp_path / "ours/latents", item) for item in manifest.items])
    pictures = np.stack([np.array(Image.open(tmp_path / path)) for path in result.out])
    expected = reference.generate(
        pipeline,
        noise,
        prompt=prompts,
        negative_prompt=[negative] * len(prompts),
        num_inference_steps=steps,
        true_cfg_scale=cfg,
    )
    return latents, pictures, expected, pipeline


@pytest.mark.parametrize("index", range(6))
def test_random_models_match_the_pipeline(qwen_stage, tmp_path, index):
    seed = SEED + index
    print(f"repeat with QWEN_STAGE_TEST_SEED={seed} and index 0")
    draw = random.Random(seed)
    configs = drawn_configs(draw)
    checkpoint = random_models.write_checkpoint(tmp_path / "model", configs, reference.shapes(configs), seed)
    latents, pictures, (expected_latents, expected_pictures), _ = run_both(qwen_stage, tmp_path, checkpoint, draw)
    assert_close(latents, expected_latents)
    for ours, theirs in zip(pictures, expected_pictures, strict=True):
        assert_same_picture(ours, np.round(theirs * 255).astype(np.uint8))


def test_demo_model_matches_the_pipeline(qwen_stage, tmp_path):
    print(f"repeat with QWEN_STAGE_TEST_SEED={SEED}")
    draw = random.Random(SEED)
    latents, pictures, (expected_latents, expected_pictures), _ = run_both(
        qwen_stage, tmp_path, random_models.TINY, draw
    )
    assert_close(latents, expected_latents)
    for ours, theirs in zip(pictures, expected_pictures, strict=True):
        assert_same_picture(ours, np.round(theirs * 255).astype(np.uint8))


@pytest.mark.parametrize("index", range(4))
def test_images_to_begin_with_match_the_pipeline(qwen_stage, tmp_path, index):
    """The last with the demo model, whose encoder was trained."""
    seed = SEED + index
    print(f"repeat with QWEN_STAGE_TEST_SEED={seed} and index 0")
    draw, checkpoint = random.Random(seed), random_models.TINY
    if index < 3:
        configs = drawn_configs(draw)
        checkpoint = random_models.write_checkpoint(tmp_path / "model", configs, reference.shapes(configs), seed)
    pipeline = reference.load(checkpoint)
    grid = (2 * draw.randint(2, 7), 2 * draw.randint(2, 7))
    height, width = (side * pipeline.vae_scale_factor for side in grid)
    scale = draw.choice([1, 2, 3])  # in the same shape: what we would crop, the reference would squeeze
    colours = np.random.RandomState(seed).randint(0, 256, (scale * height, scale * width, 3), np.uint8)
    image = Image.fromarray(colours)
    image.save(tmp_path / "image.png")
    noise = random_models.noise(1, *grid, seed)
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    prompt, steps, cfg, strength = (
        draw.choice(PROMPTS),
        draw.randint(2, 6),
        draw.choice([1.0, 4.0]),
        draw.uniform(0.1, 1),
    )
    out = qwen_stage(
        "run", prompt, "--image=image.png", f"--strength={strength}", "--noise=noise.safetensors",
        "--negative-prompt=b", f"--model={checkpoint}", "--dtype=float32", "--out=ours",
        f"--size={width}x{height}", f"--steps={steps}", f"--cfg={cfg}",
    ).out  # fmt: skip
    path = out[-1]
    expected = reference.from_image(
        pipeline,
        image,
        noise,
        prompt=prompt,
        negative_prompt="b",
        strength=strength,
        num_inference_steps=steps,
        true_cfg_scale=cfg,
    )
    made = np.asarray(Image.open(tmp_path / path))
    assert_same_picture(made, np.round(expected * 255).astype(np.uint8))


def test_cached_steps_match_the_pipelines_first_block_cache(qwen_stage, tmp_path):
    """Without guidance, where both decide alike; which steps are reused is the same, or the pictures would differ."""
    print(f"repeat with QWEN_STAGE_TEST_SEED={SEED}")
    prompt, size, threshold = "a green square on a black background", 16, random.Random(SEED).uniform(0.1, 0.3)
    noise = random_models.noise(1, size, size, SEED)
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    (tmp_path / "p.txt").write_text(prompt)
    qwen_stage("encode", "p.txt", "--out=run", "--dtype=float32")
    settings = ["--dtype=float32", "--noise=noise.safetensors", "--steps=20", "--cfg=1"]
    settings += ["--size=128x128", f"--cache-steps={threshold}"]
    assert qwen_stage("denoise", "--embeddings=run", *settings).code == 0
    manifest, _ = store.read_manifest(tmp_path / "run/latents", LatentsManifest)
    pipeline = reference.load(random_models.TINY)
    arguments = {"prompt": prompt, "num_inference_steps": 20, "true_cfg_scale": 1.0}
    exact, _ = reference.generate(pipeline, noise, **arguments)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    expected, _ = reference.generate(pipeline, noise, **arguments)
    assert_close(store.read_latents(tmp_path / "run/latents", manifest.items[0])[None], expected)
    assert np.abs(expected - exact).max() > 0.01


@pytest.mark.parametrize("spelling", loras.SPELLINGS)
def test_loras_match_peft(qwen_stage, tmp_path, spelling):
    """Two of them, in each spelling, unmerged there and in the weights here."""
    print(f"repeat with QWEN_STAGE_TEST_SEED={SEED}")
    draw = random.Random(SEED)
    configs = random_models.configs(heads=draw.randint(1, 4), layers=draw.randint(1, 3))
    checkpoint = random_models.write_checkpoint(tmp_path / "model", configs, reference.shapes(configs), SEED)
    pipeline = reference.load(checkpoint)
    scales = {name: draw.uniform(-1, 1) for name in ("one", "two")}
    for number, name in enumerate(scales):
        # it takes alphas behind a `transformer.` for something else
        changes = loras.drawn(checkpoint, SEED + number, alphas=spelling != "diffusers")
        path = loras.write(tmp_path / f"{name}.safetensors", changes, spelling)
        pipeline.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name=name)
    noise = random_models.noise(1, 8, 12, SEED)
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    (tmp_path / "p.txt").write_text("a red circle")
    assert qwen_stage("encode", "p.txt", f"--model={checkpoint}", "--out=run", "--dtype=float32").code == 0
    settings = ["--dtype=float32", "--noise=noise.safetensors", "--steps=3", "--cfg=2", "--size=96x64"]
    arguments = {"prompt": "a red circle", "negative_prompt": " ", "num_inference_steps": 3, "true_cfg_scale": 2.0}
    pipeline.set_adapters(list(scales), list(scales.values()))
    expected, _ = reference.generate(pipeline, noise, **arguments)
    pipeline.disable_lora()
    without, _ = reference.generate(pipeline, noise, **arguments)
    options = [f"--lora={name}.safetensors:{scale}" for name, scale in scales.items()]
    assert qwen_stage("denoise", "--embeddings=run", *settings, *options).code == 0
    manifest, _ = store.read_manifest(tmp_path / "run/latents", LatentsManifest)
    assert_close(store.read_latents(tmp_path / "run/latents", manifest.items[0])[None], expected)
    assert np.abs(expected - without).max() > 0.01


def test_our_prompt_embeds_feed_the_pipeline(qwen_stage, tmp_path):
    """The other way round: what `encode` saves is what QwenImagePipeline(prompt_embeds=…) takes."""
    pipeline = reference.load(random_models.TINY)
    noise = random_models.noise(1, 12, 12, SEED)
    prompt, negative = "a green square on a black background", "blue"
    (tmp_path / "prompts.txt").write_text(prompt)
    result = qwen_stage("encode", "prompts.txt", "--out=ours", f"--negative-prompt={negative}", "--dtype=float32")
    assert result.code == 0, result.err
    manifest, _ = store.read_manifest(tmp_path / "ours/embeddings", EmbeddingsManifest)
    saved = {}
    for name, key in (("", manifest.items[0].prompt_key), ("negative_", manifest.items[0].negative_key)):
        tensors = mx.load(str(tmp_path / f"ours/embeddings/{key}.safetensors"))
        saved[f"{name}prompt_embeds"] = torch.from_numpy(np.array(tensors["prompt_embeds"]))[None]
        saved[f"{name}prompt_embeds_mask"] = torch.from_numpy(np.array(tensors["prompt_embeds_mask"]))[None]
    settings = {"num_inference_steps": 4, "true_cfg_scale": 3.0}
    _, from_text = reference.generate(pipeline, noise, prompt=prompt, negative_prompt=negative, **settings)
    _, from_ours = reference.generate(pipeline, noise, **saved, **settings)
    np.testing.assert_allclose(from_ours, from_text, atol=2 / 255)


def test_bfloat16_timesteps_are_rounded_like_the_pipelines():
    """In bfloat16 the pipeline rounds 1000 x sigma and again the thousandth of it; the model was trained so."""
    pipeline = reference.load(random_models.TINY)
    pipeline.transformer.to(torch.bfloat16)
    seen = []
    pipeline.transformer.time_text_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
    embeds = torch.zeros(1, 3, pipeline.transformer.config.joint_attention_dim, dtype=torch.bfloat16)
    packed = torch.zeros(1, 64, 64, dtype=torch.bfloat16)
    pipeline(prompt_embeds=embeds, latents=packed, height=128, width=128, num_inference_steps=7, output_type="latent")
    schedule = Checkpoint("tiny", random_models.TINY).config("scheduler", SchedulerConfig, "scheduler_config.json")
    ours = [model_timestep(sigma, mx.bfloat16).astype(mx.float32).item() for sigma in schedule.sigmas(7, 64)[:-1]]
    assert ours == torch.cat(seen).tolist()


@pytest.mark.parametrize("index", range(20))
def test_schedules_match_the_scheduler(index):
    draw = random.Random(SEED + index)
    config = {
        "use_dynamic_shifting": draw.random() < 0.7,
        "time_shift_type": draw.choice(["exponential", "linear"]),
        "shift": draw.uniform(0.5, 6),
        "base_shift": draw.uniform(0.1, 1),
        "max_shift": draw.uniform(0.5, 2),
        "base_image_seq_len": draw.choice([64, 256]),
        "max_image_seq_len": draw.choice([4096, 8192]),
        "shift_terminal": draw.choice([None, 0.02, 0.1]),
    }
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    steps, tokens = draw.randint(2, 60), draw.randint(16, 10000)
    mu = calculate_shift(
        tokens, *(config[name] for name in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"))
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = SchedulerConfig(**config).sigmas(steps, tokens)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), atol=2e-6)

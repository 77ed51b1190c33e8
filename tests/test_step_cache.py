"""First-block caching: what is reused, that it is the same however a picture is made, and that recipes know of it."""

import math
import signal
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from artifacts_schema import store
from artifacts_schema.manifests import LatentsManifest
from orchestrator.inspect import read_recipe
from stages.checkpoint import Checkpoint
from stages.models.step_cache import StepCache
from stages.models.transformer import Modulation, Modulator, QwenImageTransformer2DModel, TransformerConfig
from stages.weights import load_weights

MODEL = "landscape-linear-shift"
SETTINGS = ["--size=64x64", "--steps=24", "--cfg=3", "--cache-steps=0.8"]


@pytest.fixture
def steps(golden):
    """steps(model options): a function (step, cache) -> velocities of one picture beside two prompts."""
    directory = golden(MODEL).checkpoint
    config = Checkpoint("test", directory).config("transformer", TransformerConfig)
    modulator = Modulator(config)
    load_weights(modulator, directory / "transformer", mx.float32)
    modulation = modulator([mx.array(1 - step / 1000) for step in range(10)], mx.float32)
    noise = mx.random.normal((10, 12, config.in_channels), key=mx.random.key(0))

    def of(**options):
        model = QwenImageTransformer2DModel(config)
        load_weights(model, directory / "transformer", mx.float32, **options)
        embeds = mx.random.normal((7, config.joint_attention_dim), key=mx.random.key(1))
        texts = [model.text(embeds[:3], [3], 3, 4), model.text(embeds[3:], [4], 3, 4)]

        def velocities(step, cache):
            latents = noise[0] + 0.003 * step * noise[1]
            made = model(latents[None], texts, Modulation(*[part[step] for part in modulation]), cache)
            return np.concatenate([np.array(each) for each in made])

        return velocities

    return of


def test_nothing_is_reused_below_the_threshold(steps):
    velocities, cache = steps(), StepCache(1e-9)
    for step in range(10):
        assert np.array_equal(velocities(step, cache), velocities(step, None))
        assert not cache.reused


def test_what_is_reused_is_what_was_added(steps):
    """At the same step it is the same but for rounding; at the next, the first block's own part is new."""
    velocities, cache = steps(), StepCache(math.inf)
    first = velocities(0, cache)
    assert not cache.reused
    again = velocities(0, cache)
    assert cache.reused
    np.testing.assert_allclose(again, first, rtol=0, atol=1e-5 * np.abs(first).max())
    following = velocities(1, cache)
    assert cache.reused
    assert not np.allclose(following, first)
    assert not np.allclose(following, velocities(1, None))


@pytest.mark.parametrize("options", [{"stream": True}, {"bits": 8}])
def test_streamed_and_quantized_models_reuse_as_well(steps, options):
    velocities, plain = steps(**options), steps(**{**options, "stream": False})
    caches = StepCache(0.5), StepCache(0.5)
    reused = []
    for step in range(10):
        assert np.array_equal(velocities(step, caches[0]), plain(step, caches[1]))
        reused.append(caches[0].reused)
    assert 0 < sum(reused) < 9


def test_change_is_that_of_the_image_that_changes_most():
    def first(*images):
        return [mx.full((1, 3, 2), value) for value in images]

    cache = StepCache(0.1)
    assert cache.reuse(first(1.0, 2.0)) is None
    cache.keep(first(5.0, 6.0))
    assert cache.reuse(first(1.05, 2.0)) is not None
    assert cache.reuse(first(1.09, 1.81)) is not None  # always beside the step that was computed whole
    assert cache.reuse(first(1.0, 2.3)) is None
    assert cache.reuse(first(1.0, 2.3)) == []  # nothing was kept since


@pytest.fixture
def denoised(qwen_stage, tmp_path, golden, fresh_cache):
    """denoised(run, *options): the latents of its pictures by their seeds."""
    (tmp_path / "p.txt").write_text("a\n")

    def make(run, *options):
        fresh_cache()
        qwen_stage("encode", "p.txt", f"--out={run}", f"--model={golden(MODEL).checkpoint}")
        result = qwen_stage("denoise", f"--embeddings={run}", *options)
        assert result.code == 0, result.err
        manifest, _ = store.read_manifest(tmp_path / run / "latents", LatentsManifest)
        return {item.seed: store.read_latents(tmp_path / run / "latents", item) for item in manifest.items}

    return make


def test_a_picture_is_the_same_in_any_company(denoised):
    alone = denoised("alone", *SETTINGS)
    assert not np.allclose(alone[42], denoised("exact", *SETTINGS[:-1])[42], atol=1e-3)
    assert np.array_equal(alone[42], denoised("streamed", *SETTINGS, "--stream")[42])
    together = denoised("together", *SETTINGS, "--batch=3", "--seed", "1", "42", "7")
    assert np.array_equal(alone[42], together[42])
    np.testing.assert_allclose(denoised("pair", *SETTINGS, "--batch-guidance")[42], alone[42], atol=1e-3)


DIES = """
import os, signal, sys
from types import SimpleNamespace
from artifacts_schema import trajectory
from orchestrator import cli

def publish(*arguments):
    global left
    trajectory.store.disk.publish(*arguments)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

left = int(sys.argv[1])
trajectory.disk = SimpleNamespace(**{**vars(trajectory.disk), "publish": publish})
sys.exit(cli.main(sys.argv[2:]))
"""
KEEP = ["--keep-trajectory"]


@pytest.mark.parametrize(
    ("deaths", "last"),
    [
        ([([], 4), ([], 5), ([], 6)], []),
        ([(KEEP, 22), (KEEP, 23), (KEEP, 30)], KEEP),
        ([(KEEP, 22), ([], 1)], []),  # the record of a step is there, its chunk is not, and others still are
        ([(KEEP, 22), ([], 2)], KEEP),  # both are, others as well
        ([([], 4), (KEEP, 5)], []),
    ],
)
def test_killed_and_resumed_it_ends_bit_identical(denoised, tmp_path, deaths, last):
    """It goes on from the last step that was computed whole, as those after it build on that.

    Each process dies after so many files, of which every step that is saved has two.
    """
    settings = ["--size=64x64", "--steps=40", "--cfg=3", "--cache-steps=0.8", "--save-every-step"]
    expected = denoised("undisturbed", *settings, *last)
    denoised("killed", "--size=16x16", "--steps=1")  # encodes; another picture
    run = tmp_path / "killed"
    for keep, files in deaths:
        command = [sys.executable, "-P", "-c", DIES, str(files), "denoise", "--embeddings=killed", *settings, *keep]
        dead = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
        assert dead.returncode == -signal.SIGKILL
    assert np.array_equal(denoised("killed", *settings, *last)[42], expected[42])
    if last:
        trajectories = [
            {path.relative_to(each): path.read_bytes() for path in each.glob("latents/*.trajectory.zarr/c/*/0/0/0")}
            for each in (tmp_path / "undisturbed", run)
        ]
        assert len(trajectories[0]) == 41
        assert trajectories[0] == trajectories[1]


def test_recipes_know_of_it(qwen_stage, tmp_path, small_model):
    options = ["--size=32x32", "--steps=6", f"--model={small_model}"]
    exact = qwen_stage("run", "a cat", *options, "--out=run").out
    cached = qwen_stage("run", "a cat", *options, "--out=run", "--cache-steps=0.9").out
    assert exact != cached
    assert read_recipe(tmp_path / exact[0]).cache_steps is None
    assert read_recipe(tmp_path / cached[0]).cache_steps == 0.9
    assert "Cache steps: 0.9" in read_recipe(tmp_path / cached[0]).parameters()
    assert "cache-steps 0.9" in "\n".join(qwen_stage("inspect", "run").out)
    like = qwen_stage("run", "--like", tmp_path / cached[0], f"--model={small_model}", "--out=like").out
    assert (tmp_path / like[0]).read_bytes() == (tmp_path / cached[0]).read_bytes()
    off = qwen_stage("rerun", "like", "--from=denoise", "--cache-steps=0").out
    assert read_recipe(tmp_path / off[0]).cache_steps is None
    assert (tmp_path / off[0]).read_bytes() == (tmp_path / exact[0]).read_bytes()
    assert qwen_stage("rerun", "run").code == 0
    (tmp_path / "p.toml").write_text('cache_steps = 0.9\n[[prompts]]\nprompt = "a cat"\n')
    qwen_stage("encode", "p.toml", "--out=toml", f"--model={small_model}")
    qwen_stage("denoise", "--embeddings=toml", *options[:2])
    (again,) = qwen_stage("decode", "toml").out
    assert (tmp_path / again).read_bytes() == (tmp_path / cached[0]).read_bytes()


@pytest.mark.parametrize("threshold", ["-0.1", "1.5", "nan"])
def test_thresholds_that_mean_nothing(qwen_stage, tmp_path, threshold):
    result = qwen_stage("run", "a cat", f"--cache-steps={threshold}")
    assert result.code == 2
    assert "cache_steps must be between 0, which is off, and 1" in result.err

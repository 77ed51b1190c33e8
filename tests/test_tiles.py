"""A picture decoded in tiles is the picture decoded whole, in memory that the tiles bound.

Every run draws new models and sizes; a failure prints its seed, and QWEN_STAGE_TEST_SEED repeats it.
"""

import math
import os
import random
import secrets
from pathlib import Path

import mlx.core as mx
import msgspec
import numpy as np
import pytest
import random_models
from mlx.utils import tree_flatten
from PIL import Image

from stages.decode import decode
from stages.models import tiles
from stages.models.vae import AutoencoderKLQwenImage, UpBlock, VAEConfig

SEED = int(os.environ.get("QWEN_STAGE_TEST_SEED") or secrets.randbelow(2**31))
DIM_MULTS = [(1, 2, 4, 4), (1, 2, 2), (2, 1, 3, 2), (1, 2)]


def randomize(model, seed):
    shapes = {name: weight.shape for name, weight in tree_flatten(model.parameters())}
    weights = random_models.random_weights(shapes, seed)
    model.load_weights([(name, mx.array(weight)) for name, weight in weights.items()])
    return model


def random_vae(seed, **options):
    config = msgspec.convert(random_models.configs(**options)["vae"], type=VAEConfig)
    return randomize(AutoencoderKLQwenImage(config), seed)


def put_together(vae, latents, edge):
    """RGB [H, W, 3] from tiles; NaN where there was none."""
    factor = vae.config.vae_scale_factor
    rgb = np.full((latents.shape[2] * factor, latents.shape[3] * factor, 3), np.nan, np.float32)
    shapes = set()
    for tile, part in vae.decode_tiles(latents, edge):
        assert np.isnan(rgb[tile]).any()
        rgb[tile] = np.array(part[0])
        shapes.add(part.shape)
        assert max(part.shape[1:3]) <= edge
    assert len(shapes) == 1
    return rgb


@pytest.mark.parametrize("index", range(8))
def test_tiles_are_cut_from_the_whole(index):
    print(f"repeat with QWEN_STAGE_TEST_SEED={SEED + index} and index 0")
    draw = random.Random(SEED + index)
    vae = random_vae(
        SEED + index,
        base_dim=draw.choice([4, 6]),
        dim_mult=draw.choice(DIM_MULTS),
        res_blocks=draw.randint(1, 3),
    )
    edge = draw.randint(1, 9)
    height = draw.choice([draw.randint(1, 20), edge + 1, 2 * edge + 1])  # often a row is left over
    width = draw.choice([draw.randint(1, 20), edge, 2 * edge + 1])
    latents = mx.array(random_models.noise(1, height, width, SEED + index))
    whole = np.array(vae.decode(latents)[0])
    parts = put_together(vae, latents, edge * vae.config.vae_scale_factor)
    # Bit-identical with MLX's own products; a BLAS rounds by shape, and a random model magnifies that.
    beside = np.array(vae.decode(mx.array(np.nextafter(np.array(latents), np.inf)))[0])
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6 + 8 * np.abs(beside - whole).max())


@pytest.mark.parametrize("index", range(20))
def test_all_tiles_have_one_shape_in_every_layer(index):
    draw = random.Random(SEED + index)
    size, edge, factor = draw.randint(1, 60), draw.randint(1, 30), 4
    layers = [
        layer for block in (UpBlock(4, 4, draw.randint(1, 2), True) for _ in range(2)) for layer in block.layers()
    ]
    each = tiles.along(layers, size, edge)
    assert len({tuple(span.stop - span.start for span in spans) for spans in each}) == 1, (SEED, index)
    assert {pixel for spans in each for pixel in range(spans[-1].start, spans[-1].stop)} == set(range(factor * size))
    assert len(each) == math.ceil(size / edge)
    assert all(span.stop - span.start <= factor * edge for *_, span in each)


def test_a_halo_one_pixel_short_leaves_a_seam():
    block = randomize(UpBlock(4, 4, 1, upsample=True), SEED)
    x = mx.array(np.random.RandomState(SEED).standard_normal((1, 12, 12, 4)), mx.float32)

    def made(local, span):
        spans = (local.source(span, 12), span)
        return tiles.part([local], x, spans, spans)

    tile = slice(4, 8)
    for local in block.layers():
        whole = local.layer(x)[:, tile, tile]
        short = made(local._replace(reach=local.reach - 1), tile)
        assert mx.abs(made(local, tile) - whole).max() < 1e-5
        assert mx.abs(short - whole)[:, 0].max() > 1e-3
        assert mx.abs(short - whole)[:, :, 0].max() > 1e-3


def test_halos_are_as_large_as_they_must_be_and_no_larger():
    """Pixels outside a tile's source change nothing in it; those on the source's edge do."""
    block = randomize(UpBlock(4, 4, 1, upsample=True), SEED)
    x = np.random.RandomState(SEED).standard_normal((1, 24, 24, 4)).astype(np.float32)
    spans = [[slice(20, 28)], [slice(24, 27)]]
    for span in spans:
        for layer in reversed(block.layers()):
            span.insert(0, layer.source(span[0], 24))
    down, across = (span[0] for span in spans)
    assert (down, across) == (slice(5, 19), slice(7, 18))  # 4 convolutions below the upsampler, half of its one more

    def made(changed):
        return np.array(tiles.part(block.layers(), mx.array(np.where(changed[..., None], x + 1, x)), *spans))

    inside = np.zeros((1, 24, 24), bool)
    inside[:, down, across] = True
    before = made(np.zeros_like(inside))
    assert np.array_equal(made(~inside), before)
    for edge in ((down.start, None), (down.stop - 1, None), (None, across.start), (None, across.stop - 1)):
        changed = np.zeros_like(inside)
        changed[:, *(slice(None) if at is None else at for at in edge)] = True
        assert not np.array_equal(made(changed & inside), before)


def test_memory_is_bounded_by_the_tiles(monkeypatch):
    monkeypatch.setattr("stages.models.vae.SCORE_BYTES", 1 << 16)
    vae = random_vae(SEED)
    mx.eval(vae.parameters())

    def peak(size, edge):
        latents = mx.array(random_models.noise(1, size // 8, size // 8, SEED))
        mx.eval(latents)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for _, rgb in vae.decode_tiles(latents, edge):
            mx.eval(rgb)
        return mx.get_peak_memory() - before

    assert peak(384, 384) > 3 * peak(192, 192)
    assert peak(384, 64) < 1.5 * peak(192, 64) < 0.5 * peak(384, 384)


def test_a_picture_of_the_demo_model(qwen_stage, fresh_cache, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle on a white background")
    assert qwen_stage("encode", "p.txt", "--out=run").code == 0
    assert qwen_stage("denoise", "--embeddings=run", "--size=256x192", "--steps=4").code == 0
    reports, pictures = [], []
    for out, tile in (("whole", None), ("tiled", 80)):
        fresh_cache()
        (path,), _ = decode(
            Path("run"), None, Path(out), tile=tile, report=lambda *each: reports.append(each), notice=print
        )
        pictures.append(np.array(Image.open(path)).astype(int))
    error = np.square(pictures[0] - pictures[1]).mean()
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert error == 0 or 10 * math.log10(255**2 / error) >= 50
    assert reports == [("decode", n, 1) for n in range(2)] + [("decode", n, 12) for n in range(13)]


@pytest.mark.parametrize("tile", [0, -64, 32, 100])
def test_unusable_tiles_are_refused(qwen_stage, tmp_path, tile):
    (tmp_path / "p.txt").write_text("a red circle")
    qwen_stage("encode", "p.txt", "--out=run")
    qwen_stage("denoise", "--embeddings=run", "--size=16x16", "--steps=1")
    result = qwen_stage("decode", "run", f"--tile={tile}")
    assert result.code == 2
    assert result.err == f"qwen-stage: error: --tile {tile}: must be a multiple of 8, at least 64\n"

"""How a picture looks while it is denoised: an estimate, that costs and changes nothing."""

import os

import numpy as np
import pytest
from PIL import Image

from artifacts_schema import cache, store
from artifacts_schema.manifests import ImagesManifest, LatentsManifest
from stages import preview
from stages.checkpoint import open_checkpoint
from stages.preview import Fit

PROMPTS = (
    "a red circle on a white background",
    "a green triangle on a black background",
    "a blue square on a yellow background",
    "a white ring on a blue background",
)


def likeness(fit: Fit, run) -> list[float]:
    """Of each picture, the correlation of its preview with its pixels at latent resolution."""
    latents, _ = store.read_manifest(run / "latents", LatentsManifest)
    images, _ = store.read_manifest(run / "images", ImagesManifest)
    found = []
    for item, image in zip(latents.items, images.items, strict=True):
        normalized = store.read_latents(run / "latents", item)
        _, h, w = normalized.shape
        with Image.open(run / "images" / image.file.path) as picture:
            small = picture.resize((w, h), Image.Resampling.BOX)
        found.append(np.corrcoef(fit.rgb(normalized).ravel(), np.asarray(small).ravel())[0, 1])
    return found


def test_what_is_linear_is_learned_exactly():
    random = np.random.default_rng(0)
    fit = Fit("0" * 64, None)
    with pytest.raises(ValueError, match="nothing was learned"):
        fit.rgb(np.zeros((4, 2, 2)))
    weights = random.uniform(-0.05, 0.05, (3, 4))

    def colours(latents):
        return (np.einsum("oc,chw->hwo", weights, latents) + 0.5) * 255

    for _ in range(3):
        latents = random.standard_normal((4, 12, 8))
        fit.add(latents, colours(latents).repeat(8, 0).repeat(8, 1))
    new = random.standard_normal((4, 5, 6))
    assert abs(fit.rgb(new) - colours(new)).max() < 1.5


def test_previews_look_like_the_pictures(qwen_stage, tmp_path):
    """As far as a linear function of the demo's latents can; it is better the more it has seen."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    assert qwen_stage("encode", "p.txt", "--out=run").code == 0
    assert qwen_stage("denoise", "--embeddings=run", "--steps=10").code == 0
    assert qwen_stage("fit-preview").code == 0
    begun = Fit.of(open_checkpoint(None))
    assert qwen_stage("decode", "run").code == 0
    learned = Fit.of(open_checkpoint(None))
    before, after = (likeness(fit, tmp_path / "run") for fit in (begun, learned))
    assert np.mean(before) > 0.4
    assert np.mean(after) > 0.8
    assert sorted(after)[1] > 0.85


@pytest.fixture
def shown(qwen_stage, tmp_path, small_model, monkeypatch, fresh_cache):
    """shown(*options): denoises two pictures, and returns what was shown meanwhile."""
    (tmp_path / "p.txt").write_text("a\nb\n")
    assert qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}").code == 0
    monkeypatch.setattr(preview, "EVERY_SECONDS", 0)
    monkeypatch.setattr(preview, "SHARE", 1e9)
    sizes = []

    def show(self, latents, original=preview.Preview.show):
        original(self, latents)
        if self.path.exists():
            with Image.open(self.path, formats=["WEBP"]) as picture:
                sizes.append(picture.size)

    monkeypatch.setattr(preview.Preview, "show", show)

    def denoise(out, *options, fit=True):
        fresh_cache()
        if fit:
            assert qwen_stage("fit-preview", f"--model={small_model}").code == 0
        sizes.clear()
        result = qwen_stage("denoise", "--embeddings=run", "--size=32x48", "--steps=3", f"--out={out}", *options)
        assert result.code == 0, result.err
        return list(sizes)

    return denoise


def bytes_of(run) -> list[bytes]:
    return [path.read_bytes() for path in sorted(run.rglob("latents/*.zarr/c/0/0/0"))]


def test_a_preview_is_shown_meanwhile_and_changes_nothing(shown, tmp_path):
    assert shown("without") == []
    assert shown("with", "--preview=live.webp") == [(256, 384)] * 6
    assert shown("batch", "--preview=live.webp", "--batch=2") == [(256, 384)] * 3
    assert not (tmp_path / "live.webp").exists()
    assert len(bytes_of(tmp_path / "with")) == 2
    assert bytes_of(tmp_path / "with") == bytes_of(tmp_path / "without")


def test_without_a_fit_or_a_place_there_is_none(shown, tmp_path):
    assert shown("one", "--preview=live.webp", fit=False) == []
    assert shown("two", "--preview=nowhere/live.webp") == []
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_a_fit_that_is_damaged_is_made_again(qwen_stage, small_model, own_cache):
    command = ["fit-preview", f"--model={small_model}"]
    assert qwen_stage(*command).code == 0
    (path,) = own_cache.glob("previews/*.json")
    whole = path.read_bytes()
    checkpoint = open_checkpoint(str(small_model))
    for damage in (b"", whole[:-9], whole.replace(b"0.", b"1.", 1), whole.replace(b'"vae": "', b'"vae": "0', 1)):
        path.write_bytes(damage)
        assert Fit.of(checkpoint).moments is None
        assert qwen_stage(*command).code == 0
        assert path.read_bytes() == whole  # and what is made up is always the same
    cache.put_moments(checkpoint.fingerprint("vae"), ((1.0, 2.0),))  # whole, and yet none
    assert Fit.of(checkpoint).moments is None


def test_trimming_keeps_fits_and_sweeps_beside_them(qwen_stage, small_model, own_cache):
    qwen_stage("fit-preview", f"--model={small_model}")
    (path,) = own_cache.glob("previews/*.json")
    half = path.with_name(f".tmp-{'0' * 16}")
    for each in (path, half):
        each.touch()
        os.utime(each, (0, 0))
    assert qwen_stage("cache", "verify").code == qwen_stage("cache", "trim", "--max-size=0").code == 0
    assert list(path.parent.iterdir()) == [path]

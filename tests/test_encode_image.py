"""Pictures that begin with others: what the encoder is given, what is kept of it, and what becomes of a run."""

import io
import json
import os
import re
import secrets
import shutil

import mlx.core as mx
import msgspec
import numpy as np
import pytest
import random_models
from mlx.utils import tree_flatten
from PIL import Image

from artifacts_schema import store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import EmbeddingsManifest, ImageLatentsManifest, LatentsManifest
from stages import picture
from stages.models import tiles
from stages.models.vae import VAEConfig
from stages.models.vae_encoder import AutoencoderKLQwenImageEncoder

SEED = int(os.environ.get("QWEN_STAGE_TEST_SEED") or secrets.randbelow(2**31))
PROMPT = "a red circle above a blue square"


@pytest.fixture(autouse=True)
def say_the_seed():
    print(f"repeat with QWEN_STAGE_TEST_SEED={SEED}")


def drawn(width, height):
    """A picture of noise, which no resampling can take for another."""
    return Image.fromarray(np.random.RandomState(SEED).randint(0, 256, (height, width, 3), np.uint8))


def data_of(image, **options):
    file = io.BytesIO()
    image.save(file, **{"format": "PNG", **options})
    return file.getvalue()


@pytest.fixture
def source(tmp_path):
    drawn(40, 24).save(tmp_path / "source.png")
    return tmp_path / "source.png"


def done(result):
    assert result.code == 0, result.err
    return result.out


# -- the encoder


def random_encoder(**options):
    config = msgspec.convert(random_models.configs(**options)["vae"], type=VAEConfig)
    model = AutoencoderKLQwenImageEncoder(config)
    shapes = {name: weight.shape for name, weight in tree_flatten(model.parameters())}
    weights = random_models.random_weights(shapes, SEED)
    model.load_weights([(name, mx.array(weight)) for name, weight in weights.items()])
    return model


@pytest.mark.parametrize("edge", [1, 2, 3, 5])
def test_tiles_give_what_the_whole_gives(edge):
    model = random_encoder(base_dim=4, dim_mult=(1, 2, 2), res_blocks=2)
    rgb = mx.array(np.random.RandomState(SEED).uniform(-1, 1, (1, 44, 28, 3)), mx.float32)
    whole, tiled = model.encode(rgb), model.encode(rgb, 4 * edge)
    beside = model.encode(mx.array(np.nextafter(np.array(rgb), np.inf, dtype=np.float32)))  # a BLAS rounds by shape
    assert whole.shape == (1, 16, 11, 7)
    assert mx.abs(tiled - whole).max() <= 1e-6 + 8 * mx.abs(beside - whole).max()


# -- what it is given


def test_a_picture_of_the_right_size_is_left_as_it_is():
    image = drawn(48, 32)
    rgb = picture.rgb(data_of(image), 48, 32, "it")
    assert np.array_equal(np.round((rgb + 1) * 127.5).astype(np.uint8), np.asarray(image))
    assert rgb.dtype == np.float32


def test_another_shape_is_cropped_around_the_middle_and_resampled():
    image = drawn(96, 40)
    made = picture.rgb(data_of(image), 32, 32, "it")
    expected = image.crop((28, 0, 68, 40)).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(np.round((made + 1) * 127.5).astype(np.uint8), np.asarray(expected))


def test_cameras_say_how_they_were_held(tmp_path):
    image, exif = drawn(48, 32), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    (tmp_path / "it.png").write_bytes(data_of(image, exif=exif))
    read = picture.read(tmp_path / "it.png")
    assert (read.width, read.height) == (32, 48)
    rgb = picture.rgb(read.data, 32, 48, "it")
    turned = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(np.round((rgb + 1) * 127.5).astype(np.uint8), turned)


def test_what_is_transparent_is_white():
    image = drawn(16, 16)
    image.putalpha(0)
    assert (picture.rgb(data_of(image), 16, 16, "it") == 1).all()


def test_16_bits_are_rounded_not_cut_off():
    image = Image.fromarray(np.full((16, 16), 257 * 200 - 100, np.uint16))
    assert abs(picture.rgb(data_of(image), 16, 16, "it") - (200 / 127.5 - 1)).max() < 1e-6
    shows_through = picture.rgb(data_of(image, transparency=257 * 200 - 100), 16, 16, "it")
    assert (shows_through == 1).all()


@pytest.mark.parametrize("numbers", [np.float32, np.int32])
def test_numbers_of_which_nobody_says_what_is_white(tmp_path, numbers):
    Image.fromarray(np.ones((16, 16), numbers)).save(tmp_path / "it.tiff")
    with pytest.raises(UserError, match="nobody says what is white"):
        picture.read(tmp_path / "it.tiff")


def test_what_is_said_beside_a_picture_may_be_anything(tmp_path):
    (tmp_path / "it.jpg").write_bytes(data_of(drawn(32, 16), format="JPEG", exif=b"Exif\0\0" + b"junk" * 9))
    assert picture.read(tmp_path / "it.jpg")[2:] == (32, 16)


def test_a_picture_of_one_pixel_fills_any_size():
    rgb = picture.rgb(data_of(Image.new("RGB", (1, 1), "red")), 512, 128, "it")
    assert (rgb == (1, -1, -1)).all()


def test_links_are_followed_and_programs_are_not_run(tmp_path):
    (tmp_path / "real.png").write_bytes(data_of(drawn(16, 16)))
    (tmp_path / "link.png").symlink_to("real.png")
    assert picture.read(tmp_path / "link.png").width == 16
    (tmp_path / "it.eps").write_bytes(data_of(drawn(16, 16), format="EPS"))
    os.mkfifo(tmp_path / "pipe")
    for name, message in {"it.eps": "no picture", "pipe": "is no file", "a\0b": "null"}.items():
        with pytest.raises(UserError, match=message):
            picture.read(tmp_path / name)


def test_files_that_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "MAX_BYTES", 1 << 20)
    (tmp_path / "it.png").write_bytes(bytes(1 << 21))
    with pytest.raises(UserError, match="larger than 1 MiB"):
        picture.read(tmp_path / "it.png")


@pytest.mark.parametrize(("dim_mult", "res_blocks"), [((1, 2, 4, 4), 2), ((1, 2, 2), 1)])
def test_estimates_count_the_halo(monkeypatch, dim_mult, res_blocks):
    """What the encoder sees around a tile, as its layers have it."""
    model = random_encoder(base_dim=4, dim_mult=dim_mult, res_blocks=res_blocks)
    seen = []
    monkeypatch.setattr(tiles, "whole", lambda layers, x, edge: seen.append(layers) or x)
    monkeypatch.setattr(model.encoder.mid_block, "attentions", [lambda x: x])
    model.encoder(mx.zeros((1, 8, 8, 3)), 1)
    along = tiles.along(seen[0], 4096, 16)
    (needed, *_), config = along[len(along) // 2], model.config
    width, factor = needed.stop - needed.start, config.vae_scale_factor
    assert width <= 16 * factor + 2 * config.encoder_halo <= width + 4 * factor


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "RGBA"])
def test_all_kinds_of_colours(mode):
    data = data_of(drawn(16, 16).convert(mode), format="TIFF" if mode == "CMYK" else "PNG")
    assert picture.rgb(data, 16, 16, "it").shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no picture"),
        (b"a text", "no picture"),
        (data_of(drawn(64, 64))[:-2000], "cannot be read: .*truncated"),
    ],
)
def test_what_is_no_picture(tmp_path, content, message):
    (tmp_path / "it.png").write_bytes(content)
    with pytest.raises(UserError, match=message):
        picture.read(tmp_path / "it.png")


def test_a_picture_of_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    drawn(64, 32).save(tmp_path / "it.png")
    with pytest.raises(UserError, match="more than 1000 pixels"):
        picture.read(tmp_path / "it.png")


@pytest.mark.parametrize("index", range(20))
def test_sizes_have_the_shape_of_the_picture(index):
    draw = np.random.RandomState((SEED + index) % 2**32)
    width, height = map(int, draw.randint(1, 5000, 2))
    across, down = picture.size_like(width, height, 1024 * 1024, 16)
    assert across % 16 == down % 16 == 0
    assert min(across, down) >= 16
    if max(width / height, height / width) < 4:
        assert abs(across * down / 1024**2 - 1) < 0.08
        assert abs((across / down) / (width / height) - 1) < 0.08


# -- runs


def test_a_run_begins_with_an_image(qwen_stage, tmp_path, source):
    (path,) = done(qwen_stage("run", PROMPT, f"--image={source}", "--strength=0.4", "--steps=5", "--out=run"))
    embeddings, _ = store.read_manifest(tmp_path / "run/embeddings", EmbeddingsManifest)
    images, _ = store.read_manifest(tmp_path / "run/image_latents", ImageLatentsManifest)
    latents, _ = store.read_manifest(tmp_path / "run/latents", LatentsManifest)
    assert [image.name for image in embeddings.images] == ["source.png"]
    assert (tmp_path / "run/embeddings" / embeddings.images[0].file.path).read_bytes() == source.read_bytes()
    (image,), (item,) = images.items, latents.items
    assert (image.width, image.height) == (item.width, item.height) == (160, 96)  # in its shape, the model's own area
    assert (item.image, item.strength, item.num_inference_steps) == (embeddings.images[0].file.sha256, 0.4, 5)
    said = done(qwen_stage("inspect", path))
    assert {f"  image: {item.image}", "  strength: 0.4"} <= set(said)
    assert any("from 'source.png'" in line for line in done(qwen_stage("inspect", "run")))


def test_strength_says_how_far_it_goes(qwen_stage, tmp_path):
    """From hardly at all to what noise alone would give."""
    begin = done(qwen_stage("run", "a green square on a white background", "--seed=3", "--out=begin"))[0]
    options = [f"--image={begin}", "--seed=7", "--steps=10", "--out=run"]
    away = []
    before = np.asarray(Image.open(tmp_path / begin)).astype(int)
    for strength in ("0.1", "0.6", "1"):
        path = done(qwen_stage("run", PROMPT, *options, f"--strength={strength}"))[-1]
        away.append(np.abs(np.asarray(Image.open(tmp_path / path)).astype(int) - before).mean())
    assert away == sorted(away)
    assert away[0] < 0.2 * away[2]
    alone = done(qwen_stage("run", PROMPT, "--seed=7", "--steps=10", "--out=alone"))[0]
    assert (tmp_path / alone).read_bytes() != (tmp_path / path).read_bytes()  # recipes differ
    assert np.array_equal(np.asarray(Image.open(tmp_path / alone)), np.asarray(Image.open(tmp_path / path)))


def test_images_are_encoded_once_for_all_runs(qwen_stage, tmp_path, source):
    arguments = ["run", PROMPT, f"--image={source}", "--steps=2"]
    done(qwen_stage(*arguments, "--out=one"))
    (one,) = store.read_manifest(tmp_path / "one/image_latents", ImageLatentsManifest)[0].items
    done(qwen_stage(*arguments, "--out=two", "--seed=9"))
    (two,) = store.read_manifest(tmp_path / "two/image_latents", ImageLatentsManifest)[0].items
    assert two == one  # with what it cost
    assert "1 of 1 images are encoded already" in qwen_stage("encode-image", "two").err


def test_prompt_files_name_images_beside_them(qwen_stage, tmp_path, source):
    (tmp_path / "folder").mkdir()
    shutil.move(source, tmp_path / "folder/source.png")
    lines = [
        {"prompt": "a", "image": "source.png", "strength": 0.5, "size": "32x48", "steps": 2},
        {"prompt": "b", "image": "source.png", "size": "48x32", "steps": 2},
        {"prompt": "c", "size": "32x32", "steps": 2},
    ]
    (tmp_path / "folder/p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done(qwen_stage("encode", "folder/p.jsonl", "--out=run"))
    shutil.rmtree(tmp_path / "folder")  # the run holds what it needs
    done(qwen_stage("encode-image", "run"))
    done(qwen_stage("denoise", "--embeddings=run", "--batch=2"))
    latents, _ = store.read_manifest(tmp_path / "run/latents", LatentsManifest)
    assert [(item.strength, item.image is None) for item in latents.items] == [(0.5, False), (0.6, False), (None, True)]


def test_denoise_says_what_is_missing(qwen_stage, tmp_path, source):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "image": "source.png"}))
    done(qwen_stage("encode", "p.jsonl", "--out=run"))
    result = qwen_stage("denoise", "--embeddings=run", "--size=32x32", "--steps=1")
    assert result.code == 2
    assert "is not encoded at 32x32; run `qwen-stage encode-image run --size 32x32` first" in result.err
    done(qwen_stage("encode-image", "run", "--size=32x32"))
    done(qwen_stage("denoise", "--embeddings=run", "--size=32x32", "--steps=1"))


def test_an_interrupted_picture_goes_on_from_its_last_step(qwen_stage, tmp_path, source):
    """Steps are counted from where the image comes in."""
    arguments = ["run", PROMPT, f"--image={source}", "--strength=0.5", "--steps=8", "--size=32x32"]
    done(qwen_stage(*arguments, "--keep-trajectory", "--out=run"))
    latents, _ = store.read_manifest(tmp_path / "run/latents", LatentsManifest)
    (item,) = latents.items
    steps = tmp_path / f"run/latents/{item.key}.trajectory.zarr/c"
    assert sorted(int(each.name) for each in steps.iterdir()) == [0, 1, 2, 3, 4]
    expected = store.read_latents(tmp_path / "run/latents", item)
    for each in (tmp_path / "run/latents").glob("manifest*"):
        each.unlink()
    shutil.rmtree(tmp_path / f"run/latents/{item.key}.zarr")
    for step in ("3", "4"):
        shutil.rmtree(steps / step)
    result = qwen_stage("denoise", "--embeddings=run", "--keep-trajectory")
    assert "goes on after step 2" in result.err
    (again,) = store.read_manifest(tmp_path / "run/latents", LatentsManifest)[0].items
    assert np.array_equal(store.read_latents(tmp_path / "run/latents", again), expected)


def test_reruns_repair_and_vary(qwen_stage, tmp_path, source):
    (path,) = done(qwen_stage("run", PROMPT, f"--image={source}", "--steps=4", "--size=32x32", "--out=run"))
    shutil.rmtree(os.environ["QWEN_STAGE_CACHE"])
    for array in [*tmp_path.glob("run/image_latents/*.zarr"), *tmp_path.glob("run/latents/*.zarr")]:
        shutil.rmtree(array)
    source.unlink()
    before = (tmp_path / path).read_bytes()
    assert done(qwen_stage("rerun", "run")) == [path]
    assert (tmp_path / path).read_bytes() == before
    assert "every file is whole" in qwen_stage("inspect", "run", "--verify").err
    other = done(qwen_stage("rerun", "run", "--from=denoise", "--strength=0.3", "--size=48x32"))
    latents, _ = store.read_manifest(tmp_path / "run/latents", LatentsManifest)
    assert [(item.strength, item.width) for item in latents.items] == [(0.6, 32), (0.3, 48)]
    assert len(other) == 1


def test_reruns_make_what_no_picture_begins_with_any_longer(qwen_stage, tmp_path, source):
    done(qwen_stage("run", PROMPT, f"--image={source}", "--steps=2", "--size=32x32", "--out=run"))
    done(qwen_stage("encode-image", "run", "--size=48x32"))
    shutil.rmtree(os.environ["QWEN_STAGE_CACHE"])
    for array in tmp_path.glob("run/image_latents/*.zarr"):
        shutil.rmtree(array)
    done(qwen_stage("rerun", "run"))
    assert "every file is whole" in qwen_stage("inspect", "run", "--verify").err
    for name in ("manifest.json", "manifest.backup.json"):
        (tmp_path / "run/image_latents" / name).write_bytes(b"{}")
    result = qwen_stage("rerun", "run")
    assert "cannot be read; what it listed is made again" in result.err
    done(result)
    done(qwen_stage("inspect", "run", "--verify"))


def test_an_image_that_is_damaged_has_to_be_given_again(qwen_stage, tmp_path, source):
    (path,) = done(qwen_stage("run", PROMPT, f"--image={source}", "--steps=2", "--size=32x32", "--out=run"))
    (held,) = tmp_path.glob("run/embeddings/*.png")
    held.write_bytes(held.read_bytes() + b"x")
    assert f"{held.name} is damaged" in qwen_stage("inspect", path, "--verify").err
    assert "is damaged" in qwen_stage("run", f"--like={path}").err
    result = qwen_stage("rerun", "run")
    assert result.code == 3
    assert "the image 'source.png' is damaged or missing; give it again with `qwen-stage run --image`" in result.err
    done(qwen_stage("run", PROMPT, f"--image={source}", "--steps=2", "--size=32x32", "--out=run"))
    assert "every file is whole" in qwen_stage("inspect", path, "--verify").err


def test_strength_without_an_image_is_told(qwen_stage, tmp_path):
    done(qwen_stage("run", PROMPT, "--steps=1", "--size=32x32", "--out=run"))
    assert "strength changes nothing" in qwen_stage("denoise", "--embeddings=run", "--strength=0.5").err
    assert "begins with an image" in qwen_stage("rerun", "run", "--from=denoise", "--strength=0.5").err
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "strength": 0.5}))
    assert "say which with image" in qwen_stage("encode", "p.jsonl").err


def test_a_picture_is_made_again_from_its_recipe(qwen_stage, tmp_path, source):
    strength = "--strength=0.3"
    (path,) = done(qwen_stage("run", PROMPT, f"--image={source}", "--steps=4", "--size=32x32", strength, "--out=run"))
    (again,) = done(qwen_stage("run", f"--like={path}", "--out=again"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / again)), np.asarray(Image.open(tmp_path / path)))
    shutil.copy(tmp_path / path, tmp_path / "alone.png")
    assert "give that with --image" in qwen_stage("run", "--like=alone.png").err
    (third,) = done(qwen_stage("run", "--like=alone.png", f"--image={source}", "--out=third"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / third)), np.asarray(Image.open(tmp_path / path)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "a", "--strength=0.5"], "give that with --image"),
        (["run", "a", "--image=source.png", "--strength=0"], "strength must be above 0"),
        (["run", "a", "--image=source.png", "--strength=1.5"], "at most 1"),
        (["encode", "missing.jsonl"], "image 'missing.png': No such file"),
        (["encode", "directory.jsonl"], "image 'inbox' is no file"),
        (["encode", "elsewhere.jsonl"], "image 'sha256:0' is one that a run holds; say which with --out"),
        (["encode", "empty.toml"], "image names no file"),
        (["encode-image", "plain"], "no prompt in plain begins with an image"),
        (["encode-image", "held", "--tile=10"], "--tile 10: must be a multiple of"),
        (["encode-image", "held", "--size=33x32"], "33x32 is not a multiple"),
    ],
)
def test_bad_input_is_one_clear_line(qwen_stage, tmp_path, source, arguments, message):
    (tmp_path / "p.txt").write_text("a")
    (tmp_path / "i.jsonl").write_text(json.dumps({"prompt": "a", "image": "source.png"}))
    (tmp_path / "inbox").mkdir()
    for name, image in {"missing": "missing.png", "directory": "inbox", "elsewhere": "sha256:0"}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "a", "image": image}))
    (tmp_path / "empty.toml").write_text('[[prompts]]\nprompt = "a"\nimage = ""\n')
    done(qwen_stage("encode", "p.txt", "--out=plain"))
    done(qwen_stage("encode", "i.jsonl", "--out=held"))
    result = qwen_stage(*arguments)
    assert result.code == 2
    errors = [line for line in result.err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert re.search(message, errors[0])


def test_drops_that_begin_with_images_are_refused(qwen_stage, tmp_path, source):
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox/a.jsonl").write_text(json.dumps({"prompt": "a", "image": str(source)}))
    result = qwen_stage("watch", "inbox", "--once", "--settle=0.01", "--poll")
    assert "begins with an image, which drops cannot yet" in result.err

"""A run made again: repaired where it is damaged, extended where other settings are wanted; pictures made alike."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file
from test_stages import changed

from artifacts_schema import store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import EmbeddingsManifest, LatentsManifest
from orchestrator import cli, inspect


@pytest.fixture
def run(qwen_stage, tmp_path, small_model) -> Path:
    """Two prompts, one with two seeds; the steps are kept."""
    (tmp_path / "p.toml").write_text(
        'size = "32x48"\nsteps = 2\n[[prompts]]\nprompt = "a cat"\nseeds = [5, 6]\n[[prompts]]\nprompt = "a dog"\n'
    )
    qwen_stage("encode", "p.toml", "--out=run", f"--model={small_model}")
    assert qwen_stage("denoise", "--embeddings=run", "--keep-trajectory").code == 0
    assert qwen_stage("decode", "run").code == 0
    return tmp_path / "run"


def contents(run: Path) -> dict[str, bytes]:
    """All files of a run but its locks."""
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def settings(run: Path) -> list[tuple]:
    manifest, _ = store.read_manifest(run / "latents", LatentsManifest)
    return [(i.prompt, i.seed, i.width, i.num_inference_steps, i.true_cfg_scale, i.dtype) for i in manifest.items]


def test_other_settings_stand_beside_the_old_ones(qwen_stage, run):
    before, old = contents(run), settings(run)
    result = qwen_stage("rerun", "run", "--from", "denoise", "--steps=3")
    assert result.code == 0, result.err
    assert result.out == [
        f"run/images/000{n}-a-{what}.png" for n, what in ((4, "cat-s5"), (5, "cat-s6"), (6, "dog-s42"))
    ]
    assert settings(run) == [*old, *((*item[:3], 3, *item[4:]) for item in old)]
    after = contents(run)
    assert all(after[name] == data for name, data in before.items() if "manifest" not in name)
    again = qwen_stage("rerun", "run", "--from", "denoise", "--steps=3")
    assert again.out == result.out
    assert contents(run).keys() == after.keys()


def test_quantized_pictures_stay_so_and_stand_beside_others(qwen_stage, run, small_model):
    """Of a model so small that nothing of it can be quantized; what is asked for is recorded all the same."""
    assert qwen_stage("rerun", "run", "--item=3", "--quantize=8", "--stream", "--memory=1GB").out == [
        "run/images/0004-a-dog-s42.png"
    ]
    assert qwen_stage("rerun", "run", "--item=4", "--seed=7").code == 0
    assert [(item[1], item[5]) for item in settings(run)[3:]] == [(42, "float32-q8"), (7, "float32-q8")]
    shutil.rmtree(run / "images")
    assert len(qwen_stage("rerun", "run").out) == 5
    recipe = inspect.read_recipe(run / "images/0005-a-dog-s7.png")
    assert recipe.dtype == "float32-q8"
    like = qwen_stage("run", "--like", run / "images/0005-a-dog-s7.png", "--out=like", f"--model={small_model}")
    assert like.code == 0, like.err
    assert settings(run.parent / "like") == settings(run)[4:]
    assert len(qwen_stage("rerun", "run", "--item=5", "--dtype=bfloat16").out) == 1
    assert len(qwen_stage("rerun", "run", "--item=5", "--quantize=none").out) == 1
    assert [item[5] for item in settings(run)[5:]] == ["bfloat16-q8", "float32"]
    refused = qwen_stage("rerun", "run", "--memory=1MB", "--seed=8")
    assert refused.code == 2


def test_a_quantized_text_encoder_is_part_of_the_recipe(qwen_stage, tmp_path, small_model, monkeypatch):
    common = ["--size=32x32", "--steps=1", f"--model={small_model}"]
    assert qwen_stage("run", "a cat", *common, "--quantize-text=8", "--out=run").code == 0
    (picture,) = (tmp_path / "run/images").glob("*.png")
    assert inspect.read_recipe(picture).embeddings_dtype == "float32-q8"
    assert qwen_stage("run", "--like", picture, f"--model={small_model}", "--out=like").code == 0
    assert (tmp_path / "like/images" / picture.name).read_bytes() == picture.read_bytes()
    assert (
        qwen_stage("run", "--like", picture, f"--model={small_model}", "--quantize-text=none", "--out=full").code == 0
    )
    assert inspect.read_recipe(tmp_path / "full/images" / picture.name).embeddings_dtype == "float32"


def test_all_stages_that_load_layers_are_told_how(run, monkeypatch, fresh_cache):
    for path in (*run.glob("embeddings/*.safetensors"), *run.glob("latents/*.zarr/c/0/0/0")):
        if path.is_file():
            path.write_bytes(b"damaged")
    fresh_cache()
    told = {}
    monkeypatch.setattr(
        "orchestrator.rerun.stage", lambda name, *options, **_: (told.update({name: options}), (0, []))[1]
    )
    assert cli.main(["rerun", str(run), "--no-stream", "--memory=1GB"]) == 0
    assert told.keys() == {"encode", "denoise", "decode"}
    assert all("--no-stream" in told[name] for name in ("encode", "denoise"))
    assert all("--memory=1000000000" in options for options in told.values())


def test_more_seeds_of_one_picture(qwen_stage, run):
    assert qwen_stage("rerun", "run", "--item=1", "--seed", "+2").out == [
        "run/images/0004-a-cat-s7.png",
        "run/images/0005-a-cat-s8.png",
    ]
    assert qwen_stage("rerun", "run", "--item", "1", "3", "--seed", "9").out == [
        "run/images/0006-a-cat-s9.png",
        "run/images/0007-a-dog-s9.png",
    ]
    assert [item[:2] for item in settings(run)[3:]] == [("a cat", 7), ("a cat", 8), ("a cat", 9), ("a dog", 9)]


def test_guidance_off_and_on_again(qwen_stage, run):
    for cfg, expected in (("0.5", 1.0), ("3", 3.0)):
        result = qwen_stage("rerun", "run", "--item=3", f"--cfg={cfg}")
        assert len(result.out) == 1, result.err
        assert settings(run)[-1][4] == expected
    result = qwen_stage("rerun", "run", "--item=4", "--cfg=3")  # from the one that had no negative prompt
    assert result.out == ["run/images/0005-a-dog-s42.png"]


def test_another_dtype_of_one_picture(qwen_stage, run):
    result = qwen_stage("rerun", "run", "--from=decode", "--item=2", "--dtype=bfloat16")
    assert result.out == ["run/images/0002-a-cat-s6-2.png"]
    assert len(settings(run)) == 3
    assert qwen_stage("inspect", "run", "--verify").code == 0


def test_the_first_pictures_of_a_run(qwen_stage, run):
    shutil.rmtree(run / "latents")
    shutil.rmtree(run / "images")
    assert len(qwen_stage("rerun", "run", "--size=32x32", "--seed", "1", "2").out) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is no run"),
        (["run", "--item=4"], "run has no picture 4"),
        (["run", "--from=decode", "--steps=3"], "rerun with --from denoise"),
        (["run", "--seed", "+2", "7"], "either seeds or +N"),
        (["run", "--size=33x33"], "33x33 is not a multiple"),
        (["run", "--steps=0"], "steps must be at least 1"),
    ],
)
def test_what_cannot_be_made_again(qwen_stage_process, run, arguments, message):
    before = contents(run)
    result = qwen_stage_process("rerun", *arguments)
    assert (result.code, result.out) == (2, [])
    assert message in result.err
    assert contents(run) == before


def test_a_picture_from_injected_noise_can_only_stay(qwen_stage, run, tmp_path):
    noise = np.random.default_rng(0).standard_normal((1, 16, 4, 4)).astype(np.float32)
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    (tmp_path / "p.txt").write_text("a bird\n")
    model = json.loads(qwen_stage("inspect", "run/latents", "--json").out[0])["model"]["name"]
    qwen_stage("encode", "p.txt", "--out=other", f"--model={model}")
    options = ["--size=32x32", "--steps=1", "--noise=noise.safetensors"]
    assert qwen_stage("denoise", "--embeddings=other", *options).code == 0
    assert qwen_stage("rerun", "other").out == ["other/images/0001-a-bird-noise.png"]
    next((tmp_path / "other/latents").glob("*.zarr/c/0/0/0")).write_bytes(b"damaged")
    result = qwen_stage("rerun", "other")
    assert result.code == 3
    assert "its noise came from a file" in result.err


def is_detected(run: Path) -> list[str]:
    """What is said to be wrong with a run."""
    return [line for artifact in inspect.read(run) for line in inspect.damaged(artifact)]


def test_any_flipped_byte_of_any_file_is_found_and_named(run):
    """At up to a hundred places of each file, the first and the last among them."""
    random = np.random.default_rng(0)
    for name, whole in contents(run).items():
        positions = {0, len(whole) - 1, *random.integers(0, len(whole), 98).tolist()}
        for position in sorted(positions):
            damaged = bytearray(whole)
            damaged[position] ^= int(random.integers(1, 256))
            (run / name).write_bytes(damaged)
            said = is_detected(run)
            assert len(said) == 1, (name, position, said)
            assert said[0].startswith(f"{run / name} ") or Path(name).name == "manifest.json"
            assert str((run / name).parent) in said[0], said
        (run / name).write_bytes(whole)
    assert is_detected(run) == []


@pytest.mark.parametrize(
    "pattern",
    [
        "embeddings/*.safetensors",
        "embeddings/manifest.json",
        "embeddings/manifest.backup.json",
        "latents/manifest.json",
        "latents/????????????????????????????????.zarr/c/0/0/0",
        "latents/????????????????????????????????.zarr/zarr.json",
        "latents/*.trajectory.zarr/zarr.json",
        "latents/*.trajectory.zarr/c/1/0/0/0",
        "images/manifest.json",
        "images/0002*.png",
    ],
)
def test_rerun_repairs(qwen_stage, run, fresh_cache, pattern):
    """Bit-identical, by making it again: nothing of it is in the cache any more."""
    fresh_cache()
    before = contents(run)
    path = sorted(run.glob(pattern))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = qwen_stage("inspect", "run", "--verify")
    assert found.code == 2
    assert f"{path.relative_to(run.parent)} is damaged" in found.err
    result = qwen_stage("rerun", "run")
    assert result.code == 0, result.err
    assert len(result.out) == 3
    after = contents(run)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {name for name in after if "manifest" in name}
    assert qwen_stage("inspect", "run", "--verify").code == 0


def test_rerun_repairs_pictures_whose_manifests_are_both_gone(qwen_stage, run):
    for name in (store.MANIFEST, store.BACKUP):
        (run / "images" / name).write_bytes(b"damaged")
    result = qwen_stage("rerun", "run")
    assert (result.code, len(result.out)) == (0, 3)
    for name in (store.MANIFEST, store.BACKUP):
        (run / "embeddings" / name).write_bytes(b"damaged")
    result = qwen_stage("rerun", "run")
    assert result.code == 2
    assert f"{Path('run/embeddings/manifest.json')} is damaged" in result.err


def test_a_picture_like_another(qwen_stage, run, fresh_cache, small_model, tmp_path):
    picture = run / "images/0002-a-cat-s6.png"
    fresh_cache()
    result = qwen_stage("run", "--like", picture, f"--model={small_model}", "--out=again")
    assert result.code == 0, result.err
    assert result.out == ["again/images/0001-a-cat-s6.png"]
    assert (tmp_path / result.out[0]).read_bytes() == picture.read_bytes()
    others = qwen_stage(
        "run", "a horse", "--like", picture, f"--model={small_model}", "--out=others", "--seed", "1", "2", "--steps=1"
    )
    assert [Path(path).name for path in others.out] == ["0001-a-horse-s1.png", "0002-a-horse-s2.png"]
    assert settings(tmp_path / "others") == [("a horse", seed, 32, 1, 4.0, "float32") for seed in (1, 2)]


def test_a_picture_like_another_by_another_model(qwen_stage, run, small_model, tmp_path):
    picture = run / "images/0002-a-cat-s6.png"
    result = qwen_stage("run", "--like", picture)
    assert result.code == 2
    assert f"was made with {small_model.name!r}; say with --model where that is" in result.err
    model = changed(small_model, tmp_path / "model", "transformer")
    result = qwen_stage("run", "--like", picture, f"--model={model}")
    assert result.code == 0
    assert "was made with another transformer: this picture will be another" in result.err
    result = qwen_stage("run")
    assert (result.code, "give a prompt" in result.err) == (2, True)


def test_the_way_back_from_a_picture_to_its_prompt(qwen_stage, run, tmp_path):
    picture = run / "images/0003-a-dog-s42.png"
    words = "\n".join(qwen_stage("inspect", picture, "--verify").out)
    manifest, _ = store.read_manifest(run / "latents", LatentsManifest)
    item = manifest.items[2]
    for place in (f"latents/{item.key}.zarr", f"embeddings/{item.prompt_key}.s", f"embeddings/{item.negative_key}.s"):
        assert f"from {run / place}" in words
    lineage = json.loads(qwen_stage("inspect", picture, "--json").out[0])["lineage"]
    assert [each["key"] for each in lineage[1:]] == [item.key, item.prompt_key, item.negative_key]
    (run / item.files[0].path).parent.mkdir(parents=True)
    (run / "latents" / item.files[0].path).write_bytes(b"damaged")
    assert qwen_stage("inspect", picture, "--verify").code == 2
    shutil.copy(picture, tmp_path / "travelled.png")
    travelled = json.loads(qwen_stage("inspect", "travelled.png", "--json").out[0])
    assert (travelled["lineage"], travelled["prompt"]) == ([], "a dog")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_step_in_another_steps_place_is_not_gone_on_from(qwen_stage, run, fresh_cache):
    """Each chunk is whole by its own checksum; only their record tells them apart."""
    fresh_cache()
    before = contents(run)
    manifest, _ = store.read_manifest(run / "latents", LatentsManifest)
    steps = run / "latents" / f"{manifest.items[0].key}.trajectory.zarr" / "c"
    for source, target in (("1", "x"), ("2", "1"), ("x", "2")):
        (steps / source).rename(steps / target)
    flip(run / "latents" / manifest.items[0].files[0].path)
    assert qwen_stage("inspect", "run", "--verify").code == 2
    assert qwen_stage("rerun", "run").code == 0
    after = contents(run)
    assert {name: data for name, data in after.items() if "manifest" not in name} == {
        name: data for name, data in before.items() if "manifest" not in name
    }


def test_what_is_whole_is_never_replaced(qwen_stage, run, monkeypatch):
    """Should another machine round otherwise: the picture that is there stays what was decoded."""
    from stages import denoise

    shutil.rmtree(run / "latents")
    assert qwen_stage("denoise", "--embeddings=run").code == 0
    before = contents(run)
    loop = denoise._denoise_batch
    monkeypatch.setattr(denoise, "_denoise_batch", lambda *args: [each + 1e-6 for each in loop(*args)])
    result = qwen_stage("denoise", "--embeddings=run", "--keep-trajectory")
    assert result.code == 3
    assert "came out otherwise than before; it is kept as it was" in result.err
    after = contents(run)
    assert all(after[name] == data for name, data in before.items() if "manifest" not in name)


def test_notes_of_a_file_browser_are_cleared_away(qwen_stage, run, fresh_cache):
    manifest, _ = store.read_manifest(run / "latents", LatentsManifest)
    note = run / "latents" / manifest.items[0].directory / ".DS_Store"
    note.write_bytes(b"")
    fresh_cache()
    shutil.rmtree(run / "images")
    result = qwen_stage("decode", "run")
    assert (result.code, len(result.out)) == (3, 2)
    assert str(note.relative_to(run.parent)) in qwen_stage("inspect", "run", "--verify").err
    assert len(qwen_stage("rerun", "run").out) == 3
    assert qwen_stage("inspect", "run", "--verify").code == 0


def test_a_manifest_that_is_gone_is_missed(qwen_stage, run):
    before = contents(run)
    (run / "latents/manifest.json").unlink()
    for command in (["inspect", "run", "--verify"], ["decode", "run"], ["denoise", "--embeddings=run", "--seed=9"]):
        result = qwen_stage(*command)
        assert result.code == 2
        assert "run/latents/manifest.json is missing; repair it with `qwen-stage rerun run`" in result.err
    assert qwen_stage("rerun", "run").code == 0
    assert contents(run) == before


def test_a_newer_versions_manifest_is_left_alone(qwen_stage, run):
    for name in (store.MANIFEST, store.BACKUP):
        path = run / "images" / name
        path.write_bytes(path.read_bytes().replace(b"qwen-stage/images/2", b"qwen-stage/images/9"))
    before = contents(run)
    result = qwen_stage("rerun", "run")
    assert result.code == 2
    assert "written by a newer qwen-stage" in result.err
    assert contents(run) == before


def test_an_old_backup_is_said_and_repaired(qwen_stage, run):
    backup = run / "images" / store.BACKUP
    old = backup.read_bytes()
    qwen_stage("rerun", "run", "--item=1", "--seed=7")
    backup.write_bytes(old)
    assert "is not the same as the manifest" in qwen_stage("inspect", "run", "--verify").err
    assert len(qwen_stage("rerun", "run").out) == 4
    assert qwen_stage("inspect", "run", "--verify").code == 0


def test_damaged_embeddings_stay_listed_when_others_are_added(qwen_stage, run, fresh_cache, small_model, tmp_path):
    """In a dtype that is not the default: `rerun` has to know it."""
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "b.txt").write_text("b\n")
    options = ["--out=other", f"--model={small_model}", "--dtype=bfloat16"]
    qwen_stage("encode", "a.txt", *options)
    assert qwen_stage("denoise", "--embeddings=other", "--size=32x32", "--steps=1").code == 0
    manifest, _ = store.read_manifest(tmp_path / "other/embeddings", EmbeddingsManifest)
    path = tmp_path / "other/embeddings" / f"{manifest.items[0].prompt_key}.safetensors"  # which `b` does not share
    whole = path.read_bytes()
    flip(path)
    fresh_cache()
    assert qwen_stage("encode", "b.txt", *options).code == 0
    assert f"{path.relative_to(tmp_path)} is damaged" in qwen_stage("inspect", "other", "--verify").err
    assert qwen_stage("rerun", "other").code == 0
    assert path.read_bytes() == whole
    assert qwen_stage("inspect", "other", "--verify").code == 0


def test_guidance_back_on_with_its_own_negative_prompt(qwen_stage, small_model, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n")
    encode = ["encode", "p.txt", "--out=run", f"--model={small_model}"]
    qwen_stage(*encode, "--negative-prompt=blue")
    qwen_stage("denoise", "--embeddings=run", "--size=32x32", "--steps=1", "--cfg=1")
    qwen_stage(*encode, "--negative-prompt=green")  # the same prompt again, after the picture
    assert qwen_stage("rerun", "run", "--item=1", "--cfg=3").code == 0
    assert store.read_manifest(tmp_path / "run/latents", LatentsManifest)[0].items[-1].negative_prompt == "blue"


def test_the_steps_of_a_whole_picture(qwen_stage, run):
    shutil.rmtree(run / "latents")
    qwen_stage("denoise", "--embeddings=run")
    assert qwen_stage("rerun", "run", "--item=2", "--keep-trajectory").code == 0
    items = store.read_manifest(run / "latents", LatentsManifest)[0].items
    assert [len(item.trajectory) for item in items] == [0, 5, 0]
    assert qwen_stage("denoise", "--embeddings=run").code == 0  # which does not ask for them, and keeps them
    assert store.read_manifest(run / "latents", LatentsManifest)[0].items == items


def test_verifying_a_picture_says_when_it_cannot(qwen_stage, run, tmp_path):
    picture = run / "images/0001-a-cat-s5.png"
    (tmp_path / "link.png").symlink_to(picture)
    assert qwen_stage("inspect", "link.png", "--verify").code == 0
    shutil.copy(picture, tmp_path / "copy.png")
    result = qwen_stage("inspect", "copy.png", "--verify")
    assert result.code == 2
    assert "copy.png cannot be verified: its run is not here" in result.err
    flip(run / "latents/manifest.json")
    result = qwen_stage("inspect", picture, "--verify")
    assert result.code == 2
    assert "latents/manifest.json is damaged" in result.err


def png(**texts: str) -> bytes:
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name.replace("_", "-"), text, zip=True)
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(qwen_stage="x" * 100_000_000), "carries a recipe that cannot be read: Decompressed data too large"),
        (png(qwen_stage="[" * 1_000_000), "cannot be read"),
        (png(qwen_stage='{"prompt": "a"}'), "cannot be read: Object missing required field"),
        (png(qwen_stage="{}"), "cannot be read: Object missing required field"),
        (png(other="x"), "carries no recipe"),
        (b"GIF89a" + bytes(100), "is not a PNG"),
        (b"", "is not a PNG"),
    ],
    ids=["bomb", "nested", "incomplete", "empty", "none", "gif", "nothing"],
)
def test_pictures_that_carry_no_recipe(qwen_stage, tmp_path, data, message):
    (tmp_path / "x.png").write_bytes(data)
    for command in (["inspect", "x.png"], ["run", "--like=x.png"]):
        result = qwen_stage(*command)
        assert (result.code, result.out) == (2, [])
        assert message in result.err


def test_a_picture_cut_off_anywhere(run):
    whole = (run / "images/0001-a-cat-s5.png").read_bytes()
    path = run / "cut.png"
    for length in range(0, whole.index(b"IDAT") - 8, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=str(path)):
            inspect.read_recipe(path)

"""The command from outside: exit codes, one-line errors, what is printed where."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from msgspec.structs import replace
from safetensors.numpy import load_file, save_file

from artifacts_schema import arrays, store
from artifacts_schema.manifests import EmbeddingsManifest, LatentsManifest, Settings


def assert_one_clear_line(result, *words: str) -> None:
    """Exit code 2, nothing on stdout, and a single line that holds the words and no traceback."""
    assert result.code == 2, result
    assert result.out == []
    errors = [line for line in result.err.splitlines() if line.startswith("qwen-stage: error: ")]
    assert len(errors) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("prompts.txt", "no prompts")),
        (b"one\ntwo \xff", ("prompts.txt", "line 2", "UTF-8")),
        (b"nul \0", ("prompts.txt", "line 1", "NUL")),
        (b"fine\n" + b"word " * 1100, ("word word", "tokens, more than 1024", "--truncate")),
    ],
)
def test_bad_prompt_files(qwen_stage, tmp_path, content, words):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert_one_clear_line(qwen_stage("encode", "prompts.txt"), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]  # no empty run is left behind


def test_no_such_prompt_file_and_a_directory(qwen_stage, tmp_path):
    assert_one_clear_line(qwen_stage("encode", "nowhere.txt"), "nowhere.txt", "No such file")
    (tmp_path / "folder").mkdir()
    assert_one_clear_line(qwen_stage("encode", "folder"), "folder", "directory")
    (tmp_path / "prompts.json").write_text('{"prompt": "a"}')
    assert_one_clear_line(qwen_stage("encode", "prompts.json"), "prompts.json", "--format")


def test_truncate_allows_long_prompts(qwen_stage, tmp_path):
    (tmp_path / "prompts.txt").write_text("word " * 1100)
    result = qwen_stage("encode", "prompts.txt", "--truncate", "--out=run")
    assert result.code == 0, result.err
    manifest, _ = store.read_manifest(tmp_path / "run/embeddings", EmbeddingsManifest)
    assert max(embedding.tokens for embedding in manifest.embeddings) == 1024


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size=100x100"], ("100x100", "multiple of 16", "96x96")),
        (["--size=64"], ("'64'", "WIDTHxHEIGHT")),
        (["--size=131072x64"], ("131072x64", "4096 positions")),
        (["--steps=0"], ("steps", "at least 1")),
        (["--steps=99999999999999999999"], ("steps", "at most 1000")),
        (["--cfg=nan"], ("cfg", "finite")),
        (["--cfg=inf"], ("cfg", "finite")),
        (["--seed", "3", "4", "3"], ("seed 3", "twice")),
        (["--seed=-1"], ("seed -1",)),
        (["--seed=18446744073709551616"], ("seed 18446744073709551616",)),
        (["--model=nowhere"], ("unknown model 'nowhere'",)),
        (["--model=no-such/model"], ("unknown model 'no-such/model'",)),
        (["--model=."], ("not a Qwen-Image checkpoint",)),
        (["--noise=nowhere.safetensors"], ("--noise nowhere.safetensors", "not a readable")),
        (["--out=/proc/nothing"], ("/proc/nothing", "choose another --out")),
        (["--out=prompts.txt"], ("prompts.txt", "choose another --out")),
    ],
)
def test_bad_denoise_arguments(qwen_stage, encoded, arguments, words):
    assert_one_clear_line(qwen_stage("denoise", f"--embeddings={encoded}", *arguments), *words)
    assert not (encoded / "latents").exists()


def test_run_refuses_a_bad_size_before_encoding(qwen_stage_process, tmp_path):
    result = qwen_stage_process("run", "a red circle", "--size=100x100", "--out=run")
    assert_one_clear_line(result, "100x100", "multiple of 16")
    result = qwen_stage_process("run", "a red circle", "--size=131072x64", "--out=run")
    assert_one_clear_line(result, "131072x64", "4096 positions")
    assert_one_clear_line(qwen_stage_process("run", "a", "--noise=nowhere"), "--noise nowhere", "no such file")
    assert not list(tmp_path.glob("run*"))


@pytest.fixture
def encoded(qwen_stage, tmp_path):
    """A run with the embeddings of one prompt, by the demo model."""
    (tmp_path / "prompts.txt").write_text("a red circle on a white background")
    result = qwen_stage("encode", "prompts.txt", "--out=run")
    assert result.code == 0, result.err
    return tmp_path / "run"


FAST = ["--size=32x48", "--steps=2"]


def test_denoising_without_embeddings(qwen_stage, tmp_path):
    assert_one_clear_line(qwen_stage("denoise", "--embeddings=nowhere"), "nowhere", "no such file")
    assert_one_clear_line(qwen_stage("denoise", f"--embeddings={tmp_path}"), "no embeddings", "qwen-stage encode")
    assert_one_clear_line(qwen_stage("decode", tmp_path), "no latents", "qwen-stage denoise")


def test_embeddings_of_another_model(qwen_stage, encoded, small_model):
    result = qwen_stage("denoise", f"--embeddings={encoded}", f"--model={small_model}")
    assert_one_clear_line(result, "another text_encoder", str(small_model))


def test_damaged_embeddings(qwen_stage, encoded):
    path = next((encoded / "embeddings").glob("*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_one_clear_line(
        qwen_stage("denoise", f"--embeddings={encoded}", *FAST), path.name, "damaged", "qwen-stage rerun"
    )
    path.unlink()
    assert_one_clear_line(
        qwen_stage("denoise", f"--embeddings={encoded}", *FAST), path.name, "missing", "qwen-stage rerun"
    )


def test_nan_in_embeddings(qwen_stage, encoded):
    """As a broken writer would leave them: the manifest agrees with the file."""
    directory = encoded / "embeddings"
    manifest, _ = store.read_manifest(directory, EmbeddingsManifest)
    first, *others = manifest.embeddings
    tensors = load_file(directory / first.file.path)
    tensors["prompt_embeds"][0, 0] = np.nan
    (file,) = store.publish(directory, first.file.path, safetensors.numpy.save(tensors))
    store.write_manifest(directory, replace(manifest, embeddings=(replace(first, file=file), *others)))
    assert_one_clear_line(qwen_stage("denoise", f"--embeddings={encoded}", *FAST), first.file.path, "NaN")


def test_nan_in_latents(qwen_stage, encoded):
    assert qwen_stage("denoise", f"--embeddings={encoded}", *FAST).code == 0
    directory = encoded / "latents"
    manifest, _ = store.read_manifest(directory, LatentsManifest)
    (item,) = manifest.items
    latents = store.read_latents(directory, item).copy()
    latents[0, 0, 0] = np.inf
    files = store.publish(directory, item.directory, arrays.pack(latents))
    store.write_manifest(directory, replace(manifest, items=(replace(item, files=files),)))
    assert_one_clear_line(qwen_stage("decode", encoded), item.directory, "NaN")


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        ({"noise": np.zeros((2, 16, 6, 4), np.float32)}, ("[1, C, H/8, W/8]", "(2, 16, 6, 4)")),
        ({"noise": np.zeros((1, 16, 4, 6), np.float32)}, ("(16, 4, 6)", "needs (16, 6, 4)")),
        ({"noise": np.zeros((1, 16, 6, 4), np.float16)}, ("float16",)),
        ({"noise": np.full((1, 16, 6, 4), np.nan, np.float32)}, ("NaN",)),
        ({"latents": np.zeros((1, 16, 6, 4), np.float32)}, ("one tensor named noise", "latents")),
    ],
)
def test_bad_noise(qwen_stage, encoded, tmp_path, noise, words):
    save_file(noise, tmp_path / "noise.safetensors")
    result = qwen_stage("denoise", f"--embeddings={encoded}", *FAST, "--noise=noise.safetensors")
    assert_one_clear_line(result, "--noise noise.safetensors", *words)


def damage_missing_shard(directory):
    path = directory / "diffusion_pytorch_model.safetensors"
    index = {
        "weight_map": dict.fromkeys(load_file(path), "part-1.safetensors") | {"proj_out.bias": "part-2.safetensors"}
    }
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    path.rename(directory / "part-1.safetensors")


def damage_truncated(directory):
    path = directory / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change_tensors(change):
    def damage(directory):
        path = directory / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def change_config(**fields):
    def damage(directory):
        path = directory / "config.json"
        config = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_missing_shard, ("part-2.safetensors", "missing")),
        (damage_truncated, ("diffusion_pytorch_model.safetensors", "cut short")),
        (change_tensors(lambda tensors: tensors.pop("img_in.bias")), ("lacks", "img_in.bias")),
        (change_tensors(lambda tensors: tensors.update(lora=np.ones(3, np.float32))), ("does not account for", "lora")),
        (
            change_tensors(lambda tensors: tensors.update({"img_in.bias": np.ones(3, np.float32)})),
            ("img_in.bias", "wrong shape", "(3,)"),
        ),
        (change_config(guidance_embeds=True), ("guidance_embeds",)),
        (change_config(zero_cond_t=True), ("zero_cond_t",)),
        (change_config(use_layer3d_rope=True), ("use_layer3d_rope",)),
        (change_config(use_additional_t_cond=True), ("use_additional_t_cond",)),
        (change_config(num_layers="absent"), ("config.json", "num_layers")),
        (change_config(num_layers="many"), ("config.json", "num_layers")),
        (change_config(axes_dims_rope=[2, 2, 2]), ("axes_dims_rope",)),
        (lambda directory: (directory / "config.json").write_text("{"), ("config.json", "not JSON")),
        (lambda directory: (directory / "config.json").write_text("[" * 100_000), ("config.json", "not JSON")),
        (lambda directory: (directory / "config.json").write_text("[1]"), ("config.json", "not a JSON object")),
        (lambda directory: (directory / "../vae/config.json").write_text("{}"), ("config.json", "temperal_downsample")),
        (lambda directory: (directory / "../qwen-stage.json").write_text('{"steps": 0}'), ("qwen-stage.json", "steps")),
        (lambda directory: (directory / "../qwen-stage.json").write_text('{"cfg": "x"}'), ("qwen-stage.json", "cfg")),
        (
            lambda directory: (directory / "../scheduler/scheduler_config.json").write_text('{"shift": 0}'),
            ("scheduler_config.json", "shift"),
        ),
        (lambda directory: (directory / "config.json").unlink(), ("config.json", "missing")),
        (lambda directory: shutil.rmtree(directory), ("no transformer/",)),
    ],
)
def test_damaged_models(qwen_stage, tmp_path, small_model, damage, words):
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    (tmp_path / "prompts.txt").write_text("a prompt")
    assert qwen_stage("encode", "prompts.txt", "--out=run", f"--model={model}").code == 0
    damage(model / "transformer")
    assert_one_clear_line(qwen_stage("denoise", "--embeddings=run", *FAST), *words)


@pytest.mark.parametrize(
    "config",
    ["[1]", '{"text_config": null}', '{"rope_parameters": "x"}', '{"text_config": {"num_attention_heads": 0}}'],
)
def test_damaged_text_encoders(qwen_stage, tmp_path, small_model, config):
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    (model / "text_encoder/config.json").write_text(config)
    (tmp_path / "prompts.txt").write_text("a prompt")
    assert_one_clear_line(qwen_stage("encode", "prompts.txt", f"--model={model}"), "text_encoder/config.json")
    assert not list(tmp_path.glob("run*"))


@pytest.mark.parametrize("settings", [{"num_inference_steps": 0}, {"seeds": (-1,)}, {"width": -32, "height": 32}])
def test_settings_in_an_edited_manifest(qwen_stage, encoded, settings):
    directory = encoded / "embeddings"
    manifest, _ = store.read_manifest(directory, EmbeddingsManifest)
    (item,) = manifest.items
    store.write_manifest(directory, replace(manifest, items=(replace(item, settings=Settings(**settings)),)))
    assert_one_clear_line(qwen_stage("denoise", f"--embeddings={encoded}"))


def test_a_manifest_without_its_embeddings(qwen_stage, encoded):
    directory = encoded / "embeddings"
    manifest, _ = store.read_manifest(directory, EmbeddingsManifest)
    store.write_manifest(directory, replace(manifest, embeddings=()))
    assert_one_clear_line(qwen_stage("denoise", f"--embeddings={encoded}"), "not there", "encode")


def test_a_model_in_the_hugging_face_cache(qwen_stage, tmp_path, small_model, monkeypatch):
    """Found by its name, without a network, and recorded by that name."""
    snapshot = tmp_path / "hub/models--someone--small/snapshots/0123456789"
    shutil.copytree(small_model, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0123456789")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "prompts.txt").write_text("a")
    result = qwen_stage("encode", "prompts.txt", "--out=run", "--model=someone/small")
    assert result.code == 0, result.err
    assert qwen_stage("denoise", "--embeddings=run", *FAST).code == 0
    manifest, _ = store.read_manifest(tmp_path / "run/latents", LatentsManifest)
    assert manifest.model.name == "someone/small"


def test_sharded_weights_are_the_same_model(qwen_stage, tmp_path, small_model):
    (tmp_path / "prompts.txt").write_text("a prompt")
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    latents = []
    for sharded in (False, True):
        if sharded:
            path = model / "transformer" / "diffusion_pytorch_model.safetensors"
            tensors = list(load_file(path).items())
            weight_map = {}
            for number, part in enumerate((tensors[::2], tensors[1::2])):
                name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
                save_file(dict(part), path.with_name(name))
                weight_map |= dict.fromkeys(dict(part), name)
            path.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(
                json.dumps({"weight_map": weight_map})
            )
            path.unlink()
        run = f"run-{sharded}"
        assert qwen_stage("encode", "prompts.txt", f"--out={run}", f"--model={model}").code == 0
        assert qwen_stage("denoise", f"--embeddings={run}", *FAST).code == 0
        manifest, _ = store.read_manifest(tmp_path / run / "latents", LatentsManifest)
        latents.append(store.read_latents(tmp_path / run / "latents", manifest.items[0]))
    assert np.array_equal(*latents)


def test_a_picture_that_becomes_nan_fails_alone(qwen_stage, tmp_path, small_model):
    """Exit code 3: the others are kept. Noise far out of range overflows float32 for one of two items."""
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    noise = np.random.default_rng(0).standard_normal((2, 16, 6, 4)).astype(np.float32)
    noise[0] = 3e38
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    assert qwen_stage("encode", "prompts.txt", "--out=run", f"--model={small_model}").code == 0
    result = qwen_stage("denoise", "--embeddings=run", *FAST, "--noise=noise.safetensors")
    assert result.code == 3
    assert "failed: 'one'" in result.err
    manifest, _ = store.read_manifest(tmp_path / "run/latents", LatentsManifest)
    assert [item.prompt for item in manifest.items] == ["two"]


def test_encode_makes_the_next_run_and_prints_it_alone(qwen_stage_process, tmp_path):
    for number in (1, 2):
        result = qwen_stage_process("encode", "-", input=b"eine Katze\n")
        assert result.code == 0, result.err
        assert result.out[-1].endswith(f"run{number}")
        assert (tmp_path / f"run{number}/embeddings/manifest.json").exists()
        assert "built-in demo" in result.err
        assert "--model" in result.err


def test_negative_prompts_without_guidance_are_announced(qwen_stage, tmp_path, small_model):
    (tmp_path / "prompts.txt").write_text("a")
    qwen_stage("encode", "prompts.txt", "--out=run", f"--model={small_model}", "--negative-prompt=ugly")
    result = qwen_stage("denoise", "--embeddings=run", *FAST, "--cfg=1")
    assert "negative prompts are not used" in result.err


def test_bad_usage_exits_with_2(qwen_stage):
    for arguments in ([], ["paint"], ["denoise"], ["denoise", "--embeddings=x", "--batch=0"], ["run"]):
        assert qwen_stage(*arguments).code == 2


def test_arguments_that_are_not_utf8(qwen_stage):
    for arguments in (["run", "\udcff"], ["encode", "x.txt", "--negative-prompt=\udcff"], ["decode", "\udcff"]):
        result = qwen_stage(*arguments)
        assert result.code == 2
        assert "not UTF-8" in result.err


def test_a_failed_encode_leaves_no_run(qwen_stage, tmp_path, small_model):
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    path = model / "text_encoder/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "prompts.txt").write_text("a")
    assert_one_clear_line(qwen_stage("encode", "prompts.txt", f"--model={model}"), "model.safetensors", "cut short")
    assert not list(tmp_path.glob("run*"))


def test_debug_shows_the_traceback(qwen_stage):
    result = qwen_stage("encode", "nowhere.txt", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err

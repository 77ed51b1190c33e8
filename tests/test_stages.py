"""The three stages together, on files: whole runs against golden pictures, and what must not change the result."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import random_models
from conftest import RANDOM_CASES
from parity import assert_close, assert_same_picture
from PIL import Image
from safetensors.numpy import load_file, save_file

import stages.decode
import stages.memory
from artifacts_schema import store
from artifacts_schema.manifests import EmbeddingsManifest, ImagesManifest, LatentsManifest, Recipe
from orchestrator import EXIT_SOME_FAILED
from orchestrator.inspect import read_recipe


def latents_of(run: Path) -> dict[tuple[str, int | None], np.ndarray]:
    """A run's latents by prompt and seed."""
    manifest, _ = store.read_manifest(run / "latents", LatentsManifest)
    return {(item.prompt, item.seed): store.read_latents(run / "latents", item) for item in manifest.items}


def write_prompts(path: Path, case: dict) -> None:
    entries = zip(case["prompts"], case["negative_prompts"], strict=True)
    path.write_text("".join(json.dumps({"prompt": p, "negative_prompt": n}) + "\n" for p, n in entries))


@pytest.mark.parametrize("batching", [[], ["--batch=3"], ["--batch-guidance"], ["--batch=2", "--batch-guidance"]])
@pytest.mark.parametrize("name", [*RANDOM_CASES, "demo"])
def test_golden_pictures(qwen_stage, tmp_path, golden, name, batching):
    """encode, denoise, decode give the reference's latents and pictures, however the passes are batched."""
    case, expected, checkpoint = golden(name)
    h, w = case["grid"]
    factor = expected["pictures"].shape[1] // h
    write_prompts(tmp_path / "prompts.jsonl", case)
    save_file({"noise": random_models.noise(len(case["prompts"]), h, w, case["seed"])}, tmp_path / "noise.safetensors")
    settings = [f"--size={w * factor}x{h * factor}", f"--steps={case['steps']}", f"--cfg={case['cfg']}"]
    for command in (
        ["encode", "prompts.jsonl", "--out=run", f"--model={checkpoint}", "--dtype=float32"],
        ["denoise", "--embeddings=run", *settings, "--noise=noise.safetensors", "--dtype=float32", *batching],
        ["decode", "run/latents", "--dtype=float32"],
    ):
        result = qwen_stage(*command)
        assert result.code == 0, result.err
    latents = latents_of(tmp_path / "run")
    for i, prompt in enumerate(case["prompts"]):
        assert_close(latents[prompt, None], expected["latents"][i])
        assert_same_picture(np.array(Image.open(tmp_path / result.out[i])), expected["pictures"][i])


def test_one_by_one_equals_run(qwen_stage_process, tmp_path, small_model, fresh_cache):
    """Byte-identical files from `run` and from the three commands, as real processes."""
    arguments = [f"--model={small_model}"]
    settings = ["--seed", "5", "6", "--size=48x32", "--steps=3"]
    whole = qwen_stage_process("run", "a red circle", "zwei", *settings, "--out=whole", *arguments)
    assert whole.code == 0, whole.err
    assert len(whole.out) == 4
    fresh_cache()
    encoded = qwen_stage_process("encode", "-", "--out=steps", *arguments, input=b"a red circle\nzwei\n")
    denoised = qwen_stage_process("denoise", f"--embeddings={encoded.out[-1]}", *settings)
    decoded = qwen_stage_process("decode", denoised.out[-1])
    assert decoded.code == 0, decoded.err
    for ours, theirs in zip(whole.out, decoded.out, strict=True):
        assert Path(ours).name == Path(theirs).name
        assert (tmp_path / ours).read_bytes() == (tmp_path / theirs).read_bytes()


def test_a_picture_does_not_depend_on_its_company(qwen_stage, tmp_path, small_model, fresh_cache):
    """The same seed and prompt alone, in a batch, and in another order."""
    (tmp_path / "one.txt").write_text("the one\n")
    (tmp_path / "many.txt").write_text("a much longer prompt that comes before it\nthe one\nshort\n")
    settings = ["--size=32x64", "--steps=3"]
    for name, seeds, batch in (("one", [3], 1), ("many", [9, 3], 4)):
        fresh_cache()
        qwen_stage("encode", f"{name}.txt", f"--out={name}", f"--model={small_model}")
        result = qwen_stage("denoise", f"--embeddings={name}", "--seed", *seeds, *settings, f"--batch={batch}")
        assert result.code == 0, result.err
    alone, together = latents_of(tmp_path / "one"), latents_of(tmp_path / "many")
    assert len(together) == 6
    assert_close(together["the one", 3], alone["the one", 3], 1e-5)
    assert np.abs(together["the one", 9] - alone["the one", 3]).max() > 0.1


def test_prompts_bring_their_settings(qwen_stage, tmp_path, small_model):
    """A prompt file's settings reach denoise; the command line comes before them, the model's defaults after."""
    (tmp_path / "p.toml").write_text(
        'steps = 2\nsize = "32x32"\n[[prompts]]\nprompt = "a"\nseeds = [1, 2]\nname = "first one"\n'
        '[[prompts]]\nprompt = "b"\nseed = 7\nsize = "48x32"\ncfg = 1\nnegative_prompt = "n"\n'
    )
    qwen_stage("encode", "p.toml", "--out=run", f"--model={small_model}")
    assert qwen_stage("denoise", "--embeddings=run").code == 0
    manifest, _ = store.read_manifest(tmp_path / "run/latents", LatentsManifest)
    made = [(i.prompt, i.seed, i.width, i.height, i.num_inference_steps, i.true_cfg_scale) for i in manifest.items]
    assert made == [("a", 1, 32, 32, 2, 4.0), ("a", 2, 32, 32, 2, 4.0), ("b", 7, 48, 32, 2, 1.0)]
    result = qwen_stage("denoise", "--embeddings=run", "--seed=5", "--num-inference-steps=1", "--true-cfg-scale=2")
    assert result.code == 0
    manifest, _ = store.read_manifest(tmp_path / "run/latents", LatentsManifest)
    assert [(i.seed, i.num_inference_steps, i.true_cfg_scale) for i in manifest.items[3:]] == [(5, 1, 2.0)] * 2
    pictures = qwen_stage("decode", "run").out
    assert [Path(path).name for path in pictures[:3]] == [
        "0001-first-one-s1.png",
        "0002-first-one-s2.png",
        "0003-b-s7.png",
    ]


def test_pictures_carry_their_recipe(qwen_stage, tmp_path, small_model):
    prompt = 'a "red" circle, 圆 😀'
    (tmp_path / "p.txt").write_text(prompt)
    qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}", "--negative-prompt=blurry")
    qwen_stage("denoise", "--embeddings=run", "--size=48x32", "--steps=2", "--seed=7", "--cfg=2.5")
    (path,) = qwen_stage("decode", "run").out
    text = Image.open(path).text
    settings = f"Steps: 2, Sampler: Euler, CFG scale: 2.5, Seed: 7, Size: 48x32, Model: {small_model.name}"
    assert text["parameters"] == f"{prompt}\nNegative prompt: blurry\n{settings}"
    recipe = msgspec.json.decode(text["qwen-stage"].encode(), type=Recipe)
    manifest, _ = store.read_manifest(tmp_path / "run/latents", LatentsManifest)
    assert recipe.latents_key == manifest.items[0].key
    assert (recipe.prompt, recipe.negative_prompt, recipe.seed) == (prompt, "blurry", 7)
    assert recipe.fingerprints == manifest.model.fingerprints
    assert str(tmp_path) not in text["qwen-stage"]


def test_nothing_is_done_twice(qwen_stage, tmp_path, small_model):
    (tmp_path / "p.txt").write_text("a\nb\na\n")
    qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}")
    embeddings, _ = store.read_manifest(tmp_path / "run/embeddings", EmbeddingsManifest)
    assert len(embeddings.items) == 2
    assert len(embeddings.embeddings) == 3  # a, b and the negative prompt
    (tmp_path / "q.txt").write_text("b\nc\n")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/embeddings").glob("*.safetensors")}
    assert (
        "2 of 3 texts are encoded already" in qwen_stage("encode", "q.txt", "--out=run", f"--model={small_model}").err
    )
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    embeddings, _ = store.read_manifest(tmp_path / "run/embeddings", EmbeddingsManifest)
    assert [item.prompt for item in embeddings.items] == ["a", "b", "c"]
    denoise = ["denoise", "--embeddings=run", "--size=32x32", "--steps=1"]
    assert qwen_stage(*denoise, "--seed=1").code == 0
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/latents").rglob("*") if path.is_file()}
    again = qwen_stage(*denoise, "--seed=1")
    assert "3 of 3 pictures are denoised already" in again.err
    assert all(path.stat().st_mtime_ns == before for path, before in first.items())
    more = qwen_stage(*denoise, "--seed", "1", "2")
    assert "3 of 6" in more.err
    assert len(qwen_stage("decode", "run").out) == 6
    assert "6 of 6" in qwen_stage("decode", "run").err


def changed(checkpoint: Path, target: Path, component: str) -> Path:
    """A copy of a checkpoint with one number of one component changed."""
    shutil.copytree(checkpoint, target)
    if component == "scheduler":
        path = target / "scheduler/scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "shift": 1.5, "use_dynamic_shifting": False}))
        return target
    path = next((target / component).glob("*.safetensors"))
    tensors = load_file(path)
    next(iter(tensors.values())).flat[0] += 1
    save_file(tensors, path, {"format": "pt"})
    return target


def test_whatever_determines_a_picture_is_in_its_key(qwen_stage, tmp_path, small_model):
    """Changing any one thing makes a new picture, and never finds the old one."""
    base = {"--size": "32x32", "--steps": "2", "--cfg": "3", "--seed": "1", "--dtype": "float32"}
    others = {"--size": "32x48", "--steps": "3", "--cfg": "2", "--seed": "2", "--dtype": "bfloat16"}

    def make(run: str, model: Path, settings: dict[str, str], prompt: str = "a", negative: str = "n") -> set[str]:
        (tmp_path / "p.txt").write_text(prompt)
        encoded = qwen_stage("encode", "p.txt", f"--out={run}", f"--model={model}", f"--negative-prompt={negative}")
        assert encoded.code == 0, encoded.err
        options = [f"{name}={value}" for name, value in settings.items()]
        assert qwen_stage("denoise", f"--embeddings={run}", *options).code == 0
        manifest, _ = store.read_manifest(tmp_path / run / "latents", LatentsManifest)
        return {item.key for item in manifest.items}

    made = make("run", small_model, base)
    for count, (name, value) in enumerate(others.items(), 2):
        made = make("run", small_model, {**base, name: value})
        assert len(made) == count, name
    for prompt, negative in (("b", "n"), ("a", "m")):
        more = make(f"run-{prompt}{negative}", small_model, base, prompt, negative)
        assert not more & made
        made |= more
    for component in ("text_encoder", "transformer", "scheduler"):
        more = make(f"run-{component}", changed(small_model, tmp_path / component, component), base)
        assert not more & made, component
        made |= more


def test_whatever_determines_pixels_is_in_their_key(qwen_stage, tmp_path, small_model):
    (tmp_path / "p.txt").write_text("a")
    model = changed(small_model, tmp_path / "model", "vae")
    qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}")
    qwen_stage("denoise", "--embeddings=run", "--size=32x32", "--steps=1")
    made = []
    for options in ([], ["--dtype=bfloat16"]):
        made += qwen_stage("decode", "run", *options).out
    result = qwen_stage("decode", "run", f"--model={model}")
    assert (result.code, len(set(made))) == (2, 2)
    assert "another vae" in result.err


def test_one_damaged_picture_does_not_stop_the_others(qwen_stage, tmp_path, small_model):
    (tmp_path / "p.txt").write_text("a\nb\n")
    qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}")
    qwen_stage("denoise", "--embeddings=run", "--size=32x32", "--steps=1")
    manifest, _ = store.read_manifest(tmp_path / "run/latents", LatentsManifest)
    (tmp_path / "run/latents" / manifest.items[0].files[0].path).write_bytes(b"damaged")
    result = qwen_stage("decode", "run")
    assert result.code == 3
    assert [Path(path).name for path in result.out] == ["0002-b-s42.png"]
    assert "failed: " in result.err


def test_a_second_run_in_one_directory_prints_its_own_pictures(qwen_stage_process, tmp_path, small_model):
    options = [f"--model={small_model}", "--size=32x32", "--steps=1", "--out=run"]
    assert len(qwen_stage_process("run", "a", *options).out) == 1
    second = qwen_stage_process("run", "b", *options)
    assert [Path(path).name for path in second.out] == ["0002-b-s42.png"]
    third = qwen_stage_process("run", "a", *options, "--seed", "1", "2")
    assert [Path(path).name for path in third.out] == ["0003-a-s1.png", "0004-a-s2.png"]


def test_stages_in_the_current_directory(qwen_stage, tmp_path, small_model, monkeypatch):
    (tmp_path / "p.txt").write_text("a")
    qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}")
    monkeypatch.chdir(tmp_path / "run/embeddings")
    assert qwen_stage("denoise", "--embeddings=.", "--size=32x32", "--steps=1").code == 0
    monkeypatch.chdir(tmp_path / "run/latents")
    assert qwen_stage("decode", ".").code == 0
    assert (tmp_path / "run/images/0001-a-s42.png").exists()


@pytest.mark.parametrize("cached", [True, False])
def test_damaged_latents_are_made_again(qwen_stage, tmp_path, small_model, fresh_cache, cached):
    (tmp_path / "p.txt").write_text("a\n")
    qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}")
    denoise = ["denoise", "--embeddings=run", "--size=32x32", "--steps=1"]
    assert qwen_stage(*denoise).code == 0
    before = latents_of(tmp_path / "run")["a", 42]
    chunk = next((tmp_path / "run/latents").glob("*.zarr/c/0/0/0"))
    chunk.write_bytes(b"damaged")
    assert qwen_stage("decode", "run").code == 2
    if not cached:
        fresh_cache()
    assert ("already" in qwen_stage(*denoise).err) == cached
    assert np.array_equal(latents_of(tmp_path / "run")["a", 42], before)
    assert qwen_stage("decode", "run").code == 0


def test_guidance_of_one_or_less_never_looks_at_the_negative_prompt(qwen_stage, tmp_path, small_model):
    for run, negative in (("one", "x"), ("two", "y")):
        (tmp_path / "p.txt").write_text("a\n")
        qwen_stage("encode", "p.txt", f"--out={run}", f"--model={small_model}", f"--negative-prompt={negative}")
        qwen_stage("denoise", f"--embeddings={run}", "--size=32x32", "--steps=2", "--cfg=1")
    one, two = (store.read_manifest(tmp_path / run / "latents", LatentsManifest)[0].items[0] for run in ("one", "two"))
    assert one.key == two.key
    assert one.negative_key is None


def test_manifests_say_what_it_cost(qwen_stage, tmp_path, small_model):
    (tmp_path / "p.txt").write_text("a\n")
    qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}")
    qwen_stage("denoise", "--embeddings=run", "--size=32x32", "--steps=1")
    qwen_stage("decode", "run")
    embeddings, _ = store.read_manifest(tmp_path / "run/embeddings", EmbeddingsManifest)
    latents, _ = store.read_manifest(tmp_path / "run/latents", LatentsManifest)
    images, _ = store.read_manifest(tmp_path / "run/images", ImagesManifest)
    for cost in (embeddings.cost, latents.items[0].cost, images.items[0].cost):
        assert cost.seconds > 0
        assert 10 << 20 < cost.process_peak < 8 << 30
        assert 0 < cost.mlx_peak < 1 << 30


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_is_finished(tmp_path, qwen_stage, small_model, stop):
    (tmp_path / "p.txt").write_text("a\n")
    qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}")
    settings = ["--embeddings=run", "--size=64x64", "--steps=20"]
    command = [sys.executable, "-P", "-m", "orchestrator.cli", "denoise", *settings, "--seed", *map(str, range(500))]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    manifest = tmp_path / "run/latents/manifest.json"
    while not manifest.exists() and child.poll() is None:
        time.sleep(0.02)
    os.kill(child.pid, stop)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Traceback" not in err
    kept = latents_of(tmp_path / "run")
    assert 1 <= len(kept) < 500
    assert [path for path in (tmp_path / "run").rglob(".tmp*")] == []
    result = qwen_stage("denoise", *settings, "--seed", "0")
    assert "1 of 1 pictures are denoised already" in result.err


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("terminal", [True, False], ids=["whole group", "parent alone"])
def test_interrupting_a_run_interrupts_its_stage(tmp_path, small_model, stop, terminal):
    """A terminal signals the whole process group, other programs the parent alone."""
    settings = [f"--model={small_model}", "--size=64x64", "--steps=20", "--out=run"]
    command = [sys.executable, "-P", "-m", "orchestrator.cli", "run", "a", *settings, "--seed", *map(str, range(500))]
    child = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    manifest = tmp_path / "run/latents/manifest.json"
    while not manifest.exists() and child.poll() is None:
        time.sleep(0.02)
    (os.killpg if terminal else os.kill)(child.pid, stop)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, b"")
    assert err.count(b"interrupted") == 1
    assert b"Traceback" not in err
    with store.writing(tmp_path / "run/latents"):  # the stage is gone, and so is its lock
        assert 1 <= len(latents_of(tmp_path / "run")) < 500


@pytest.mark.skipif(sys.platform != "linux", reason="finds the child in /proc")
def test_a_stage_that_is_killed_is_reported(tmp_path, small_model):
    """As the kernel does when memory ends."""
    settings = [f"--model={small_model}", "--size=64x64", "--steps=20", "--out=run"]
    command = [sys.executable, "-P", "-m", "orchestrator.cli", "run", "a", *settings, "--seed", *map(str, range(500))]
    parent = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "run/latents/manifest.json").exists() and parent.poll() is None:
        time.sleep(0.02)
    (stage,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    os.kill(int(stage), signal.SIGKILL)
    out, err = parent.communicate(timeout=60)
    assert (parent.returncode, out) == (137, b"")
    assert b"denoise was killed by SIGKILL (out of memory?)" in err
    qwen_stage = [sys.executable, "-P", "-m", "orchestrator.cli", "denoise", "--embeddings=run", "--seed=0"]
    subprocess.run([*qwen_stage, "--size=64x64", "--steps=20"], cwd=tmp_path, check=True, capture_output=True)
    assert list((tmp_path / "run").rglob(".tmp*")) == []  # what the killed one left is tidied by the next


LONG = ["--size=64x64", "--steps=20", "--seed", "1", "2", "3", "4", "5", "--cfg=3"]


def steps_done(run: Path) -> dict[str, int]:
    """The trajectories of a run, with their last steps."""
    found = run.glob("latents/*.trajectory.zarr/c")
    return {path.parent.name: max(int(step.name) for step in path.iterdir()) for path in found}


def chunks(run: Path) -> dict[Path, bytes]:
    """The content of all latents and trajectories of a run."""
    files = [path for path in run.glob("latents/*.zarr/c/**/*") if path.is_file()]
    return {path.relative_to(run): path.read_bytes() for path in files}


@pytest.mark.parametrize(("kills", "batching"), [(20, []), (6, ["--batch=5", "--batch-guidance"])])
def test_killed_at_random_and_resumed_it_ends_bit_identical(qwen_stage, tmp_path, golden, fresh_cache, kills, batching):
    """SIGKILL at random moments; every step is on disk, so none but the interrupted one is computed twice."""
    model = golden("landscape-linear-shift").checkpoint
    (tmp_path / "p.txt").write_text("a\n")
    for run in ("undisturbed", "killed"):
        qwen_stage("encode", "p.txt", f"--out={run}", f"--model={model}")
    assert qwen_stage("denoise", "--embeddings=undisturbed", *LONG, *batching, "--keep-trajectory").code == 0
    fresh_cache()
    command = [sys.executable, "-P", "-m", "orchestrator.cli", "denoise", "--embeddings=killed", *LONG, *batching]
    command.append("--keep-trajectory")
    random = np.random.default_rng()
    run = tmp_path / "killed"
    before: dict[str, int] = {}
    deaths = 0
    for kill in range(kills + 1):  # the last one lives
        child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while kill < kills and child.poll() is None and steps_done(run) == before:
            time.sleep(0.001)  # until it has gone on
        if kill < kills:
            time.sleep(random.uniform(0, 0.03))
            child.kill()
        said = child.communicate(timeout=60)[1].decode()
        last = min(before.values(), default=0)  # of the picture, or of the batch, that was interrupted
        after = [int(line.rpartition(" ")[2]) for line in said.splitlines() if "goes on after step" in line]
        # not one step is done again but the interrupted one; after the last of all, the picture may be published
        assert after in {0: ([],), 20: ([], [20])}.get(last, ([last],))
        deaths += child.returncode == -signal.SIGKILL
        now = steps_done(run)
        assert all(now[name] >= step for name, step in before.items())  # nothing that was on disk is lost
        before = now
    assert child.returncode == 0
    assert deaths == kills
    undisturbed, killed = (chunks(tmp_path / run) for run in ("undisturbed", "killed"))
    assert len(undisturbed) == 5 * (1 + 21)  # the final latents, and the noise and twenty steps
    assert killed == undisturbed


def test_an_interrupted_picture_goes_on_where_it_was(tmp_path, qwen_stage, golden, fresh_cache):
    """SIGTERM finishes the step and saves it, without --keep-trajectory too; the next start goes on from there."""
    model = golden("landscape-linear-shift").checkpoint
    (tmp_path / "p.txt").write_text("a\n")
    settings = ["--size=128x128", "--steps=120", "--cfg=3"]
    for run in ("undisturbed", "stopped"):
        qwen_stage("encode", "p.txt", f"--out={run}", f"--model={model}")
    assert qwen_stage("denoise", "--embeddings=undisturbed", *settings).code == 0
    assert not list((tmp_path / "undisturbed").rglob("*.trajectory.zarr"))
    command = [sys.executable, "-P", "-m", "orchestrator.cli", "denoise", "--embeddings=stopped", *settings]
    fresh_cache()
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list((tmp_path / "stopped").glob("latents/*.trajectory.zarr/c/*/0/0/0")) and child.poll() is None:
        time.sleep(0.01)  # until the first checkpoint
    child.terminate()
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    (saved,) = (tmp_path / "stopped").glob("latents/*.trajectory.zarr/c/*")
    assert 0 < int(saved.name) < 120
    assert qwen_stage("denoise", "--embeddings=stopped", *settings).code == 0
    assert (
        latents_of(tmp_path / "stopped")["a", 42].tobytes() == latents_of(tmp_path / "undisturbed")["a", 42].tobytes()
    )
    assert not list((tmp_path / "stopped").rglob("*.trajectory.zarr"))


def test_a_damaged_checkpoint_is_not_gone_on_from(qwen_stage, tmp_path, small_model):
    (tmp_path / "p.txt").write_text("a\n")
    denoise = ["--size=32x32", "--steps=4", "--keep-trajectory"]
    for run in ("whole", "damaged"):
        qwen_stage("encode", "p.txt", f"--out={run}", f"--model={small_model}")
        assert qwen_stage("denoise", f"--embeddings={run}", *denoise).code == 0
    for name in (store.MANIFEST, store.BACKUP):
        (tmp_path / "damaged/latents" / name).unlink()
    chunk = next((tmp_path / "damaged").glob("latents/*.trajectory.zarr/c/2/0/0/0"))
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    assert qwen_stage("denoise", "--embeddings=damaged", *denoise).code == 0
    whole, again = (store.read_manifest(tmp_path / run / "latents", LatentsManifest)[0] for run in ("whole", "damaged"))
    assert [file.sha256 for file in again.items[0].trajectory] == [file.sha256 for file in whole.items[0].trajectory]
    assert len(whole.items[0].trajectory) == 7  # five steps, the array's own description, and the steps' hashes


def test_what_float32_needs_and_has_not_ends_no_other_picture(qwen_stage, tmp_path, small_model, monkeypatch):
    """The fallback of the first does not fit, the second needs none."""
    (tmp_path / "p.txt").write_text("one\ntwo")
    qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}")
    qwen_stage("denoise", "--embeddings=run", "--size=16x16", "--steps=1")
    pixels_of, first = stages.decode.pixels_of, []

    def overflows_once(*arguments):
        first.append(arguments)
        return pixels_of(*arguments) if len(first) > 1 else None

    monkeypatch.setattr(stages.decode, "pixels_of", overflows_once)
    estimate = stages.memory.picture_states
    monkeypatch.setattr(
        stages.memory, "picture_states", lambda *sizes: 1 << 50 if sizes[-1] == "float32" else estimate(*sizes)
    )
    result = qwen_stage("decode", "run", "--dtype=float16", "--memory=1GB")
    assert result.code == EXIT_SOME_FAILED
    assert len(result.out) == 1
    assert "0002-two" in result.out[0]
    assert "'one': working in tiles of" in result.err


def test_a_picture_in_another_dtype_will_do(qwen_stage, tmp_path, small_model, monkeypatch):
    """As where the default became another: what is there is not made again unless that is asked for."""
    (tmp_path / "p.txt").write_text("a\n")
    qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}")
    qwen_stage("denoise", "--embeddings=run", "--size=16x16", "--steps=1")
    before = qwen_stage("decode", "run", "--dtype=float32").out
    monkeypatch.setattr(stages.decode, "DEFAULT_DTYPE", "float16")
    assert qwen_stage("decode", "run").out == before
    Path(before[0]).write_bytes(b"damaged")
    (other,) = qwen_stage("decode", "run").out
    assert (other != before[0], read_recipe(Path(other)).decode_dtype) == (True, "float16")


def test_noise_levels_by_preset_shift_and_hand(qwen_stage, tmp_path, small_model, fresh_cache):
    common = ["--size=32x32", f"--model={small_model}"]
    pictures = {}
    for name, options in {
        "preset": ["--preset=lightning-4"],
        "shift": ["--steps=4", "--cfg=1", "--shift=3"],
        "even": ["--steps=4", "--cfg=1", "--shift=1"],
        "sigmas": ["--cfg=1", "--sigmas=1,0.9,0.75,0.5"],
    }.items():
        fresh_cache()
        (path,) = qwen_stage("run", "a cat", *common, *options, f"--out={name}").out
        pictures[name] = tmp_path / path
    recipes = {name: read_recipe(path) for name, path in pictures.items()}
    assert (recipes["preset"].shift, recipes["preset"].sigmas, recipes["preset"].num_inference_steps) == (3.0, None, 4)
    assert (recipes["sigmas"].shift, recipes["sigmas"].sigmas) == (None, (1, 0.9, 0.75, 0.5))
    assert recipes["sigmas"].num_inference_steps == 4
    assert "Shift: 3" in recipes["shift"].parameters()
    assert 'Sigmas: "1,0.9,0.75,0.5"' in recipes["sigmas"].parameters()
    assert pictures["preset"].read_bytes() == pictures["shift"].read_bytes()
    shift, even, sigmas = (np.array(Image.open(pictures[name])).astype(int) for name in ("shift", "even", "sigmas"))
    assert np.abs(shift - sigmas).max() <= 1
    assert np.abs(shift - even).max() > 1
    for name in ("preset", "sigmas"):
        (like,) = qwen_stage("run", "--like", pictures[name], f"--model={small_model}", f"--out={name}-like").out
        assert (tmp_path / like).read_bytes() == pictures[name].read_bytes()
        (other,) = qwen_stage("rerun", f"{name}-like", "--from=denoise", "--steps=5").out
        recipe = read_recipe(tmp_path / other)
        assert (recipe.num_inference_steps, recipe.sigmas, recipe.shift) == (5, None, recipes[name].shift)
    assert "sigmas 1,0.9,0.75,0.5" in "\n".join(qwen_stage("inspect", "sigmas").out)
    (tmp_path / "p.toml").write_text('cfg = 1.0\n[[prompts]]\nprompt = "a cat"\nsigmas = [1, 0.9, 0.75, 0.5]\n')
    qwen_stage("encode", "p.toml", "--out=toml", f"--model={small_model}")
    qwen_stage("denoise", "--embeddings=toml", "--size=32x32")
    (path,) = qwen_stage("decode", "toml").out
    assert (tmp_path / path).read_bytes() == pictures["sigmas"].read_bytes()
    result = qwen_stage("run", "a cat", *common, "--sigmas=1,x")
    assert (result.code, "'1,x' is not a list of numbers" in result.err) == (2, True)


def test_float16_is_as_good_as_float32_to_the_eye(qwen_stage, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle on a white background\na blue square on a yellow background")
    qwen_stage("encode", "p.txt", "--out=run")
    qwen_stage("denoise", "--embeddings=run", "--size=64x64", "--steps=4")
    pictures = {}
    for dtype in ("float32", "float16"):
        printed = qwen_stage("decode", "run", f"--dtype={dtype}", f"--out={dtype}").out
        assert read_recipe(Path(printed[0])).decode_dtype == dtype
        pictures[dtype] = np.stack([np.array(Image.open(path)).astype(int) for path in printed])
    assert 0 < np.abs(pictures["float32"] - pictures["float16"]).max() <= 2


@pytest.mark.parametrize("factor", [1e6, np.nan])
def test_numbers_beyond_float16(qwen_stage, tmp_path, small_model, factor):
    model = shutil.copytree(small_model, tmp_path / "model")
    (file,) = (model / "vae").glob("*.safetensors")
    weights = load_file(file)
    weights["decoder.conv_in.weight"] *= np.float32(factor)
    save_file(weights, file)
    (tmp_path / "p.txt").write_text("one\ntwo")
    qwen_stage("encode", "p.txt", "--out=run", f"--model={model}")
    qwen_stage("denoise", "--embeddings=run", "--size=16x16", "--steps=1")
    result = qwen_stage("decode", "run", "--dtype=float16", "--out=a")
    if np.isnan(factor):
        assert result.code == EXIT_SOME_FAILED
        assert result.err.count("the picture became NaN; are the VAE's weights whole?") == 2
        return
    assert result.code == 0
    assert "'one' is beyond what float16 can hold; it is decoded in float32" in result.err
    assert read_recipe(Path(result.out[0])).decode_dtype == "float32"
    exact = qwen_stage("decode", "run", "--dtype=float32", "--out=b")
    for one, other in zip(result.out, exact.out, strict=True):
        assert np.array_equal(Image.open(one), Image.open(other))


def test_the_parent_of_a_run_never_imports_mlx(tmp_path, small_model):
    """The parent chains processes; the models live and die in its children."""
    script = (
        "import sys; from orchestrator.cli import main\n"
        f"code = main(['run', 'a', '--model={small_model}', '--size=32x32', '--steps=1', '--out=run'])\n"
        "heavy = {'mlx', 'numpy', 'zarr', 'safetensors', 'tokenizers', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_folder_named_stages_does_not_stand_in_for_ours(qwen_stage_process, tmp_path, small_model):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/__init__.py").write_text("raise SystemExit('the wrong stages')")
    result = qwen_stage_process("run", "a", f"--model={small_model}", "--size=32x32", "--steps=1")
    assert result.code == 0, result.err

"""The embedding cache: hit, miss, mixed, damaged, shared, trimmed; by real commands."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from conftest import GOLDEN

from artifacts_schema import arrays, cache, keys, store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import Embedding, EmbeddingsManifest, File


def write(path: Path, *prompts: str) -> Path:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return path


def embeddings(run: Path) -> dict[str, bytes]:
    manifest, _ = store.read_manifest(run / "embeddings", EmbeddingsManifest)
    return {each.key: (run / "embeddings" / each.file.path).read_bytes() for each in manifest.embeddings}


def test_hit_miss_and_mixed(qwen_stage, tmp_path, small_model):
    write(tmp_path / "one.txt", "a", "b")
    write(tmp_path / "two.txt", "b", "c")
    runs = []
    for file, run, said in (
        ("one.txt", "miss", None),
        ("one.txt", "hit", "3 of 3 texts are encoded already"),
        ("two.txt", "mixed", "2 of 3 texts are encoded already"),
    ):
        result = qwen_stage("encode", file, f"--out={run}", f"--model={small_model}")
        assert result.code == 0, result.err
        assert (said in result.err) if said else ("already" not in result.err)
        runs.append(embeddings(tmp_path / run))
    miss, hit, mixed = runs
    assert hit == miss
    assert {key: data for key, data in mixed.items() if key in miss}.items() <= miss.items()
    assert len(miss.keys() | mixed.keys()) == 4
    denoised = qwen_stage("denoise", "--embeddings=hit", "--size=32x32", "--steps=1")
    assert denoised.code == 0, denoised.err


def test_a_full_hit_imports_no_tensor_library(tmp_path, small_model, own_cache):
    write(tmp_path / "p.txt", "a", "b")
    script = (
        "import sys; from orchestrator.cli import main\n"
        f"code = main(['encode', 'p.txt', '--out=' + sys.argv[1], '--model={small_model}'])\n"
        "print(code, *sorted({'mlx', 'numpy', 'zarr', 'tokenizers', 'safetensors'} & set(sys.modules)))"
    )
    seen = [
        subprocess.run([sys.executable, "-c", script, run], cwd=tmp_path, capture_output=True, text=True).stdout
        for run in ("cold", "warm")
    ]
    assert "mlx" in seen[0].splitlines()[-1].split()
    assert seen[1].splitlines()[-1] == "0"


def contents(run: Path, kind: str, name: str) -> dict[str, bytes]:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in (run / kind).glob(name) if path.is_file()}


def test_runs_share_latents_and_pictures(qwen_stage, tmp_path, small_model, own_cache):
    """Another run that asks for the same, and more, computes only what is new."""
    write(tmp_path / "p.txt", "a")
    for run, seeds, said in (("one", [1, 2], None), ("two", [2, 3], "1 of 2"), ("three", [3, 1], "2 of 2")):
        qwen_stage("encode", "p.txt", f"--out={run}", f"--model={small_model}")
        denoised = qwen_stage("denoise", f"--embeddings={run}", "--size=32x48", "--steps=2", "--seed", *seeds)
        decoded = qwen_stage("decode", run)
        for result in (denoised, decoded):
            assert result.code == 0, result.err
            assert (f"{said} pictures are" in result.err) if said else ("already" not in result.err)
        assert [Path(path).name for path in decoded.out] == [
            f"{i:04d}-a-s{seed}.png" for i, seed in enumerate(seeds, 1)
        ]
    one, two, three = (tmp_path / run for run in ("one", "two", "three"))
    assert (
        contents(one, "latents", "*.zarr/**/*").items()
        <= {
            **contents(two, "latents", "*.zarr/**/*"),
            **contents(three, "latents", "*.zarr/**/*"),
        }.items()
    )
    assert (one / "images/0001-a-s1.png").read_bytes() == (three / "images/0002-a-s1.png").read_bytes()
    assert len(list(own_cache.glob("latents/??/*.json"))) == len(list(own_cache.glob("images/??/*.json"))) == 3


def test_the_cache_keeps_to_its_limit(qwen_stage, tmp_path, small_model, monkeypatch):
    monkeypatch.setenv("QWEN_STAGE_CACHE_SIZE", "5KB")
    write(tmp_path / "p.txt", *(f"prompt {number}" for number in range(20)))
    assert qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}").code == 0
    sizes = [entry.size for entry in cache.entries()]
    assert 5000 - max(sizes) < sum(sizes) <= 5000
    assert len(embeddings(tmp_path / "run")) == 21


@pytest.mark.parametrize("damage", ["flip", "short", "record", "symlink", "swapped"])
def test_a_damaged_entry_is_made_again(qwen_stage, tmp_path, small_model, own_cache, damage):
    write(tmp_path / "p.txt", "a", "b")
    assert qwen_stage("encode", "p.txt", "--out=one", f"--model={small_model}").code == 0
    data, other = sorted(own_cache.glob("embeddings/??/*.safetensors"))[:2]
    whole = data.read_bytes()
    if damage == "flip":
        data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "short":
        data.write_bytes(whole[:-1])
    elif damage == "record":
        data.with_suffix(".json").write_text("{")
    elif damage == "symlink":
        data.unlink()
        data.symlink_to(other)
    else:
        data.with_suffix(".json").write_bytes(other.with_suffix(".json").read_bytes())
    result = qwen_stage("encode", "p.txt", "--out=two", f"--model={small_model}")
    assert result.code == 0, result.err
    assert "set aside a damaged cache entry" in result.err
    assert embeddings(tmp_path / "two") == embeddings(tmp_path / "one")
    assert list((own_cache / "damaged").iterdir())
    assert "set aside a damaged" not in qwen_stage("encode", "p.txt", "--out=three", f"--model={small_model}").err


def test_ten_encodes_on_a_cold_cache_encode_each_prompt_once(tmp_path, small_model, own_cache):
    write(tmp_path / "p.txt", "a", "b", "c")
    command = [sys.executable, "-P", "-m", "orchestrator.cli", "encode", "p.txt", f"--model={small_model}", "--out"]
    children = [
        subprocess.Popen([*command, f"run{number}"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for number in range(10)
    ]
    errors = [child.communicate(timeout=120)[1].decode() for child in children]
    assert [child.returncode for child in children] == [0] * 10, errors
    contents = [embeddings(tmp_path / f"run{number}") for number in range(10)]
    assert contents == [contents[0]] * 10
    made = [path for path in own_cache.rglob("*.safetensors")]
    assert len(made) == 4
    said = [error for error in errors if "texts are encoded already" in error or "waiting" in error]
    assert len(said) >= 9  # all but the one that did the work


def test_a_group_can_share_it(qwen_stage, tmp_path, small_model, own_cache):
    """What a user adds gets the mode of the cache's own directory."""
    own_cache.chmod(0o2775)
    write(tmp_path / "p.txt", "a")
    umask = os.umask(0o077)
    try:
        assert qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}").code == 0
    finally:
        os.umask(umask)
    for path in own_cache.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o2775 if path.is_dir() else 0o664), path


def test_without_a_cache_to_write_to_encode_still_works(qwen_stage, tmp_path, small_model, monkeypatch):
    monkeypatch.setenv("QWEN_STAGE_CACHE", "/proc/no/cache")
    write(tmp_path / "p.txt", "a")
    assert qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}").code == 0


def test_a_prompt_cut_off_once_is_not_accepted_silently(qwen_stage, tmp_path, small_model):
    write(tmp_path / "p.txt", "word " * 1100)
    assert qwen_stage("encode", "p.txt", "--out=one", f"--model={small_model}", "--truncate").code == 0
    result = qwen_stage("encode", "p.txt", "--out=two", f"--model={small_model}")
    assert result.code == 2
    assert "tokens, more than 1024" in result.err
    assert qwen_stage("encode", "p.txt", "--out=three", f"--model={small_model}", "--truncate").code == 0


def test_show_verify_and_trim(qwen_stage, tmp_path, small_model, own_cache):
    write(tmp_path / "p.txt", "a", "b", "c")
    qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}")
    shown = qwen_stage("cache", "show").out
    assert shown[0].startswith("4 embeddings, ")
    assert shown[-1] == str(own_cache)
    assert qwen_stage("cache", "verify").out == ["4 entries are whole, 0 were damaged and are set aside"]
    used = cache.entries()
    for age, entry in enumerate(reversed(used)):
        os.utime(own_cache / "embeddings" / entry.key[:2] / f"{entry.key[2:]}.json", (time.time() - 100 * age,) * 2)
    survivors = {entry.key for entry in cache.entries()[2:]}
    limit = sum(entry.size for entry in cache.entries()[2:])
    assert qwen_stage("cache", "trim", f"--max-size={limit}").out[0].startswith("removed 2 entries")
    assert {entry.key for entry in cache.entries()} == survivors
    next(own_cache.glob("embeddings/??/*.safetensors")).write_bytes(b"x")
    damaged = qwen_stage("cache", "verify")
    assert (damaged.code, damaged.out) == (3, ["1 entries are whole, 1 were damaged and are set aside"])
    assert qwen_stage("cache", "trim", "--max-size=0").code == 0
    assert not cache.entries()
    assert not list(own_cache.rglob("*.safetensors"))
    assert qwen_stage("cache", "trim", "--max-size=lots").code == 2


def plant(cache_root: Path, kind: str, key: str, files: dict[str, bytes], item: object) -> None:
    """An entry as somebody else who may write to the cache could make it: whole by its own account."""
    shelf = cache_root / kind / key[:2]
    shelf.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        target = shelf / name
        if not target.is_absolute() or shelf in target.parents:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    listed = tuple(File(path=name, size=len(data), sha256=keys.sha256(data)) for name, data in files.items())
    entry = cache.CacheRecord(key=key, item=item, files=listed)
    (shelf / f"{key[2:]}.json").write_bytes(store.seal(entry, cache.CacheRecord[type(item)]))


@pytest.mark.parametrize("name", ["{data}/{outside}", "{data}/../../x", "{data}/./", "{data}/a", "other"])
def test_an_entry_never_reaches_beyond_its_place(qwen_stage, tmp_path, small_model, own_cache, name):
    write(tmp_path / "p.txt", "a")
    qwen_stage("encode", "p.txt", "--out=one", f"--model={small_model}")
    manifest, _ = store.read_manifest(tmp_path / "one/embeddings", EmbeddingsManifest)
    before = embeddings(tmp_path / "one")
    for each in manifest.embeddings:
        data = f"{each.key[2:]}.safetensors"
        (own_cache / "embeddings" / each.key[:2] / data).unlink()
        place = name.format(data=data, outside=tmp_path / "outside")
        listed = File(path=place, size=3, sha256=keys.sha256(b"bad"))
        entry = cache.CacheRecord(key=each.key, item=each, files=(listed,))
        record = own_cache / "embeddings" / each.key[:2] / f"{each.key[2:]}.json"
        record.write_bytes(store.seal(entry, cache.CacheRecord[Embedding]))
    result = qwen_stage("encode", "p.txt", "--out=two", f"--model={small_model}")
    assert result.code == 0, result.err
    assert "the record lists other files than an entry has" in result.err
    assert not (tmp_path / "outside").exists()
    assert embeddings(tmp_path / "two") == before


def test_an_entry_that_is_whole_but_wrong_is_set_aside(qwen_stage, tmp_path, small_model, own_cache):
    """Latents of another shape under a picture's key, embeddings that are none, a picture that is none."""
    write(tmp_path / "p.txt", "a")
    commands = (
        ["encode", "p.txt", "--out={run}", f"--model={small_model}"],
        ["denoise", "--embeddings={run}", "--size=32x48", "--steps=2"],
        ["decode", "{run}"],
    )
    for command in commands:
        assert qwen_stage(*(part.format(run="one") for part in command)).code == 0
    wrong = {
        "embeddings": lambda key: {f"{key[2:]}.safetensors": b"none"},
        "latents": lambda key: {
            f"{key[2:]}.zarr/{name}": data for name, data in arrays.pack(np.ones((16, 2, 2), np.float32)).items()
        },
        "images": lambda key: {f"{key[2:]}.png": b"GIF"},
        "modulations": lambda key: {f"{key[2:]}.safetensors": b"none"},
    }
    for entry in cache.entries():
        item = cache.find(entry.kind, entry.key, print)
        plant(own_cache, entry.kind.name, entry.key, wrong[entry.kind.name](entry.key), item)
    for command in commands:
        result = qwen_stage(*(part.format(run="two") for part in command))
        assert result.code == 0, result.err
        assert "set aside a damaged cache entry" in result.err
    for pattern in ("embeddings/*.safetensors", "latents/*.zarr/c/0/0/0", "images/*.png"):
        one, two = ([path.read_bytes() for path in sorted((tmp_path / run).glob(pattern))] for run in ("one", "two"))
        assert one == two


def test_trimming_leaves_alone_what_is_not_ours(qwen_stage, tmp_path, small_model, own_cache):
    """Even when the cache is somebody's home, or a link leads out of it."""
    long_ago = (time.time() - 10 * 24 * 3600,) * 2
    (tmp_path / "victim").mkdir()
    (own_cache / "embeddings").mkdir()
    (own_cache / "embeddings/zz").symlink_to(tmp_path / "victim")
    (own_cache / "embeddings/ab").symlink_to(tmp_path / "victim")
    (own_cache / "damaged").symlink_to(tmp_path / "victim")
    others = [tmp_path / "victim/thesis.txt", own_cache / "src/go/main.go", own_cache / "embeddings/cd/notes.txt"]
    others.append(tmp_path / "victim" / f"{'0' * 30}.safetensors")
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("dear to me")
        os.utime(path, long_ago)
    orphan = own_cache / "embeddings/cd" / f"{'0' * 30}.safetensors"
    orphan.write_text("data without a record")
    os.utime(orphan, long_ago)
    write(tmp_path / "p.txt", "a")
    assert qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}").code == 0
    assert qwen_stage("cache", "trim", "--max-size=0").code == 0
    assert all(path.exists() for path in others)
    assert not orphan.exists()


def test_a_bad_limit_is_said_before_the_work(qwen_stage, tmp_path, small_model, monkeypatch):
    write(tmp_path / "p.txt", "a")
    monkeypatch.setenv("QWEN_STAGE_CACHE_SIZE", "lots")
    result = qwen_stage("encode", "p.txt", "--out=run", f"--model={small_model}")
    assert result.code == 2
    assert "QWEN_STAGE_CACHE_SIZE: 'lots' is not a size" in result.err
    assert not (tmp_path / "run").exists()


def test_a_shared_picture_says_what_this_run_asked_for(qwen_stage, tmp_path, small_model):
    """The same pixels by a model of another name: its recipe is not taken over."""
    model = tmp_path / "another-name"
    shutil.copytree(small_model, model)
    write(tmp_path / "p.txt", "a")
    for run, checkpoint, cfg in (("one", model, "0.5"), ("two", small_model, "1")):
        qwen_stage("encode", "p.txt", f"--out={run}", f"--model={checkpoint}")
        qwen_stage("denoise", f"--embeddings={run}", "--size=32x48", "--steps=1", f"--cfg={cfg}")
        (path,) = qwen_stage("decode", run).out
        recipe = json.loads(qwen_stage("inspect", path, "--json").out[0])
        assert (recipe["model"], recipe["true_cfg_scale"]) == (checkpoint.name, 1.0)


@pytest.mark.parametrize(("text", "size"), [("0", 0), ("20GB", 20 * 10**9), ("1.5 mb", 1_500_000), ("7k", 7000)])
def test_sizes(text, size):
    assert cache.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "inf", "9" * 400])
def test_bad_sizes(text):
    with pytest.raises(UserError, match="not a size"):
        cache.parse_bytes(text)


@pytest.mark.parametrize(
    "version",
    [*(f"embeddings-{n}" for n in range(1, 5)), "latents-1", "latents-2", "latents-3", "images-1"],
)
def test_manifests_of_older_versions_are_upgraded(tmp_path, version):
    """The golden files were written by the code of those versions."""
    (tmp_path / "manifest.json").write_bytes((GOLDEN / "manifests" / f"{version}.json").read_bytes())
    kind = {kind.kind: kind for kind in store.KINDS}[version.partition("-")[0]]
    manifest, _ = store.read_manifest(tmp_path, kind)
    assert isinstance(manifest, kind)
    assert manifest.items[0].prompt == "a red circle"
    if version == "embeddings-1":
        assert [each.prompt_tokens for each in manifest.embeddings] == [each.tokens for each in manifest.embeddings]
    store.write_manifest(tmp_path, manifest)
    again, _ = store.read_manifest(tmp_path, kind)
    assert msgspec.structs.replace(again, checksum="") == msgspec.structs.replace(manifest, checksum="")

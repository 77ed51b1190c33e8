"""Published files are whole, and whatever is read was checked."""

import errno
import json
import os
import re
import tempfile
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.numpy
import zarr
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from artifacts_schema import arrays, keys, store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import Cost, Embedding, File, ImagesManifest, LatentsItem, LatentsManifest, Model

SHA = "0" * 64
MODEL = Model(name="demo", fingerprints={"vae": SHA})


def latents_item(latents: np.ndarray, files: tuple[File, ...], key: str = "a" * 32) -> LatentsItem:
    return LatentsItem(
        key=key,
        prompt="p",
        negative_prompt=" ",
        prompt_key=key,
        negative_key=None,
        seed=1,
        width=64,
        height=64,
        num_inference_steps=2,
        true_cfg_scale=1.0,
        dtype="float32",
        shape=latents.shape,
        files=files,
        cost=Cost(seconds=1.0, process_peak=1, mlx_peak=1),
    )


@pytest.fixture
def published(tmp_path):
    """A latents directory with one item. Returns (directory, item, latents)."""
    latents = np.random.default_rng(0).standard_normal((16, 8, 8)).astype(np.float32)
    files = store.publish(tmp_path, f"{'a' * 32}.zarr", arrays.pack(latents))
    item = latents_item(latents, files)
    store.write_manifest(tmp_path, LatentsManifest(versions={}, model=MODEL, items=(item,)))
    return tmp_path, item, latents


def leftovers(directory) -> list[str]:
    return [path.name for path in directory.rglob("*") if ".tmp" in path.name]


def test_latents_round_trip(published):
    directory, item, latents = published
    assert np.array_equal(store.read_latents(directory, item), latents)
    manifest, manifest_id = store.read_manifest(directory, LatentsManifest)
    assert manifest.items == (item,)
    assert manifest_id == keys.sha256((directory / "manifest.json").read_bytes())


def test_publishing_replaces_what_a_crash_left(published):
    directory, item, latents = published
    (directory / item.directory / "c" / "0" / "0" / "0").write_bytes(b"half written")
    files = store.publish(directory, item.directory, arrays.pack(latents))
    assert files == item.files
    assert np.array_equal(store.read_latents(directory, item), latents)
    assert leftovers(directory) == []


@pytest.mark.parametrize("content", [b"whole", {"a/b": b"part", "a/c": b"whole"}])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, content):
    write = os.write

    def full(descriptor, data):
        if bytes(data) == b"whole":
            write(descriptor, data[:2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        store.publish(tmp_path, "x", content)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_whole_is_not_replaced(published):
    directory, item, latents = published
    before = (directory / item.directory).stat().st_ino
    assert store.publish(directory, item.directory, arrays.pack(latents)) == item.files
    assert (directory / item.directory).stat().st_ino == before
    (directory / item.directory / "extra").write_bytes(b"")
    store.publish(directory, item.directory, arrays.pack(latents))
    assert (directory / item.directory).stat().st_ino != before
    store.read_latents(directory, item)


def test_any_flipped_bit_is_found(published):
    directory, item, _ = published
    random = np.random.default_rng(1)
    for file in item.files:
        path = directory / file.path
        whole = path.read_bytes()
        for position in random.integers(0, len(whole), 20):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << int(random.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{re.escape(str(path))} is damaged"):
                store.read_latents(directory, item)
        path.write_bytes(whole)
    store.read_latents(directory, item)


@pytest.mark.parametrize("damage", ["missing", "short", "symlink", "fifo", "directory"])
def test_files_that_are_not_what_was_written(published, damage):
    directory, item, _ = published
    path = directory / item.files[0].path
    content = path.read_bytes()
    path.unlink()
    if damage == "short":
        path.write_bytes(content[:-1])
    elif damage == "symlink":
        (directory / "elsewhere").write_bytes(content)
        path.symlink_to(directory / "elsewhere")
    elif damage == "fifo":
        os.mkfifo(path)
    elif damage == "directory":
        path.mkdir()
    with pytest.raises(UserError, match=re.escape(str(path))):
        store.read_latents(directory, item)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../outside", ""])
def test_paths_that_leave_the_directory_are_refused(tmp_path, path):
    with pytest.raises(UserError, match="leaves the directory"):
        store.verify(tmp_path, (File(path=path, size=0, sha256=SHA),))


def test_not_finite_latents_are_refused(tmp_path):
    latents = np.full((16, 4, 4), np.nan, np.float32)
    files = store.publish(tmp_path, f"{'a' * 32}.zarr", arrays.pack(latents))
    with pytest.raises(UserError, match="NaN"):
        store.read_latents(tmp_path, latents_item(latents, files))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"{}", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b'{"schema": "qwen-stage/latents/99"}', "newer qwen-stage .*upgrade"),
        (b'{"schema": "qwen-stage/images/1"}', "holds images, not latents"),
        (b'{"schema": "qwen-stage/latents/1", "versions": {}, "items": []}', "damaged: .*model"),
    ],
)
def test_manifests_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        store.read_manifest(tmp_path, LatentsManifest)


def test_a_manifest_that_could_not_be_read_is_not_published(published):
    directory, item, _ = published
    broken = LatentsManifest(versions={}, model=MODEL, items=(msgspec.structs.replace(item, num_inference_steps=0),))
    with pytest.raises(msgspec.ValidationError):
        store.write_manifest(directory, broken)
    store.read_manifest(directory, LatentsManifest)


@pytest.mark.parametrize("change", ["no files", "more files", "another shape", "a huge shape"])
def test_arrays_that_we_would_not_write(published, change):
    directory, item, _ = published
    (directory / "more").write_bytes(b"")
    changed = {
        "no files": {"files": ()},
        "more files": {"files": (*item.files, File(path="more", size=0, sha256=keys.sha256(b"")))},
        "another shape": {"shape": (16, 4, 16)},
        "a huge shape": {"shape": (10**6, 10**6, 10**6)},
    }[change]
    with pytest.raises(UserError, match="not an array"):
        store.read_latents(directory, msgspec.structs.replace(item, **changed))


def test_unknown_fields_in_a_manifest_are_refused(published):
    directory, _, _ = published
    path = directory / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"versions"', b'"surprise": 1, "versions"', 1))
    with pytest.raises(UserError, match="surprise"):
        store.read_manifest(directory, LatentsManifest)


def test_find_takes_a_run_or_the_artifact_itself(tmp_path):
    directory = tmp_path / "run1" / "images"
    directory.mkdir(parents=True)
    store.write_manifest(directory, ImagesManifest(versions={}, model=MODEL, items=()))
    assert store.find(tmp_path / "run1", ImagesManifest) == store.find(directory, ImagesManifest) == directory
    with pytest.raises(UserError, match="holds no latents; make them with `qwen-stage denoise`"):
        store.find(tmp_path / "run1", LatentsManifest)
    with pytest.raises(UserError, match="no such file"):
        store.find(tmp_path / "run2", LatentsManifest)


def test_new_runs_count_on_and_go_again_when_nothing_came_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run7").mkdir()
    (tmp_path / "runabout").mkdir()
    for fate in ("fails", "works"):
        try:
            with store.run_directory(None) as run, store.writing(run / "images") as directory:
                assert run.name == "run8"
                if fate == "fails":
                    raise UserError("no")
                store.write_manifest(directory, ImagesManifest(versions={}, model=MODEL, items=()))
        except UserError:
            assert not run.exists()
    with store.run_directory(None) as run:
        assert run.name == "run9"


def test_one_writer_an_artifact(tmp_path):
    with (
        store.writing(tmp_path / "images"),
        pytest.raises(UserError, match="another qwen-stage"),
        store.writing(tmp_path / "images"),
    ):
        pass
    with store.writing(tmp_path / "images"):
        pass


def test_what_a_killed_process_left_is_tidied(tmp_path):
    (tmp_path / ".tmp-1-abc-x.zarr/c").mkdir(parents=True)
    (tmp_path / ".tmp-1-abc-manifest.json").write_text("half")
    (tmp_path / "kept.png").write_text("whole")
    with store.writing(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "kept.png"]


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), plain, min_size=1))
def test_keys_do_not_depend_on_the_order_of_fields(fields):
    backwards = dict(reversed(fields.items()))
    assert keys.key(fields) == keys.key(backwards)
    assert keys.key({**fields, "one more": 1}) != keys.key({**fields, "one more": 2})


def test_fingerprints_see_every_sampled_block(tmp_path):
    path = tmp_path / "weights.safetensors"
    step = 2 * keys.SAMPLE_BLOCK_BYTES  # the blocks lie this far apart in a file of this size
    path.write_bytes(bytes((keys.SAMPLE_BLOCKS - 1) * step + keys.SAMPLE_BLOCK_BYTES))
    seen = {keys.fingerprint([path])}
    assert seen == {keys.fingerprint([path])}
    for block in range(keys.SAMPLE_BLOCKS):
        with path.open("r+b") as file:
            file.seek(block * step + 12345)
            file.write(b"x")
        seen.add(keys.fingerprint([path]))
    assert len(seen) == keys.SAMPLE_BLOCKS + 1
    before = keys.fingerprint([path])
    path.rename(tmp_path / "other.safetensors")
    assert keys.fingerprint([tmp_path / "other.safetensors"]) != before


def test_manifests_survive_their_own_encoding(published):
    directory, _, _ = published
    manifest, _ = store.read_manifest(directory, LatentsManifest)
    assert msgspec.json.decode(msgspec.json.encode(manifest), type=LatentsManifest) == manifest


def sealed_item(directory, item: LatentsItem, files: dict[str, bytes]) -> LatentsItem:
    """A manifest that agrees with whatever files it is given, as who means harm would write it."""
    for name, data in files.items():
        path = directory / item.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return msgspec.structs.replace(item, files=store.describe(item.directory, files))


HOSTILE_METADATA = {
    "a compressor": {"codecs": [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 9}}]},
    "another codec": {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]},
    "a huge shape": {"shape": [10**9, 10**9, 10**9]},
    "another type": {"data_type": "float64"},
    "a plain fill value": {"fill_value": 0.0},
    "a transformer": {"storage_transformers": [{"name": "sharding"}]},
    "a surprise": {"surprise": 1},
}


@pytest.mark.parametrize("change", HOSTILE_METADATA)
def test_metadata_that_we_would_not_write(published, change):
    directory, item, latents = published
    files = arrays.pack(latents)
    metadata = {**json.loads(files["zarr.json"]), **HOSTILE_METADATA[change]}
    item = sealed_item(directory, item, {**files, "zarr.json": json.dumps(metadata).encode()})
    with pytest.raises(UserError, match=r"not an array as qwen-stage writes|another shape"):
        store.read_latents(directory, item)


@pytest.mark.parametrize("metadata", [b"", b"[]", b"[" * 50_000, b"\xff"])
def test_metadata_that_is_none(published, metadata):
    directory, item, latents = published
    item = sealed_item(directory, item, {**arrays.pack(latents), "zarr.json": metadata})
    with pytest.raises(UserError, match="its metadata is"):
        store.read_latents(directory, item)


def test_a_chunk_whose_own_checksum_is_wrong(published):
    directory, item, latents = published
    files = arrays.pack(latents)
    chunk = files["c/0/0/0"]
    item = sealed_item(directory, item, {**files, "c/0/0/0": chunk[:-1] + bytes([chunk[-1] ^ 1])})
    with pytest.raises(UserError, match="checksum"):
        store.read_latents(directory, item)


@pytest.mark.parametrize("strange", ["c/0/0/1", "evil.json", "c/0/zarr.json"])
def test_files_that_an_array_has_too_many(published, strange):
    directory, item, _ = published
    (directory / item.directory / strange).write_bytes(b"")
    with pytest.raises(UserError, match=f"{strange} is not part of an array"):
        store.read_latents(directory, item)


def test_arrays_are_read_by_zarr_as_they_are_by_us(published):
    directory, item, latents = published
    array = zarr.open_array(store=directory / item.directory, mode="r")
    assert np.array_equal(array[...], latents)
    assert array.chunks == latents.shape


@pytest.mark.parametrize("make", ["fifo", "symlink", "huge", "directory"])
def test_manifests_that_are_no_files(published, make):
    """Refused at once: a pipe is never waited for, and nothing of a huge file is read."""
    directory, _, _ = published
    path = directory / "manifest.json"
    path.rename(directory / "other.json")
    if make == "fifo":
        os.mkfifo(path)
    elif make == "symlink":
        path.symlink_to("other.json")
    elif make == "directory":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    tracemalloc.start()
    with pytest.raises(UserError, match=re.escape(str(path))):
        store.read_manifest(directory, LatentsManifest)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_huge_file_that_a_manifest_lists(published):
    directory, item, _ = published
    first, *others = item.files
    with (directory / first.path).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="is damaged"):
        store.read_latents(directory, item)
    huge = msgspec.structs.replace(first, size=1 << 40)
    with pytest.raises(UserError, match="do not trust it"):
        store.verify(directory, (huge, *others))


def test_swapped_latents_are_found(published):
    directory, item, latents = published
    other = msgspec.structs.replace(item, key="b" * 32)
    other = msgspec.structs.replace(other, files=store.publish(directory, other.directory, arrays.pack(latents + 1)))
    (directory / item.directory).rename(directory / "x")
    (directory / other.directory).rename(directory / item.directory)
    (directory / "x").rename(directory / other.directory)
    for each in (item, other):
        with pytest.raises(UserError, match="c/0/0/0 is damaged"):
            store.read_latents(directory, each)


EMBEDS = np.ones((3, 4), np.float32)
MASK = np.ones(3, bool)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 100,
        (1 << 60).to_bytes(8, "little") + b"{}",
        (8).to_bytes(8, "little") + b"[" * 8,
        safetensors.numpy.save({"prompt_embeds": EMBEDS}),
        safetensors.numpy.save({"prompt_embeds": EMBEDS, "prompt_embeds_mask": MASK, "more": MASK}),
        safetensors.numpy.save({"prompt_embeds": EMBEDS[:2], "prompt_embeds_mask": MASK}),
        safetensors.numpy.save({"prompt_embeds": EMBEDS.astype(np.float16), "prompt_embeds_mask": MASK}),
    ],
)
def test_embeddings_that_are_not_what_their_manifest_says(tmp_path, data):
    embedding = Embedding(
        key="a" * 32, tokens=3, prompt_tokens=3, dim=4, dtype="float32", file=store.publish(tmp_path, "x", data)[0]
    )
    with pytest.raises(UserError, match=r"is no safetensors file|does not hold what its manifest says"):
        store.read_embeddings(tmp_path, embedding)


def test_a_manifest_whose_checksum_was_taken_out(published):
    directory, _, _ = published
    path = directory / "manifest.json"
    path.write_bytes(re.sub(rb'"checksum": "[0-9a-f]+",', b"", path.read_bytes()))
    with pytest.raises(UserError, match="is damaged: its content is not what was written"):
        store.read_manifest(directory, LatentsManifest)


def listed_item(latents: np.ndarray, key: str = "a" * 32) -> LatentsItem:
    """An item of files that were never written."""
    sizes = {"c/0/0/0": arrays.chunk_bytes(latents.shape), "zarr.json": 3}
    files = tuple(File(path=f"{key}.zarr/{name}", size=size, sha256=SHA) for name, size in sizes.items())
    return latents_item(latents, files, key)


@pytest.mark.parametrize("path", ["a" * 32 + ".zarr/c/0/0/1", "x", "a" * 32 + ".zarr//etc/passwd", "../x"])
def test_files_that_no_manifest_of_ours_lists(tmp_path, path):
    """Refused before any is opened: the same file a thousand times would be read a thousand times."""
    item = listed_item(np.zeros((16, 8, 8)))
    more = File(path=path, size=1, sha256=SHA)
    for files in ((*item.files, more), (item.files[0], more), (*item.files, item.files[0])):
        store.write_manifest(tmp_path, LatentsManifest(versions={}, model=MODEL, items=(replace(item, files=files),)))
        with pytest.raises(UserError, match=r"lists .* which qwen-stage would not; do not trust it"):
            store.read_manifest(tmp_path, LatentsManifest)
    trajectory = tuple(replace(more, path=f"{item.key}.trajectory.zarr/c/0") for _ in range(2))
    store.write_manifest(
        tmp_path, LatentsManifest(versions={}, model=MODEL, items=(replace(item, trajectory=trajectory),))
    )
    with pytest.raises(UserError, match="lists a file twice"):
        store.read_manifest(tmp_path, LatentsManifest)


@given(data=st.data())
def test_whatever_is_done_to_a_manifest_it_is_refused_or_the_same(data):
    """Bytes put in, taken out, changed or swapped around: never another exception, never another content."""
    latents = np.zeros((16, 8, 8), np.float32)
    item = listed_item(latents)
    manifest = LatentsManifest(versions={"é": '"checksum": "'}, model=MODEL, items=(item,))
    whole = store.seal(manifest, LatentsManifest)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 8)))
    changed = whole[:start] + data.draw(st.binary(max_size=8)) + whole[end:]
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "manifest.json").write_bytes(changed)
        try:
            found, _ = store.read_manifest(Path(directory), LatentsManifest)
        except UserError:
            assert changed != whole
        else:
            assert changed == whole
            assert msgspec.structs.replace(found, checksum="") == manifest


names = st.text(min_size=1, max_size=20)
fingerprints = st.dictionaries(names, st.text("0123456789abcdef", min_size=64, max_size=64), max_size=3)


@given(
    prompts=st.lists(names, max_size=4),
    versions=st.dictionaries(names, names, max_size=3),
    fingerprints=fingerprints,
    seconds=st.floats(allow_nan=False, allow_infinity=False),
    seed=st.none() | st.integers(0, 2**64 - 1),
)
@example(prompts=[], versions={}, fingerprints={"checksum": "0" * 64}, seconds=0.0, seed=None)  # as the field itself
def test_any_manifest_survives_being_written_and_read(prompts, versions, fingerprints, seconds, seed):
    cost = Cost(seconds=seconds, process_peak=1, mlx_peak=0)
    bases = (listed_item(np.zeros((16, 8, 8)), f"{number:032x}") for number in range(len(prompts)))
    items = tuple(
        msgspec.structs.replace(base, prompt=prompt, seed=seed, cost=cost)
        for base, prompt in zip(bases, prompts, strict=True)
    )
    manifest = LatentsManifest(versions=versions, model=Model(name="m", fingerprints=fingerprints), items=items)
    with tempfile.TemporaryDirectory() as directory:
        store.write_manifest(Path(directory), manifest)
        found, _ = store.read_manifest(Path(directory), LatentsManifest)
        assert msgspec.structs.replace(found, checksum="") == manifest
        assert not store.restore_manifest(Path(directory), LatentsManifest)


@pytest.mark.parametrize("what", ["symlink", "fifo"])
def test_a_lock_that_is_no_file(tmp_path, what):
    if what == "fifo":
        os.mkfifo(tmp_path / ".lock")
        with store.writing(tmp_path):
            return
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), store.writing(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()

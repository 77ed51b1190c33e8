"""The only place that writes artifacts, and that reads them: checked whenever they are read.

The manifest goes last and is the commit mark: a file that no manifest lists does not exist. Its checksum covers its own
bytes; those of everything else stand in it.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar, Union

import msgspec
from msgspec.structs import replace

from artifacts_schema import arrays, disk, keys
from artifacts_schema.errors import Busy, Damaged, Unreadable, UserError
from artifacts_schema.manifests import (
    Embedding,
    EmbeddingsManifest,
    File,
    ImageLatentsItem,
    ImageLatentsManifest,
    ImagesManifest,
    LatentsItem,
    LatentsManifest,
    Manifest,
)

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "manifest.json"
BACKUP = "manifest.backup.json"  # the same again, for `rerun` to repair from: nothing else says what was asked for
MAX_MANIFEST_BYTES = 64 << 20
MAX_FILE_BYTES = 1 << 30  # the largest are tables of modulations: 0.9 GB for 100 steps in float32
UNSEALED = "0" * 64
KINDS: tuple[type[Manifest], ...] = (EmbeddingsManifest, ImageLatentsManifest, LatentsManifest, ImagesManifest)
MADE_BY = {"embeddings": "encode", "image_latents": "encode-image", "latents": "denoise", "images": "decode"}
SOURCE_IMAGE = re.compile(r"[0-9a-f]{64}\.[a-z0-9]{1,16}")  # its hash, and the format that it is in

M = TypeVar("M", bound=Manifest)


def publish(directory: Path, name: str, content: disk.Content) -> tuple[File, ...]:
    """Publishes `directory/name`, a file or a directory. Returns what a manifest lists for it."""
    disk.publish(directory, name, content)
    return describe(name, content)


def describe(name: str, content: disk.Content) -> tuple[File, ...]:
    files = (
        {name: content} if isinstance(content, bytes) else {f"{name}/{path}": data for path, data in content.items()}
    )
    return tuple(File(path=path, size=len(data), sha256=keys.sha256(data)) for path, data in sorted(files.items()))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    data = seal(manifest, type(manifest))
    disk.publish(directory, MANIFEST, data)
    disk.publish(directory, BACKUP, data)


def restore_manifest(directory: Path, kind: type[Manifest]) -> bool:
    """Makes a damaged manifest from its backup, or the other way round. Returns whether one was damaged.

    Raises Damaged if both are, UserError if one cannot be read for another reason: it may be a newer version's.
    """
    whole: dict[str, bytes] = {}
    for name in (MANIFEST, BACKUP):
        with contextlib.suppress(Damaged):
            read_manifest(directory, kind, name)
            whole[name] = disk.read(directory / name, MAX_MANIFEST_BYTES)
    if not whole:
        read_manifest(directory, kind)  # says what is wrong with it
    best = whole.get(MANIFEST) or whole[BACKUP]
    damaged = [name for name in (MANIFEST, BACKUP) if whole.get(name) != best]
    existed = [name for name in damaged if os.path.lexists(directory / name)]
    for name in damaged:
        disk.publish(directory, name, best)
    return bool(existed) or MANIFEST in damaged


def seal(record: Any, kind: Any) -> bytes:
    """A record's JSON, with a checksum of all its bytes in its field `checksum`."""
    data = msgspec.json.format(msgspec.json.encode(replace(record, checksum=UNSEALED)), indent=1)
    msgspec.json.decode(data, type=kind)  # building a struct checks nothing; what is published can be read
    return data.replace(_field(UNSEALED), _field(keys.sha256(data)), 1)


def unseal(data: bytes, kind: Any) -> Any:
    """The record that `seal` wrote. Raises ValueError, of which msgspec's errors are kinds, if it is damaged."""
    try:
        record: Any = msgspec.json.decode(data, type=kind)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    sealed = getattr(record, "checksum", None)  # versions from before there were checksums have none
    if sealed is not None and keys.sha256(data.replace(_field(sealed), _field(UNSEALED), 1)) != sealed:
        raise ValueError("its content is not what was written")
    return record


def _field(checksum: str) -> bytes:
    """How the checksum stands in formatted JSON, and nothing else: fields within are indented further."""
    return f'\n "checksum": "{checksum}"'.encode()


def find(path: Path, kind: type[Manifest]) -> Path:
    """The artifact's own directory, from it or from the run that holds it."""
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if not path.is_dir():
        raise UserError(f"{path} is a file; give a run directory or its {kind.kind}/")
    for directory in (path, path / kind.kind):
        if is_there(directory):
            return directory
    raise UserError(f"{path} holds no {kind.kind}; make them with `qwen-stage {MADE_BY[kind.kind]}`")


def kind_of(directory: Path) -> type[Manifest] | None:
    """What kind of artifact a directory holds, by what its manifest says, or else by its name."""
    if not is_there(directory):
        return None
    for name in (MANIFEST, BACKUP):
        with contextlib.suppress(OSError, UserError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            schema = msgspec.json.decode(disk.read(directory / name, MAX_MANIFEST_BYTES))["schema"]
            return {_name_of(kind): kind for kind in KINDS}[schema.rpartition("/")[0]]
    return next((kind for kind in KINDS if kind.kind == directory.resolve().name), None)


def _name_of(kind: type[Manifest]) -> str:
    """Its tag without the version."""
    return str(kind.__struct_config__.tag).rpartition("/")[0]


def is_there(directory: Path) -> bool:
    """Whether a directory holds an artifact, be its manifest damaged or missing."""
    return any(os.path.lexists(directory / name) for name in (MANIFEST, BACKUP))


def read_manifest(directory: Path, kind: type[M], name: str = MANIFEST) -> tuple[M, str]:
    """The manifest of an artifact, and its id (the hash of its bytes)."""
    path = directory / name
    try:
        data = disk.read(path, MAX_MANIFEST_BYTES)
        manifest: Any = unseal(data, Union[(kind, *kind.older)])
    except FileNotFoundError:
        raise Damaged(f"{path} is missing; {repair(directory)}") from None
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from None
    except ValueError as error:  # bad UTF-8 is one as well
        raise _why_not(path, data, kind, error) from None
    while not isinstance(manifest, kind):
        manifest = manifest.upgrade()
    _check_listing(path, manifest)
    return manifest, keys.sha256(data)


def read_manifest_if_any(directory: Path, kind: type[M]) -> M | None:
    return read_manifest(directory, kind)[0] if is_there(directory) else None


def listed_files(manifest: Any) -> Iterator[File]:
    """All the files that a manifest lists."""
    if isinstance(manifest, EmbeddingsManifest):
        yield from (each.file for each in manifest.embeddings)
        yield from (image.file for image in manifest.images)
    elif isinstance(manifest, LatentsManifest):
        for item in manifest.items:
            yield from (*item.files, *item.trajectory)
    elif isinstance(manifest, ImageLatentsManifest):
        for each in manifest.items:
            yield from each.files
    else:
        yield from (item.file for item in manifest.items)


def _check_listing(path: Path, manifest: Any) -> None:
    """Raises unless the files are those that we would have written, each once: no work is begun for others."""
    files = list(listed_files(manifest))
    strange = [file.path for file in files if PurePosixPath(file.path).as_posix() != file.path or "\0" in file.path]
    strange += [file.path for file in files if file.size > MAX_FILE_BYTES]
    if isinstance(manifest, EmbeddingsManifest):
        strange += [each.file.path for each in manifest.embeddings if each.file.path != f"{each.key}.safetensors"]
        strange += [each.file.path for each in manifest.images if not _is_source_image(each.file)]
    elif isinstance(manifest, LatentsManifest | ImageLatentsManifest):
        strange += [name for item in manifest.items for name in _strange_latents(item)]
    else:
        strange += [item.file.path for item in manifest.items if "/" in item.file.path]
    if strange or len({file.path for file in files}) < len(files):
        what = repr(strange[0]) if strange else "a file twice"
        raise UserError(f"{path} lists {what}, which qwen-stage would not; do not trust it")


def _is_source_image(file: File) -> bool:
    return file.path.startswith(file.sha256) and bool(SOURCE_IMAGE.fullmatch(file.path))


def _strange_latents(item: LatentsItem | ImageLatentsItem) -> Iterator[str]:
    """What an item lists that we would not have written, by name or by size."""
    sizes = {file.path.removeprefix(f"{item.directory}/"): file.size for file in item.files}
    chunk = arrays.chunk_bytes(item.shape)
    expected = sizes.keys() == {arrays.METADATA, arrays.chunk_name()} and sizes[arrays.chunk_name()] == chunk
    if not expected or sizes[arrays.METADATA] > arrays.MAX_METADATA_BYTES:
        yield item.directory
    ours = (f"{item.key}.trajectory.zarr/", f"{item.key}.trajectory.json")
    for file in item.trajectory if isinstance(item, LatentsItem) else ():
        if not file.path.startswith(ours) or file.size > max(chunk, arrays.MAX_METADATA_BYTES):
            yield file.path


def verify(directory: Path, files: tuple[File, ...]) -> None:
    """Raises unless every file is a regular file inside the directory, with the size and content the manifest says."""
    for file in files:
        with _listed(directory, file) as descriptor:
            digest = hashlib.sha256()
            for block in disk.blocks(descriptor):
                digest.update(block)
        _compare(directory, file, digest.hexdigest())


def is_whole(directory: Path, files: tuple[File, ...]) -> bool:
    """Whether everything listed is there, as it was written."""
    try:
        verify(directory, files)
    except UserError:
        return False
    return True


def read_file(directory: Path, file: File) -> bytes:
    """A listed file's content, verified."""
    with _listed(directory, file) as descriptor:
        data = b"".join(disk.blocks(descriptor))
    _compare(directory, file, keys.sha256(data))
    return data


@contextlib.contextmanager
def _listed(directory: Path, file: File) -> Iterator[int]:
    """Opens a file that a manifest lists, if it is where it should be and as large as it should be."""
    path = directory / file.path
    parts = Path(file.path).parts
    if not parts or Path(file.path).is_absolute() or ".." in parts:
        raise UserError(f"{directory / MANIFEST} lists {file.path!r}, which leaves the directory; do not trust it")
    if file.size > MAX_FILE_BYTES:
        raise UserError(f"{directory / MANIFEST} lists {file.path!r} with {file.size} bytes; do not trust it")
    try:
        if any((directory / Path(*parts[:i])).is_symlink() for i in range(1, len(parts) + 1)):
            raise UserError(f"{path} is a symbolic link, which artifacts never hold; do not trust it")
        with disk.opened(path) as descriptor:
            size = os.fstat(descriptor).st_size
            if size != file.size:
                raise Damaged(f"{path} is damaged ({size} bytes instead of {file.size}); {repair(directory)}")
            yield descriptor
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{path} is missing; {repair(directory)}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise Unreadable(f"{path} cannot be read: {error}") from None


def _compare(directory: Path, file: File, sha256: str) -> None:
    if sha256 != file.sha256:
        path = directory / file.path
        raise Damaged(f"{path} is damaged (its content is not what was written); {repair(directory)}")


def read_latents(directory: Path, item: LatentsItem | ImageLatentsItem) -> "np.ndarray":
    """The latents [C, h, w] of an item, float32: verified against the manifest, and finite."""
    path = directory / item.directory
    if any(_strange_latents(item)):
        raise UserError(f"{path} is not an array as qwen-stage writes them; do not trust it")
    files = read_array(directory, item)
    if strange := strangers(directory, item):
        raise Damaged(f"{path / strange[0]} is not part of an array as qwen-stage writes them; {repair(directory)}")
    try:
        return arrays.unpack(files, item.shape)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} {error}; {repair(directory)}") from None


def read_array(directory: Path, item: LatentsItem | ImageLatentsItem) -> dict[str, bytes]:
    """The verified files of an item's latents, by their paths in the array's directory."""
    return {file.path.removeprefix(f"{item.directory}/"): read_file(directory, file) for file in item.files}


def strangers(directory: Path, item: LatentsItem | ImageLatentsItem) -> list[str]:
    """What lies in an array's directory and is not part of it: a file browser's notes, or something worse."""
    return sorted(_inside(directory / item.directory) - {arrays.METADATA, arrays.chunk_name()})


def read_embeddings(directory: Path, embedding: Embedding) -> bytes:
    """The safetensors file of an embedding: verified, and exactly the two tensors that the manifest says."""
    data = read_file(directory, embedding.file)
    try:
        check_embeddings(data, embedding)
    except ValueError as error:
        raise UserError(f"{directory / embedding.file.path} {error}; {repair(directory)}") from None
    return data


def check_embeddings(data: bytes, embedding: Embedding) -> None:
    """Raises ValueError unless a safetensors file holds just what is said of it, end to end."""
    number = embedding.dtype.partition("-")[0]  # that of a quantized model as well
    dtype, width = {"bfloat16": ("BF16", 2), "float32": ("F32", 4)}.get(number, ("", 0))
    wanted = {
        "prompt_embeds": (dtype, [embedding.tokens, embedding.dim], embedding.tokens * embedding.dim * width),
        "prompt_embeds_mask": ("BOOL", [embedding.tokens], embedding.tokens),
    }
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = msgspec.json.decode(data[8:start], type=dict[str, Any])
        header.pop("__metadata__", None)
        tensors = sorted((each["data_offsets"], name, each["dtype"], each["shape"]) for name, each in header.items())
    except (ValueError, RecursionError, KeyError, TypeError):
        raise ValueError("is no safetensors file") from None
    end = 0
    for (begin, next_end), name, *what in tensors:
        if begin != end or wanted.pop(name, None) != (*what, next_end - begin):
            break
        end = next_end
    if wanted or start + end != len(data):
        raise ValueError("does not hold what its manifest says")


def _inside(directory: Path) -> set[str]:
    """The paths of everything in a directory but directories."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}


def run_of(directory: Path) -> Path:
    """The run that holds an artifact's directory; that may have been given as `.`"""
    return directory.parent if directory.name not in ("", "..") else directory.resolve().parent


@contextlib.contextmanager
def run_directory(out: Path | None) -> Iterator[Path]:
    """The run to write into: `out`, or the next free `run<N>`, which goes again if nothing gets published in it."""
    if out is not None:
        yield out
        return
    run = _next_run(Path.cwd()).relative_to(Path.cwd())
    try:
        yield run
    finally:
        if not any(run.rglob(MANIFEST)):
            disk.remove(run)


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[Path]:
    """Makes an artifact's directory and lets one process write to it at a time.

    What a process that was killed left half-written goes with the next.
    """
    disk.make_directory(directory)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(disk.lock(directory))
        except BlockingIOError:
            raise Busy(f"another qwen-stage is writing to {directory}; wait for it or choose --out") from None
        disk.sweep(directory)
        yield directory


def _next_run(parent: Path) -> Path:
    """Makes the next free `run<N>`; two processes never get the same."""
    taken = [int(path.name[3:]) for path in parent.glob("run*") if path.name[3:].isdecimal()]
    number = max(taken, default=0) + 1
    while True:
        try:
            path = parent / f"run{number}"
            path.mkdir()
            disk.sync(parent)
            return path
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"cannot make a run directory in {parent}: {error.strerror}; choose --out") from None


def repair(directory: Path) -> str:
    """What to do about damage."""
    return f"repair it with `qwen-stage rerun {run_of(directory)}`"


def _why_not(path: Path, data: bytes, kind: type[Manifest], error: Exception) -> UserError:
    """One line for a manifest that cannot be read: another kind, a newer version, or damage."""
    damaged = Damaged(f"{path} is damaged: {error}; {repair(path.parent)}")
    try:
        schema = str(msgspec.json.decode(data)["schema"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return damaged
    name, _, version = schema.rpartition("/")
    tags = {_name_of(each): each for each in KINDS}
    if name in tags and tags[name] is not kind:
        return UserError(f"{path.parent} holds {tags[name].kind}, not {kind.kind}")
    newest = int(str(kind.__struct_config__.tag).rpartition("/")[2])
    if name in tags and version.isdecimal() and int(version) > newest:
        return UserError(f"{path} was written by a newer qwen-stage ({schema}); upgrade qwen-stage")
    return damaged

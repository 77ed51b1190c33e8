"""The only place that writes artifacts, and that reads them: checked whenever they are read.

The manifest goes last and is the commit mark: a file that no manifest lists does not exist. Its checksum covers its own
bytes; those of everything else stand in it.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union

import msgspec
from msgspec.structs import replace

from artifacts_schema import arrays, disk, keys
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import (
    Embedding,
    EmbeddingsManifest,
    File,
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
MAX_FILE_BYTES = 1 << 30
UNSEALED = "0" * 64
KINDS: tuple[type[Manifest], ...] = (EmbeddingsManifest, LatentsManifest, ImagesManifest)
MADE_BY = {"embeddings": "encode", "latents": "denoise", "images": "decode"}

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
    """Makes a manifest that cannot be read from its backup, or the other way round. Returns whether that was needed.

    Raises UserError if neither can be read.
    """
    whole: dict[str, bytes] = {}
    for name in (MANIFEST, BACKUP):
        with contextlib.suppress(UserError):
            read_manifest(directory, kind, name)
            whole[name] = disk.read(directory / name, MAX_MANIFEST_BYTES)
    if MANIFEST not in whole and BACKUP not in whole:
        read_manifest(directory, kind)  # says what is wrong with it
    for name, other in ((MANIFEST, BACKUP), (BACKUP, MANIFEST)):
        if name not in whole:
            disk.publish(directory, name, whole[other])
    return len(whole) < 2


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
    """How the checksum stands in formatted JSON, and how no text in it can: there, quotes are escaped."""
    return f'"checksum": "{checksum}"'.encode()


def find(path: Path, kind: type[Manifest]) -> Path:
    """The artifact's own directory, from it or from the run that holds it."""
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if not path.is_dir():
        raise UserError(f"{path} is a file; give a run directory or its {kind.kind}/")
    for directory in (path, path / kind.kind):
        if os.path.lexists(directory / MANIFEST):
            return directory
    raise UserError(f"{path} holds no {kind.kind}; make them with `qwen-stage {MADE_BY[kind.kind]}`")


def read_manifest(directory: Path, kind: type[M], name: str = MANIFEST) -> tuple[M, str]:
    """The manifest of an artifact, and its id (the hash of its bytes)."""
    path = directory / name
    try:
        data = disk.read(path, MAX_MANIFEST_BYTES)
        manifest: Any = unseal(data, Union[(kind, *kind.older)])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # bad UTF-8 is one as well
        raise UserError(_why_not(path, data, kind, error)) from None
    while not isinstance(manifest, kind):
        manifest = manifest.upgrade()
    return manifest, keys.sha256(data)


def read_manifest_if_any(directory: Path, kind: type[M]) -> M | None:
    return read_manifest(directory, kind)[0] if os.path.lexists(directory / MANIFEST) else None


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
                raise UserError(f"{path} is damaged ({size} bytes instead of {file.size}); {_repair(directory)}")
            yield descriptor
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {_repair(directory)}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path} cannot be read: {error}") from None


def _compare(directory: Path, file: File, sha256: str) -> None:
    if sha256 != file.sha256:
        path = directory / file.path
        raise UserError(f"{path} is damaged (its content is not what was written); {_repair(directory)}")


def read_latents(directory: Path, item: LatentsItem) -> "np.ndarray":
    """The latents [C, h, w] of an item, float32: verified against the manifest, and finite."""
    path = directory / item.directory
    name = f"{item.directory}/{arrays.chunk_name()}"
    sizes = {file.path: file.size for file in item.files}
    metadata = f"{item.directory}/{arrays.METADATA}"
    if sizes.keys() != {name, metadata} or sizes[metadata] > arrays.MAX_METADATA_BYTES:
        raise UserError(f"{path} is not an array as qwen-stage writes them; {_repair(directory)}")
    if sizes[name] != arrays.chunk_bytes(item.shape):
        raise UserError(f"{path} has another shape than its manifest says; {_repair(directory)}")
    files = {file.path.removeprefix(f"{item.directory}/"): read_file(directory, file) for file in item.files}
    if strange := sorted(_inside(path) - files.keys()):
        raise UserError(f"{path / strange[0]} is not part of an array as qwen-stage writes them; do not trust it")
    try:
        return arrays.unpack(files, item.shape)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} {error}; {_repair(directory)}") from None


def read_embeddings(directory: Path, embedding: Embedding) -> bytes:
    """The safetensors file of an embedding: verified, and exactly the two tensors that the manifest says."""
    from safetensors import SafetensorError, deserialize

    path = directory / embedding.file.path
    data = read_file(directory, embedding.file)
    dtype = {"bfloat16": "BF16", "float32": "F32"}.get(embedding.dtype)
    wanted = {
        "prompt_embeds": (dtype, [embedding.tokens, embedding.dim]),
        "prompt_embeds_mask": ("BOOL", [embedding.tokens]),
    }
    try:
        found = {name: (tensor["dtype"], tensor["shape"]) for name, tensor in deserialize(data)}
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error}); {_repair(directory)}") from None
    if found != wanted:
        raise UserError(f"{path} does not hold what its manifest says; {_repair(directory)}")
    return data


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
            raise UserError(f"another qwen-stage is writing to {directory}; wait for it or choose --out") from None
        for leftover in directory.glob(f"{disk.TEMPORARY}*"):
            disk.remove(leftover)
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


def _repair(directory: Path) -> str:
    return f"repair it with `qwen-stage rerun {run_of(directory)}`"


def _why_not(path: Path, data: bytes, kind: type[Manifest], error: Exception) -> str:
    """One line for a manifest that cannot be read: another kind, a newer version, or damage."""
    damaged = f"{path} is damaged: {error}; {_repair(path.parent)}"
    try:
        schema = str(msgspec.json.decode(data)["schema"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return damaged
    name, _, version = schema.rpartition("/")
    tags = {str(each.__struct_config__.tag).rpartition("/")[0]: each for each in KINDS}
    if name in tags and tags[name] is not kind:
        return f"{path.parent} holds {tags[name].kind}, not {kind.kind}"
    newest = int(str(kind.__struct_config__.tag).rpartition("/")[2])
    if name in tags and version.isdecimal() and int(version) > newest:
        return f"{path} was written by a newer qwen-stage ({schema}); upgrade qwen-stage"
    return damaged

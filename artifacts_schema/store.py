"""The only place that writes artifacts: whole or not at all, and checked whenever they are read.

Publishing: write into a temporary sibling on the same file system, fsync, rename, fsync the directory. The manifest
goes last and is the commit mark: a file that no manifest lists does not exist.
"""

import contextlib
import fcntl
import hashlib
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union

import msgspec

from artifacts_schema import keys
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import EmbeddingsManifest, File, ImagesManifest, LatentsItem, LatentsManifest, Manifest

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 256 << 20
MAX_ZARR_JSON_BYTES = 64 << 10
CHECKSUM_BYTES = 4  # crc32c, after each chunk
READ_BYTES = 1 << 20
TEMPORARY = ".tmp-"
SCHEMAS: tuple[type[Manifest], ...] = (EmbeddingsManifest, LatentsManifest, ImagesManifest)
MADE_BY = {"embeddings": "encode", "latents": "denoise", "images": "decode"}

M = TypeVar("M", bound=Manifest)


def publish(directory: Path, name: str, write: Callable[[Path], object]) -> tuple[File, ...]:
    """Publishes `directory/name`, a file or a directory that `write(temporary_path)` makes. Returns what it holds."""
    # the suffix stays, because writers look at it
    temporary = directory / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{name}"
    target = directory / name
    try:
        write(temporary)
        files = describe(temporary, name)
        for path in _tree(temporary):
            sync(path)
        if target.is_dir():  # left by a crash before its manifest was written; a rename cannot replace it
            aside = temporary.with_name(f"{temporary.name}.old")
            target.rename(aside)
            temporary.rename(target)
            _remove(aside)
        else:
            temporary.replace(target)
        sync(directory)
    finally:
        _remove(temporary)
    return files


def write_manifest(directory: Path, manifest: Manifest) -> None:
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    msgspec.json.decode(data, type=type(manifest))  # building a struct checks nothing; what is published can be read
    publish(directory, MANIFEST, lambda path: path.write_bytes(data))


def find(path: Path, kind: type[Manifest]) -> Path:
    """The artifact's own directory, from it or from the run that holds it."""
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if not path.is_dir():
        raise UserError(f"{path} is a file; give a run directory or its {kind.kind}/")
    for directory in (path, path / kind.kind):
        if (directory / MANIFEST).exists():
            return directory
    raise UserError(f"{path} holds no {kind.kind}; make them with `qwen-stage {MADE_BY[kind.kind]}`")


def run_of(directory: Path) -> Path:
    """The run that holds an artifact's directory; that may have been given as `.`"""
    return directory.parent if directory.name not in ("", "..") else directory.resolve().parent


def read_manifest(directory: Path, kind: type[M]) -> tuple[M, str]:
    """The manifest of an artifact, and its id (the hash of its bytes)."""
    path = directory / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise UserError(f"{path} is larger than any manifest may be; it is not one of ours")
        data = path.read_bytes()
        manifest: Any = msgspec.json.decode(data, type=Union[(kind, *kind.older)])
        while not isinstance(manifest, kind):
            manifest = manifest.upgrade()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    # bad UTF-8 and deep nesting escape msgspec's own exception
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(_why_not(path, data, kind, error)) from None
    return manifest, keys.sha256(data)


def read_manifest_if_any(directory: Path, kind: type[M]) -> M | None:
    return read_manifest(directory, kind)[0] if (directory / MANIFEST).exists() else None


def verify(directory: Path, files: tuple[File, ...], kind: type[Manifest]) -> None:
    """Raises unless every file is a regular file inside the directory, with the size and content the manifest says."""
    for file in files:
        path = directory / file.path
        parts = Path(file.path).parts
        if not parts or Path(file.path).is_absolute() or ".." in parts:
            raise UserError(f"{directory / MANIFEST} lists {file.path!r}, which leaves the directory; do not trust it")
        try:
            if any((directory / Path(*parts[:i])).is_symlink() for i in range(1, len(parts) + 1)):
                raise UserError(f"{path} is a symbolic link, which artifacts never hold; do not trust it")
            info = path.stat()
            if not stat.S_ISREG(info.st_mode) or info.st_size != file.size:
                raise UserError(f"{path} is not the file of {file.size} bytes that its manifest lists; {_again(kind)}")
            if _sha256(path) != file.sha256:
                raise UserError(f"{path} is damaged (its content is not what was written); {_again(kind)}")
        except FileNotFoundError:
            raise UserError(f"{path} is missing; {_again(kind)}") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise UserError(f"{path} cannot be read: {error}") from None


def is_whole(directory: Path, files: tuple[File, ...], kind: type[Manifest]) -> bool:
    """Whether everything listed is there, as it was written."""
    try:
        verify(directory, files, kind)
    except UserError:
        return False
    return True


def write_latents(path: Path, latents: "np.ndarray") -> None:
    """Writes one picture's latents as a zarr array of a single checksummed chunk."""
    create_array(path, latents.shape, ())[...] = latents


def create_array(path: Path, shape: tuple[int, ...], chunk: tuple[int, ...]) -> Any:
    """A new zarr array of float32 as all of ours are; `chunk` says how its first axes are cut, the rest stay whole."""
    import zarr
    from zarr.codecs import Crc32cCodec

    return zarr.create_array(
        store=path,
        shape=shape,
        chunks=(*chunk, *shape[len(chunk) :]),
        dtype="float32",
        filters=None,
        compressors=[Crc32cCodec()],  # compression would save 8%
        fill_value=float("nan"),  # an absent chunk must not pass for latents
        config={"write_empty_chunks": True},
    )


def read_latents(directory: Path, item: LatentsItem) -> "np.ndarray":
    """The latents [C, h, w] of an item, float32: verified against the manifest, and finite."""
    import numpy as np
    import zarr

    path = directory / item.directory
    again = _again(LatentsManifest)
    verify(directory, item.files, LatentsManifest)
    chunk_bytes = 4 * math.prod(item.shape) + CHECKSUM_BYTES
    chunk, metadata = (f"{item.directory}/{name}" for name in ("c/0/0/0", "zarr.json"))
    sizes = {file.path: file.size for file in item.files}
    if sizes.keys() != {chunk, metadata} or sizes[chunk] != chunk_bytes or sizes[metadata] > MAX_ZARR_JSON_BYTES:
        raise UserError(f"{path} is not an array as qwen-stage writes them; {again}")
    try:
        array = zarr.open_array(store=path, mode="r")
        if array.shape != item.shape or array.chunks != item.shape or array.dtype != np.float32:
            raise UserError(f"{path} has another shape or type than its manifest says; {again}")
        latents = np.asarray(array[...])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {again}") from None
    if not np.isfinite(latents).all():
        raise UserError(f"{path} holds NaN or infinite numbers; {again}")
    return latents


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
            shutil.rmtree(run, ignore_errors=True)


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[Path]:
    """Makes an artifact's directory and lets one process write to it at a time.

    The lock goes with the process, however that ends; what one left half-written goes with the next.
    """
    _make_directory(directory)
    with (directory / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another qwen-stage is writing to {directory}; wait for it or choose --out") from None
        for leftover in directory.glob(f"{TEMPORARY}*"):
            _remove(leftover)
        yield directory


def _make_directory(path: Path) -> None:
    try:
        missing = [parent for parent in (path, *path.parents) if not parent.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for made in missing:
            sync(made.parent)  # or a power cut takes the directory with everything in it
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path} or a part of it is a file; choose another --out") from None
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another --out") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {path}: permission denied; choose another --out")


def _next_run(parent: Path) -> Path:
    """Makes the next free `run<N>`; two processes never get the same."""
    taken = [int(path.name[3:]) for path in parent.glob("run*") if path.name[3:].isdecimal()]
    number = max(taken, default=0) + 1
    while True:
        try:
            path = parent / f"run{number}"
            path.mkdir()
            sync(parent)
            return path
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"cannot make a run directory in {parent}: {error.strerror}; choose --out") from None


def describe(path: Path, name: str) -> tuple[File, ...]:
    """What a file or directory holds, as a manifest lists it under `name`."""
    return tuple(
        File(path=(Path(name) / each.relative_to(path)).as_posix(), size=each.stat().st_size, sha256=_sha256(each))
        for each in sorted(each for each in _tree(path) if each.is_file())
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _tree(path: Path) -> list[Path]:
    """A path and everything under it, children first."""
    return [*reversed(list(path.rglob("*"))), path] if path.is_dir() else [path]


def sync(path: Path) -> None:
    """Puts a file's content, or a directory's names, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: plain fsync leaves the data in the drive's cache
            with contextlib.suppress(OSError):  # network file systems have only the plain one
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _again(kind: type[Manifest]) -> str:
    return f"run `qwen-stage {MADE_BY[kind.kind]}` again"


def _why_not(path: Path, data: bytes, kind: type[Manifest], error: Exception) -> str:
    """One line for a manifest that cannot be read: another kind, a newer version, or damage."""
    try:
        schema = str(msgspec.json.decode(data)["schema"])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
        return f"{path} is damaged: not a manifest of ours"
    wanted = str(kind.__struct_config__.tag)
    name, _, version = schema.rpartition("/")
    wanted_name, _, wanted_version = wanted.rpartition("/")
    if name == wanted_name and version.isdecimal() and int(version) > int(wanted_version):
        return f"{path} was written by a newer qwen-stage ({schema}); upgrade qwen-stage"
    other = next((each.kind for each in SCHEMAS if each.__struct_config__.tag == schema), None)
    if other and schema != wanted:
        return f"{path.parent} holds {other}, not {kind.kind}"
    return f"{path} is damaged: {error}"

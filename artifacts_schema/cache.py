"""The content-addressed cache that all runs, and all users who may write to it, share.

    embeddings/ab/cdef….safetensors   the data
    embeddings/ab/cdef….json          its record: written last, it makes the entry exist
    damaged/                          what did not match its record, set aside

A key names everything that determines the content, so entries are never wrong, only absent or damaged; every hit is
verified. Renames make it correct; the lock only saves two processes from doing the same work.
"""

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from artifacts_schema import store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import Embedding, EmbeddingsManifest

EMBEDDINGS = "embeddings"
DAMAGED = "damaged"
LEFTOVER_SECONDS = 24 * 3600  # a temporary file this old belongs to no living process
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

Notice = Callable[[str], None]


class Entry(NamedTuple):
    key: str
    size: int  # bytes, record included
    used: float  # seconds since the epoch


def root() -> Path:
    """`$QWEN_STAGE_CACHE`, else the platform's cache directory."""
    if own := os.environ.get("QWEN_STAGE_CACHE"):
        return Path(own)
    from platformdirs import user_cache_path

    return user_cache_path("qwen-stage", appauthor=False)


def get(key: str, notice: Notice, used: bool = True) -> Embedding | None:
    """The verified entry of a key, marked as used now. A damaged one is set aside, and a miss."""
    record = _record(key)
    try:
        embedding = msgspec.json.decode(record.read_bytes(), type=Embedding)
        store.verify(record.parent, (embedding.file,), EmbeddingsManifest)
        if embedding.key != key or embedding.file.path != _data_name(key):
            raise UserError("the record is another entry's")
    except FileNotFoundError:
        return None
    except (UserError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OSError) as error:
        _set_aside(key)
        notice(f"set a damaged cache entry aside ({error}); it is made again")
        return None
    if used:
        with contextlib.suppress(OSError):  # another user's entry
            os.utime(record)
    return embedding


def path_of(embedding: Embedding) -> Path:
    return _record(embedding.key).parent / embedding.file.path


def put(embedding: Embedding, source: Path) -> None:
    """Copies a published file into the cache under its key. A cache that cannot be written to is no error."""
    record = _record(embedding.key)
    with contextlib.suppress(OSError):
        _make_shared(record.parent)
        (file,) = store.publish(record.parent, _data_name(embedding.key), lambda path: _copy(source, path))
        entry = msgspec.structs.replace(embedding, file=file)
        store.publish(record.parent, record.name, lambda path: _write(msgspec.json.encode(entry), path))


@contextlib.contextmanager
def lock(notice: Notice) -> Iterator[None]:
    """Held while encoding: who waits for it finds the work done. Where locks do not work, work may be done twice."""
    directory = root() / EMBEDDINGS
    try:
        _make_shared(directory)
        file = (directory / ".lock").open("ab")
        with contextlib.suppress(OSError):
            os.fchmod(file.fileno(), _file_mode(directory))
    except OSError:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notice("waiting for another encode")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def entries() -> list[Entry]:
    """All entries, least recently used first."""
    found = []
    for record in root().glob(f"{EMBEDDINGS}/??/*.json"):
        with contextlib.suppress(OSError):
            data = record.with_suffix(".safetensors")
            info = record.stat()
            found.append(Entry(record.parent.name + record.stem, info.st_size + data.stat().st_size, info.st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def trim(max_size: int) -> tuple[int, int]:
    """Removes the least recently used entries until the rest fits, and what is no entry. Returns (entries, bytes)."""
    shutil.rmtree(root() / DAMAGED, ignore_errors=True)
    known = entries()
    removed = freed = 0
    excess = sum(entry.size for entry in known) - max_size
    for entry in known:
        if excess <= freed:
            break
        record = _record(entry.key)
        record.unlink(missing_ok=True)  # first: without it the data is no entry
        record.with_suffix(".safetensors").unlink(missing_ok=True)
        removed, freed = removed + 1, freed + entry.size
    for path in root().glob(f"{EMBEDDINGS}/??/*"):
        orphan = path.name.startswith(store.TEMPORARY) or not path.with_suffix(".json").exists()
        with contextlib.suppress(OSError):
            if orphan and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()
    return removed, freed


def parse_bytes(text: str) -> int:
    """ "20GB" -> 20,000,000,000."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not match:
        raise UserError(f"{text!r} is not a size, as in 500MB or 20GB")
    return int(float(match[1]) * UNITS[match[2]])


def _record(key: str) -> Path:
    return root() / EMBEDDINGS / key[:2] / f"{key[2:]}.json"


def _data_name(key: str) -> str:
    return f"{key[2:]}.safetensors"


def _set_aside(key: str) -> None:
    record = _record(key)
    with contextlib.suppress(OSError):
        _make_shared(root() / DAMAGED)
        for path in (record, record.with_suffix(".safetensors")):  # the record first: the entry is gone at once
            if path.is_symlink() or path.exists():
                path.replace(root() / DAMAGED / f"{key}{path.suffix}")


def _make_shared(directory: Path) -> None:
    """Makes a directory with its parent's mode: a cache that a group may write to stays so all the way down."""
    if directory.is_dir():
        return
    if directory == root():
        directory.mkdir(parents=True, exist_ok=True)
        return
    _make_shared(directory.parent)
    directory.mkdir(exist_ok=True)
    with contextlib.suppress(OSError):
        directory.chmod(directory.parent.stat().st_mode & 0o7777)


def _file_mode(directory: Path) -> int:
    return directory.stat().st_mode & 0o666


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    target.chmod(_file_mode(target.parent))


def _write(data: bytes, target: Path) -> None:
    target.write_bytes(data)
    target.chmod(_file_mode(target.parent))

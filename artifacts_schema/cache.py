"""The content-addressed cache that all runs, and all users who may write to it, share.

    embeddings/ab/cdef….safetensors   the data
    embeddings/ab/cdef….json          its record: written last, it makes the entry exist
    image_latents/ab/cdef….zarr/      and so on
    latents/ab/cdef….zarr/
    images/ab/cdef….png
    modulations/ab/cdef….safetensors
    previews/<fingerprint>.json       what stages/preview.py has learned of a VAE; a few kB, never trimmed
    damaged/                          what did not match its record, set aside

A key names everything that determines the content; whatever is taken from here is compared with its record, and
checked to be of its kind. Who may write to a cache is trusted with the pictures that others get from it, and with
nothing else: no entry reaches beyond its place, or costs more than its kind may. Renames make it correct; the lock only
saves two processes from doing the same work.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from artifacts_schema import arrays, disk, store
from artifacts_schema.errors import Unreadable, UserError
from artifacts_schema.manifests import (
    Embedding,
    File,
    ImageItem,
    ImageLatentsItem,
    LatentsItem,
    ModulationTable,
    Record,
    Sha256,
)

DAMAGED = "damaged"
PREVIEWS = "previews"
SETTING_LIMIT = "QWEN_STAGE_CACHE_SIZE"
DEFAULT_LIMIT = "20GB"
MAX_RECORD_BYTES = 1 << 20
LEFTOVER_SECONDS = 24 * 3600  # a temporary file this old belongs to no living process
# shelves, entries and temporary files; with its first two digits, what was set aside
OUR_NAMES = re.compile(r"[0-9a-f]{2}|([0-9a-f]{2})?[0-9a-f]{30}\.(json|safetensors|zarr|png)|\.tmp-[0-9a-f]{16}")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

Notice = Callable[[str], None]
Item = TypeVar("Item", Embedding, ImageLatentsItem, LatentsItem, ImageItem, ModulationTable)


class CacheRecord(Record, Generic[Item], frozen=True, kw_only=True):
    """What an entry is, and the files it consists of."""

    key: str
    item: Item
    files: tuple[File, ...]
    checksum: str = ""


class Kind(NamedTuple, Generic[Item]):
    """A kind of results: its directory in the cache, the type of its records, and how its data is called."""

    name: str
    record: type[CacheRecord[Item]]
    suffix: str


ARRAY_SUFFIX = ".zarr"
EMBEDDINGS = Kind("embeddings", CacheRecord[Embedding], ".safetensors")
IMAGE_LATENTS = Kind("image_latents", CacheRecord[ImageLatentsItem], ARRAY_SUFFIX)
LATENTS = Kind("latents", CacheRecord[LatentsItem], ARRAY_SUFFIX)
IMAGES = Kind("images", CacheRecord[ImageItem], ".png")
MODULATIONS = Kind("modulations", CacheRecord[ModulationTable], ".safetensors")
KINDS = (EMBEDDINGS, IMAGE_LATENTS, LATENTS, IMAGES, MODULATIONS)


class Moments(Record, frozen=True, kw_only=True):
    """The sums from which a VAE's previews are solved."""

    vae: Sha256  # its fingerprint
    moments: tuple[tuple[float, ...], ...]
    checksum: str = ""


class Entry(NamedTuple):
    kind: Kind
    key: str
    size: int  # bytes, record included
    used: float  # seconds since the epoch


def root() -> Path:
    """`$QWEN_STAGE_CACHE`, else the platform's cache directory."""
    if own := os.environ.get("QWEN_STAGE_CACHE"):
        return Path(own)
    from platformdirs import user_cache_path

    return user_cache_path("qwen-stage", appauthor=False)


def find(kind: Kind[Item], key: str, notice: Notice) -> Item | None:
    """What is recorded under a key. Its data is verified when it is taken, with `adopt`."""
    record = _read_record(kind, key, notice)
    return record.item if record else None


def adopt(
    kind: Kind[Item], key: str, directory: Path, name: str, check: Callable[[Any], object], notice: Notice
) -> tuple[File, ...] | None:
    """Publishes an entry's data as `directory/name`, as `take` gives it."""
    content = take(kind, key, check, notice)
    return None if content is None else store.publish(directory, name, content)


def take(kind: Kind[Item], key: str, check: Callable[[Any], object], notice: Notice) -> Any:
    """An entry's data, verified; it is marked as used now.

    `check(content)` raises ValueError for what is not as it must be. An entry that is damaged or refused is set aside;
    that, like an entry that went meanwhile, is None.
    """
    content = _content(kind, key, notice)
    if content is None:
        return None
    try:
        check(content)
    except (ValueError, KeyError, TypeError) as error:
        _set_aside(kind, key, error, notice)
        return None
    with contextlib.suppress(OSError):  # another user's entry
        os.utime(_record(kind, key))
    return content


def verify(kind: Kind[Item], key: str, notice: Notice) -> bool:
    """Whether an entry is whole. A damaged one is set aside."""
    return _content(kind, key, notice) is not None


def put(kind: Kind[Item], key: str, item: Item, content: disk.Content) -> None:
    """Adds a result under a key. A cache that cannot be written to is no error, nor is what could not be read again."""
    if isinstance(content, bytes) and len(content) > store.MAX_FILE_BYTES:
        return
    record, data = _record(kind, key), _data(kind, key)
    with contextlib.suppress(OSError):
        _make_shared(record.parent)
        disk.publish(data.parent, data.name, content, inherit=True)
        entry = CacheRecord(key=key, item=item, files=store.describe(data.name, content))
        disk.publish(record.parent, record.name, store.seal(entry, kind.record), inherit=True)


def find_moments(vae: str) -> tuple[tuple[float, ...], ...] | None:
    """None if there are none, or they are damaged: the next `put_moments` replaces them."""
    with contextlib.suppress(OSError, UserError, ValueError):
        record: Moments = store.unseal(disk.read(root() / PREVIEWS / f"{vae}.json", MAX_RECORD_BYTES), Moments)
        if record.vae == vae:
            return record.moments
    return None


def put_moments(vae: str, moments: tuple[tuple[float, ...], ...]) -> None:
    """A cache that cannot be written to is no error."""
    with contextlib.suppress(OSError):
        _make_shared(root() / PREVIEWS)
        record = store.seal(Moments(vae=vae, moments=moments), Moments)
        disk.publish(root() / PREVIEWS, f"{vae}.json", record, inherit=True)


@contextlib.contextmanager
def lock(kind: Kind, notice: Notice) -> Iterator[None]:
    """Held while working: who waits for it finds the work done. Where locks do not work, work may be done twice."""
    directory = root() / kind.name
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, UserError):
            _make_shared(directory)
            try:
                stack.enter_context(disk.lock(directory, inherit=True))
            except BlockingIOError:
                notice(f"waiting for another process that makes {kind.name}")
                stack.enter_context(disk.lock(directory, wait=True, inherit=True))
        yield


def entries() -> list[Entry]:
    """All entries, least recently used first."""
    found = []
    for kind in KINDS:
        for record in _shelved(kind):
            if record.suffix == ".json":
                key = record.parent.name + record.stem
                with contextlib.suppress(OSError):
                    info = record.lstat()
                    found.append(Entry(kind, key, info.st_size + _size(_data(kind, key)), info.st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def trim(max_size: int) -> tuple[int, int]:
    """Removes the least recently used entries until the rest fits, and what is no entry. Returns (entries, bytes)."""
    known = entries()
    removed = freed = 0
    excess = sum(entry.size for entry in known) - max_size
    for entry in known:
        if excess <= freed:
            break
        record = _record(entry.kind, entry.key)
        disk.remove(record)  # first: without it the data is no entry
        if not record.exists():  # another user's may stay
            disk.remove(_data(entry.kind, entry.key))
            removed, freed = removed + 1, freed + entry.size
    for path in _leftovers():
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > LEFTOVER_SECONDS:
                disk.remove(path)
    return removed, freed


def forget_damaged() -> None:
    for path in _own(root() / DAMAGED):
        disk.remove(path)


def limit() -> int:
    """`$QWEN_STAGE_CACHE_SIZE` in bytes. Whoever adds something asks for it first, and trims to it afterwards."""
    try:
        return parse_bytes(os.environ.get(SETTING_LIMIT) or DEFAULT_LIMIT)
    except UserError as error:
        raise UserError(f"{SETTING_LIMIT}: {error}") from None


def parse_bytes(text: str) -> int:
    """ "20GB" -> 20,000,000,000."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMGT]?)B?", text.strip().upper())
    if not match:
        raise UserError(f"{text!r} is not a size, as in 500MB or 20GB")
    return int(float(match[1]) * UNITS[match[2]])


def _own(directory: Path) -> list[Path]:
    """What lies in a directory of the cache under names that we give. No link is followed: it may lead anywhere."""
    with contextlib.suppress(OSError):
        if not directory.is_symlink():
            return [path for path in directory.iterdir() if OUR_NAMES.fullmatch(path.name)]
    return []


def _shelved(kind: Kind) -> Iterator[Path]:
    for shelf in _own(root() / kind.name):
        yield from _own(shelf)


def _leftovers() -> Iterator[Path]:
    """Temporary files, data without a record, and what was set aside."""
    yield from _own(root() / DAMAGED)
    yield from (path for path in _own(root() / PREVIEWS) if path.name.startswith(disk.TEMPORARY))
    for kind in KINDS:
        for path in _shelved(kind):
            if path.name.startswith(disk.TEMPORARY) or not path.with_suffix(".json").exists():
                yield path


def _record(kind: Kind, key: str) -> Path:
    return root() / kind.name / key[:2] / f"{key[2:]}.json"


def _data(kind: Kind, key: str) -> Path:
    return _record(kind, key).with_suffix(kind.suffix)


def _read_record(kind: Kind[Item], key: str, notice: Notice) -> CacheRecord[Item] | None:
    try:
        data = disk.read(_record(kind, key), MAX_RECORD_BYTES)
        record: CacheRecord[Item] = store.unseal(data, kind.record)
        if record.key != key:
            raise UserError("the record is another entry's")
        if {file.path for file in record.files} != _names(kind, key) or len(record.files) != len(_names(kind, key)):
            raise UserError("the record lists other files than an entry has")
        if sum(file.size for file in record.files) > _most_bytes(record.item):
            raise UserError("the record lists more than an entry has")
    except FileNotFoundError:
        return None
    except OSError as error:
        notice(f"cannot read a cache entry ({error.strerror}); it is made again")
        return None
    except (UserError, ValueError) as error:
        _set_aside(kind, key, error, notice)
        return None
    return record


def _content(kind: Kind[Item], key: str, notice: Notice) -> disk.Content | None:
    record = _read_record(kind, key, notice)
    if record is None:
        return None
    data = _data(kind, key)
    try:
        files = {file.path: store.read_file(data.parent, file) for file in record.files}
        if data.name in files:
            return files[data.name]
        return {path.removeprefix(f"{data.name}/"): content for path, content in files.items()}
    except (OSError, Unreadable) as error:
        notice(f"cannot read a cache entry ({error}); it is made again")
        return None
    except UserError as error:
        if _record(kind, key).exists():  # else it was trimmed just now
            _set_aside(kind, key, error, notice)
        return None


def _set_aside(kind: Kind, key: str, error: Exception, notice: Notice) -> None:
    with contextlib.suppress(OSError):
        _make_shared(root() / DAMAGED)
        for path in (_record(kind, key), _data(kind, key)):  # the record first: the entry is gone at once
            aside = root() / DAMAGED / f"{key}{path.suffix}"
            disk.remove(aside)
            if path.is_symlink() or path.exists():
                path.replace(aside)
    reason = str(error).partition("; repair")[0]
    done = "cannot set aside" if _record(kind, key).exists() else "set aside"
    notice(f"{done} a damaged cache entry ({reason}); it is made again")


def _names(kind: Kind, key: str) -> set[str]:
    """The files that an entry's data consists of."""
    name = _data(kind, key).name
    if kind.suffix == ARRAY_SUFFIX:
        return {f"{name}/{path}" for path in (arrays.METADATA, arrays.chunk_name())}
    return {name}


def _most_bytes(item: Any) -> int:
    """An upper bound for the size of an entry's data, from what is said of it."""
    if isinstance(item, Embedding):
        return 4 * item.tokens * item.dim + item.tokens + arrays.MAX_METADATA_BYTES
    if isinstance(item, LatentsItem | ImageLatentsItem):
        return arrays.chunk_bytes(item.shape) + arrays.MAX_METADATA_BYTES
    if isinstance(item, ModulationTable):
        return 4 * item.steps * (12 * item.layers + 2) * item.dim + arrays.MAX_METADATA_BYTES
    return store.MAX_FILE_BYTES


def _size(path: Path) -> int:
    return sum(each.lstat().st_size for each in (path, *path.rglob("*")) if each.is_file())


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

"""Durable file operations, through which everything is written: whole or not there, also when the power goes.

Publishing: write into a temporary sibling on the same file system, fsync, rename, fsync the directory. Nothing else
does this: zarr and safetensors only rename, or write in place.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from artifacts_schema.errors import UserError

Content = bytes | Mapping[str, bytes]  # of a file, or of a directory's files by their path in it

TEMPORARY = ".tmp-"
READ_BYTES = 1 << 20


def publish(directory: Path, name: str, content: Content, inherit: bool = False) -> None:
    """Puts a file or a directory at `directory/name`, whole; with `inherit`, for those who may use `directory`.

    A directory that is there already with just this content stays, because replacing one takes two renames: a kill
    between them loses what was there, which must never be anything whole.
    """
    target = directory / name
    temporary, aside = (directory / f"{TEMPORARY}{os.urandom(8).hex()}" for _ in range(2))
    if not isinstance(content, bytes) and _holds(target, content):
        return
    mode = stat.S_IMODE(directory.stat().st_mode) if inherit else None
    try:
        if isinstance(content, bytes):
            _write(temporary, content, mode)
        else:
            _write_tree(temporary, content, mode)
        if target.is_dir() and not target.is_symlink():  # a rename cannot replace it
            target.rename(aside)
        temporary.replace(target)
        sync(target.parent)
    finally:
        remove(temporary)
        remove(aside)


def publish_new(directory: Path, names: Iterable[str], data: bytes) -> str:
    """Puts a file at the first of these names that is free, whole. Returns the name.

    It never takes another's place, unless two come at once on a file system without hard links.
    """
    temporary = directory / f"{TEMPORARY}{os.urandom(8).hex()}"
    try:
        _write(temporary, data, None)
        for name in names:
            try:
                (directory / name).hardlink_to(temporary)
            except FileExistsError:
                continue
            except OSError:  # a file system without hard links
                if os.path.lexists(directory / name):
                    continue
                temporary.rename(directory / name)
            sync(directory)
            return name
        raise FileExistsError(errno.EEXIST, "every name is taken", str(directory))
    finally:
        remove(temporary)


def bring(source: Path, target: Path, link: bool) -> None:
    """Copies the file `source`; with `link`, gives it another name where the file system can. What is there stays."""
    if target.exists():
        return
    temporary = target.parent / f"{TEMPORARY}{os.urandom(8).hex()}"
    try:
        try:
            if not link:
                raise OSError
            temporary.hardlink_to(source.resolve())
        except OSError:  # another file system, or one without hard links
            with source.open("rb") as original, temporary.open("xb") as copy:
                while block := original.read(READ_BYTES):
                    copy.write(block)
        sync(temporary)
        temporary.rename(target)
        sync(target.parent)
    finally:
        remove(temporary)


def move(path: Path, target: Path) -> None:
    """Renames a file durably. After a power cut it may have both names, but never none."""
    path.rename(target)
    sync(target.parent)
    sync(path.parent)


def read(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Never follows a link, never waits for a pipe."""
    with opened(path) as file:
        if os.fstat(file).st_size > limit:
            raise UserError(f"{path} is larger than the {limit} bytes it may have; it is not one of ours")
        return b"".join(blocks(file))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor to read from, of a regular file and nothing else."""
    with _descriptor(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as file:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise UserError(f"{path} is not a regular file; do not trust it")
        yield file


def blocks(file: int) -> Iterator[bytes]:
    while block := os.read(file, READ_BYTES):
        yield block


def remove(path: Path) -> None:
    """Removes a file or a directory with everything in it, if it is there; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        from shutil import rmtree

        rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sweep(directory: Path) -> None:
    """Removes what a kill left half-written; for the only one who writes there."""
    for leftover in directory.glob(f"{TEMPORARY}*"):
        remove(leftover)


def make_directory(path: Path) -> None:
    """Makes a directory and its parents, durably. Raises UserError where that cannot be written to."""
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


@contextlib.contextmanager
def lock(directory: Path, wait: bool = False, inherit: bool = False) -> Iterator[int]:
    """Holds `directory/.lock`; it goes with the process, however that ends. Raises BlockingIOError if another has it.

    Yields the descriptor that holds it: a child that is given it holds it as well. Where a file system knows no locks,
    this is none.
    """
    with _descriptor(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK) as file:
        if inherit:
            with contextlib.suppress(OSError):  # another user's
                os.fchmod(file, directory.stat().st_mode & 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield file


def sync(path: Path) -> None:
    """Puts a directory's names on the disk itself."""
    with _descriptor(path, os.O_RDONLY) as directory:
        _sync(directory)


def _holds(directory: Path, content: Mapping[str, bytes]) -> bool:
    """Whether a directory holds these files, and no others."""
    if not directory.is_dir():
        return False
    try:
        paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if not path.is_dir()}
        return paths.keys() == content.keys() and all(read(paths[n], len(c)) == c for n, c in content.items())
    except (OSError, UserError):
        return False


def _write_tree(root: Path, content: Mapping[str, bytes], mode: int | None) -> None:
    directories = {root}
    for name, data in content.items():
        path = root / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} leaves the directory")
        directories |= {root / parent for parent in Path(name).parents}
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, data, mode)
    for directory in sorted(directories, reverse=True):  # children first
        if mode is not None:
            directory.chmod(mode)
        sync(directory)


def _write(path: Path, data: bytes, mode: int | None) -> None:
    with _descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
        if mode is not None:
            os.fchmod(file, mode & 0o666)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        _sync(file)


@contextlib.contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: plain fsync leaves the data in the drive's cache
        with contextlib.suppress(OSError):  # network file systems have only the plain one
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)

"""The drop folder: what lies in it, what of that is a whole drop, and where drops go.

    inbox/<anywhere>/foo.txt       a drop: .txt, .toml, .jsonl or a .png of ours, `foo.png.toml` beside that changes it
    inbox/.claimed/<id>-foo.txt    taken in, its job still open
    inbox/done/foo.txt             its job is done
    inbox/failed/foo.txt           it failed; foo.txt.reason.txt says why

Nobody can know that a copy is complete: what has not changed for a while (size, time and inode) is claimed by a rename,
and looked at once more afterwards. Hidden and temporary names are others' business; links and the like are refused.
"""

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

from artifacts_schema import disk
from artifacts_schema.errors import UserError
from artifacts_schema.jobs import JOBS

SUFFIXES = (".txt", ".toml", ".jsonl", ".png")
CHANGES_SUFFIX = ".png.toml"  # beside a picture: what is to be other when it is made again
REASON_SUFFIX = ".reason.txt"
CLAIMED, DONE, FAILED = ".claimed", "done", "failed"
SETTLE_SECONDS = 1.0
EMPTY_FACTOR = 10  # times longer for empty files: many a copy begins as one
MAX_NAME_BYTES = 200  # of a claimed drop: its id and what may be put behind it must fit as well
ID_LENGTH = 16
LEFTOVER_SECONDS = 3600
OUTBOX_ID = "outbox-id"  # a random name, as paths differ between machines
CLAIM = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}-.")
OUR_TEMPORARY = re.compile(re.escape(disk.TEMPORARY) + "[0-9a-f]{16}")

Notice = Callable[[str], None]
Signature = tuple[int, int, int]  # size, time of change in ns, inode


class Claim(NamedTuple):
    """A drop that was taken in. Its id is the time of that, in hexadecimal nanoseconds."""

    id: str
    path: Path
    changes: Path | None  # the TOML beside a picture

    @property
    def name(self) -> str:
        return self.path.name[ID_LENGTH + 1 :]


class Inbox:
    def __init__(self, directory: Path, settle: float, notice: Notice) -> None:
        """`settle`: seconds that a drop must not have changed."""
        self.directory = directory
        self.claimed, self.done, self.failed = (directory / name for name in (CLAIMED, DONE, FAILED))
        self.settle = settle
        self.notice = notice
        self.seen: dict[Path, tuple[Signature, float]] = {}  # since when (monotonic) it looks like that
        self.told: set[str] = set()
        self.stuck: set[Path] = set()  # what cannot be taken in, for a reason that was told
        self.last_id = 0

    def claim(self) -> bool:
        """Takes in what has settled; whatever has not is looked at again later. Returns whether there is such."""
        try:
            drops = self._drops()
        except FileNotFoundError:
            self._tell_once(f"{self.directory} is gone; waiting for it to come back")
            return False
        self.told.discard(f"{self.directory} is gone; waiting for it to come back")
        now = time.monotonic()
        taken = {path: since for path, since in self.seen.items() if path.parent == self.claimed}
        self.seen = taken | {path: self._since(path, signature, now) for path, signature in drops.items()}
        settled = [path for path in drops if self._is_settled(path, now)]
        sidecars = {_key(path): path for path in drops if path.name.lower().endswith(CHANGES_SUFFIX)}
        pictures = {f"{_key(path)}.toml" for path in drops if path.suffix.lower() == ".png"}
        parents = set()
        for path in sorted(settled, key=lambda path: (self.seen[path][0][1], path)):
            if path.name.lower().endswith(CHANGES_SUFFIX):
                if _key(path) not in pictures:
                    self._tell_once(f"{path} waits for its picture {path.with_suffix('').name}")
                continue
            changes = sidecars.get(f"{_key(path)}.toml")
            if changes and changes not in settled:
                continue
            if self._claim(path, changes):
                parents.add(path.parent)
                self.stuck.discard(path)
        if parents:  # before a job is made of it: or, after a power cut, the drop would be back and be made again
            disk.sync(self.claimed)
            for parent in parents:
                with contextlib.suppress(OSError):  # it went meanwhile
                    disk.sync(parent)
        waiting = self.seen.keys() - self.stuck - set(sidecars.values())
        return any(path in waiting for path in drops)

    def claims(self) -> list[Claim]:
        """All drops that were taken in, as they came."""
        try:
            names = dict.fromkeys(sorted(path.name for path in self.claimed.iterdir()))
        except OSError:  # the inbox is gone, or is a file now
            return []
        claims = []
        for name in filter(CLAIM.match, names):
            id, path = name[:ID_LENGTH], self.claimed / name
            changes = f"{name}.toml"
            if name.lower().endswith(CHANGES_SUFFIX):
                if name[: -len(".toml")] not in names:
                    self._put_back(path)  # a kill came between it and its picture
            else:
                claims.append(Claim(id, path, self.claimed / changes if changes in names else None))
        return claims

    def is_whole(self, claim: Claim) -> bool:
        """Whether a claimed drop is still as it was; one that is still written to is given its time again."""
        return all(self._is_claimed_settled(path) for path in (claim.path, claim.changes) if path)

    def put_away(self, claim: Claim, reason: str = "") -> None:
        """Moves a claimed drop to where it ends, with the reason beside it if it failed."""
        if not os.path.lexists(claim.path):
            return
        directory = self.failed if reason else self.done
        disk.make_directory(directory)
        name = _free_name(directory, claim.name, claim.path)
        if reason:
            disk.publish(directory, _beside(name), f"{reason}\n".encode())
        self.seen.pop(claim.path, None)
        with contextlib.suppress(FileNotFoundError):
            disk.move(claim.path, directory / name)
        if claim.changes:
            self.seen.pop(claim.changes, None)
            with contextlib.suppress(FileNotFoundError):
                disk.move(claim.changes, directory / _free_name(directory, f"{name}.toml", claim.changes))

    def belong_to(self, outbox: Path) -> None:
        """Raises UserError if drops were taken in for another outbox: they would be made in both."""
        known = outbox / JOBS / OUTBOX_ID
        disk.sweep(known.parent)
        if not known.exists():
            disk.publish(known.parent, OUTBOX_ID, os.urandom(16).hex().encode())
        mine = known.read_bytes() + b"\n" + os.fsencode(outbox.resolve())
        other = self.claimed / f".{OUTBOX_ID}"
        before = other.read_bytes() if other.exists() else mine
        if before.partition(b"\n")[0] != mine.partition(b"\n")[0] and self.claims():
            where = os.fsdecode(before.partition(b"\n")[2])
            raise UserError(
                f"{self.directory} has drops that were taken in for {where}; finish them with --out {where}"
            )
        if before != mine or not other.exists():
            disk.publish(self.claimed, other.name, mine)

    def sweep(self, open_ids: set[str]) -> None:
        """Clears away what a kill left half-written, and what a power cut left in the inbox as well as claimed."""
        for directory in (self.claimed, self.done, self.failed):
            disk.sweep(directory)
        with contextlib.suppress(OSError):
            drops = {path.name: path for path in self._drops()}
            for claim in self.claims():  # no job is made of a claim before both folders are synced
                if claim.id not in open_ids and claim.name in drops and _is_same(claim.path, drops[claim.name]):
                    disk.remove(claim.path)
                    if claim.changes:
                        disk.remove(claim.changes)

    def _drops(self) -> dict[Path, Signature]:
        """What lies in the inbox and may be drops; what can be none is refused or left alone."""
        found: dict[Path, Signature] = {}
        folders = [self.directory]
        while folders:
            folder = folders.pop()
            try:
                entries = list(os.scandir(folder))
            except OSError as error:
                if folder == self.directory and isinstance(error, FileNotFoundError):
                    raise
                self._tell_once(f"{folder}: {error.strerror}")
                continue
            for entry in entries:
                path = folder / entry.name
                if folder == self.directory and OUR_TEMPORARY.fullmatch(entry.name):
                    self._forget_if_old(path)
                if entry.name.startswith(".") or (folder == self.directory and entry.name in (DONE, FAILED)):
                    continue
                with contextlib.suppress(OSError, UserError):  # it went meanwhile
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(path)
                    elif path.suffix.lower() not in SUFFIXES or entry.name.endswith(REASON_SUFFIX):
                        self._tell_once(f"{path} is left alone: it is no .txt, .toml, .jsonl or .png")
                    elif entry.is_file(follow_symlinks=False):
                        found[path] = _signature(entry.stat(follow_symlinks=False))
                    else:
                        self._refuse(path, "it is a link or something else that is no file; drop the file itself")
        return found

    def _since(self, path: Path, signature: Signature, now: float) -> tuple[Signature, float]:
        before = self.seen.get(path)
        return before if before and before[0] == signature else (signature, now)

    def _is_settled(self, path: Path, now: float) -> bool:
        (size, _, _), since = self.seen[path]
        return now - since >= self.settle * (1 if size else EMPTY_FACTOR)

    def _claim(self, path: Path, changes: Path | None) -> bool:
        self.last_id = max(time.time_ns(), self.last_id + 1)
        id = f"{self.last_id:0{ID_LENGTH}x}"
        target = self.claimed / f"{id}-{_cut(path.name)}"
        try:
            disk.make_directory(self.claimed)
            if changes:
                changes.rename(target.with_name(f"{target.name}.toml"))
                self._follow(changes, target.with_name(f"{target.name}.toml"))
            path.rename(target)
            self._follow(path, target)
        except FileNotFoundError:
            return False  # renamed or removed by whoever dropped it
        except (OSError, UserError) as error:
            self._tell_once(f"cannot take in {path}: {getattr(error, 'strerror', None) or error}")
            self.stuck.add(path)
            return False
        return True

    def _follow(self, path: Path, target: Path) -> None:
        self.seen[target] = self.seen.pop(path)

    def _is_claimed_settled(self, path: Path) -> bool:
        now = time.monotonic()
        try:
            signature = _signature(path.lstat())
        except OSError:
            return True  # reading it will say what is wrong
        self.seen[path] = self._since(path, signature, now)  # after a restart from now on
        return self._is_settled(path, now)

    def _forget_if_old(self, path: Path) -> None:
        """What a `submit` that was killed has left."""
        with contextlib.suppress(OSError):
            info = path.lstat()
            if stat.S_ISREG(info.st_mode) and time.time() - info.st_ctime > LEFTOVER_SECONDS:
                path.unlink()

    def _put_back(self, changes: Path) -> None:
        """Brings a picture's changes back to it, wherever it is: still in the inbox, or put away already."""
        name = changes.name[ID_LENGTH + 1 :]
        picture = name[: -len(".toml")]
        with contextlib.suppress(OSError):
            found = [path.parent for path in self._drops() if path.name == picture]
            ended = [directory for directory in (self.failed, self.done) if os.path.lexists(directory / picture)]
            directory = [*found, *ended, self.directory][0]
            disk.move(changes, directory / _free_name(directory, name, changes))

    def _refuse(self, path: Path, reason: str) -> None:
        disk.make_directory(self.failed)
        name = _free_name(self.failed, _cut(path.name), path)
        disk.publish(self.failed, _beside(name), f"{reason}\n".encode())
        disk.move(path, self.failed / name)
        self.notice(f"{path} failed: {reason}")

    def _tell_once(self, line: str) -> None:
        if line not in self.told:
            self.told.add(line)
            self.notice(line)


def submit(paths: list[Path], inbox: Path) -> list[Path]:
    """Puts copies of files into an inbox, each whole at once and in nobody's place. Returns where they are.

    A picture and the changes to it stay together, and those of others apart.
    """
    from artifacts_schema.store import MAX_FILE_BYTES

    contents = {}
    for path in paths:
        name = path.name.lower()
        if not name.endswith(SUFFIXES) or name.startswith(".") or name.endswith(REASON_SUFFIX):
            raise UserError(f"{path} is no .txt, .toml, .jsonl or .png file that is taken in")
        try:
            contents[path] = disk.read(path.resolve(), MAX_FILE_BYTES)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
    if not inbox.is_dir():
        raise UserError(f"{inbox} is no folder; start `qwen-stage watch {inbox}` first")
    changes = {path.with_suffix(""): path for path in paths if path.name.lower().endswith(CHANGES_SUFFIX)}
    placed = []
    for path in paths:
        if path in changes.values() and path.with_suffix("") in contents:
            continue  # comes with its picture
        names = (name for name in _numbered(path.name) if not _has_other(inbox, name))
        while True:
            name = next(names)
            first = []
            try:
                if path in changes:  # first: a picture without its changes would be taken in
                    first = [disk.publish_new(inbox, iter([f"{name}.toml"]), contents[changes[path]])]
                placed += [inbox / each for each in (*first, disk.publish_new(inbox, iter([name]), contents[path]))]
                break
            except FileExistsError:  # somebody was faster
                for each in first:
                    disk.remove(inbox / each)
    return placed


def _has_other(inbox: Path, name: str) -> bool:
    """Whether a name, or that of changes to it, is taken."""
    return os.path.lexists(inbox / name) or os.path.lexists(inbox / f"{name}.toml")


def _key(path: Path) -> str:
    """A path whose picture and changes may differ in case."""
    return str(path.with_name(path.name.lower()))


def _signature(info: os.stat_result) -> Signature:
    if not stat.S_ISREG(info.st_mode):
        raise FileNotFoundError
    return info.st_size, info.st_mtime_ns, info.st_ino


def _numbered(name: str) -> Iterator[str]:
    """foo.txt, foo-2.txt, foo-3.txt, …"""
    suffix = name[-len(CHANGES_SUFFIX) :] if name.lower().endswith(CHANGES_SUFFIX) else Path(name).suffix
    stem = name.removesuffix(suffix)
    yield name
    yield from (f"{stem}-{again}{suffix}" for again in count(2))


def _free_name(directory: Path, name: str, path: Path) -> str:
    """The first of a name's numbers that is free in a directory, or has the very same file.

    It may be there already: a power cut in the middle of a rename can leave both names.
    """
    return next(
        name for name in _numbered(name) if not os.path.lexists(directory / name) or _is_same(directory / name, path)
    )


def _is_same(one: Path, other: Path) -> bool:
    from filecmp import cmp

    try:
        infos = [path.lstat() for path in (one, other)]
        if not all(stat.S_ISREG(info.st_mode) for info in infos):
            return False
        return infos[0].st_mtime_ns == infos[1].st_mtime_ns and cmp(one, other, shallow=False)
    except OSError:
        return False


def _cut(name: str) -> str:
    """A name that is short enough for something more, its suffix kept."""
    suffix = Path(name).suffix
    stem = name.removesuffix(suffix)
    while len(os.fsencode(stem + suffix)) > MAX_NAME_BYTES:
        stem = stem[:-1]
    return stem + suffix


def _beside(name: str) -> str:
    return f"{name}{REASON_SUFFIX}"

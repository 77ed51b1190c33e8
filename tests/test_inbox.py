"""What lies in a drop folder: when it is taken in, where it ends, and what is never touched."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from artifacts_schema.errors import UserError
from orchestrator import inbox as module
from orchestrator.inbox import Claim, Inbox, submit

SETTLE = 2.0


class Clock:
    """Stands in for `time` in the inbox; only what is told passes."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Folder:
    """An inbox, and what it says."""

    def __init__(self, path: Path, clock: Clock) -> None:
        path.mkdir(exist_ok=True)
        self.path, self.clock = path, clock
        self.said: list[str] = []
        self.restart()

    def restart(self) -> None:
        self.inbox = Inbox(self.path, SETTLE, self.said.append)

    def drop(self, name: str, content: str = "a cat") -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return path

    def pass_time(self, seconds: float = SETTLE) -> list[str]:
        """Looks, waits, looks again; returns the names of what is claimed and whole by now."""
        self.inbox.claim()
        self.clock.now += seconds
        self.inbox.claim()
        return [claim.name for claim in self.inbox.claims() if self.inbox.is_whole(claim)]

    def only(self) -> Claim:
        (claim,) = self.inbox.claims()
        return claim


@pytest.fixture
def folder(tmp_path, clock) -> Folder:
    return Folder(tmp_path / "inbox", clock)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def test_a_drop_is_taken_in_once_it_has_settled(folder, clock):
    path = folder.drop("a.txt")
    assert folder.inbox.claim()
    assert path.exists()
    clock.now += SETTLE / 2
    assert folder.inbox.claim()
    assert path.exists()
    clock.now += SETTLE / 2
    assert not folder.inbox.claim()
    assert not path.exists()
    claim = folder.only()
    assert claim.name == "a.txt"
    assert claim.path.read_text() == "a cat"


def test_a_copy_that_goes_on_is_waited_for(folder, clock):
    path = folder.drop("a.txt", "one\n")
    for _ in range(5):
        folder.inbox.claim()
        clock.now += SETTLE * 0.9
        with path.open("a") as file:
            file.write("more\n")
    folder.inbox.claim()
    assert path.exists()
    assert folder.pass_time() == ["a.txt"]
    assert folder.only().path.read_text().count("more") == 5


def test_a_drop_that_is_still_written_to_after_it_was_claimed_is_waited_for(folder, clock):
    path = folder.drop("a.txt", "one\n")
    with path.open("a") as file:  # it stays open while the file is renamed
        folder.pass_time()
        file.write("two\n")
        file.flush()
        claim = folder.only()
        assert not folder.inbox.is_whole(claim)
        clock.now += SETTLE / 2
        assert not folder.inbox.is_whole(claim)
        clock.now += SETTLE
        assert folder.inbox.is_whole(claim)
    assert claim.path.read_text() == "one\ntwo\n"


def test_an_editors_atomic_save_between_two_looks_begins_the_waiting_anew(folder, clock):
    path = folder.drop("a.txt", "old")
    folder.inbox.claim()
    clock.now += SETTLE * 0.9
    mtime = path.stat().st_mtime_ns
    new = folder.drop(".a.txt.swp", "new")  # as long, and as old: only the inode tells
    os.utime(new, ns=(mtime, mtime))
    new.replace(path)
    folder.inbox.claim()
    clock.now += SETTLE * 0.9
    folder.inbox.claim()
    assert path.exists()
    assert folder.pass_time() == ["a.txt"]
    assert folder.only().path.read_text() == "new"


def test_an_empty_file_is_given_more_time(folder):
    folder.drop("a.txt", "")
    assert folder.pass_time() == []
    assert folder.pass_time(SETTLE * module.EMPTY_FACTOR) == ["a.txt"]


def test_names_that_are_hidden_temporary_or_unknown_are_left_alone(folder):
    left_alone = [".a.txt", "a.txt~", "a.txt.part", "a.txt.crdownload", "#a.txt#", "4913", "a.md", "a.txt.reason.txt"]
    for name in left_alone:
        folder.drop(name)
    for _ in range(3):
        assert folder.pass_time(SETTLE * 20) == []
    assert set(left_alone) <= set(names(folder.path))
    assert sum("a.md" in line for line in folder.said) == 1  # said once


def test_a_rename_from_a_temporary_name_is_a_drop(folder):
    path = folder.drop("a.txt.part")
    folder.pass_time()
    path.rename(folder.path / "a.txt")
    assert folder.pass_time() == ["a.txt"]


def test_folders_inside_are_looked_into_but_not_ours(folder):
    folder.drop("deep/er/a.txt")
    folder.drop("done/b.txt")
    folder.drop("failed/c.txt")
    folder.drop("deep/done/d.txt")
    folder.drop(".git/e.txt")
    assert sorted(folder.pass_time()) == ["a.txt", "d.txt"]


def test_links_and_pipes_are_refused_and_never_followed(folder, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    (folder.path / "link.txt").symlink_to(secret)
    (folder.path / "folder").symlink_to(tmp_path)
    os.mkfifo(folder.path / "pipe.txt")
    assert folder.pass_time() == []
    assert secret.read_text() == "a secret"
    assert names(folder.inbox.failed) == ["link.txt", "link.txt.reason.txt", "pipe.txt", "pipe.txt.reason.txt"]
    assert (folder.inbox.failed / "link.txt").is_symlink()
    assert "drop the file itself" in (folder.inbox.failed / "link.txt.reason.txt").read_text()


def test_a_name_that_is_no_text_keeps_its_bytes(folder):
    raw = os.fsencode(folder.path) + b"/caf\xe9.txt"
    Path(os.fsdecode(raw)).write_text("a cat")
    assert [os.fsencode(name) for name in folder.pass_time()] == [b"caf\xe9.txt"]
    folder.inbox.put_away(folder.only(), "because")
    found = [os.fsencode(name) for name in names(folder.inbox.failed)]
    assert found == [b"caf\xe9.txt", b"caf\xe9.txt.reason.txt"]


def test_the_longest_name_there_can_be(folder):
    name = "ä" * 125 + ".txt"  # 254 bytes
    folder.drop(name)
    (claimed,) = folder.pass_time()
    assert claimed.endswith("ä.txt")
    folder.inbox.put_away(folder.only(), "because")
    assert len(names(folder.inbox.failed)) == 2


def test_drops_come_in_the_order_of_their_time(folder):
    for number, name in enumerate(["c.txt", "a.txt", "b.txt"]):
        os.utime(folder.drop(name), (number, number))
    assert folder.pass_time() == ["c.txt", "a.txt", "b.txt"]
    ids = [claim.id for claim in folder.inbox.claims()]
    assert ids == sorted(ids)
    assert len(set(ids)) == 3


def test_nothing_that_ended_is_ever_replaced(folder):
    for content in ("one", "two", "three"):
        folder.drop("a.txt", content)
        folder.pass_time()
        folder.inbox.put_away(folder.only())
    assert [(folder.inbox.done / name).read_text() for name in ("a.txt", "a-2.txt", "a-3.txt")] == [
        "one",
        "two",
        "three",
    ]
    for content in ("one", "two"):
        folder.drop("v1.2.txt", content)
        folder.pass_time()
        folder.inbox.put_away(folder.only(), f"not {content}")
    assert names(folder.inbox.failed) == ["v1.2-2.txt", "v1.2-2.txt.reason.txt", "v1.2.txt", "v1.2.txt.reason.txt"]
    assert (folder.inbox.failed / "v1.2-2.txt.reason.txt").read_text() == "not two\n"


def test_a_removed_and_remade_inbox(folder, clock):
    folder.drop("a.txt")
    folder.pass_time()
    folder.inbox.put_away(folder.only())
    for path in sorted(folder.path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.path.rmdir()
    assert folder.pass_time() == []
    assert not folder.path.exists()  # or whoever removed it could not make it again
    assert sum("is gone" in line for line in folder.said) == 1
    folder.path.mkdir()
    folder.drop("b.txt")
    assert folder.pass_time() == ["b.txt"]


def test_a_claim_is_found_again_after_a_kill_and_given_its_time(folder, clock):
    folder.drop("a.txt")
    folder.pass_time()
    folder.restart()
    claim = folder.only()
    assert not folder.inbox.is_whole(claim)  # nobody has watched it meanwhile
    clock.now += SETTLE
    assert folder.inbox.is_whole(claim)


def test_a_picture_waits_for_its_changes_and_takes_them_along(folder, clock):
    folder.drop("a.png", "a picture")
    changes = folder.drop("a.png.toml", "seed = 1")
    folder.drop("lonely.png.toml", "seed = 2")
    folder.inbox.claim()
    clock.now += SETTLE / 2
    changes.write_text("seed = 11")
    folder.inbox.claim()
    clock.now += SETTLE / 2
    folder.inbox.claim()
    assert folder.inbox.claims() == []
    assert folder.pass_time() == ["a.png"]
    claim = folder.only()
    assert claim.changes is not None
    assert claim.changes.read_text() == "seed = 11"
    folder.inbox.put_away(claim)
    assert names(folder.inbox.done) == ["a.png", "a.png.toml"]
    assert (folder.path / "lonely.png.toml").exists()
    assert any("waits for its picture" in line for line in folder.said)


def test_changes_that_a_kill_parted_from_their_picture_come_back(folder, clock, monkeypatch):
    folder.drop("a.png", "a picture")
    folder.drop("a.png.toml", "seed = 1")
    rename = Path.rename

    def die_at_picture(self, target):
        if self.name == "a.png":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", die_at_picture)
    with pytest.raises(KeyboardInterrupt):
        folder.pass_time()
    monkeypatch.undo()
    monkeypatch.setattr(module, "time", clock)
    folder.restart()
    assert folder.inbox.claims() == []
    assert folder.pass_time() == ["a.png"]
    assert folder.only().changes is not None


def test_put_away_may_be_repeated_from_any_point(folder):
    folder.drop("a.txt")
    folder.pass_time()
    claim = folder.only()
    folder.inbox.put_away(claim, "because")
    folder.inbox.put_away(claim, "because")
    assert names(folder.inbox.failed) == ["a.txt", "a.txt.reason.txt"]
    assert folder.inbox.claims() == []


def test_submit_is_whole_at_once_and_in_nobodys_place(tmp_path):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    sources = [tmp_path / f"{n}" / "a.txt" for n in range(8)]
    for number, source in enumerate(sources):
        source.parent.mkdir()
        source.write_text(f"cat {number}")
    places: list[Path] = []
    threads = [threading.Thread(target=lambda s=source: places.extend(submit([s], inbox))) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.read_text() for path in places) == [f"cat {n}" for n in range(8)]
    assert len(names(inbox)) == 8
    assert {stat.S_ISREG(path.lstat().st_mode) and path.stat().st_nlink for path in places} == {1}


def test_submitted_pictures_keep_their_own_changes(tmp_path, folder):
    for name, seed in (("x", None), ("y", 2), ("z", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_text(f"picture {name}")
        if seed:
            (tmp_path / name / "a.png.toml").write_text(f"seed = {seed}")
    submit([tmp_path / "x/a.png"], folder.path)
    submit([tmp_path / "y/a.png.toml", tmp_path / "y/a.png"], folder.path)
    submit([tmp_path / "z/a.png", tmp_path / "z/a.png.toml"], folder.path)
    folder.pass_time()
    found = {claim.path.read_text(): claim.changes and claim.changes.read_text() for claim in folder.inbox.claims()}
    assert found == {"picture x": None, "picture y": "seed = 2", "picture z": "seed = 3"}


def test_others_temporary_files_are_never_touched(folder, monkeypatch):
    """Also old ones: a move keeps a file's time."""
    folder.drop(".tmp-x.toml")
    folder.drop(".tmp-dir/file")
    folder.drop("deep/.tmp-0123456789abcdef")
    ours = folder.drop(".tmp-0123456789abcdef")
    folder.clock.now = ours.stat().st_ctime + 1
    folder.pass_time()
    assert ours.exists()
    folder.clock.now += 24 * 3600
    folder.pass_time()
    assert names(folder.path) == [".claimed", ".tmp-dir", ".tmp-x.toml", "deep"] or names(folder.path) == [
        ".tmp-dir",
        ".tmp-x.toml",
        "deep",
    ]
    assert names(folder.path / "deep") == [".tmp-0123456789abcdef"]


def test_changes_find_their_picture_in_its_folder_and_in_any_case(folder, monkeypatch, clock):
    folder.drop("deep/a.PNG", "a picture")
    folder.drop("deep/a.PNG.TOML", "seed = 1")
    assert folder.pass_time() == ["a.PNG"]
    assert folder.only().changes is not None
    folder.inbox.put_away(folder.only())
    assert names(folder.inbox.done) == ["a.PNG", "a.PNG.toml"]


def test_changes_follow_a_picture_that_was_put_away_before_a_kill(folder, monkeypatch):
    folder.drop("a.png", "a picture")
    folder.drop("a.png.toml", "seed = no")
    folder.pass_time()
    claim = folder.only()
    folder.inbox.put_away(claim._replace(changes=None), "because")  # and then it was killed
    folder.restart()
    assert folder.inbox.claims() == []
    assert names(folder.inbox.failed) == ["a.png", "a.png.reason.txt", "a.png.toml"]


def test_a_drop_that_a_power_cut_left_in_both_places_is_one(folder):
    """As a file system may that does not keep the two halves of a rename together."""
    drop = folder.drop("a.png", "a picture")
    folder.drop("a.png.toml", "seed = 1")
    other = folder.drop("b.txt", "another")
    folder.pass_time()
    for claim in folder.inbox.claims():
        os.link(claim.path, folder.path / claim.name)
        if claim.changes:
            os.link(claim.changes, folder.path / f"{claim.name}.toml")
    other.unlink()
    folder.drop("b.txt", "newer")
    folder.restart()
    folder.inbox.sweep(set())
    assert [claim.name for claim in folder.inbox.claims()] == ["b.txt"]
    assert drop.exists()
    folder.pass_time()
    assert sorted(folder.pass_time()) == ["a.png", "b.txt", "b.txt"]


def test_what_is_no_claim_among_the_claims(folder):
    folder.drop("a.txt")
    folder.pass_time()
    (folder.inbox.claimed / "stray.txt").write_text("x")
    (folder.inbox.claimed / "too-short-to-be-an-id.txt").write_text("x")
    assert folder.only().name == "a.txt"


def test_what_cannot_be_taken_in_is_not_waited_for(folder, monkeypatch):
    folder.drop("a.txt")
    rename = Path.rename

    def other_disk(self, target):
        if self.name == "a.txt":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", other_disk)
    folder.pass_time()
    assert not folder.inbox.claim()
    assert sum("cannot take in" in line for line in folder.said) == 1


@pytest.mark.parametrize(
    ("name", "what"),
    [("a.md", "no .txt"), (".h.txt", "no .txt"), ("a.txt.reason.txt", "no .txt"), ("missing.txt", "No such file")],
)
def test_submit_says_what_is_wrong(tmp_path, name, what):
    for own in ("a.md", ".h.txt", "a.txt.reason.txt"):
        (tmp_path / own).write_text("x")
    (tmp_path / "inbox").mkdir()
    with pytest.raises(UserError, match=what):
        submit([tmp_path / name], tmp_path / "inbox")
    assert names(tmp_path / "inbox") == []


def test_submit_to_no_folder(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="is no folder"):
        submit([tmp_path / "a.txt"], tmp_path / "inbox")

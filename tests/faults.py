"""Fails, or kills, a command at each of its file operations in turn, then looks what is left: `python tests/faults.py`.

Every operation on files under the watched directories counts, whoever does it: Python tells of opening, renaming,
removing, making, listing; what works on descriptors (read, write, fsync, fchmod, flock) is watched beside. The command
runs in a fork of this process, so that the imports are paid once; nothing here may compute with MLX before.
"""

import argparse
import errno
import fcntl
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy  # noqa: F401
import random_models
import zarr  # noqa: F401
from PIL import Image

import orchestrator.watch
import stages.decode
import stages.denoise
import stages.encode
import stages.encode_image
import stages.models.text_encoder
import stages.models.transformer
import stages.models.vae
import stages.models.vae_encoder  # noqa: F401
from artifacts_schema import cache, disk, store
from artifacts_schema.errors import UserError
from artifacts_schema.jobs import JOBS
from orchestrator import cli, dispatch, worker
from orchestrator.inbox import OUTBOX_ID
from orchestrator.progress import Voice

KILL = "kill"
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EACCES": errno.EACCES}
POWER = "power cut"  # what was not synced is gone, names and contents
NAMES_AHEAD = "power cut, names kept"  # names are there that were not synced, contents not: so file systems differ
DEADLY = (KILL, POWER, NAMES_AHEAD)
FAULTS = ("EIO", KILL, "ENOSPC", POWER, "EACCES", NAMES_AHEAD)
CONVERTED = "small"  # a checkpoint
END = "done"  # counts as an operation: what a command has said to be done is not undone by a power cut
# Python's names for what it audits, with the position of the path among the event's arguments
AUDITED = {
    "open": 0,
    "os.rename": 0,
    "os.remove": 0,
    "os.mkdir": 0,
    "os.rmdir": 0,
    "os.chmod": 0,
    "os.utime": 0,
    "os.listdir": 0,
    "os.scandir": 0,
    "os.truncate": 0,
    "os.link": 0,
    "os.symlink": 0,
}
ON_DESCRIPTORS = ((os, "read"), (os, "write"), (os, "fsync"), (os, "fchmod"), (fcntl, "flock"))


class Durable:
    """What a power cut would leave of a directory: of each file the content, of each directory the names, as synced."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.open = os.open
        self.held: list[int] = []  # descriptors, lest an inode be used again
        self.contents: dict[int, tuple[bytes, int]] = {}  # with their time, in ns
        self.names: dict[int, dict[str, tuple[int, bool]]] = {}
        for path in (root, *root.rglob("*")):
            self.synced(path)

    def synced(self, path: Path) -> None:
        self.held.append(self.open(path, os.O_RDONLY))
        inode = path.stat().st_ino
        if path.is_dir():
            with os.scandir(path) as found:
                self.names[inode] = {entry.name: (entry.inode(), entry.is_dir()) for entry in found}
        else:
            self.contents[inode] = path.read_bytes(), path.stat().st_mtime_ns

    def leave(self, target: Path, names_ahead: bool) -> None:
        """Writes what is left to `target`."""
        if names_ahead:
            for path in (self.root, *self.root.rglob("*")):
                if path.is_dir():
                    self.synced(path)
        self._write(self.root.stat().st_ino, target)

    def _write(self, directory: int, target: Path) -> None:
        target.mkdir()
        for name, (inode, is_directory) in self.names.get(directory, {}).items():
            if is_directory:
                self._write(inode, target / name)
            else:
                content, time_ns = self.contents.get(inode, (b"", 0))
                (target / name).write_bytes(content)
                os.utime(target / name, ns=(time_ns, time_ns))


class Layer:
    """Counts file operations under `root` and makes the `at`-th fail. Lives and dies with the process it is put in."""

    def __init__(self, root: Path, at: int | None, fault: str) -> None:
        self.root = str(root.resolve())
        self.at, self.fault = at, fault
        self.durable = Durable(root) if fault in (POWER, NAMES_AHEAD) else None
        self.passive = False  # while this looks at files itself
        self.count = 0
        self.log: list[str] = []
        self.descriptors: dict[int, str] = {}

    def install(self) -> None:
        for module, name in ON_DESCRIPTORS:
            setattr(module, name, partial(self.on_descriptor, name, getattr(module, name)))
        self.open, os.open = os.open, self.opening
        sys.addaudithook(self.audited)

    def watches(self, path: object) -> bool:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(self.root)  # noqa: PTH100

    def audited(self, event: str, arguments: tuple) -> None:
        if event in AUDITED and not self.passive and self.watches(arguments[AUDITED[event]]):
            self.operation(event, str(arguments[AUDITED[event]]))

    def opening(self, path, flags, mode=0o777, **options) -> int:
        descriptor = self.open(path, flags, mode, **options)
        if self.watches(path):
            self.descriptors[descriptor] = str(path)
        else:
            self.descriptors.pop(descriptor, None)
        return descriptor

    def on_descriptor(self, name: str, original: Callable, descriptor: int, *arguments):
        if descriptor in self.descriptors:
            half = None
            if name == "write":  # what fails or dies in the middle has written something
                half = partial(original, descriptor, bytes(arguments[0])[: len(arguments[0]) // 2])
            self.operation(name, self.descriptors[descriptor], half)
        result = original(descriptor, *arguments)
        if name == "fsync" and self.durable and descriptor in self.descriptors:
            self.passive = True
            self.durable.synced(Path(self.descriptors[descriptor]))
            self.passive = False
        return result

    def operation(self, name: str, path: str, before: Callable | None = None) -> None:
        self.count += 1
        self.log.append(f"{name} {path}")
        if self.count == self.at:
            if before:
                before()
            if self.fault in DEADLY:
                self.passive = True
                if self.durable:
                    self.durable.leave(Path(f"{self.root}.left"), self.fault == NAMES_AHEAD)
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(ERRORS[self.fault], os.strerror(ERRORS[self.fault]), path)


class Ended(NamedTuple):
    status: int  # exit code, or -9
    err: str
    operations: list[str]


def run(directory: Path, command: list[str], at: int | None = None, fault: str = KILL) -> Ended:
    """Runs `qwen-stage COMMAND` in `directory`, with its cache in `cache/`, failing at its `at`-th file operation."""
    err, log = directory.parent / "err", directory.parent / "log"
    log.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.chdir(directory)
            os.environ["QWEN_STAGE_CACHE"] = str(directory / "cache")
            with err.open("wb") as file:
                os.dup2(file.fileno(), 2)
            with open(os.devnull, "wb") as file:  # noqa: PTH123
                os.dup2(file.fileno(), 1)
            layer = Layer(directory, at, fault)
            layer.install()
            status = watch(command) if command[0] == "watch" else cli.main(command)
            layer.operation(END, "")
            log.write_text("\n".join(layer.log))
        except SystemExit as exit:
            status = int(exit.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    operations = log.read_text().splitlines() if log.exists() else []
    left = Path(f"{directory.resolve()}.left")
    if left.exists():
        shutil.rmtree(directory)
        left.rename(directory)
    return Ended(os.waitstatus_to_exitcode(ended), err.read_text(), operations)


class Performing:
    """A worker that is no process: what it does to files is watched as well. It performs an order as it is sent."""

    def __init__(self, command: list[str], stage: str, holding: int) -> None:
        self.stage = stage
        self.ready = self.ended = False
        self.started = self.heard = time.monotonic()
        self.log: list[str] = []
        self.said: list[worker.Event] = [worker.Ready()]
        self.unsent = b""
        reader, writer = os.pipe()
        os.close(writer)  # so that nobody waits for it
        self.answers = self.stderr = os.fdopen(reader, "rb")

    def send(self, order: worker.Order) -> None:
        def perform(arguments: list[str], voice: Voice) -> int:
            args = cli._parser().parse_args(arguments)
            args.voice = voice
            return args.command(args)

        sys.stdin = io.TextIOWrapper(io.BytesIO(order.stdin.encode()))
        silent = Voice(lambda *_: None, lambda line: self.said.append(worker.Said(line)))
        self.said.append(worker._perform(perform, order.arguments, silent))

    def events(self) -> Iterator[worker.Event]:
        while self.said:
            event = self.said.pop(0)
            self.ready |= isinstance(event, worker.Ready)
            yield event

    def is_dead(self) -> bool:
        return False

    def close(self) -> int:
        self.answers.close()
        return 0

    interrupt = kill = close


def watch(command: list[str]) -> int:
    """`qwen-stage watch` in one process, without pages."""
    dispatch.Worker = Performing  # type: ignore[misc, assignment]
    dispatch.RETRY_SECONDS = dispatch.FULL_SECONDS = orchestrator.watch.RETRY_SECONDS = 0.01
    orchestrator.watch._Page.go_on = orchestrator.watch._Page.write = lambda self: None  # type: ignore[method-assign]
    return cli.main(command)


@dataclass
class Scenario:
    """A command, what has to have happened before it, and the run that it works on."""

    command: list[str]
    before: list[list[str]] = field(default_factory=list)
    damage: Callable[[Path], None] = lambda directory: None
    run: str = "run"


def scenarios(model: Path) -> dict[str, Scenario]:
    encode = ["encode", "p.txt", "--out=run", f"--model={model}"]
    denoise = ["denoise", "--embeddings=run", "--size=32x32", "--steps=2"]
    decode = ["decode", "run"]
    encode_with_image = ["encode", "i.jsonl", "--out=run", f"--model={model}"]
    encode_image = ["encode-image", "run"]
    elsewhere = [encode, denoise, decode]
    return {
        "encode": Scenario(encode),
        "encode, cached": Scenario(encode, [[*encode[:2], "--out=other", encode[3]]]),
        "denoise": Scenario(denoise, [encode]),
        "denoise, steps kept": Scenario([*denoise, "--steps=1", "--keep-trajectory"], [encode]),
        "denoise, resumed": Scenario(
            denoise, [encode, [*denoise, "--keep-trajectory"]], lambda directory: interrupt(directory)
        ),
        "denoise, cached": Scenario(denoise, elsewhere, lambda directory: shutil.rmtree(directory / "run/latents")),
        "encode-image": Scenario(encode_image, [encode_with_image]),
        "encode-image, cached": Scenario(
            encode_image,
            [encode_with_image, encode_image],
            lambda directory: shutil.rmtree(directory / "run/image_latents"),
        ),
        "encode, with an image": Scenario(encode_with_image),
        "decode": Scenario(decode, [encode, denoise]),
        "decode, cached": Scenario(decode, elsewhere, lambda directory: shutil.rmtree(directory / "run/images")),
        "watch": Scenario(
            ["watch", "inbox", "--once", "--settle=0.01", "--poll", "--no-overlap", f"--model={model}"],
            [[*encode, "--dtype=float32"], [*denoise, "--steps=1"]],
            drop,
            "outbox/a",
        ),
        "cache verify": Scenario(["cache", "verify"], elsewhere, damage_cache),
        "cache trim": Scenario(["cache", "trim", "--max-size=6KB"], elsewhere),
        "models convert": Scenario(["models", "convert", "demo", CONVERTED, "--quantize=4"], run=CONVERTED),
    }


def interrupt(directory: Path) -> None:
    """As if it had been killed after the first picture's first step."""
    for path in (*directory.glob("run/latents/manifest*"), *directory.glob("cache/latents")):
        disk.remove(path)
    for path in directory.glob("run/latents/*.zarr"):
        if not path.name.endswith(".trajectory.zarr"):
            disk.remove(path)
        for step in path.glob("c/[02]"):
            disk.remove(step)


def damage_cache(directory: Path) -> None:
    path = sorted(directory.glob("cache/latents/??/*.zarr/c/0/0/0"))[0]
    path.write_bytes(path.read_bytes()[:-1])


def drop(directory: Path) -> None:
    """A drop of which most is cached, and a bad one."""
    (directory / "inbox").mkdir()
    (directory / "inbox/a.jsonl").write_text('{"prompt": "a", "size": "32x32", "steps": 1}\n')
    (directory / "inbox/bad.toml").write_text("no toml")


class Survey(NamedTuple):
    operations: int
    faults: int
    survived: int  # faults after which nothing was lost and the next run completed all
    lost: list[str]  # what was wrong afterwards, a line each


def survey(scenario: Scenario, faults: Callable[[int], tuple[str, ...]], work: Path) -> Survey:
    """Runs a scenario with every one of its operations faulted, by the faults that `faults(n)` names."""
    offset = random.randrange(len(FAULTS))  # another fault at each operation every time
    start = work / "start"
    start.mkdir()
    (start / "p.txt").write_text("a\nb\n")
    (start / "i.jsonl").write_text('{"prompt": "a", "image": "i.png", "size": "32x48"}\n')
    Image.new("RGB", (8, 12), "teal").save(start / "i.png")
    for command in scenario.before:
        must(run(start, command))
    scenario.damage(start)
    undisturbed = copy(start, work / "undisturbed")
    operations = must(run(undisturbed, scenario.command)).operations
    where = scenario.run
    expected = pictures_and_tensors(undisturbed, where)
    count, survived, lost = 0, 0, []
    for at in range(1, len(operations) + 1):
        done = operations[at - 1].startswith(END)
        for fault in DEADLY if done else faults(at + offset):
            count += 1
            directory = copy(start, work / "faulted")
            ended = run(directory, scenario.command, at, fault)
            wrong = list(complaints(ended, fault)) + list(not_whole(directory, scenario))
            before = published(directory, where)
            if done and scenario.command[0] != "cache" and pictures_and_tensors(directory, where) != expected:
                wrong.append("what was done is undone")
            again = run(directory, scenario.command)
            after = published(directory, where)
            if again.status not in (0, 3) or (again.status == 3 and scenario.damage not in (damage_cache, drop)):
                wrong.append(f"cannot go on: {again.err.strip()}")
            wrong += [f"made twice: {name}" for name, written in before.items() if after.get(name) != written]
            if scenario.command[0] != "cache" and pictures_and_tensors(directory, where) != expected:
                wrong.append("other results than undisturbed")
            wrong += [f"left over: {path}" for path in leftovers(directory, where)]
            wrong += drops_astray(directory) if scenario.damage is drop else []
            if wrong:
                lost += [f"{fault} at {at} ({operations[at - 1]}): {line}" for line in wrong]
            else:
                survived += 1
    return Survey(len(operations), count, survived, lost)


def drops_astray(directory: Path) -> Iterator[str]:
    """What is not where it ought to be when a watch has ended: every drop in one place, every job ended once."""
    inbox, jobs = directory / "inbox", directory / "outbox" / JOBS
    found = sorted(path.relative_to(inbox).as_posix() for path in inbox.rglob("*") if path.is_file())
    ours = [".claimed/.lock", f".claimed/.{OUTBOX_ID}"]
    if found != [*ours, "done/a.jsonl", "failed/bad.toml", "failed/bad.toml.reason.txt"]:
        yield f"the inbox holds {found}"
    ended = [path.name for path in (jobs / "ended").glob("*.json")]
    if len(ended) != 2 or [path.name for path in (directory / "outbox").iterdir()] not in ([JOBS, "a"], ["a", JOBS]):
        yield f"{ended} have ended, there are {sorted(path.name for path in (directory / 'outbox').iterdir())}"
    for path in jobs.rglob("*"):
        if path.is_file() and path.name not in (".lock", OUTBOX_ID) and path.parent.name != "ended":
            yield f"left over: {path}"


def leftovers(directory: Path, run: str) -> Iterator[Path]:
    """What is in the run and no manifest lists."""
    listed = {directory / run / name for name in published(directory, run)}
    known = {store.MANIFEST, store.BACKUP, ".lock"}
    for path in (directory / run).rglob("*"):
        if path.is_file() and path not in listed and path.name not in known:
            yield path


def copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
    return target


def must(ended: Ended) -> Ended:
    if ended.status not in (0, 3):
        raise RuntimeError(ended.err)
    return ended


def complaints(ended: Ended, fault: str) -> Iterator[str]:
    """How a command may not end."""
    if ended.status not in ((0, -signal.SIGKILL) if fault in DEADLY else (0, 2, 3)):
        yield f"exit code {ended.status}: {ended.err.strip()[-300:]}"
    if "Traceback" in ended.err:
        yield f"a traceback: {ended.err.strip().splitlines()[-1]}"
    if ended.status == 2 and ended.err.count("qwen-stage: error: ") != 1:
        yield f"not one clear line: {ended.err.strip()}"


def not_whole(directory: Path, scenario: Scenario) -> Iterator[str]:
    """What is published and yet not whole."""
    for kind in store.KINDS:
        artifact = directory / scenario.run / kind.kind
        if (artifact / store.MANIFEST).exists():
            try:
                manifest, _ = store.read_manifest(artifact, kind)
                store.verify(artifact, tuple(store.listed_files(manifest)))
            except UserError as error:
                yield str(error)
    if scenario.damage is not damage_cache:
        with environment("QWEN_STAGE_CACHE", str(directory / "cache")):
            said: list[str] = []
            for entry in cache.entries():
                cache.verify(entry.kind, entry.key, said.append)
            yield from said


def published(directory: Path, run: str) -> dict[str, tuple[int, int]]:
    """The files that manifests of the run list, with what tells whether they were written again.

    Of a checkpoint, which has no manifests, every file.
    """
    found = {}
    for path in (directory / CONVERTED).rglob("*") if run == CONVERTED else ():
        if path.is_file() and not path.name.startswith((disk.TEMPORARY, ".lock")):
            info = path.stat()
            found[path.relative_to(directory / run).as_posix()] = info.st_ino, info.st_mtime_ns
    for kind in store.KINDS:
        artifact = directory / run / kind.kind
        with suppress(UserError, FileNotFoundError):  # `not_whole` says so
            manifest, _ = store.read_manifest(artifact, kind)
            for file in store.listed_files(manifest):
                info = (artifact / file.path).stat()
                found[f"{kind.kind}/{file.path}"] = info.st_ino, info.st_mtime_ns
    return found


def pictures_and_tensors(directory: Path, run: str) -> dict[str, bytes]:
    """The content of all that manifests of the run list; they themselves say how long it took."""
    return {name: (directory / run / name).read_bytes() for name in published(directory, run)}


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def all_faults(at: int) -> tuple[str, ...]:
    return FAULTS


def one_fault(at: int) -> tuple[str, ...]:
    """Errors and deaths in turn."""
    return (FAULTS[at % len(FAULTS)],)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scenario", nargs="*", help="by name; default: all")
    parser.add_argument("--brief", action="store_true", help="one fault at each operation, in turn; default: all six")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th operation")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each scenario, no table")
    args = parser.parse_args()
    kinds = one_fault if args.brief else all_faults

    def faults(at: int) -> tuple[str, ...]:
        return () if at % args.every else kinds(at)

    with tempfile.TemporaryDirectory() as work:
        model = random_models.golden_checkpoint(random_models.SMALL, Path(work) / "model")
        if not args.json:
            print(f"{'command':24}{'operations':>12}{'faults':>8}{'survived':>10}{'lost':>6}")
        for name, scenario in scenarios(model).items():
            if not args.scenario or name in args.scenario:
                found = survey(scenario, faults, Path(tempfile.mkdtemp(dir=work)))
                if args.json:
                    print(json.dumps(found._asdict()))
                    continue
                print(
                    f"{name:24}{found.operations:12}{found.faults:8}{found.survived:10}{len(found.lost):6}", flush=True
                )
                for line in found.lost:
                    print(f"    {line}")


if __name__ == "__main__":
    main()

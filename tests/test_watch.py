"""The drop folder from end to end, with real workers: whatever dies, every job ends once, with the right pictures."""

import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from artifacts_schema import disk, store
from artifacts_schema.errors import UserError
from artifacts_schema.jobs import STAGES, Ended, Jobs
from artifacts_schema.manifests import ImagesManifest, LatentsManifest
from orchestrator import EXIT_DONE, EXIT_INTERRUPTED, EXIT_SOME_FAILED, dispatch, plan, watch
from orchestrator.dispatch import Terms
from orchestrator.progress import Terminal
from orchestrator.watch import Options, Watch
from orchestrator.worker import Worker

UNRULY = [sys.executable, str(Path(__file__).parent / "unruly_worker.py")]
SETTLE = 0.2
KILLED_JOBS = int(os.environ.get("QWEN_STAGE_KILLED_JOBS", "8"))
MANY_DROPS = int(os.environ.get("QWEN_STAGE_MANY_DROPS", "150"))


def no_events(directory: Path, wake: watch.Wake) -> Callable[[], None]:
    return lambda: None


class Shop:
    """A drop folder, its outbox, and a model small enough for tests."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.inbox, self.outbox = root / "inbox", root / "outbox"
        self.inbox.mkdir()
        self.jobs = Jobs(self.outbox)
        self.lines: list[str] = []
        self.interrupt = threading.Event()

    def interrupt_when(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not reached() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.interrupt.set()

    def drop(self, name: str, *prompts: str, **settings: object) -> None:
        entries = [{"prompt": prompt, "size": "32x32", "steps": 2, **settings} for prompt in prompts]
        path = self.root / name
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        path.rename(self.inbox / name)

    def watch(self, **terms: object) -> int:
        """Until nothing is left to do, in this process."""
        stages = terms.pop("stages", STAGES)
        notifier = terms.pop("notifier", no_events)
        command = terms.pop("command", UNRULY)
        options = Options(Terms(stages, **{"once": True, **terms}), str(self.model), "float32", settle=SETTLE)
        terminal = Terminal()
        terminal.notice = self.lines.append
        return Watch(
            self.inbox, self.outbox, options, terminal, self.interrupt.is_set, notifier=notifier, command=command
        ).run()

    def command(self, *options: object) -> list[str]:
        command = [sys.executable, "-P", "-m", "orchestrator.cli", "watch", str(self.inbox), f"--settle={SETTLE}"]
        return [*command, f"--model={self.model}", *map(str, options)]

    def start(self, *options: object) -> "subprocess.Popen[str]":
        return subprocess.Popen(self.command(*options), stderr=subprocess.PIPE, text=True, process_group=0)

    def ended(self) -> dict[str, Ended]:
        found = {}
        for id in self.jobs.ended_ids():
            ended = self.jobs.read_ended(id)
            assert ended is not None
            assert ended.job.run not in found
            found[ended.job.run] = ended
        return found

    def outcomes(self) -> dict[str, str]:
        return {run: ended.outcome for run, ended in self.ended().items()}

    def pictures(self, run: str) -> dict[str, bytes]:
        """The pictures of a run, all of which must be whole and listed."""
        directory = self.outbox / run / "images"
        manifest, _ = store.read_manifest(directory, ImagesManifest)
        store.verify(directory, tuple(item.file for item in manifest.items))
        files = {path.name: path.read_bytes() for path in directory.glob("*.png")}
        assert files.keys() == {item.file.path for item in manifest.items}
        return files

    def left_over(self) -> list[str]:
        """What should not be there when nothing is open."""
        ours = (".lock", ".outbox-id")
        found = [path for path in self.root.rglob("*") if path.name.startswith(disk.TEMPORARY)]
        found += [path for path in self.inbox.iterdir() if path.is_file()]
        found += [path for path in (self.inbox / ".claimed").iterdir() if path.name not in ours]
        for directory in (self.jobs.open, *map(self.jobs.stage, STAGES)):
            found += [path for path in directory.iterdir() if path.is_file() and path.name != ".lock"]
        found += [path for path in self.outbox.rglob("*.trajectory.*")]
        return [str(path.relative_to(self.root)) for path in found]

    def names(self, folder: str) -> list[str]:
        directory = self.inbox / folder
        return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


@pytest.fixture
def shop(tmp_path, small_model) -> Shop:
    (tmp_path / "shop").mkdir()
    return Shop(tmp_path / "shop", small_model)


def test_limits_and_quantization_reach_the_stages(tmp_path, small_model):
    shop = Shop(tmp_path, small_model)
    shop.drop("a.jsonl", "one")
    done = subprocess.run(
        shop.command("--once", "--quantize=4", "--quantize-text=8", "--memory=1GB", "--stream"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == EXIT_DONE, done.stderr
    (ended,) = shop.ended().values()
    assert ended.job.dtype.endswith("-q4")
    latents, _ = store.read_manifest(shop.outbox / "a/latents", LatentsManifest)
    assert latents.items[0].dtype == ended.job.dtype
    assert latents.items[0].embeddings_dtype == ended.job.embeddings_dtype
    assert ended.job.embeddings_dtype.endswith("-q8")
    shop.drop("b.jsonl", "two")
    done = subprocess.run(shop.command("--once", "--memory=1MB"), capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_SOME_FAILED
    assert "more than --memory 1 MB" in done.stderr


def test_a_picture_of_a_quantized_text_encoder_is_made_again(shop, qwen_stage, tmp_path, small_model):
    common = ["--size=32x32", "--steps=1", f"--model={small_model}"]
    assert qwen_stage("run", "a cat", *common, "--quantize-text=8", "--out=run").code == 0
    (picture,) = (tmp_path / "run/images").glob("*.png")
    (shop.inbox / "same.png").write_bytes(picture.read_bytes())
    assert shop.watch() == EXIT_DONE
    assert shop.pictures("same") == {picture.name: picture.read_bytes()}


def test_drops_become_runs_and_end_in_done(shop, qwen_stage):
    shop.drop("cats.jsonl", "a cat", "two cats", seeds=[1, 2])
    (shop.inbox / "dog.toml").write_text('size="32x32"\nsteps=1\n[[prompts]]\nprompt="a dog"\nname="rex"\n')
    assert shop.watch() == EXIT_DONE
    assert shop.outcomes() == {"cats": "done", "dog": "done"}
    assert shop.names("done") == ["cats.jsonl", "dog.toml"]
    assert len(shop.pictures("cats")) == 4
    assert list(shop.pictures("dog")) == ["0001-rex-s42.png"]
    assert shop.left_over() == []
    assert qwen_stage("inspect", shop.outbox / "cats", "--verify").code == 0  # an ordinary run
    assert qwen_stage("rerun", shop.outbox / "dog", "--seed", "+1").code == 0
    assert len(shop.pictures("dog")) == 2


def test_the_same_drop_again_is_a_new_job_that_computes_nothing(shop):
    shop.drop("cat.jsonl", "a cat")
    shop.watch()
    shop.drop("cat.jsonl", "a cat")
    shop.lines.clear()
    assert shop.watch() == EXIT_DONE
    assert shop.outcomes() == {"cat": "done", "cat-2": "done"}
    assert shop.pictures("cat") == shop.pictures("cat-2")
    assert shop.names("done") == ["cat-2.jsonl", "cat.jsonl"]
    assert any("already" in line for line in shop.lines)


def test_a_picture_is_made_again_with_its_changes(shop):
    shop.drop("cat.jsonl", "a cat", seed=7)
    shop.watch()
    ((name, picture),) = shop.pictures("cat").items()
    (shop.inbox / "same.png").write_bytes(picture)
    (shop.inbox / "other.png").write_bytes(picture)
    (shop.inbox / "other.png.toml").write_text("seeds = [1, 2]\nsteps = 1\n")
    (shop.inbox / "no.png").write_bytes(b"no picture")
    assert shop.watch() == EXIT_SOME_FAILED
    assert shop.pictures("same") == {name: picture}
    assert len(shop.pictures("other")) == 2
    assert shop.names("failed") == ["no.png", "no.png.reason.txt"]
    assert shop.names("done") == ["cat.jsonl", "other.png", "other.png.toml", "same.png"]


@pytest.mark.parametrize("overlap", [False, True])
def test_one_model_at_a_time_and_each_loaded_once_for_all_jobs(shop, monkeypatch, overlap):
    alive: list[str] = []
    starts: list[str] = []
    together: set[frozenset[str]] = set()

    class Counted(Worker):
        def __init__(self, command: list[str], stage: str, holding: int) -> None:
            alive.append(stage)
            starts.append(stage)
            together.add(frozenset(alive))
            assert len(alive) == len(set(alive))
            super().__init__(command, stage, holding)

        def close(self) -> int:
            code = super().close()
            alive.remove(self.stage)
            return code

    monkeypatch.setattr(dispatch, "Worker", Counted)
    monkeypatch.setattr(dispatch, "SHORTEST_TURN_SECONDS", 60.0)
    for n in range(4):
        shop.drop(f"{n}.jsonl", f"cat {n}", f"dog {n}", size="64x64", steps=8)
    assert shop.watch(overlap=overlap) == EXIT_DONE
    alone = {frozenset([stage]) for stage in STAGES}
    assert together <= alone | ({frozenset(["denoise", "decode"])} if overlap else set())
    if overlap:
        assert frozenset(["denoise", "decode"]) in together
        assert starts[:2] == ["encode", "denoise"]
    else:
        assert starts == ["encode", "denoise", "decode"]


def test_a_terminal_sees_one_bar_that_moves():
    program = (
        "import time; from orchestrator.progress import Terminal\n"
        "terminal = Terminal(leave=False)\n"
        "for n in range(5): terminal.report('denoise cats 1/2', n, 4); time.sleep(0.15)\n"
        "terminal.notice('cats: done')\n"
    )
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    subprocess.run([sys.executable, "-c", program], stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "4/4" in shown
    assert "left" in shown
    assert shown.count("0/4") == 1
    assert "qwen-stage: cats: done" in shown


def test_bad_drops_fail_with_a_reason_and_hold_up_nobody(shop):
    (shop.inbox / "bad.toml").write_text("no toml")
    (shop.inbox / "bytes.txt").write_bytes(b"\xff\xfe")
    (shop.inbox / "long.txt").write_text("word " * 3000)
    shop.drop("size.jsonl", "a cat", size="33x32")
    shop.drop("good.jsonl", "a cat")
    assert shop.watch() == EXIT_SOME_FAILED
    failed = shop.names("failed")
    assert failed == sorted(
        f"{n}{s}" for n in ("bad.toml", "bytes.txt", "long.txt", "size.jsonl") for s in ("", ".reason.txt")
    )
    reasons = {name: (shop.inbox / "failed" / name).read_text() for name in failed if name.endswith("reason.txt")}
    assert "bad.toml: Expected '='" in reasons["bad.toml.reason.txt"]
    assert "UTF-8" in reasons["bytes.txt.reason.txt"]
    assert "tokens, more than 1024" in reasons["long.txt.reason.txt"]
    assert "not a multiple of 16" in reasons["size.jsonl.reason.txt"]
    failed_runs = dict.fromkeys(("bad", "bytes", "long", "size"), "failed")
    assert shop.outcomes() == {"good": "done", **failed_runs}
    assert shop.left_over() == []


def test_a_worker_that_is_killed_is_started_again(shop):
    shop.drop("a.jsonl", "@encode:kill-once a", "@denoise:kill-once b", "@decode:kill-once c")
    assert shop.watch() == EXIT_DONE
    assert len(shop.pictures("a")) == 3
    for stage in STAGES:
        assert any(line.startswith(f"{stage} a") and "SIGKILL (out of memory?)" in line for line in shop.lines), (
            shop.lines
        )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("what", "why"), [("kill", "SIGKILL"), ("bug", "exit code 1"), ("error", "Input/output error")]
)
def test_after_three_attempts_a_job_is_set_aside_and_the_rest_goes_on(shop, monkeypatch, stage, what, why):
    monkeypatch.setattr(dispatch, "RETRY_SECONDS", 0.05)
    shop.drop("bad.jsonl", f"@{stage}:{what}")
    shop.drop("good.jsonl", "a cat")
    assert shop.watch() == EXIT_SOME_FAILED
    ended = shop.ended()
    assert {run: each.outcome for run, each in ended.items()} == {"bad": "failed", "good": "done"}
    assert f"{stage}: 3 attempts failed" in ended["bad"].reason
    assert why in ended["bad"].reason
    assert sum("attempt" in line and "follows" in line for line in shop.lines) == 2
    if what == "bug":
        assert any("nobody thought of that" in line for line in ended["bad"].log)
        assert "nobody thought of that" in (shop.inbox / "failed" / "bad.jsonl.reason.txt").read_text()
    assert shop.left_over() == []


def test_a_worker_that_hangs_is_killed_and_tried_again(shop, monkeypatch):
    monkeypatch.setattr(dispatch, "RETRY_SECONDS", 0.05)
    shop.drop("a.jsonl", "a cat", "@denoise:hang-once b")
    assert shop.watch(hang=3.0) == EXIT_DONE
    assert len(shop.pictures("a")) == 2
    assert any("no progress for 3 s; attempt 2 of 3" in line for line in shop.lines)


def test_a_picture_that_cannot_be_made_fails_alone(shop, tmp_path, monkeypatch):
    """Its latents are damaged after they were made; the run's other pictures come all the same."""
    shop.drop("a.jsonl", "a cat", "a dog")
    assert shop.watch(stages=("encode", "denoise")) == EXIT_DONE
    (first, *_) = sorted((shop.outbox / "a" / "latents").glob("*.zarr/c/0/0/0"))
    first.write_bytes(bytes(first.stat().st_size))
    assert shop.watch() == EXIT_SOME_FAILED
    assert shop.outcomes() == {"a": "failed"}
    assert "1 of 2 pictures failed" in shop.ended()["a"].reason
    assert len(shop.pictures("a")) == 1
    assert "repair it with `qwen-stage rerun" in (shop.inbox / "failed" / "a.jsonl.reason.txt").read_text()


def test_a_full_disk_is_waited_for(shop, monkeypatch):
    monkeypatch.setattr(dispatch, "FULL_SECONDS", 0.1)
    shop.drop("a.jsonl", "@denoise:full-once a")
    assert shop.watch() == EXIT_DONE
    assert [line.split(":")[0] for line in shop.lines if line.startswith(("paused", "goes on"))] == [
        "paused",
        "goes on",
    ]


def test_little_space_is_noticed_before_it_is_none(shop, monkeypatch):
    monkeypatch.setattr(dispatch, "FULL_SECONDS", 0.1)
    free = iter([10, 10, 10, 10, 5000])
    monkeypatch.setattr(dispatch.Dispatcher, "_free", lambda self: next(free, 5000))
    shop.drop("a.jsonl", "a cat")
    assert shop.watch(min_free=1000) == EXIT_DONE
    assert sum(line.startswith("paused") for line in shop.lines) == 1
    assert len(shop.pictures("a")) == 1


def test_each_stage_alone_and_all_at_once(shop):
    """Three orchestrators of one outbox, which share nothing but that."""
    for n in range(4):
        shop.drop(f"{n}.jsonl", f"cat {n}", f"dog {n}")
    others = [shop.start(f"--stages={stages}") for stages in ("denoise", "decode")]
    try:
        first = shop.start("--stages=encode")
        others.append(first)
        deadline = time.monotonic() + 60
        while len(shop.names("done")) < 4 and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for process in others:
            process.send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=30)[1] for process in others]
    assert shop.names("done") == [f"{n}.jsonl" for n in range(4)], errors
    assert [process.returncode for process in others] == [EXIT_INTERRUPTED] * 3
    assert all(len(shop.pictures(str(n))) == 2 for n in range(4))
    assert shop.left_over() == []


def test_a_second_orchestrator_of_the_same_stages_is_refused(shop):
    first = shop.start("--stages=encode,denoise")
    try:
        deadline = time.monotonic() + 30
        while not (shop.jobs.stage("denoise") / "worker" / ".lock").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        second = subprocess.run(shop.command("--once", "--stages=denoise,decode"), capture_output=True, text=True)
        assert second.returncode == 2
        assert "another `qwen-stage watch` runs denoise" in second.stderr
        third = subprocess.run(shop.command("--once", "--stages=decode"), capture_output=True, text=True)
        assert third.returncode == EXIT_DONE
    finally:
        first.kill()
        first.communicate()
    shop.drop("a.jsonl", "a cat")  # the lock is gone with its holder
    assert shop.watch() == EXIT_DONE


def test_ctrl_c_finishes_the_step_and_the_next_start_goes_on(shop):
    shop.drop("a.jsonl", "a cat", size="128x128", steps=600)
    process = shop.start()
    deadline = time.monotonic() + 60
    while not list((shop.outbox / "a" / "latents").glob("*.trajectory.zarr")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert list((shop.outbox / "a" / "latents").glob("*.trajectory.zarr"))
    assert shop.watch() == EXIT_DONE
    assert any("goes on after step" in line for line in shop.lines)
    assert shop.left_over() == []


def test_lost_events_and_storms_of_them(shop, monkeypatch):
    """Without one event, drops are found by looking; ten thousand make nothing happen twice."""

    def storm(directory: Path, wake: watch.Wake) -> Callable[[], None]:
        for _ in range(10_000):
            wake()
        return lambda: None

    shop.drop("a.jsonl", "a cat")
    assert shop.watch(notifier=storm) == EXIT_DONE
    monkeypatch.setattr(watch, "RESCAN_SECONDS", 0.3)
    ends = threading.Timer(20, shop.interrupt.set)
    ends.start()
    threading.Timer(1.0, shop.drop, ("b.jsonl", "a cat")).start()
    threading.Thread(target=shop.interrupt_when, args=(lambda: "b.jsonl" in shop.names("done"),)).start()
    assert shop.watch(once=False) == EXIT_INTERRUPTED
    ends.cancel()
    assert shop.outcomes() == {"a": "done", "b": "done"}


def test_a_removed_and_remade_inbox_is_watched_again(shop, monkeypatch):
    """By its events alone: looks without them are too rare here."""
    monkeypatch.setattr(watch, "RESCAN_SECONDS", 5.0)

    def remake() -> None:
        shutil.rmtree(shop.inbox)
        shop.inbox.mkdir()
        time.sleep(6.0)  # it has been seen
        shop.drop("a.jsonl", "a cat")

    threading.Timer(1.0, remake).start()
    threading.Thread(target=shop.interrupt_when, args=(lambda: "a.jsonl" in shop.names("done"),)).start()
    assert shop.watch(once=False, notifier=watch.watch_files) == EXIT_INTERRUPTED
    assert shop.outcomes() == {"a": "done"}


def test_a_job_waits_for_a_model_that_is_not_there(shop, tmp_path):
    """A disk that is not mounted is no reason to fail everything."""
    shop.drop("a.jsonl", "a cat")
    assert shop.watch(stages=("encode",)) == EXIT_DONE
    model = shop.model
    away = tmp_path / "away"
    mine = tmp_path / "mine"
    shutil.copytree(model, mine)
    shop.model = mine
    shop.drop("b.jsonl", "a dog")
    assert shop.watch(stages=("encode",)) == EXIT_DONE
    mine.rename(away)
    shop.model = model
    assert shop.watch() == EXIT_SOME_FAILED
    assert shop.outcomes() == {"a": "done"}
    assert any("b waits: unknown model" in line for line in shop.lines)
    away.rename(mine)
    assert shop.watch() == EXIT_DONE
    assert shop.outcomes() == {"a": "done", "b": "done"}


def test_damaged_records_of_jobs_hold_up_nobody(shop):
    for name in ("a", "b", "c"):
        shop.drop(f"{name}.jsonl", f"{name} cat")
    assert shop.watch(stages=("encode", "denoise")) == EXIT_DONE
    first, second, _ = shop.jobs.open_ids()
    (shop.jobs.open / f"{first}.json").write_text("{")
    (shop.jobs.ended / f"{second}.json").write_text("{")
    assert shop.watch() == EXIT_DONE
    assert set(shop.outcomes().values()) == {"done"}
    assert shop.names("done") == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert all(len(shop.pictures(run)) == 1 for run in shop.outcomes())


def test_drops_that_were_taken_in_are_not_made_in_another_outbox(shop, tmp_path):
    shop.drop("a.jsonl", "a cat")
    assert shop.watch(stages=("encode",)) == EXIT_DONE
    done = subprocess.run(shop.command("--once", "--out", tmp_path / "other"), capture_output=True, text=True)
    assert done.returncode == 2
    assert f"finish them with --out {shop.outbox}" in done.stderr
    assert shop.watch() == EXIT_DONE
    assert subprocess.run(shop.command("--once", "--out", tmp_path / "other")).returncode == EXIT_DONE


def test_names_that_a_disk_may_not_tell_apart(shop):
    shop.drop("Cat.jsonl", "a")
    shop.drop("cat.jsonl", "b")
    shop.drop("index.html.jsonl", "c")
    assert shop.watch() == EXIT_DONE
    assert {run.casefold() for run in shop.outcomes()} == {"cat", "cat-2", "index.html-2"}


def test_a_worker_that_floods_its_log_or_writes_into_its_pipe(shop):
    shop.drop("a.jsonl", "@denoise:flood-once a", "@denoise:scribble-once b")
    assert shop.watch() == EXIT_DONE
    assert len(shop.pictures("a")) == 2


def test_a_log_without_end_is_not_read_to_its_end(tmp_path):
    with disk.lock(tmp_path) as held:
        worker = Worker(
            [sys.executable, "-c", "while True: print('x' * 99, file=__import__('sys').stderr)"], "encode", held
        )
        deadline = time.monotonic() + 10
        while not worker.log and time.monotonic() < deadline:
            assert list(worker.events()) == []
        worker.kill()
        assert worker.close() == -signal.SIGKILL
    assert worker.log


def test_a_worker_that_takes_no_order_hangs_like_any_other(shop):
    """An order is larger than the pipe: whoever waited for it to be taken would wait for ever."""
    deaf = [sys.executable, str(Path(__file__).parent / "unruly_worker.py"), "--deaf"]
    shop.drop("a.jsonl", *(f"{'long ' * 40}{n}" for n in range(600)))
    assert shop.watch(command=deaf, hang=1.0) == EXIT_SOME_FAILED
    assert "no progress for 1 s" in shop.ended()["a"].reason


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has one")
def test_what_cannot_be_said_ends_nothing(shop):
    shop.drop("a.jsonl", "a cat")
    with Path("/dev/full").open("wb") as full:
        assert subprocess.run(shop.command("--once"), stderr=full).returncode == EXIT_DONE
    assert shop.outcomes() == {"a": "done"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says it so")
def test_it_stays_small_and_imports_no_tensor_library(shop, tmp_path):
    program = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from orchestrator import cli\n"
        "code = cli.main(sys.argv[1:])\n"
        "heavy = {'mlx', 'numpy', 'zarr', 'safetensors', 'tokenizers'} & set(sys.modules)\n"
        # not of getrusage: that counts what the process was forked from
        "print(sorted(heavy), re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
        "sys.exit(code)\n"
    )
    for n in range(20):
        shop.drop(f"{n}.jsonl", f"cat {n}")
    command = [sys.executable, "-P", "-c", program, *shop.command("--once")[4:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == EXIT_DONE, done.stderr
    modules, peak = done.stdout.rsplit(" ", 1)
    assert modules == "[]"
    assert int(peak) * 1024 < 80e6


def test_many_drops_while_it_was_stopped(shop):
    """All cached but the first, so that it is the orchestrator that is tested. The environment says how many."""
    for n in range(MANY_DROPS):
        shop.drop(f"{n:05}.jsonl", "a cat")
    assert shop.watch(command=None) == EXIT_DONE
    assert len(shop.names("done")) == MANY_DROPS
    outcomes = shop.outcomes()
    assert len(outcomes) == MANY_DROPS
    assert set(outcomes.values()) == {"done"}
    assert shop.left_over() == []


def test_kills_of_anybody_at_any_moment(shop, fresh_cache):
    """Orchestrator and workers are killed every now and then until all jobs are done. The environment says how many."""
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    jobs = {f"job{n:02}": [f"cat {n} {m}" for m in range(1 + n % 3)] for n in range(KILLED_JOBS)}
    for name, prompts in jobs.items():
        shop.drop(f"{name}.jsonl", *prompts, steps=40, size="96x96")
    kills = {"orchestrator": 0, "worker": 0}
    process = shop.start()
    deadline = time.monotonic() + 20 * KILLED_JOBS
    try:
        while len(shop.names("done")) + len(shop.names("failed")) < len(jobs) and time.monotonic() < deadline:
            time.sleep(chance.uniform(0.2, 2.5))
            workers = children_of(process.pid)
            if workers and chance.random() < 0.6:
                os.kill(chance.choice(workers), signal.SIGKILL)
                kills["worker"] += 1
            else:
                process.kill()
                process.communicate()
                kills["orchestrator"] += 1
                process = shop.start()
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert shop.outcomes() == dict.fromkeys(jobs, "done"), errors
    assert shop.names("done") == [f"{name}.jsonl" for name in jobs]
    assert shop.left_over() == []
    assert children_of(process.pid) == []
    assert sum(kills.values()) >= 2
    print(f"{kills} kills")
    disturbed = {name: shop.pictures(name) for name in jobs}
    fresh_cache()
    again = shop.root / "again"
    again.mkdir()
    quiet = Shop(again, shop.model)
    for name, prompts in jobs.items():
        quiet.drop(f"{name}.jsonl", *prompts, steps=40, size="96x96")
    assert quiet.watch() == EXIT_DONE
    assert {name: quiet.pictures(name) for name in jobs} == disturbed


def children_of(pid: int) -> list[int]:
    """Also zombies."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split() if int(line) != found.returncode]


def test_a_worker_that_cannot_start_ends_the_watch_with_a_word(shop, tmp_path):
    shop.drop("a.jsonl", "a cat")
    broken = [sys.executable, "-c", "import sys; sys.exit('the model library is missing')"]
    with pytest.raises(UserError, match="encode cannot start: the model library is missing"):
        shop.watch(command=broken)
    assert shop.watch() == EXIT_DONE


def test_an_innocent_job_survives_many_power_cuts_and_a_guilty_one_is_set_aside_at_last(shop):
    """An attempt is written down before it begins; here nobody is left to say how it ended."""
    shop.drop("a.jsonl", "a cat")
    assert shop.watch(stages=("encode",)) == EXIT_DONE
    (id,) = shop.jobs.open_ids()
    trouble = shop.jobs.read_trouble(id, "denoise")
    job = shop.jobs.read(id)
    assert job is not None
    here = plan.reached(shop.jobs, job, "denoise")
    shop.jobs.write_trouble(id, "denoise", replace(trouble, attempts=dispatch.UNSEEN_ATTEMPTS - 1, reached=here))
    assert shop.watch(stages=("denoise",)) == EXIT_DONE
    here = plan.reached(shop.jobs, job, "decode")
    shop.jobs.write_trouble(id, "decode", replace(trouble, attempts=dispatch.UNSEEN_ATTEMPTS, reached=here))
    assert shop.watch() == EXIT_SOME_FAILED
    assert "10 attempts ended with everything being killed" in shop.ended()["a"].reason

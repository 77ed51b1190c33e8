"""The drop folder's orchestrator: takes drops in, has their pictures made, puts finished drops away.

All it knows is on the disk, and it may die at any moment. File events only wake it; what it then does, it does by what
it finds. Whatever takes long, or much memory, other processes do.
"""

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from artifacts_schema import disk, store
from artifacts_schema.errors import Busy, Damaged, Unreadable, UserError, failed_operation
from artifacts_schema.jobs import STAGES, Ended, Jobs
from artifacts_schema.manifests import Dtype, LatentsManifest
from artifacts_schema.trajectory import forget_steps
from orchestrator import EXIT_DONE, EXIT_INTERRUPTED, EXIT_SOME_FAILED, plan
from orchestrator.dispatch import ATTEMPTS, NO_SPACE, RETRY_SECONDS, Dispatcher, Terms
from orchestrator.gallery import PAGE
from orchestrator.inbox import CLAIMED, DONE, FAILED, SETTLE_SECONDS, Claim, Inbox
from orchestrator.intake import Intake
from orchestrator.progress import Terminal
from orchestrator.run import COMMAND

RESCAN_SECONDS = 10.0  # whatever the events say
POLL_SECONDS = 2.0  # where there are no events
CLAIMS_AT_ONCE = 50  # made into jobs, before the workers are looked after again
SHORTEST_WAIT_SECONDS = 0.05
LISTENER_SECONDS = 2.0  # that the thread may take to end
ORPHAN_SECONDS = 0.1  # between two looks whether an orphaned worker has ended
PAGE_TIMEOUT_SECONDS = 60.0  # for the last page
PAGE_SECONDS = 2.0  # at least between two pages
PAGE_SHARE = 10  # and so many times what writing one took

Wake = Callable[[], None]
Notifier = Callable[[Path, Wake], Callable[[], None]]  # wakes whenever something may have changed; returns what ends it


class Options(NamedTuple):
    terms: Terms
    model: str | None = None
    dtype: Dtype | None = None
    bits: int | None = None  # of quantized weights; 0: not quantized
    text_bits: int | None = None  # the same for the text encoder
    poll: bool = False
    settle: float = SETTLE_SECONDS


class Watch:
    def __init__(
        self,
        inbox: Path,
        outbox: Path,
        options: Options,
        terminal: Terminal,
        interrupted: Callable[[], bool],
        *,
        notifier: Notifier | None = None,
        command: list[str] | None = None,
    ) -> None:
        """`interrupted`: whether to save the current steps and end. `command`: what starts a worker, for tests."""
        self.options, self.terminal, self.notice = options, terminal, terminal.notice
        self.interrupted = interrupted
        self.stages = options.terms.stages
        self.takes_in = "encode" in self.stages
        self.jobs = Jobs(outbox)
        self.inbox = Inbox(inbox, options.settle, self.notice)
        self.intake = Intake(options.model, options.dtype, options.bits, options.text_bits, self.notice)
        self.works: dict[str, plan.Work] = {}
        self.over: set[str] = set()  # open jobs that have ended; whoever takes drops in closes them
        self.runs: dict[str, str] = {}  # the names of open jobs' runs
        self.taken: set[str] = set()  # names that no new run may have
        self.claims: dict[str, Claim] = {}
        self.held: dict[str, int] = {}
        self.dispatcher = Dispatcher(
            self.jobs, options.terms, self.works, self._look, self.held, command or [*COMMAND, "work"], terminal
        )
        self.watched = _Watched(inbox, None if options.poll else notifier or watch_files)
        self.page = _Page(outbox)
        self.some_failed = False
        self.tries: dict[str, int] = {}  # by drop or job, how often something went wrong with it
        self.stamps: dict[str, tuple[int, ...]] = {}
        self.failures = 0  # in a row, of file operations
        self.waits = False  # for a drop to settle, or to be made a job
        self.is_seen = False  # all that there is, and nothing failed since
        self.rescan_at = 0.0

    def run(self) -> int:
        """Goes on until it is interrupted; with `once`, until nothing is left to do. Returns the exit code."""
        self._make_directories()
        with contextlib.ExitStack() as stack:
            self._lock(stack)
            self._open_pipe(stack)
            stack.callback(self.page.end)
            stack.callback(self.watched.end)
            stack.callback(self.dispatcher.kill)
            while not self._is_over():
                try:
                    self._go_on()
                    self.failures = 0
                except (OSError, UserError) as error:
                    because = failed_operation(error)
                    if because is None:
                        raise
                    self._overcome(because)
                self._wait()
        self.page.write()
        if self.dispatcher.stopping:
            return EXIT_INTERRUPTED
        return EXIT_SOME_FAILED if self.some_failed or self.dispatcher.absent else EXIT_DONE

    def _make_directories(self) -> None:
        for directory in (self.jobs.open, self.jobs.ended, *(self.jobs.stage(stage) for stage in STAGES)):
            disk.make_directory(directory)

    def _go_on(self) -> None:
        if self.interrupted():
            self.dispatcher.stop()
        self.dispatcher.attend()
        if time.monotonic() >= self.rescan_at and not self.dispatcher.stopping:
            self._rescan()
        self.dispatcher.give()
        self.page.go_on()

    def _overcome(self, error: OSError) -> None:
        """What is on the disk is whole; what failed is tried again."""
        self.failures += 1
        self.is_seen = False
        if error.errno in NO_SPACE:
            self.dispatcher.pause(f"{error.filename or self.jobs.outbox}: {error.strerror}")
        elif self.options.terms.once and self.failures >= ATTEMPTS:
            raise error
        elif self.failures == 1:
            self.notice(f"{error.filename or self.jobs.outbox}: {error.strerror or error}; it is tried again")
        self.rescan_at = time.monotonic() + RETRY_SECONDS

    def _is_over(self) -> bool:
        ends = self.dispatcher.stopping or (self.options.terms.once and self.is_seen and not self.waits)
        return ends and self.dispatcher.is_idle()

    # -- being alone, and being woken

    def _lock(self, stack: contextlib.ExitStack) -> None:
        """Makes sure to be the only one for these stages, and that no orphaned worker still has its model."""

        def lock(directory: Path, does: str) -> None:
            disk.make_directory(directory)
            try:
                stack.enter_context(disk.lock(directory))
            except BlockingIOError:
                raise Busy(f"another `qwen-stage watch` {does}; end that one first") from None

        for stage in self.stages:
            lock(self.jobs.stage(stage), f"runs {stage} for {self.jobs.outbox}")
            self.jobs.sweep(stage)
            workers = self.jobs.stage(stage) / "worker"
            disk.make_directory(workers)
            self.held[stage] = self._lock_workers(stack, stage, workers)
        if self.takes_in:
            lock(self.inbox.claimed, f"takes in what is dropped into {self.inbox.directory}")
            lock(self.jobs.open, f"adds jobs to {self.jobs.outbox}")
            disk.sweep(self.jobs.open)
            self.inbox.belong_to(self.jobs.outbox)
            self.inbox.sweep(set(self.jobs.open_ids()))
        with disk.lock(self.jobs.ended, wait=True):
            disk.sweep(self.jobs.ended)

    def _lock_workers(self, stack: contextlib.ExitStack, stage: str, directory: Path) -> int:
        """Waits for a worker whose watch died: it has been told to save its step and end."""
        waits = False
        while True:
            try:
                return stack.enter_context(disk.lock(directory))
            except BlockingIOError:
                if not waits:
                    self.notice(f"waiting for {stage} of an earlier watch to save its step and end")
                waits = True
                if self.interrupted():
                    raise KeyboardInterrupt from None
                time.sleep(ORPHAN_SECONDS)

    def _open_pipe(self, stack: contextlib.ExitStack) -> None:
        """Through which signals and file events end the waiting."""
        self.reader, writer = os.pipe()
        for end in (self.reader, writer):
            stack.callback(os.close, end)
            os.set_blocking(end, False)
        if threading.current_thread() is threading.main_thread():
            stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer, warn_on_full_buffer=False))

        def wake() -> None:
            with contextlib.suppress(OSError):  # it is awake already, or has ended
                os.write(writer, b"!")

        self.watched.wake = wake

    def _wait(self) -> None:
        if self._is_over():
            return
        times = [self.rescan_at - time.monotonic(), self.dispatcher.wait_at_most(), self.page.wait_at_most()]
        timeout = max(min(times), SHORTEST_WAIT_SECONDS if self.rescan_at else 0)
        pipes = [self.reader, *self.dispatcher.pipes(), *self.page.pipes()]
        ready, _, _ = select.select(pipes, self.dispatcher.unsent(), [], timeout)
        if self.reader in ready:
            with contextlib.suppress(BlockingIOError):
                while b"!" in os.read(self.reader, 4096):
                    self.rescan_at = min(self.rescan_at, time.monotonic() + SHORTEST_WAIT_SECONDS)

    # -- what is there

    def _rescan(self) -> None:
        """Looks at everything again: the drops, the jobs, and what others did to them."""
        now = time.monotonic()
        alone = set(self.stages) == set(STAGES)
        self.rescan_at = now + (RESCAN_SECONDS if alone and not self.options.poll else POLL_SECONDS)
        self.is_seen = True
        self._make_directories()  # somebody may have tidied up
        if self.takes_in:
            self.watched.look_after()
            self._take_in()
        open_ids = self.jobs.open_ids()
        for id in open_ids:
            if id not in self.works or (not alone and self._stamp(id) != self.stamps.get(id)):
                self._look(id)
        for id in {*self.works, *self.over, *self.runs}.difference(open_ids):
            self._forget(id)
        self.dispatcher.has_news = True

    def _stamp(self, id: str) -> tuple[int, ...]:
        """By which what another watch did to a job is seen."""
        run = self.jobs.outbox / self.runs.get(id, "")
        paths = [self.jobs.ended / f"{id}.json", *(run / kind.kind / store.MANIFEST for kind in store.KINDS)]
        return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in paths)

    def _take_in(self) -> None:
        self.waits = self.inbox.claim()
        open_ids = set(self.jobs.open_ids())
        self.claims = {claim.id: claim for claim in self.inbox.claims()}
        fresh = [claim for id, claim in self.claims.items() if id not in open_ids]
        self.taken = {PAGE, *(name.casefold() for name in self.runs.values())}
        for claim in fresh[:CLAIMS_AT_ONCE]:
            if not self.inbox.is_whole(claim):
                self.waits = True
                continue
            with self._isolated(claim.name):
                if self._ended(claim.id):  # its job was closed
                    self._put_away(claim.id)
                else:
                    self._make_job(claim)
        if len(fresh) > CLAIMS_AT_ONCE:
            self.waits = True
            self.rescan_at = 0.0
        elif self.waits:
            self.rescan_at = time.monotonic() + max(self.options.settle / 4, SHORTEST_WAIT_SECONDS)

    @contextlib.contextmanager
    def _isolated(self, what: str) -> Iterator[None]:
        """What goes wrong with one drop or job concerns no other. It is tried again at the next look."""
        try:
            yield
        except (OSError, UserError) as error:
            because = failed_operation(error)
            if because and because.errno in NO_SPACE:
                raise
            self.is_seen = False
            self.tries[what] = self.tries.get(what, 0) + 1
            if self.tries[what] == 1:
                self.notice(f"{what}: {error}; it is tried again")
            if self.tries[what] < ATTEMPTS:
                self.rescan_at = time.monotonic() + RETRY_SECONDS
            else:
                self.some_failed = True
                self.is_seen = True  # `--once` waits no longer

    def _make_job(self, claim: Claim) -> None:
        try:
            job = self.intake.job(claim, self._is_taken)
        except UserError as error:
            if isinstance(error, Unreadable) and self.tries.get(claim.name, 0) < ATTEMPTS - 1:
                raise
            self.notice(f"failed: {error}")
            self.some_failed = True
            self.jobs.end(self.intake.refused(claim, str(error)))
            self._put_away(claim.id)
            self.page.is_old = True
            return
        self.jobs.add(job)
        self.runs[job.id] = job.run
        self.taken.add(job.run.casefold())
        count = len(job.prompts)
        priority = f", priority {job.priority}" if job.priority else ""
        self.notice(f"{job.run}: taken in, {count} prompt{'' if count == 1 else 's'}{priority}")

    def _is_taken(self, run: str) -> bool:
        """Also where a disk does not tell Cat from cat, before either is there; and the page is no run."""
        return run.casefold() in self.taken or os.path.lexists(self.jobs.outbox / run)

    def _look(self, id: str) -> plan.Work | None:
        """Sees what an open job needs now. One that needs nothing more has ended, and is put away."""
        if id in self.over:
            return None
        before = self.works.pop(id, None)
        found: plan.Work | None = None
        with self._isolated(self.runs.get(id, id)):
            seen = self._see(id)
            if isinstance(seen, Ended):
                self._end(seen)
            else:
                found = seen
        if found is None:
            return None
        self.works[id] = found
        self.page.is_old |= before is None or before.done != found.done
        if before and before.done < found.done:
            self.notice(f"{found.run}: {found.done} of {found.wanted} pictures")
        return found

    def _see(self, id: str) -> plan.Work | Ended | None:
        """None if the job is not open any more."""
        try:
            job = self.jobs.read(id)
        except Damaged as error:
            if self.takes_in:
                self.jobs.set_aside(id)
                self.notice(f"{error}; it is made again from its drop")
                self.rescan_at = 0.0
                return None
            raise
        if job is None:
            return None
        self.runs[id] = job.run
        self.stamps[id] = self._stamp(id)
        try:
            return self._ended(id) or plan.look(self.jobs, job, time.time())
        except Unreadable:
            raise
        except UserError as error:  # somebody changed its run
            return Ended(job=job, outcome="failed", at=time.time(), reason=str(error))

    def _ended(self, id: str) -> Ended | None:
        """A damaged record is none: how a job ended shows again."""
        with contextlib.suppress(Damaged):
            return self.jobs.read_ended(id)
        return None

    def _end(self, ended: Ended) -> None:
        id = ended.job.id
        if not self._ended(id):
            self._tidy(ended)
            self.jobs.end(ended)
            self._tell_end(ended)
        if self.takes_in:
            self._put_away(id)
        self.over.add(id)
        self.page.is_old = True

    def _tidy(self, ended: Ended) -> None:
        """Clears away what kills have left in a run where no stage will come by any more."""
        for kind in store.KINDS:
            directory = self.jobs.run(ended.job) / kind.kind
            with contextlib.suppress(UserError):  # damaged, or somebody else's right now
                if store.is_there(directory):
                    with store.writing(directory):
                        store.restore_manifest(directory, kind)
                        if kind is LatentsManifest:
                            forget_steps(directory)

    def _tell_end(self, ended: Ended) -> None:
        if ended.outcome == "failed":
            self.some_failed = True
            self.notice(f"{ended.job.run}: failed: {ended.reason}")
        else:
            count = f"{ended.pictures} picture{'' if ended.pictures == 1 else 's'}"
            self.notice(f"{ended.job.run}: done, {count} in {self.jobs.run(ended.job)}")

    def _put_away(self, id: str) -> None:
        """Moves a job's drop to where it ends, then forgets the job. Any step may be the last; all may be repeated."""
        ended = self._ended(id)
        claim = self.claims.pop(id, None)
        if ended and claim:
            log = "".join(f"\n{line}" for line in ended.log)
            self.inbox.put_away(claim, f"{ended.reason}{log}" if ended.outcome == "failed" else "")
        self.jobs.close(id)

    def _forget(self, id: str) -> None:
        self.works.pop(id, None)
        self.runs.pop(id, None)
        self.over.discard(id)


class _Watched:
    """An inbox with its notifier, which goes blind when the folder is removed and made again."""

    def __init__(self, directory: Path, notifier: Notifier | None) -> None:
        self.directory, self.notifier = directory, notifier
        self.wake: Wake = lambda: None
        self.end: Callable[[], object] = lambda: None
        self.identity: tuple[int, int] | None = None

    def look_after(self) -> None:
        try:
            info = self.directory.stat()
            identity = (info.st_dev, info.st_ino)
        except OSError:
            identity = None
        if identity != self.identity and self.notifier:
            self.end()
            if identity:
                stop = self.notifier(self.directory, self.wake)
                held = os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC)  # lest a new folder gets its inode
                self.end = partial(_end_all, stop, partial(os.close, held))
            else:
                self.end = lambda: None
        self.identity = identity


def _end_all(*ends: Callable[[], object]) -> None:
    for end in ends:
        end()


class _Page:
    """Has `qwen-stage gallery` write the outbox's page, never taking more than a share of the time."""

    def __init__(self, outbox: Path) -> None:
        self.command = [*COMMAND, "gallery", str(outbox)]
        self.process: subprocess.Popen[bytes] | None = None
        self.is_old = True
        self.began = self.next_at = 0.0

    def go_on(self) -> None:
        now = time.monotonic()
        if self.process and self.process.poll() is not None:
            self.end()
            self.next_at = now + max(PAGE_SECONDS, PAGE_SHARE * (now - self.began))
        if self.is_old and not self.process and now >= self.next_at:
            self.is_old = False
            self.began = now
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                process_group=0,
            )

    def pipes(self) -> list[int]:
        return [self.process.stdout.fileno()] if self.process and self.process.stdout else []

    def wait_at_most(self) -> float:
        if self.process:
            return 1.0
        return max(0.0, self.next_at - time.monotonic()) if self.is_old else 3600.0

    def end(self) -> None:
        if self.process:
            self.process.communicate()
            self.process = None

    def write(self) -> None:
        """Now."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(self.command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PAGE_TIMEOUT_SECONDS)


def watch_files(directory: Path, wake: Wake) -> Callable[[], None]:
    """Wakes on events of the file system, as long as those come; none of them is needed."""
    stop = threading.Event()

    def is_ours(change: object, path: str) -> bool:
        return Path(path).relative_to(directory.absolute()).parts[:1] not in [(CLAIMED,), (DONE,), (FAILED,)]

    def listen() -> None:
        import watchfiles

        # it may end at any time: a name that is no text, a removed folder, too many watches
        with contextlib.suppress(Exception):
            for _ in watchfiles.watch(
                directory.absolute(), watch_filter=is_ours, stop_event=stop, raise_interrupt=False
            ):
                wake()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()

    def end() -> None:
        stop.set()
        listener.join(LISTENER_SECONDS)

    return end

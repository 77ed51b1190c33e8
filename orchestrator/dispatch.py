"""Gives the stages' workers their orders, one model in memory at a time, and deals with how they end."""

import errno
import os
import time
from collections.abc import Callable
from typing import NamedTuple

from msgspec.structs import replace

from artifacts_schema.errors import UserError
from artifacts_schema.jobs import Job, Jobs, Trouble
from artifacts_schema.prompts import Entry, to_jsonl
from orchestrator import plan
from orchestrator.plan import Work
from orchestrator.progress import Terminal
from orchestrator.run import precision
from orchestrator.worker import Answer, Order, Progress, Ready, Said, Worker, how_it_ended

ATTEMPTS = 3  # of a job in a stage that fail and bring nothing, before it is set aside
UNSEEN_ATTEMPTS = 10  # the same, if all went down with it: that may be the job's doing, and may be the power's
ABSENT_SECONDS = 10.0  # until a model that is not there is looked for again
STARTS = 5  # of a worker in a row that never got ready, before all is given up
RETRY_SECONDS = 1.0  # for each attempt that was in vain
BUSY_SECONDS = 2.0  # until what another process was at is tried again
FULL_SECONDS = 5.0  # until a full disk is looked at again
GIVE_SECONDS = 1.0  # between two looks for what may be given, where nothing happens
LOG_SECONDS = 30.0  # between two lines on the same picture, where there is no terminal
TURN_SHARE = 10  # a stage's turn lasts so many times what loading its model took
SHORTEST_TURN_SECONDS = 2.0
DECODE_BYTES = 3 << 30  # what decoding takes, of pictures up to 4096x4096, and some more
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Terms(NamedTuple):
    """How work is to be done."""

    stages: tuple[str, ...]
    truncate: bool = False
    overlap: bool | None = None  # decode beside denoise; None: where memory allows
    hang: float = 900.0  # seconds without progress after which a worker is taken for dead
    min_free: int = 1_000_000_000  # bytes of disk, with fewer of which nothing is begun
    once: bool = False  # end when nothing is left to do
    limits: tuple[str, ...] = ()  # options of every stage
    streaming: tuple[str, ...] = ()  # and of encode and denoise


class Slot:
    """A place for one worker, which is one model in memory."""

    def __init__(self, line: int, stages: tuple[str, ...]) -> None:
        self.line = line  # of the display
        self.stages = stages
        self.worker: Worker | None = None
        self.order: plan.Order | None = None
        self.run = self.label = ""
        self.failures: list[str] = []  # that the worker told of, of this order
        self.hung = False
        self.prepares = False  # the order's preview, before the order itself
        self.loaded: tuple[str, plan.Loads] | None = None  # the stage, and what its worker has loaded
        self.turn_began = 0.0
        self.loading = 0.0  # seconds from the turn's begin to its first progress
        self.has_loaded = False
        self.told = 0.0  # when the log last had a line on this order

    @property
    def stage(self) -> str | None:
        return self.worker.stage if self.worker else None

    def is_turn_over(self) -> bool:
        turn = max(SHORTEST_TURN_SECONDS, TURN_SHARE * self.loading)
        return time.monotonic() - self.turn_began > turn

    def begin_turn(self, loaded: tuple[str, plan.Loads] | None) -> None:
        self.loaded, self.turn_began, self.has_loaded = loaded, time.monotonic(), False


class Dispatcher:
    def __init__(
        self,
        jobs: Jobs,
        terms: Terms,
        works: dict[str, Work],
        look: Callable[[str], Work | None],
        held: dict[str, int],
        command: list[str],
        terminal: Terminal,
    ) -> None:
        """`works`: what open jobs need, kept up to date by `look(id)`; `held`: by stage, the lock its workers hold."""
        self.jobs, self.terms, self.works, self.look = jobs, terms, works, look
        self.held, self.command, self.terminal = held, command, terminal
        self.slots = [Slot(0, terms.stages)]
        if {"denoise", "decode"} <= set(terms.stages) and terms.overlap is not False:
            self.slots.append(Slot(1, ("decode",)))
        self.not_before: dict[str, float] = {}
        self.absent: dict[str, str] = {}  # jobs whose model is not here, and what was said of that
        self.absent_until = 0.0
        self.absent_said: set[str] = set()
        self.full_until = 0.0
        self.is_full = False
        self.starts_failed = 0
        self.has_news = True  # since orders were last given
        self.next_give = 0.0
        self.can_preview: set[str] = set()  # models
        self.stopping = False

    def give(self) -> None:
        """Gives whoever is idle the next order, and the memory back of whoever gets none.

        Does nothing while there is no news: to choose among ten thousand jobs takes a moment.
        """
        if not self.has_news and time.monotonic() < self.next_give:
            return
        self.has_news, self.next_give = False, time.monotonic() + GIVE_SECONDS
        if self.absent and not self.terms.once and time.monotonic() > self.absent_until:
            self.absent.clear()
        self.is_full &= self._is_wanted()
        for slot in self.slots:
            self._give(slot)

    def pipes(self) -> list[int]:
        """What to wait for."""
        workers = [slot.worker for slot in self.slots if slot.worker]
        return [pipe.fileno() for worker in workers for pipe in (worker.answers, worker.stderr)]

    def attend(self) -> None:
        """Takes note of what the workers have said, and of those that are dead or hang."""
        for slot in self.slots:
            if slot.worker is None:
                continue
            is_dead = slot.worker.is_dead()  # before what it said last is read
            while events := list(slot.worker.events()):
                for event in events:
                    if isinstance(event, Answer):
                        self._answered(slot, event)
                    else:
                        self._heard(slot, event)
                    self.has_news |= isinstance(event, Answer | Ready)
                if not is_dead:  # the next comes with the next look
                    break
            if is_dead or slot.worker.ended:
                self._died(slot)
                self.has_news = True
            elif (slot.order or not slot.worker.ready) and time.monotonic() - slot.worker.heard > self.terms.hang:
                slot.hung = True
                slot.worker.kill()

    def wait_at_most(self) -> float:
        """Seconds until something is to be done that no pipe will tell of."""
        now = time.monotonic()
        times = [time for time in self.not_before.values() if time > now]
        times += [slot.worker.heard + self.terms.hang for slot in self.slots if slot.worker]
        times += [self.next_give] if self._is_wanted() or self.absent else []
        return max(0.0, min(times, default=now + 3600) - now)

    def unsent(self) -> list[int]:
        """Pipes that have to take more of an order."""
        return [slot.worker.orders.fileno() for slot in self.slots if slot.worker and slot.worker.unsent]

    def is_idle(self) -> bool:
        """Whether nothing is being done, nor will be as things are."""
        return not any(slot.worker for slot in self.slots) and (self.stopping or not self._is_wanted())

    def stop(self) -> None:
        """Lets the workers finish their step, save it, and end."""
        if not self.stopping:
            self.stopping = self.has_news = True
            for slot in self.slots:
                if slot.worker and (slot.order or not slot.worker.ready):
                    slot.worker.interrupt()

    def kill(self) -> None:
        for slot in self.slots:
            if slot.worker:
                slot.worker.kill()
                slot.worker.close()
                slot.worker = None

    def pause(self, why: str) -> None:
        """Begins nothing for a while, because the disk is full or nearly so."""
        self.full_until = time.monotonic() + FULL_SECONDS
        if not self.is_full:
            self.is_full = True
            self.terminal.notice(f"paused: {why}")

    # -- orders

    def _is_wanted(self) -> bool:
        works = (work for id, work in self.works.items() if id not in self.absent)
        return any(stage in work.next for work in works for stage in self.terms.stages)

    def _give(self, slot: Slot) -> None:
        if slot.order or (slot.worker and not slot.worker.ready):
            return
        order = self._choose(slot)
        if slot.worker and (order is None or order.stage != slot.stage):
            self._release(slot)
        if order is None or self._is_in_the_way(slot, order) or not self._has_space():
            return
        if slot.worker is None:
            slot.worker = Worker(self.command, order.stage, self.held[order.stage])
            slot.begin_turn((order.stage, order.loads))
        else:
            if slot.loaded != (order.stage, order.loads):
                slot.begin_turn((order.stage, order.loads))
            self._begin(slot, slot.worker, order)

    def _choose(self, slot: Slot) -> plan.Order | None:
        if self.stopping or (self.is_full and time.monotonic() < self.full_until):
            return None
        now = time.monotonic()
        self.not_before = {id: time for id, time in self.not_before.items() if time > now}
        works = [work for id, work in self.works.items() if id not in self.not_before and id not in self.absent]
        stages = [stage for stage in slot.stages if all(stage != other.stage for other in self.slots if other != slot)]
        if slot != self.slots[0] and not self._may_overlap():
            return None
        return plan.choose(works, stages, slot.loaded if slot.worker else None, slot.is_turn_over())

    def _is_in_the_way(self, slot: Slot, order: plan.Order) -> bool:
        """Whether another worker must end first: only decode may be beside denoise."""
        for other in self.slots:
            if other != slot and other.worker and {order.stage, other.stage} != {"denoise", "decode"}:
                if other.order is None and other.worker.ready:
                    self._release(other)
                else:
                    return True
        return False

    def _may_overlap(self) -> bool:
        main = self.slots[0]
        if main.stage != "denoise" or main.order is None:
            return False
        if self.terms.overlap is None:
            if self.terms.limits:  # they are for one stage at a time
                return False
            beside = self.slots[1].worker is not None  # then it has its memory
            return beside or _available_memory() > DECODE_BYTES
        return self.terms.overlap

    def _has_space(self) -> bool:
        free = self._free()
        if free < self.terms.min_free:
            wanted = self.terms.min_free / 1e9
            self.pause(f"{free / 1e9:.1f} GB are free in {self.jobs.outbox}, {wanted:.1f} GB should be")
        return free >= self.terms.min_free

    def _free(self) -> int:
        info = os.statvfs(self.jobs.outbox)
        return info.f_bavail * info.f_frsize

    def _begin(self, slot: Slot, worker: Worker, order: plan.Order) -> None:
        try:
            job = self.jobs.read(order.id)
        except UserError:
            job = None
        if job is None:
            self.look(order.id)  # says what is wrong with it
            return
        slot.prepares = order.stage == "denoise" and job.model not in self.can_preview
        attempts = 0 if slot.prepares else self._count(job, order)
        if attempts > UNSEEN_ATTEMPTS:
            return
        work = self.works[order.id]
        number = {"denoise": work.denoised + 1, "decode": work.done + 1}
        place = f" {number[order.stage]}/{work.wanted}" if order.stage in number else ""
        slot.order, slot.run, slot.label = order, job.run, f"{order.stage} {job.run}{place}"
        slot.failures, slot.hung, slot.told = [], False, time.monotonic()
        if slot.prepares:
            self.can_preview.add(job.model)
            worker.send(Order(["fit-preview", f"--model={job.model}"]))
        else:
            worker.send(_command(self.jobs, job, order, self.terms, again=attempts > 1))

    def _count(self, job: Job, order: plan.Order) -> int:
        """Writes down that an attempt begins. Returns how many there are by now that brought nothing, with this."""
        before = self.jobs.read_trouble(job.id, order.stage)
        reached = plan.reached(self.jobs, job, order.stage)
        if before.reached != reached:
            before = replace(before, attempts=0, failed=0, reached=reached)
        trouble = replace(before, attempts=before.attempts + 1)
        if trouble.attempts > UNSEEN_ATTEMPTS:
            self._set_aside(order, f"{UNSEEN_ATTEMPTS} attempts ended with everything being killed", before)
        else:
            self.jobs.write_trouble(job.id, order.stage, trouble)
        return trouble.attempts

    def _release(self, slot: Slot) -> int:
        """Ends a slot's worker; its memory is back afterwards. Returns its exit code."""
        code = slot.worker.close() if slot.worker else 0
        slot.worker = None
        self.terminal.close(slot.line)
        return code

    # -- what comes of them

    def _heard(self, slot: Slot, event: Ready | Progress | Said) -> None:
        if isinstance(event, Ready):
            self.starts_failed = 0
            slot.loading = time.monotonic() - slot.worker.started if slot.worker else 0.0
        elif isinstance(event, Said):
            if event.line.startswith("failed: "):
                slot.failures.append(event.line.removeprefix("failed: "))
            self.terminal.notice(f"{slot.run}: {event.line}")
        elif slot.worker:
            now = time.monotonic()
            if event.done and not slot.has_loaded and event.label.startswith(slot.worker.stage):  # not: reading weights
                slot.has_loaded = True
                slot.loading = now - slot.turn_began
            self.terminal.report(slot.label, event.done, event.total, slot.line)
            if not self.terminal.is_live() and now - slot.told > LOG_SECONDS:
                slot.told = now
                self.terminal.notice(f"{slot.label}: {event.done} of {event.total}")

    def _answered(self, slot: Slot, answer: Answer) -> None:
        order, slot.order = slot.order, None
        if order is None:
            return
        if slot.prepares:  # without a preview if it failed; the order itself comes next
            slot.prepares = False
            return
        if answer.outcome == "done" and self.is_full:
            self.is_full = False
            self.terminal.notice("goes on: there is space on the disk again")
        if answer.outcome == "refused" and order.stage == "encode":
            self._set_aside(order, answer.message, Trouble())
        elif answer.outcome in ("refused", "some_failed"):
            self._give_up(order, slot.failures or [answer.message])
        elif answer.outcome == "busy":
            self._uncount(order)
            self.not_before[order.id] = time.monotonic() + BUSY_SECONDS
        elif answer.outcome == "unavailable":
            self._uncount(order)
            self._wait_for_model(order, answer.message)
        elif answer.outcome == "environment" and answer.errno in NO_SPACE:
            self._uncount(order)
            self.pause(answer.message)
        elif answer.outcome == "environment":
            self._failed(order, answer.message, slot.label, slot.worker)
        elif answer.outcome == "interrupted":
            self._uncount(order)
        self.look(order.id)

    def _died(self, slot: Slot) -> None:
        worker, order, hung = slot.worker, slot.order, slot.hung
        slot.order, prepared = None, slot.prepares
        slot.prepares = slot.hung = False
        code = self._release(slot)
        why = f"no progress for {self.terms.hang:.0f} s" if hung else how_it_ended(code)
        if self.stopping or prepared:
            if order and not prepared:
                self._uncount(order)
        elif order:
            self._failed(order, why, slot.label, worker)
        elif worker and not worker.ready:
            self.starts_failed += 1
            if self.starts_failed >= STARTS:
                last = worker.log[-1] if worker.log else why
                raise UserError(f"{worker.stage} cannot start: {last}")
        if order:
            self.look(order.id)

    def _failed(self, order: plan.Order, why: str, label: str, worker: Worker | None) -> None:
        """An attempt brought nothing."""
        log = tuple(worker.log) if worker else ()
        before = self.jobs.read_trouble(order.id, order.stage)
        trouble = replace(before, failed=before.failed + 1, log=log)
        if trouble.failed >= ATTEMPTS:
            self._set_aside(order, f"{ATTEMPTS} attempts failed, at last because {why}", trouble)
            return
        self.jobs.write_trouble(order.id, order.stage, trouble)
        self.not_before[order.id] = time.monotonic() + RETRY_SECONDS * trouble.failed
        self.terminal.notice(f"{label}: {why}; attempt {trouble.failed + 1} of {ATTEMPTS} follows")

    def _wait_for_model(self, order: plan.Order, why: str) -> None:
        if why not in self.absent_said:
            self.absent_said.add(why)
            self.terminal.notice(f"{self.works[order.id].run} waits: {why}")
        self.absent[order.id] = why
        self.absent_until = time.monotonic() + ABSENT_SECONDS

    def _set_aside(self, order: plan.Order, why: str, trouble: Trouble) -> None:
        self.jobs.write_trouble(order.id, order.stage, replace(trouble, set_aside=why))
        self.look(order.id)

    def _uncount(self, order: plan.Order) -> None:
        """It was not the job's fault."""
        trouble = self.jobs.read_trouble(order.id, order.stage)
        self.jobs.write_trouble(order.id, order.stage, replace(trouble, attempts=max(0, trouble.attempts - 1)))

    def _give_up(self, order: plan.Order, reasons: list[str]) -> None:
        """What an order was to make and did not will not be tried again; the job's other pictures are made."""
        work = self.look(order.id)
        missing = set(work.next.get(order.stage, ())) if work else set()
        trouble = self.jobs.read_trouble(order.id, order.stage)
        given_up = dict(trouble.given_up)
        for place, picture in enumerate(each for each in order.pictures if each in missing):
            given_up[plan.picture_key(picture)] = reasons[min(place, len(reasons) - 1)]
        self.jobs.write_trouble(order.id, order.stage, replace(trouble, attempts=0, given_up=tuple(given_up.items())))


def _command(jobs: Jobs, job: Job, order: plan.Order, terms: Terms, again: bool) -> Order:
    """An order as a command line of `qwen-stage`; `again`: after an attempt that brought nothing."""
    run = jobs.run(job)
    model = f"--model={job.model}"
    computing = [model, *terms.limits, *terms.streaming]
    if order.stage == "encode":
        own = precision(job.embeddings_dtype)
        truncate = ["--truncate"] if terms.truncate else []
        entries = to_jsonl([Entry.of(prompt) for prompt in job.prompts]).decode()
        return Order(["encode", "-", "--format=jsonl", f"--out={run}", *computing, *own, *truncate], entries)
    if order.stage == "denoise":
        save = ["--save-every-step"] if again else []
        wanted = to_jsonl(list(order.pictures)).decode()
        return Order(
            [
                "denoise",
                f"--embeddings={run}",
                "--items=-",
                *computing,
                *precision(job.dtype),
                f"--preview={jobs.preview(job.id)}",
                *save,
            ],
            wanted,
        )
    keys = "".join(f"{key}\n" for key in order.pictures)
    return Order(["decode", "--items=-", model, f"--dtype={job.decode_dtype}", *terms.limits, "--", str(run)], keys)


def _available_memory() -> int:
    """Bytes that may be taken without swapping; 0 where models are in the GPU's own memory."""
    from stages.checkpoint import has_cuda
    from stages.memory import system_memory

    return 0 if has_cuda() else system_memory()

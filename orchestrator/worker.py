"""A stage's process that lasts: it takes one order after the other and keeps its model loaded. Both ends of its pipes.

An order is a command line of `qwen-stage` and what that reads from standard input, as one JSON line; so are the
answers: progress, notices, and how it ended. Standard error is the worker's log. When its orders end, so does the
worker; when its orchestrator dies in the middle of one, it finishes the step, saves it and ends too.
"""

import contextlib
import io
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import IO, Literal, cast

import msgspec

from artifacts_schema.errors import Busy, Damaged, Unavailable, UserError, failed_operation
from orchestrator import EXIT_DONE, EXIT_INTERRUPTED, EXIT_SOME_FAILED
from orchestrator.progress import Voice

LOG_LINES = 40
LOG_LINE_LENGTH = 500
READ_BYTES = 1 << 16
MOST_REST_BYTES = 1 << 20  # of a line without end
ENDING_SECONDS = 30.0  # that an idle worker may take to end

Outcome = Literal["done", "some_failed", "refused", "busy", "unavailable", "environment", "interrupted"]


class Order(msgspec.Struct, tag="order"):
    arguments: list[str]
    stdin: str = ""


class Ready(msgspec.Struct, tag="ready"):
    """The worker has imported what it needs and waits for orders."""


class Progress(msgspec.Struct, tag="progress"):
    label: str
    done: int
    total: int


class Said(msgspec.Struct, tag="said"):
    line: str


class Answer(msgspec.Struct, tag="answer"):
    """How an order ended. `errno` is that of a failed file operation, or 0."""

    outcome: Outcome
    message: str = ""
    errno: int = 0


Event = Ready | Progress | Said | Answer


def obey(prepare: Callable[[], None], perform: Callable[[list[str], Voice], int]) -> int:
    """The worker's side: performs the orders from stdin, and answers on stdout. Returns the exit code.

    `prepare` imports what orders will need.
    """
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever else is printed belongs into the log
    encode = msgspec.json.Encoder().encode

    def tell(event: Event) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more; the step is saved all the same
            answers.write(encode(event) + b"\n")

    voice = Voice(
        report=lambda label, done, total: tell(Progress(label, done, total)),
        notice=lambda line: tell(Said(line)),
    )
    busy = threading.Event()  # from the moment an order has come
    orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders, busy), daemon=True).start()
    try:
        prepare()
        tell(Ready())
        while (order := orders.get()) is not None:
            sys.stdin = io.TextIOWrapper(io.BytesIO(order.stdin.encode()), encoding="utf-8")
            answer = _perform(perform, order.arguments, voice)
            busy.clear()
            tell(answer)
            if answer.outcome == "interrupted":
                return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_DONE


def _listen(orders: "queue.SimpleQueue[Order | None]", busy: threading.Event) -> None:
    rest = b""
    while block := os.read(0, READ_BYTES):  # no buffered reader: one that waits in a thread cannot be shut down
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            busy.set()
            orders.put(msgspec.json.decode(line, type=Order))
    orders.put(None)
    if busy.is_set():  # the orchestrator is gone: save the step and end
        os.kill(os.getpid(), signal.SIGTERM)


def _perform(perform: Callable[[list[str], Voice], int], arguments: list[str], voice: Voice) -> Answer:
    try:
        code = perform(arguments, voice)
    except Busy as error:
        return Answer("busy", str(error))
    except Unavailable as error:
        return Answer("unavailable", str(error))
    except UserError as error:
        because = failed_operation(error)
        if because and not isinstance(error, Damaged):
            return Answer("environment", str(error), because.errno or 0)
        return Answer("refused", str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return Answer("environment", f"{where}{error.strerror or error}", error.errno or 0)
    except KeyboardInterrupt:
        return Answer("interrupted")
    return Answer("some_failed" if code == EXIT_SOME_FAILED else "done")


class Worker:
    """The orchestrator's side: starts the process, in a group of its own so that a Ctrl-C does not reach it too."""

    def __init__(self, command: list[str], stage: str, holding: int) -> None:
        """`holding`: the descriptor of a lock that is held as long as the worker lives, whoever dies before it."""
        self.stage = stage
        self.process = subprocess.Popen(
            [*command, stage],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            process_group=0,
            pass_fds=(holding,),
        )
        self.started = self.heard = time.monotonic()
        self.ready = self.ended = False  # ended: it has closed its pipe, and is dead or about to be
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self.answers: IO[bytes] = cast(IO[bytes], self.process.stdout)
        self.stderr: IO[bytes] = cast(IO[bytes], self.process.stderr)
        self.orders: IO[bytes] = cast(IO[bytes], self.process.stdin)
        for pipe in (self.answers, self.stderr):
            os.set_blocking(pipe.fileno(), False)
        os.set_blocking(self.orders.fileno(), False)
        self.unsent = b""
        self._rest = {self.answers.fileno(): b"", self.stderr.fileno(): b""}

    def send(self, order: Order) -> None:
        self.log.clear()
        self.heard = time.monotonic()
        self.unsent += msgspec.json.encode(order) + b"\n"
        self.flush()

    def flush(self) -> None:
        """Sends what the pipe has room for, without waiting."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # that it is dead is seen elsewhere
            while self.unsent:
                self.unsent = self.unsent[os.write(self.orders.fileno(), self.unsent[:READ_BYTES]) :]

    def events(self) -> Iterator[Event]:
        """What it has said since, without waiting; its log is read along with that."""
        self.flush()
        self._read_log()
        for line in self._lines(self.answers.fileno()):
            try:
                event: Event = msgspec.json.decode(line, type=Event)
            except ValueError:  # a library that writes to the pipe itself
                self.log.append(line[:LOG_LINE_LENGTH])
                continue
            self.heard = time.monotonic()
            if isinstance(event, Ready):
                self.ready = True
            elif isinstance(event, Said):
                self.log.append(event.line)
            yield event

    def _read_log(self) -> None:
        self.log.extend(line[:LOG_LINE_LENGTH] for line in self._lines(self.stderr.fileno()))

    def _lines(self, pipe: int) -> list[str]:
        data = self._rest[pipe]
        with contextlib.suppress(BlockingIOError):
            block = os.read(pipe, READ_BYTES)  # no more, as it may never end
            data += block
            self.ended |= not block and pipe == self.answers.fileno()
        *lines, rest = data.split(b"\n")
        self._rest[pipe] = rest[-MOST_REST_BYTES:]
        return [line.decode("utf-8", "replace") for line in lines]

    def is_dead(self) -> bool:
        """Also when something that it started holds its pipes open."""
        return self.ended or self.process.poll() is not None

    def interrupt(self) -> None:
        """Finish the step, save it, end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """With whatever it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self.process.kill()

    def close(self) -> int:
        """Ends an idle worker or one that is ending, and waits for its memory to be given back: its exit code."""
        self.orders.close()
        try:
            self.process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        self._read_log()
        for pipe in (self.answers, self.stderr):
            pipe.close()
        return self.process.returncode


def how_it_ended(code: int) -> str:
    """A dead worker's exit code in words."""
    if code >= 0:
        return f"it ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"it was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")

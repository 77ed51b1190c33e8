"""What a drop folder's jobs are on disk, in the outbox beside their runs.

    <run>/                     embeddings/ latents/ images/, as of any run
    .jobs/open/<id>.json       what is asked for; a job is open as long as this is here
    .jobs/<stage>/<id>.json    what a stage tried in vain
    .jobs/denoise/<id>.webp    how the picture looks by now that is being denoised
    .jobs/ended/<id>.json      how a job ended
    .jobs/outbox-id            by which an inbox knows for whom its drops were taken in

An id is the time at which the drop was taken in: ids sort as the jobs came. A stage's directory belongs to the one
orchestrator that runs that stage, `open/` to the one that takes drops in.
"""

import contextlib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union

import msgspec
from msgspec import Meta

from artifacts_schema import disk, store
from artifacts_schema.errors import Damaged, Unreadable, UserError
from artifacts_schema.manifests import DecodeDtype, Key, Precision, Record, Sha256, split
from artifacts_schema.prompts import Prompt, PromptV1

JOBS = ".jobs"
STAGES = ("encode", "denoise", "decode")
MAX_JOB_BYTES = 64 << 20

JobId = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]


class JobV1(Record, frozen=True, tag_field="schema", tag="qwen-stage/job/1", kw_only=True):
    """A job as it was before the text encoder could be quantized."""

    id: JobId
    run: Annotated[str, Meta(pattern="^[^/\0]+$")]  # its directory in the outbox
    source: str  # the drop's name
    sha256: Sha256  # of the drop's content
    model: str
    dtype: Precision
    decode_dtype: DecodeDtype
    priority: int = 0  # higher comes first
    prompts: tuple[PromptV1, ...]
    checksum: str = ""

    def upgrade(self) -> "JobV2":
        return JobV2(**msgspec.structs.asdict(self), embeddings_dtype=split(self.dtype)[0])


class JobV2(JobV1, frozen=True, tag="qwen-stage/job/2", kw_only=True):
    """A job as it was before pictures could begin with others."""

    embeddings_dtype: Precision

    def upgrade(self) -> "Job":
        return Job(**{**msgspec.structs.asdict(self), "prompts": tuple(each.upgrade() for each in self.prompts)})


class Job(JobV2, frozen=True, tag="qwen-stage/job/3", kw_only=True):
    """A drop that was taken in: its prompts, and all that they leave open but what the model itself says."""

    older: ClassVar[tuple[type[Record], ...]] = (JobV1, JobV2)
    prompts: tuple[Prompt, ...]


class Trouble(Record, frozen=True, tag_field="schema", tag="qwen-stage/trouble/1", kw_only=True):
    """What a stage tried in vain. Written before every attempt, so that a death of the whole machine counts as well."""

    older: ClassVar[tuple[type[Record], ...]] = ()
    attempts: int = 0  # in a row that brought nothing new
    failed: int = 0  # of these, how many somebody saw fail: others may have ended by a power cut
    reached: str = ""  # how far the job was when the last of them began
    given_up: tuple[tuple[Key, str], ...] = ()  # pictures that cannot be made, and why
    set_aside: str = ""  # why the whole job is, if it is
    log: tuple[str, ...] = ()  # the last lines of the last that failed
    checksum: str = ""


class EndedV1(Record, frozen=True, tag_field="schema", tag="qwen-stage/ended/1", kw_only=True):
    """How a job of version 1 ended."""

    job: JobV1
    outcome: Literal["done", "failed"]
    at: float  # seconds since the epoch
    pictures: int = 0
    reason: str = ""
    log: tuple[str, ...] = ()
    checksum: str = ""

    def upgrade(self) -> "EndedV2":
        return EndedV2(**{**msgspec.structs.asdict(self), "job": self.job.upgrade()})


class EndedV2(EndedV1, frozen=True, tag="qwen-stage/ended/2", kw_only=True):
    """How a job of version 2 ended."""

    job: JobV2

    def upgrade(self) -> "Ended":
        return Ended(**{**msgspec.structs.asdict(self), "job": self.job.upgrade()})


class Ended(EndedV2, frozen=True, tag="qwen-stage/ended/3", kw_only=True):
    """How a job ended. `reason` and `log` are for people."""

    older: ClassVar[tuple[type[Record], ...]] = (EndedV1, EndedV2)
    job: Job


R = TypeVar("R", bound=Job | Trouble | Ended)


class Jobs:
    """The jobs of one outbox."""

    def __init__(self, outbox: Path) -> None:
        self.outbox = outbox
        self.open = outbox / JOBS / "open"
        self.ended = outbox / JOBS / "ended"

    def stage(self, stage: str) -> Path:
        return self.outbox / JOBS / stage

    def page(self) -> Path:
        """A place for the lock of whoever writes the page."""
        return self.outbox / JOBS / "page"

    def run(self, job: Job) -> Path:
        return self.outbox / job.run

    def preview(self, id: str) -> Path:
        return self.stage("denoise") / f"{id}.webp"

    def open_ids(self) -> list[str]:
        """As they came."""
        return _ids(self.open)

    def ended_ids(self) -> list[str]:
        return _ids(self.ended)

    def read(self, id: str) -> Job | None:
        """An open job; None if it is not open (any more). Raises Damaged."""
        return _read(self.open / f"{id}.json", Job)

    def read_ended(self, id: str) -> Ended | None:
        return _read(self.ended / f"{id}.json", Ended)

    def set_aside(self, id: str) -> None:
        """Makes an open job that cannot be read none: its drop is taken in anew."""
        (self.open / f"{id}.json").replace(self.open / f"{id}.damaged")

    def read_trouble(self, id: str, stage: str) -> Trouble:
        """A damaged record is none: what it says shows again."""
        with contextlib.suppress(Damaged):
            return _read(self.stage(stage) / f"{id}.json", Trouble) or Trouble()
        return Trouble()

    def add(self, job: Job) -> None:
        disk.publish(self.open, f"{job.id}.json", store.seal(job, Job))

    def write_trouble(self, id: str, stage: str, trouble: Trouble) -> None:
        disk.publish(self.stage(stage), f"{id}.json", store.seal(trouble, Trouble))

    def end(self, ended: Ended) -> None:
        """Says how a job ended. It stays open until its drop is put away as well, and it is closed."""
        with disk.lock(self.ended, wait=True):  # any orchestrator of the outbox may
            disk.publish(self.ended, f"{ended.job.id}.json", store.seal(ended, Ended))

    def sweep(self, stage: str) -> None:
        """Clears away what is left in a stage's own directory, for its only orchestrator."""
        disk.sweep(self.stage(stage))
        open_ids = set(self.open_ids())
        for path in self.stage(stage).glob("*.*"):
            if path.is_file() and path.stem not in open_ids and not path.name.startswith("."):
                disk.remove(path)

    def close(self, id: str) -> None:
        """Forgets an open job, its own record last."""
        for stage in STAGES:
            disk.remove(self.stage(stage) / f"{id}.json")
        disk.remove(self.preview(id))
        disk.remove(self.open / f"{id}.json")
        disk.sync(self.open)


def _ids(directory: Path) -> list[str]:
    return sorted(path.stem for path in directory.glob("*.json"))


def _read(path: Path, kind: type[R]) -> R | None:
    versions: Any = Union[(kind, *kind.older)]
    try:
        record: Any = store.unseal(disk.read(path, MAX_JOB_BYTES), versions)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from None
    except (ValueError, UserError) as error:
        raise Damaged(f"{path} is damaged: {error}") from None
    while not isinstance(record, kind):
        record = record.upgrade()
    return record

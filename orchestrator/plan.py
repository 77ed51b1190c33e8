"""What is on disk -> what to run next. Reads manifests and job records, writes nothing, remembers nothing."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from artifacts_schema import keys, store
from artifacts_schema.jobs import STAGES, Ended, Job, Jobs, Trouble
from artifacts_schema.manifests import (
    EmbeddingsManifest,
    ImagesManifest,
    LatentsManifest,
    Manifest,
    PromptItem,
)
from artifacts_schema.prompts import Prompt, Wanted, as_wanted, pictures_of

AT_ONCE = {"encode": 1, "denoise": 1, "decode": 8}  # pictures in one order: jobs take turns between orders
SHOWN_REASONS = 20  # of pictures that failed
KINDS: dict[str, type[Manifest]] = {"encode": EmbeddingsManifest, "denoise": LatentsManifest, "decode": ImagesManifest}


Loads = tuple[str, str]  # the model and the dtype that a worker has loaded


class Work(NamedTuple):
    """What an open job needs: by stage, its next pictures there, and when it last got any. No more: there are many."""

    id: str
    run: str
    priority: int
    denoised: int
    done: int  # pictures that are there
    wanted: int  # pictures there will be; 0: not known before they are encoded
    loads: dict[str, Loads]  # by stage
    next: dict[str, tuple[Any, ...]]  # encode: (); denoise: `Wanted`; decode: keys of latents
    served: dict[str, int]  # ns since the epoch


class Order(NamedTuple):
    """One job's next pictures in one stage."""

    id: str
    stage: str
    loads: Loads
    pictures: tuple[Any, ...]


def look(jobs: Jobs, job: Job, now: float) -> Work | Ended:
    """What a job needs, by what is on disk; or how it ended, if nothing more can be done. Raises UserError."""
    run = jobs.run(job)
    troubles = {stage: jobs.read_trouble(job.id, stage) for stage in STAGES}
    embeddings = store.read_manifest_if_any(run / EmbeddingsManifest.kind, EmbeddingsManifest)
    encoded = {_asked(item): item for item in embeddings.items} if embeddings else {}
    asked = [_asked(prompt) for prompt in job.prompts]
    items = [encoded[each] for each in asked if each in encoded]
    wanted = dict.fromkeys(each for item in items for each in pictures_of(item))
    latents = store.read_manifest_if_any(run / LatentsManifest.kind, LatentsManifest)
    denoised = {as_wanted(item): item.key for item in latents.items if item.dtype == job.dtype} if latents else {}
    images = store.read_manifest_if_any(run / ImagesManifest.kind, ImagesManifest)
    decoded = {item.latents_key for item in images.items if item.dtype == job.decode_dtype} if images else set()

    given_up = {stage: dict(trouble.given_up) for stage, trouble in troubles.items()}
    to_denoise = [each for each in wanted if each not in denoised and picture_key(each) not in given_up["denoise"]]
    made = [denoised[each] for each in wanted if each in denoised]
    to_decode = [key for key in made if key not in decoded and key not in given_up["decode"]]
    done = sum(key in decoded for key in made)
    for stage, trouble in troubles.items():
        if trouble.set_aside:
            return _failed(job, now, done, f"{stage}: {trouble.set_aside}", trouble)
    dtypes = {"encode": job.embeddings_dtype, "denoise": job.dtype, "decode": job.decode_dtype}
    loads = {stage: (job.model, dtype) for stage, dtype in dtypes.items()}
    if len(items) < len(asked):
        return Work(job.id, job.run, job.priority, 0, 0, 0, loads, {"encode": ()}, _served(run))
    if not to_denoise and not to_decode:
        if not any(given_up.values()):
            return Ended(job=job, outcome="done", at=now, pictures=done)
        reasons = [reason for each in given_up.values() for reason in each.values()]
        reason = f"{len(reasons)} of {len(wanted)} pictures failed: {reasons[0]}"
        return _failed(job, now, done, reason, Trouble(log=tuple(dict.fromkeys(reasons))[:SHOWN_REASONS]))
    following: dict[str, tuple[Any, ...]] = {}
    if to_denoise:
        following["denoise"] = tuple(to_denoise[: AT_ONCE["denoise"]])
    if to_decode:
        following["decode"] = tuple(to_decode[: AT_ONCE["decode"]])
    return Work(job.id, job.run, job.priority, len(made), done, len(wanted), loads, following, _served(run))


def choose(
    works: Iterable[Work], stages: Collection[str], loaded: tuple[str, Loads] | None, turn_over: bool
) -> Order | None:
    """The next order for a process that may run these stages, and has loaded this stage's model.

    Only what has the highest priority counts. What is loaded goes on until its work or its turn is over, then the next
    stage in the circle comes that has work; within a stage, the job that was served longest ago.
    """
    stage_now, loads_now = loaded or (None, None)
    best: dict[str, tuple[tuple[int, bool, int, str], Work]] = {}
    for work in works:
        for stage in work.next:
            if stage in stages:
                reloads = stage == stage_now and not turn_over and work.loads[stage] != loads_now
                rank = (-work.priority, reloads, work.served[stage], work.id)
                if stage not in best or rank < best[stage][0]:
                    best[stage] = rank, work
    highest = max((work.priority for _, work in best.values()), default=0)
    circle = [*STAGES, *STAGES]
    after = circle[STAGES.index(stage_now) + 1 :] if stage_now else circle
    goes_on = stage_now in best and not turn_over and not best[stage_now][0][1]
    for stage in [stage_now, *after] if stage_now and goes_on else after:
        if stage in best and best[stage][1].priority == highest:
            work = best[stage][1]
            return Order(work.id, stage, work.loads[stage], work.next[stage])
    return None


def reached(jobs: Jobs, job: Job, stage: str) -> str:
    """How far a job is in a stage; the same as before means that an attempt brought nothing."""
    directory = jobs.run(job) / KINDS[stage].kind
    try:
        files = [path for path in directory.iterdir() if path.suffix in (".safetensors", ".zarr", ".json", ".png")]
        steps = [path.stat().st_mtime_ns for path in files if path.name.endswith(".trajectory.json")]
    except OSError:
        return ""
    return f"{len(files)}/{max(steps, default=0)}"


def picture_key(picture: Any) -> str:
    """What names a picture of an order in a record: latents have a key, what is only wanted gets one."""
    return keys.key(picture) if isinstance(picture, Wanted) else str(picture)


def _asked(prompt: Prompt | PromptItem) -> tuple[Any, ...]:
    return prompt.prompt, prompt.negative_prompt, prompt.name, prompt.settings


def _failed(job: Job, now: float, done: int, reason: str, trouble: Trouble) -> Ended:
    return Ended(job=job, outcome="failed", at=now, pictures=done, reason=reason, log=trouble.log)


def _served(run: Path) -> dict[str, int]:
    """When each stage last wrote something of a run; never is 0."""
    served = {}
    for stage, kind in KINDS.items():
        try:
            served[stage] = (run / kind.kind / store.MANIFEST).stat().st_mtime_ns
        except OSError:
            served[stage] = 0
    return served

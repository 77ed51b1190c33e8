"""The page of an outbox: its jobs, the newest first, how far each is, and the pictures they made.

While a job goes on, the page shows the picture that is being denoised and keeps itself up to date. It is made of
`gallery.py`'s cards, from the disk alone: whatever is damaged or gone is said in its job's place.
"""

import time
from dataclasses import dataclass, field
from html import escape
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from msgspec.structs import replace

from artifacts_schema import disk, store
from artifacts_schema.errors import UserError
from artifacts_schema.jobs import JOBS, Ended, Job, Jobs
from artifacts_schema.manifests import ImagesManifest
from orchestrator.gallery import PAGE, Report, Shown, cards, counted, page, whole

MOST_PICTURES = 2000  # on the page: a browser shows so many at once


def is_outbox(path: Path) -> bool:
    return (path / JOBS).is_dir()


def write(outbox: Path, report: Report) -> Path:
    """Writes an outbox's page and the thumbnails that are missing. Returns the page."""
    jobs = Jobs(outbox)
    ids = sorted({*jobs.open_ids(), *jobs.ended_ids()}, reverse=True)
    sections, made, shown = [], 0, 0
    for number, id in enumerate(ids, 1):
        found = _look(jobs, id, MOST_PICTURES - shown)
        if found:
            sections.append(_section(jobs, found))
            made, shown = made + found.made, shown + len(found.shown)
        report("gallery", number, len(ids))
    if made > shown >= MOST_PICTURES:
        sections.insert(0, f"<p>The newest {shown:,} pictures are shown.</p>")
    summary = f"{counted(made, 'picture')} in {counted(len(ids), 'job')}"
    main = "\n".join(sections) or "<p>No jobs yet.</p>"
    disk.make_directory(jobs.page())
    with disk.lock(jobs.page(), wait=True):
        disk.sweep(outbox)
        disk.publish(outbox, PAGE, page(outbox.resolve().name, summary, main))
    return outbox / PAGE


@dataclass
class _Found:
    """What there is of a job; no `job` if its record is damaged."""

    id: str
    job: Job | None = None
    ended: Ended | None = None
    is_begun: bool = False
    made: int = 0  # pictures
    shown: list[Shown] = field(default_factory=list)
    own_page: str = ""  # of its run, seen from the outbox, if there is one
    wrong: str = ""


def _look(jobs: Jobs, id: str, most: int) -> _Found | None:
    """A job and at most so many of its pictures. None if it went just now."""
    found = _Found(id)
    try:
        found.ended = jobs.read_ended(id)
        found.job = found.ended.job if found.ended else jobs.read(id)
        if not found.job:
            return None
        run = jobs.run(found.job)
        found.is_begun = run.is_dir()
        directory, place = run / ImagesManifest.kind, f"{found.job.run}/{ImagesManifest.kind}/"
        found.own_page = place + PAGE if (directory / PAGE).is_file() else ""
        if images := store.read_manifest_if_any(directory, ImagesManifest):
            found.made = len(images.items)
            found.shown = list(islice(whole(directory, images, place, _silent), most))
        elif found.ended and found.ended.pictures:
            found.wrong = "Its pictures are not there any more."
    except (UserError, OSError) as error:
        found.wrong = str(error)
    return found


def _silent(label: str, done: int, total: int) -> None:
    pass


def _section(jobs: Jobs, found: _Found) -> str:
    job, ended = found.job, found.ended
    id = escape(found.id)
    kind = "failed" if not job else ended.outcome if ended else "open"
    name = f"<bdi>{escape(job.run)}</bdi>" if job else "A job that cannot be read"
    lines = [
        f'<section class="{kind}" aria-labelledby="{id}">',
        f'<header><h2 id="{id}">{name}</h2><p class="state">{_state(found)}</p></header>',
    ]
    if job:
        came = time.strftime("%Y-%m-%d %H:%M", time.localtime(int(job.id, 16) / 1e9))
        facts = f"<bdi>{escape(job.source)}</bdi> · came {came} · model <bdi>{escape(job.model)}</bdi>"
        lines.append(f'<p class="facts">{facts}</p>')
    goes_on = job and not ended and found.is_begun
    if job and goes_on:
        lines.append(f'<progress max="{_asked_for(job)}" value="{found.made}" aria-labelledby="{id}"></progress>')
    for text in filter(None, [ended.reason if ended else "", found.wrong]):
        lines.append(f'<p dir="auto">{escape(text)}</p>')
    if ended and ended.log:
        log = escape("\n".join(ended.log))
        lines.append(f'<details><summary>what it said last</summary><pre dir="auto">{log}</pre></details>')
    lines.append(cards(found.shown, before=_live(jobs, job) if job and goes_on else ""))
    if missing := found.made - len(found.shown):
        link = f' <a href="{quote(found.own_page)}">The run\'s own page</a>' if found.own_page else ""
        lines.append(f'<p class="facts">{counted(missing, "more picture")} not shown here.{link}</p>')
    return "\n".join([*filter(None, lines), "</section>"])


def _state(found: _Found) -> str:
    job, ended, made = found.job, found.ended, counted(found.made, "picture")
    if not job:
        return "damaged"
    if ended and ended.outcome == "done":
        return f"done, {made}"
    if ended:
        return f"failed, {made}"
    asked_for = counted(_asked_for(job), "picture")
    return f"in progress, {found.made:,} of {asked_for}" if found.is_begun else f"waiting, {asked_for}"


def _asked_for(job: Job) -> int:
    """How many pictures a job will have: a prompt written twice is one, and one that names no seed as well."""
    wanted = set()
    for prompt in job.prompts:
        settings = replace(prompt.settings, seeds=None)
        wanted |= {(prompt.prompt, prompt.negative_prompt, settings, seed) for seed in prompt.settings.seeds or (None,)}
    return len(wanted)


def _live(jobs: Jobs, job: Job) -> str:
    """The picture that is being denoised. Its card is always there; the page looks whether there is one to show."""
    preview = jobs.preview(job.id)
    return (
        f'<article class="live"{"" if preview.exists() else " hidden"}>'
        f'<div><img src="{quote(preview.relative_to(jobs.outbox).as_posix())}" alt="how it looks by now"></div>\n'
        f'<p class="prompt">denoising…</p></article>'
    )

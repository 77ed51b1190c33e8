"""The page of an outbox: every job is there, in whatever state it and its files are, and texts do nothing."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
from browser import INSTALLED, Browser
from PIL import Image
from test_gallery import HOSTILE, Page

from artifacts_schema import disk, keys, store
from artifacts_schema.jobs import Ended, Job, Jobs
from artifacts_schema.manifests import (
    Cost,
    File,
    ImageItem,
    ImagesManifest,
    LatentsItem,
    LatentsManifest,
    Model,
    Settings,
)
from artifacts_schema.prompts import Prompt
from orchestrator import outbox

COST = Cost(seconds=12.3, process_peak=1, mlx_peak=1)
MODEL = Model(name="demo", fingerprints={})
MORNING = 1_800_000_000_000_000_000  # nanoseconds since the epoch: when the first drop came
TEXTS = [HOSTILE, "دائرة حمراء </script></style> 😀 'x\"", "a blue square on a yellow background"]


@pytest.fixture
def jobs(tmp_path) -> Jobs:
    jobs = Jobs(tmp_path / "outbox")
    for directory in (jobs.open, jobs.ended):
        disk.make_directory(directory)
    return jobs


def job(number: int, run: str, *prompts: Prompt) -> Job:
    return Job(
        id=f"{MORNING + number * 3600 * 10**9:016x}",
        run=run,
        source=f"{run}.txt",
        sha256="0" * 64,
        model="demo",
        embeddings_dtype="float32",
        dtype="float32",
        decode_dtype="float32",
        prompts=prompts or (Prompt("a red circle"),),
    )


def end(jobs: Jobs, job: Job, outcome: str = "done", **fields: object) -> None:
    jobs.end(Ended(job=job, outcome=outcome, at=1.8e9, **fields))


def png(number: int, side: int = 48) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (number * 37 % 256, number * 91 % 256, 160)).save(file, format="PNG")
    return file.getvalue()


def paint(run: Path, prompts: list[str], first: int = 0) -> None:
    """A run of plain pictures, without computing any."""
    directory = run / "images"
    disk.make_directory(directory)
    disk.make_directory(run / "latents")
    items, latents = [], []
    for number, prompt in enumerate(prompts, first):
        key = keys.key(f"{run.name} {number}")
        (file,) = store.describe(f"{number:04d}.png", png(number))
        (directory / file.path).write_bytes(png(number))
        made = dict(key=key, prompt=prompt, seed=number, dtype="float32", cost=COST)
        items.append(ImageItem(latents_key=key, file=file, **made))
        names = {"zarr.json": 9, "c/0/0/0": 16 * 2 * 2 * 4 + 4}
        settings = dict(width=16, height=16, num_inference_steps=20, true_cfg_scale=4.0, shape=(16, 2, 2))
        files = tuple(File(path=f"{key}.zarr/{name}", size=size, sha256="0" * 64) for name, size in names.items())
        asked = dict(negative_prompt=" ", prompt_key=key, negative_key=key)
        latents.append(LatentsItem(files=files, **asked, **settings, **made))
    store.write_manifest(directory, ImagesManifest(versions={}, model=MODEL, items=tuple(items)))
    store.write_manifest(run / "latents", LatentsManifest(versions={}, model=MODEL, items=tuple(latents)))


def page(jobs: Jobs) -> Page:
    return Page((jobs.outbox / "index.html").read_text(encoding="utf-8"))


def written(jobs: Jobs) -> Page:
    outbox.write(jobs.outbox, lambda *_: None)
    return page(jobs)


def test_jobs_come_newest_first_with_how_far_they_are(qwen_stage, jobs):
    done, failed = job(1, "done", *map(Prompt, TEXTS)), job(2, "failed & <b>")
    going, waiting = job(3, "going", *(Prompt(text, settings=Settings(seeds=(0, 1))) for text in TEXTS)), job(4, "late")
    end(jobs, done, pictures=3)
    end(jobs, failed, "failed", reason=f"no luck: {HOSTILE}", log=(HOSTILE, "</pre>the end"))
    jobs.add(failed)  # ended, and not closed yet
    jobs.add(going)
    jobs.add(waiting)
    paint(jobs.run(done), TEXTS)
    paint(jobs.run(going), TEXTS[:2], first=5)
    assert qwen_stage("gallery", "outbox").out == ["outbox/index.html"]
    found = page(jobs)
    assert found.texts["title"] == ["outbox: 5 pictures in 4 jobs"]
    assert found.texts["bdi"][::3] == ["late", "going", "failed & <b>", "done"]
    states = ["waiting, 1 picture", "in progress, 2 of 6 pictures", "failed, 0 pictures", "done, 3 pictures"]
    assert found.texts["state"] == states
    assert found.texts["prompt"] == ["denoising…", *TEXTS[1::-1], *TEXTS[::-1]]
    assert found.texts["pre"] == [f"{HOSTILE}\n</pre>the end"]
    assert f"no luck: {HOSTILE}" in found.texts["p"]
    assert found.tags.count("progress") == found.tags.count("details") == found.tags.count("script") == 1
    (preview,) = (source for source in found.sources if source.startswith(".jobs"))
    assert jobs.outbox / preview == jobs.preview(going.id)
    assert all((jobs.outbox / unquote(source)).is_file() for source in found.sources if source != preview)


def test_pictures_asked_for_are_counted_once(jobs):
    one, two = Prompt("a", settings=Settings(seeds=(1, 2))), Prompt("a", settings=Settings(seeds=(2, 3)))
    other = Prompt("a", settings=Settings(seeds=(2,), width=32, height=32))
    jobs.add(job(1, "run", one, two, other, Prompt("b"), Prompt("b"), Prompt("b", negative_prompt="c")))
    assert written(jobs).texts["state"] == ["waiting, 6 pictures"]


def test_whatever_is_gone_or_damaged_is_said_in_its_place(jobs):
    gone, damaged, latents, unlisted, whole = (job(n, f"run{n}") for n in range(1, 6))
    for each in (gone, damaged, latents, whole):
        end(jobs, each, pictures=1)
        paint(jobs.run(each), ["a red circle"])
    end(jobs, unlisted, "failed", reason="encode died")
    jobs.run(unlisted).mkdir()
    shutil.rmtree(jobs.run(gone))
    (jobs.run(damaged) / "images/manifest.json").write_bytes(b"{")
    (jobs.run(latents) / "latents/manifest.json").write_bytes(b"{")
    (jobs.ended / f"{0:016x}.json").write_bytes(b'{"<script>')
    found = written(jobs)
    said = " ".join(found.texts["p"])
    assert found.texts["prompt"] == ["a red circle"]
    assert "Its pictures are not there any more." in said
    assert "run2/images/manifest.json is damaged" in said
    assert "run3/latents/manifest.json is damaged" in said
    assert "encode died" in said
    assert f"{0:016x}.json is damaged" in said
    assert found.texts["state"][-1] == "damaged"
    assert len(found.texts["h2"]) == 6


def test_only_what_is_missing_is_made(jobs):
    for number in (1, 2):
        end(jobs, job(number, f"run{number}"))
        paint(jobs.run(job(number, f"run{number}")), TEXTS)
    assert len(written(jobs).texts["prompt"]) == 6
    thumbnails = sorted(jobs.outbox.glob("*/images/thumbnails/*.webp"))
    before = {path: path.stat().st_mtime_ns for path in thumbnails}
    thumbnails[0].unlink()
    (jobs.outbox / "run2/images/0001.png").write_bytes(b"damaged, and not read again: it has a thumbnail")
    (jobs.outbox / "run2/images/0002.png").unlink()
    found = written(jobs)
    assert len(found.texts["prompt"]) == 5
    assert [path.stat().st_mtime_ns == before[path] for path in thumbnails] == [False, *[True] * 5]
    assert "1 more picture not shown here." in found.texts["facts"]


def test_more_than_fit_on_a_page(qwen_stage, jobs, monkeypatch):
    monkeypatch.setattr(outbox, "MOST_PICTURES", 4)
    for number in (1, 2, 3):
        end(jobs, job(number, f"run{number}"), pictures=3)
        paint(jobs.run(job(number, f"run{number}")), [f"{number}.{place}" for place in range(3)])
    qwen_stage("gallery", "outbox/run1")
    found = written(jobs)
    assert found.texts["prompt"] == ["3.2", "3.1", "3.0", "2.2"]
    assert "The newest 4 pictures are shown." in found.texts["p"]
    assert [text for text in found.texts["facts"] if "more" in text] == [
        "2 more pictures not shown here.",
        "3 more pictures not shown here. ",
    ]
    assert [source for source in found.sources if source.endswith("index.html")] == ["run1/images/index.html"]


def test_an_outbox_of_nothing(qwen_stage, jobs):
    assert "No jobs yet." in written(jobs).texts["p"]
    result = qwen_stage("gallery", "outbox", "--sheet=all.png")
    assert (result.code, "holds no images" in result.err) == (2, True)


def test_the_pictures_of_a_real_run(qwen_stage, jobs, small_model, tmp_path):
    end(jobs, job(1, "a run"), pictures=2)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text, "seed": 1}) + "\n" for text in TEXTS[:2]))
    qwen_stage("encode", "p.jsonl", "--out=outbox/a run", f"--model={small_model}")
    qwen_stage("denoise", "--embeddings=outbox/a run", "--size=32x32", "--steps=1")
    assert qwen_stage("decode", "outbox/a run").code == 0
    found = written(jobs)
    assert found.texts["prompt"] == TEXTS[1::-1]
    assert all((jobs.outbox / unquote(source)).is_file() for source in found.sources)
    shutil.rmtree(jobs.outbox / "a run/latents")
    assert "--like 'a run/images/0002" in written(jobs).texts["code"][0]


@pytest.fixture
def busy(jobs) -> Jobs:
    """An outbox with jobs in every state, and texts that would like to do something."""
    for number in range(1, 4):
        done = job(number, f"landscapes {number}", *map(Prompt, TEXTS * 3))
        paint(jobs.run(done), TEXTS * 3, first=number * 20)
        end(jobs, done, pictures=9)
    reason = f"decode: {HOSTILE} was killed three times (out of memory?)"
    end(jobs, job(4, "شكل <i>&"), "failed", reason=reason, log=(HOSTILE, "Traceback", "MemoryError " * 30))
    going = job(5, "shapes", *(Prompt(text, settings=Settings(seeds=tuple(range(6)))) for text in TEXTS))
    paint(jobs.run(going), TEXTS, first=70)
    jobs.add(going)
    jobs.add(job(6, "later", *map(Prompt, TEXTS)))
    disk.make_directory(jobs.preview(going.id).parent)
    outbox.write(jobs.outbox, lambda *_: None)
    return jobs


def show_preview(jobs: Jobs) -> Path:
    path = jobs.preview(job(5, "shapes").id)
    Image.linear_gradient("L").resize((384, 256)).save(path, format="WEBP")
    return path


@pytest.mark.skipif(not INSTALLED, reason="needs Debian's chromium and chromium-driver")
def test_in_a_browser(busy, tmp_path):
    screenshots = Path(os.environ.get("QWEN_STAGE_SCREENSHOTS", tmp_path))
    screenshots.mkdir(parents=True, exist_ok=True)
    with Browser() as browser:
        browser.open(busy.outbox / "index.html")
        assert browser.run("return document.title") == "outbox: 30 pictures in 6 jobs"
        shown = browser.run("return [...document.querySelectorAll('article a ~ .prompt')].map(p => p.textContent)")
        assert shown == TEXTS[::-1] * 10
        focused = "links.indexOf(document.activeElement)"

        browser.press("ArrowLeft")  # from nowhere
        places = []
        for _ in range(31):
            browser.press("ArrowRight")
            places.append(browser.run(f"return {focused}"))
        assert sorted(set(places)) == list(range(30))
        browser.run("links[29].focus()")
        browser.press("Enter")
        assert browser.run("return large.open")
        browser.press("ArrowRight")  # past the last comes the first
        browser.press("ArrowRight")
        browser.until("large.querySelector('img').naturalWidth === 48")
        assert browser.run("return large.querySelector('p').textContent") == TEXTS[1]
        browser.press("Escape")
        browser.until(f"!large.open && {focused} === 1")

        # the preview comes and goes by itself
        assert browser.run("return document.querySelector('.live').hidden")
        preview = show_preview(busy)
        browser.until("!document.querySelector('.live').hidden")
        browser.screenshot(screenshots / "outbox-desktop.png")
        preview.unlink()
        browser.until("document.querySelector('.live').hidden")

        # while somebody looks at a picture the page stays; else it comes anew, and what was looked at keeps its place
        paint(busy.outbox / "shapes", [*TEXTS] * 6, first=70)
        outbox.write(busy.outbox, lambda *_: None)
        browser.run("window.old = true; large.showModal(); again()")
        time.sleep(0.5)
        assert browser.run("return window.old")
        browser.run("large.close()")
        browser.until(f"!large.open && {focused} === 1")
        place = "links.at(-10).getBoundingClientRect().top"
        browser.run(f"links.at(-10).focus({{preventScroll: true}}); scrollTo(0, scrollY + {place} - 100)")
        browser.until(f"Math.abs({place} - 100) < 3")
        browser.run("again()")
        browser.until("!window.old && document.readyState === 'complete' && links.length === 45")
        browser.until(f"Math.abs({place} - 100) < 3")
        assert browser.run(f"return {focused}") == 35

        assert browser.errors() == []
        asked_for = browser.requests()
        assert len(asked_for) > 30
        assert [url for url in asked_for if not url.startswith("file:///")] == []
    show_preview(busy)
    for name, options in (("phone", dict(width=390, height=844)), ("dark", dict(dark=True))):
        with Browser(**options) as browser:
            browser.open(busy.outbox / "index.html")
            browser.until("!document.querySelector('.live').hidden")
            assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
            assert browser.run("return matchMedia('(prefers-color-scheme: dark)').matches") == (name == "dark")
            browser.screenshot(screenshots / f"outbox-{name}.png")


@pytest.mark.skipif(not INSTALLED, reason="needs Debian's chromium and chromium-driver")
def test_a_page_of_2000_pictures(jobs):
    for number in range(200):
        paint(jobs.run(job(number, f"run{number}")), TEXTS * 3 + ["a red circle"])
        end(jobs, job(number, f"run{number}"), pictures=10)
    outbox.write(jobs.outbox, lambda *_: None)
    paint(jobs.outbox / "run7", TEXTS * 3 + ["a green circle"])
    script = (
        "import sys, time; from pathlib import Path; from orchestrator import outbox; start = time.time();"
        "outbox.write(Path(sys.argv[1]), lambda *_: None); print(time.time() - start);"
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    command = [sys.executable, "-P", "-c", script, str(jobs.outbox)]
    seconds, kilobytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    print(f"\nwritten again in {float(seconds):.2f} s, peak {int(kilobytes) / 1024:.0f} MiB")
    print(f"{(jobs.outbox / 'index.html').stat().st_size / 1e6:.1f} MB")
    with Browser() as browser:
        browser.open(jobs.outbox / "index.html")
        assert browser.run("return links.length") == 2000
        times = (
            "const [page, paint] = ['navigation', 'paint'].map(kind => performance.getEntriesByType(kind)[0]);"
            "return [page.domContentLoadedEventEnd, paint?.startTime]"
        )
        print("DOMContentLoaded, first paint (ms):", browser.run(times))
        assert browser.run("return [...document.images].filter(image => image.naturalWidth).length") < 200  # lazy

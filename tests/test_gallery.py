"""The page of a run: whatever a prompt holds is shown as it was written, and never does anything."""

import json
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from artifacts_schema import store
from artifacts_schema.manifests import ImagesManifest

HOSTILE = (
    """<img src=x onerror="document.title='hacked'"> & </article><script>document.title='hacked'</script> `$(x)` 'y'"""
)
PROMPTS = [HOSTILE, "دائرة حمراء 😀", "--seed"]


@pytest.fixture
def run(qwen_stage, tmp_path, small_model) -> Path:
    entries = [{"prompt": prompt, "negative_prompt": f"</style>{prompt}", "seed": 3} for prompt in PROMPTS]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    qwen_stage("encode", "p.jsonl", "--out=run", f"--model={small_model}")
    qwen_stage("denoise", "--embeddings=run", "--size=48x32", "--steps=1")
    assert qwen_stage("decode", "run").code == 0
    return tmp_path / "run"


class Page(HTMLParser):
    """What is on a page: how often each tag, the images' sources, and the texts by their element's class or tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        fields = dict(attrs)
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href") and value]
        assert not any(name.startswith("on") for name in fields)
        self.inside = fields.get("class") or tag
        self.texts.setdefault(self.inside, []).append("")

    def handle_data(self, data):
        if self.inside in self.texts:
            self.texts[self.inside][-1] += data

    def handle_endtag(self, tag):
        self.inside = ""


def page(run: Path) -> Page:
    return Page((run / "images/index.html").read_text(encoding="utf-8"))


def test_prompts_are_shown_as_they_were_written(qwen_stage, run):
    assert qwen_stage("gallery", "run").out == ["run/images/index.html"]
    found = page(run)
    assert found.texts["prompt"] == PROMPTS[::-1]  # the newest first
    assert found.tags.count("article") == 3
    assert found.tags.count("script") == found.tags.count("style") == 1
    assert all((run / "images" / unquote(source)).is_file() for source in found.sources)  # nothing from elsewhere


def test_its_commands_make_the_same_pictures(qwen_stage_process, run, fresh_cache, tmp_path):
    qwen_stage_process("gallery", "run")
    commands = page(run).texts["code"]
    for number, command in enumerate(reversed(commands), 1):
        program, *arguments = shlex.split(command)
        assert program == "qwen-stage"
        fresh_cache()
        made = qwen_stage_process(*arguments[:1], f"--out=again{number}", *arguments[1:])
        assert made.code == 0, made.err
        (before,) = (run / "images").glob(f"{number:04d}-*.png")
        assert (tmp_path / made.out[0]).read_bytes() == before.read_bytes()


@pytest.mark.parametrize("levels", ["--sigmas=1,0.7000000001,0.123456789", "--shift=2.3456789012"])
def test_its_commands_are_exact(qwen_stage, tmp_path, small_model, fresh_cache, levels):
    odd = [levels, "--cfg=2.3456789012", "--cache-steps=0.1234567891"]
    (before,) = qwen_stage("run", "a cat", *odd, "--size=32x32", f"--model={small_model}", "--out=odd").out
    qwen_stage("gallery", "odd")
    _, *arguments = shlex.split(page(tmp_path / "odd").texts["code"][0])
    fresh_cache()
    (again,) = qwen_stage(*arguments[:1], "--out=again", *arguments[1:]).out
    assert (tmp_path / again).read_bytes() == (tmp_path / before).read_bytes()


def test_only_what_is_missing_is_made_and_damage_is_left_out(qwen_stage, run):
    qwen_stage("gallery", "run")
    before = {path: path.stat().st_mtime_ns for path in (run / "images/thumbnails").glob("*.webp")}
    assert len(before) == 3
    first, second, _ = store.read_manifest(run / "images", ImagesManifest)[0].items
    (run / "images" / first.file.path).write_bytes(b"damaged")
    (run / "images/thumbnails" / f"{first.key}.webp").unlink()
    (run / "images/thumbnails" / f"{second.key}.webp").unlink()
    assert qwen_stage("gallery", "run").code == 0
    after = {path: path.stat().st_mtime_ns for path in (run / "images/thumbnails").glob("*.webp")}
    assert len(after) == 2
    assert sum(after[path] == before[path] for path in after) == 1
    assert page(run).texts["prompt"] == PROMPTS[:0:-1]


def test_a_run_of_which_only_pictures_are_left(qwen_stage, run):
    shutil.rmtree(run / "latents")
    assert qwen_stage("gallery", "run/images").code == 0
    assert page(run).texts["code"][-1].startswith("qwen-stage run --like 0001-")


def test_a_contact_sheet(qwen_stage, run, tmp_path):
    assert qwen_stage("gallery", "run", "--sheet=sheets/all.png").out == ["sheets/all.png"]
    with Image.open(tmp_path / "sheets/all.png") as sheet:
        assert len({sheet.getpixel((x, y)) for x in range(0, sheet.width, 9) for y in range(0, sheet.height, 9)}) > 50
    shutil.rmtree(run / "images")
    result = qwen_stage("gallery", "run")
    assert (result.code, "holds no images; make them with `qwen-stage decode`" in result.err) == (2, True)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_in_a_browser(qwen_stage, run):
    """Opened from the disk, after its scripts have run: a prompt has changed nothing."""
    qwen_stage("gallery", "run")
    url = (run / "images/index.html").as_uri()
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", url]
    dom = subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()
    found = Page(dom)
    assert found.texts["title"] == ["run: 3 pictures"]
    assert found.texts["prompt"] == PROMPTS[::-1]

"""The pages people look at: pictures with what made them, as a static HTML file and small thumbnails; here, a run's.

A page works from the disk alone, without a server, and loads nothing from elsewhere. Prompts are text of strangers: all
of it is escaped, and isolated from the page's own direction of writing.
"""

import io
import shlex
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from artifacts_schema import disk, store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import ImageItem, ImagesManifest, LatentsItem, LatentsManifest, exact

PAGE = "index.html"
THUMBNAILS = "thumbnails"
THUMBNAIL_PIXELS = 320  # the longer side: sharp in the page's columns on a dense screen
SHEET_COLUMN_PIXELS = 256
SHEET_CAPTION_PIXELS = 18
SHEET_GAP_PIXELS = 8
MOST_SHEET_PIXELS = 100_000_000
# nothing from elsewhere, ever; `file:` is what 'self' is not, for a page opened from the disk
POLICY = "default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

Report = Callable[[str, int, int], None]


class Shown(NamedTuple):
    """A picture, the latents it came from if they are still known, its thumbnail's name, and its model."""

    place: str  # of its directory, seen from the page: "", or "run/images/"
    image: ImageItem
    latents: LatentsItem | None
    thumbnail: str
    model: str


def write(run: Path, report: Report) -> Path:
    """Writes a run's page and the thumbnails that are missing; the newest picture comes first. Returns the page."""
    directory = store.find(run, ImagesManifest)
    with store.writing(directory):
        shown = list(_whole(directory, report))
        name, count = store.run_of(directory).resolve().name, counted(len(shown), "picture")
        disk.publish(directory, PAGE, page(name, count, cards(shown) or "<p>No pictures yet.</p>"))
    return directory / PAGE


def sheet(run: Path, path: Path, report: Report) -> None:
    """Writes all pictures of a run, in their order, as one PNG with their numbers and seeds."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    directory = store.find(run, ImagesManifest)
    with store.writing(directory):
        shown = list(_whole(directory, report))[::-1]
    if not shown:
        raise UserError(f"{directory} holds no pictures yet")
    columns = max(1, round(len(shown) ** 0.5))
    rows = -(-len(shown) // columns)
    width, height = (
        SHEET_COLUMN_PIXELS + SHEET_GAP_PIXELS,
        SHEET_COLUMN_PIXELS + SHEET_CAPTION_PIXELS + SHEET_GAP_PIXELS,
    )
    if columns * width * rows * height > MOST_SHEET_PIXELS:
        raise UserError(f"{len(shown)} pictures are too many for one sheet")
    canvas = Image.new("RGB", (columns * width + SHEET_GAP_PIXELS, rows * height + SHEET_GAP_PIXELS), "#ececf1")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(SHEET_CAPTION_PIXELS - 4)
    for place, each in enumerate(shown):
        left, top = place % columns * width + SHEET_GAP_PIXELS, place // columns * height + SHEET_GAP_PIXELS
        with Image.open(directory / THUMBNAILS / each.thumbnail) as thumbnail:
            picture = ImageOps.contain(thumbnail, (SHEET_COLUMN_PIXELS, SHEET_COLUMN_PIXELS))
        canvas.paste(picture, (left, top + SHEET_COLUMN_PIXELS - picture.height))
        seed = "" if each.image.seed is None else f"  seed {each.image.seed}"
        draw.text((left, top + SHEET_COLUMN_PIXELS), f"{each.image.file.path[:4]}{seed}", "black", font)
    file = io.BytesIO()
    canvas.save(file, format="PNG")
    disk.make_directory(path.parent)
    disk.publish(path.parent, path.name, file.getvalue())


def _whole(directory: Path, report: Report) -> Iterator[Shown]:
    images, _ = store.read_manifest(directory, ImagesManifest)
    return whole(directory, images, "", report)


def whole(directory: Path, images: ImagesManifest, place: str, report: Report) -> Iterator[Shown]:
    """The pictures of a run that are there and whole, newest first. Their thumbnails are there afterwards.

    A picture was whole when its thumbnail was made, and is not read again.
    """
    latents = store.read_manifest_if_any(store.run_of(directory) / LatentsManifest.kind, LatentsManifest)
    by_key = {item.key: item for item in latents.items} if latents else {}
    for number, image in enumerate(reversed(images.items), 1):
        thumbnail = f"{image.key}.webp"
        if not (directory / image.file.path).is_file():
            continue
        if not (directory / THUMBNAILS / thumbnail).is_file():
            if not store.is_whole(directory, (image.file,)):
                continue  # `inspect --verify` says so
            thumbnails = directory / THUMBNAILS
            disk.make_directory(thumbnails)
            with disk.lock(thumbnails, wait=True):
                disk.sweep(thumbnails)
                disk.publish(thumbnails, thumbnail, _thumbnail(store.read_file(directory, image.file)))
        report("gallery", number, len(images.items))
        yield Shown(place, image, by_key.get(image.latents_key), thumbnail, images.model.name)


def _thumbnail(png: bytes) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        picture.save(file, format="WEBP", quality=80)
    return file.getvalue()


def page(title: str, summary: str, main: str) -> bytes:
    """A whole page. `main` is HTML, the others text."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}: {escape(summary)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1 dir="auto">{escape(title)}</h1><p>{escape(summary)}</p></header>
<main>
{main}
</main>
<dialog id="large" aria-label="picture"><img alt=""><p dir="auto"></p></dialog>
<script>{SCRIPT}</script>
</body>
</html>
""".encode()


def cards(shown: list[Shown], before: str = "") -> str:
    """The pictures side by side, after other cards."""
    inside = "\n".join(filter(None, [before, *map(_card, shown)]))
    return inside and f'<div class="cards">\n{inside}\n</div>'


def counted(number: int, what: str) -> str:
    """ "1 picture", "2,000 pictures"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _card(each: Shown) -> str:
    image, latents, place = each.image, each.latents, quote(each.place)
    prompt = escape(image.prompt)
    facts = ["injected noise" if image.seed is None else f"seed {image.seed}"]
    if latents:
        guidance = "no guidance" if latents.negative_key is None else f"cfg {exact(latents.true_cfg_scale)}"
        facts += [f"{latents.width}×{latents.height}", f"{latents.num_inference_steps} steps", guidance]
        facts += [f"{name} {value}" for name, value in latents.unusual().items()]
        facts += [f"{latents.cost.seconds:.0f} s"] if latents.cost.seconds >= 1 else []
    if latents and latents.negative_key and latents.negative_prompt.strip():
        facts.append(f"not: <bdi>{escape(latents.negative_prompt)}</bdi>")
    return (
        f'<article><a href="{place}{quote(image.file.path)}">'
        f'<img src="{place}{THUMBNAILS}/{each.thumbnail}" alt="{prompt}" loading="lazy" decoding="async"></a>\n'
        f'<p class="prompt" dir="auto">{prompt}</p>\n'
        f'<p class="facts">{escape(image.file.path[:4])} · {" · ".join(facts)}</p>\n'
        f'<p class="again"><code>{escape(shlex.join(_command(each)))}</code>'
        f'<button type="button">copy</button></p></article>'
    )


def _command(each: Shown) -> list[str]:
    """What makes the picture again, from anywhere where its settings are known."""
    image, latents = each.image, each.latents
    if latents is None or image.seed is None or latents.image:  # what it began with is known beside it
        return ["qwen-stage", "run", "--like", each.place + image.file.path]
    size = f"--size={latents.width}x{latents.height}"
    options = [size, f"--steps={latents.num_inference_steps}", f"--cfg={exact(latents.true_cfg_scale)}"]
    if latents.negative_key and latents.negative_prompt.strip():
        options.append(f"--negative-prompt={latents.negative_prompt}")
    options += [f"--{name}={value}" for name, value in latents.unusual().items()]
    options.append(f"--model={each.model}")
    return ["qwen-stage", "run", *options, f"--seed={image.seed}", "--", image.prompt]


STYLE = """
:root { --ink: #1b1b1f; --dim: #666670; --paper: #fbfbfd; --card: #fff; --line: #e3e3ea;
  --good: #1c7c3c; --bad: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf1; --dim: #9a9aa6; --paper: #131316; --card: #1d1d22; --line: #2e2e36;
    --good: #6cc486; --bad: #ff8a80 }
}
* { box-sizing: border-box; margin: 0 }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); padding: 1.2rem }
header { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline; margin-bottom: 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem } h1, h2 { overflow-wrap: anywhere }
header p, .facts { color: var(--dim) }
.cards { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)) }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden;
  content-visibility: auto; contain-intrinsic-size: auto 24rem }
article a, .live div { display: block; aspect-ratio: 1; background: var(--line); outline-offset: -3px }
article img { display: block; width: 100%; height: 100%; object-fit: contain }
article p { padding: 0 .7rem; overflow-wrap: anywhere }
.prompt { margin-top: .6rem; display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical;
  overflow: hidden }
.facts { font-size: .85rem; margin: .3rem 0 }
.again { display: flex; gap: .5rem; margin-bottom: .6rem; align-items: center }
code { font-size: .75rem; color: var(--dim); white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
  flex: 1; user-select: all }
button { font: inherit; font-size: .8rem; color: inherit; background: none; border: 1px solid var(--line);
  border-radius: 6px; padding: .25rem .6rem; cursor: pointer; min-height: 2rem }
dialog { border: 0; outline: 0; padding: 0; margin: auto; background: none; color: #fff;
  max-width: 96vw; max-height: 96vh }
dialog img { display: block; margin: auto; max-width: 96vw; max-height: 84vh }
dialog p { padding: .6rem; text-align: center; max-height: 12vh; overflow: auto }
dialog::backdrop { background: rgb(0 0 0 / .88) }
section { border-top: 1px solid var(--line); padding: 1rem 0 1.4rem }
section header { margin-bottom: .5rem }
section .cards { margin-top: .8rem }
.state { font-weight: 600 } .failed .state { color: var(--bad) }
.live { border-style: dashed } .live .prompt { margin-bottom: .6rem; color: var(--dim) }
progress { width: min(24rem, 100%); height: .6rem; accent-color: var(--good) }
summary { cursor: pointer; min-height: 2rem; align-content: center; width: fit-content }
pre { font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20rem; overflow: auto;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .6rem }
"""

SCRIPT = """
const links = [...document.querySelectorAll('article a')];
const large = document.getElementById('large');
let current = 0;
function show(index) {
  if (!links.length) return;
  current = (index + links.length) % links.length;
  large.querySelector('img').src = links[current].href;
  large.querySelector('p').textContent = links[current].parentElement.querySelector('.prompt').textContent;
  if (!large.open) large.showModal();
}
links.forEach((link, index) => link.addEventListener('click', event => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  show(index);
}));
large.addEventListener('click', () => large.close());
large.addEventListener('close', () => links[current].focus());
document.addEventListener('keydown', event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step) return;
  event.preventDefault();
  if (large.open) return show(current + step);
  const index = (links.indexOf(document.activeElement) + step + links.length) % links.length;
  if (links.length) links[index].focus();
});
document.addEventListener('click', async event => {
  if (event.target.tagName !== 'BUTTON') return;
  const code = event.target.previousElementSibling;
  try { await navigator.clipboard.writeText(code.textContent); event.target.textContent = 'copied'; }
  catch { getSelection().selectAllChildren(code); }
});
// a picture that is being denoised: its preview comes, changes and goes
for (const live of document.querySelectorAll('.live img')) {
  const card = live.closest('article'), source = live.src;
  live.addEventListener('load', () => { card.hidden = false; });
  live.addEventListener('error', () => { card.hidden = true; });
  setInterval(() => { if (!document.hidden) live.src = `${source}?${Date.now()}`; }, 2000);
}
// jobs that go on: the page comes anew unless somebody is busy with it, and what was looked at stays in its place
const find = href => links.find(link => link.href === href);
const topOf = link => link.parentElement.getBoundingClientRect().top;
function again() {
  const busy = large.open || !getSelection().isCollapsed || document.querySelector('details[open]');
  if (document.hidden || busy) return;
  const seen = scrollY && links.find(link => topOf(link) > 0);
  history.scrollRestoration = 'manual';
  history.replaceState(
    {y: scrollY, seen: seen && seen.href, top: seen && topOf(seen), focused: document.activeElement.href}, '');
  location.reload();
}
if (history.state) {
  const {y, seen, top, focused} = history.state;
  const there = find(seen);
  const restore = () => scrollTo(0, there ? scrollY + topOf(there) - top : y);
  history.replaceState(null, '');
  restore();
  find(focused)?.focus({preventScroll: true});
  // and again when what is above has its real height; only then may the browser do it for itself again
  addEventListener('load', () => requestAnimationFrame(() => {
    restore();
    setTimeout(() => { history.scrollRestoration = 'auto'; }, 500);
  }));
}
if (document.querySelector('.open')) setInterval(again, 10000);
"""

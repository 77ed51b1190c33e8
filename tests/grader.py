"""Does a picture show what its caption says? Simple rules on pixels, for the demo's world of flat shapes.

A column of `Grade` is None where the scene says nothing about it. Only numpy is needed: a picture is an array
[H, W, 3] of uint8 or anything numpy can read as one (a Pillow image).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

import numpy as np

PALETTE = {
    "red": (220, 30, 35),
    "green": (30, 160, 60),
    "blue": (35, 75, 220),
    "yellow": (250, 215, 35),
    "orange": (245, 130, 25),
    "purple": (130, 45, 165),
    "cyan": (40, 200, 220),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# half the bounding box over the picture's shorter side; between the sizes that captions call small, (nothing), large
SMALL_BELOW = {1: 0.162, 2: 0.125}
LARGE_ABOVE = {1: 0.258, 2: 0.178}
OFF_CENTER = 0.075  # of the side: nearer than this to the middle is neither left nor right (above nor below)
COLOR_TOLERANCE = 55.0  # distance in RGB; the palette's nearest pair is 86 apart
VISIBLE = 40.0  # a pixel this far from the background belongs to something
SPECK = 0.0015  # of the picture: smaller components are dust ...
DUST = 0.01  # ... and more dust than this counts as something extra
LIKENESS = 0.85  # intersection over union with the ideal shape


@dataclass(frozen=True)
class Grade:
    background: bool
    count: bool  # as many objects as asked, and nothing else
    color: bool | None = None
    shape: bool | None = None
    size: bool | None = None
    position: bool | None = None
    relation: bool | None = None

    @property
    def right(self) -> bool:
        return all(value is not False for value in asdict(self).values())


@dataclass(frozen=True)
class Blob:
    color: str | None  # None: nothing in the palette is near
    shape: str | None
    x: float  # centre of the bounding box, 0..1
    y: float
    extent: float  # half the longer side of the bounding box over the picture's shorter side


def grade(image: Any, scene: dict[str, Any]) -> Grade:
    """Grade a picture against a scene (`background`, `objects`, `relation`, as in data/heldout.jsonl)."""
    background, blobs, dust = look(image)
    objects = scene["objects"]
    wanted = len(objects)
    grounds = background == scene["background"]
    count = len(blobs) == wanted and dust <= DUST
    if not objects:
        return Grade(grounds, count)

    def fits(value: str | None, asked: str | None) -> bool:
        return asked is None or value == asked

    # pair every object with the blob that suits it best; with too few blobs some objects get none
    slots: list[Blob | None] = [*blobs, *[None] * (wanted - len(blobs))]
    matches = max(
        permutations(slots, wanted),
        key=lambda found: sum(
            2 * fits(b.color, o["color"]) + fits(b.shape, o["shape"]) + b.extent
            for b, o in zip(found, objects, strict=True)
            if b is not None
        ),
    ) if len(slots) <= 6 else tuple(slots[:wanted])  # fmt: skip
    pairs = list(zip(matches, objects, strict=True))

    def column(name: str, test: Any) -> bool | None:
        asked = [(b, o) for b, o in pairs if o.get(name) is not None]
        return all(b is not None and test(b, o[name]) for b, o in asked) if asked else None

    color = column("color", lambda b, asked: b.color == asked)
    relation = None
    if scene.get("relation"):
        relation = color is not False and None not in matches and holds(matches[0], scene["relation"], matches[1])
    return Grade(
        grounds,
        count,
        color,
        column("shape", lambda b, asked: b.shape == asked),
        column("size", lambda b, asked: size_of(b, wanted) == asked),
        column("position", lambda b, asked: position_of(b) == asked),
        relation,
    )


def holds(a: Blob, relation: str, b: Blob) -> bool:
    dx, dy = RELATIONS[relation]
    along, across = ((a.x - b.x) * dx, abs(a.y - b.y)) if dx else ((a.y - b.y) * dy, abs(a.x - b.x))
    return along > across and along > 0.05


def size_of(blob: Blob, objects: int) -> str | None:
    key = min(objects, 2)
    return "small" if blob.extent < SMALL_BELOW[key] else "large" if blob.extent > LARGE_ABOVE[key] else None


def position_of(blob: Blob) -> str:
    def side(value: float, names: tuple[str, str]) -> str:
        return names[0] if value < 0.5 - OFF_CENTER else names[1] if value > 0.5 + OFF_CENTER else ""

    return f"{side(blob.y, ('top', 'bottom'))} {side(blob.x, ('left', 'right'))}".strip() or "center"


def look(image: Any) -> tuple[str | None, list[Blob], float]:
    """What is in the picture: the background's colour, the objects, the fraction of stray pixels."""
    pixels = np.asarray(image)[..., :3].astype(np.float64)
    height, width = pixels.shape[:2]
    rim = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
                          pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])  # fmt: skip
    ground = np.median(rim, axis=0)
    even = np.mean(np.linalg.norm(rim - ground, axis=1) < VISIBLE) > 0.9
    labels, number = components(np.linalg.norm(pixels - ground, axis=-1) > VISIBLE)
    areas = np.bincount(labels.ravel(), minlength=number + 1)[1:]
    large = [n for n in range(number) if areas[n] >= SPECK * height * width]
    dust = float(areas.sum() - sum(areas[n] for n in large)) / (height * width)
    blobs = [_blob(pixels, labels == n + 1, ground) for n in sorted(large, key=lambda n: -areas[n])]
    return nearest(ground) if even else None, blobs, dust


def nearest(color: np.ndarray) -> str | None:
    distances = {name: float(np.linalg.norm(color - np.array(value))) for name, value in PALETTE.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] < COLOR_TOLERANCE else None


def _blob(pixels: np.ndarray, mask: np.ndarray, ground: np.ndarray) -> Blob:
    core = mask.copy()  # without the rim, whose pixels blend into the background
    core[1:] &= mask[:-1]
    core[:-1] &= mask[1:]
    core[:, 1:] &= mask[:, :-1]
    core[:, :-1] &= mask[:, 1:]
    if not core.any():
        core = mask
    color = np.median(pixels[core], axis=0)
    # one flat colour? two shapes grown together, or a gradient, are no object of any colour
    flat = np.mean(np.linalg.norm(pixels[core] - color, axis=1) < VISIBLE) > 0.85
    # the outline runs where a pixel is half object, half background; neighbouring pixels may lie outside `mask`
    step = color - ground
    half = (pixels - ground) @ step >= 0.5 * (step @ step)
    wide = mask.copy()
    wide[1:] |= mask[:-1]
    wide[:-1] |= mask[1:]
    half &= wide
    if not half.any():
        half = mask
    rows, columns = np.flatnonzero(half.any(axis=1)), np.flatnonzero(half.any(axis=0))
    # plain numbers: comparisons of numpy's would give np.False_, which is not False
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    height, width = pixels.shape[:2]
    return Blob(
        nearest(color) if flat else None,
        shape_of(half[top:bottom, left:right]),
        (left + right) / 2 / width,
        (top + bottom) / 2 / height,
        max(right - left, bottom - top) / 2 / min(height, width),
    )


def shape_of(mask: np.ndarray) -> str | None:
    """The shape whose ideal, drawn into the same bounding box, the mask resembles most."""
    height, width = mask.shape
    if not 0.78 < width / height < 1.28:
        return None
    v, u = np.meshgrid(
        (np.arange(height) + 0.5) / height * 2 - 1, (np.arange(width) + 0.5) / width * 2 - 1, indexing="ij"
    )
    ideals = {
        "circle": u * u + v * v <= 1,
        "square": np.ones_like(mask),
        "triangle": 2 * abs(u) - v <= 1,
    }
    likeness = {name: (mask & ideal).sum() / (mask | ideal).sum() for name, ideal in ideals.items()}
    name = max(likeness, key=likeness.__getitem__)
    return name if likeness[name] >= LIKENESS else None


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Label the 8-connected components of a mask 1..n (0: outside), by joining the runs of neighbouring rows."""
    height = len(mask)
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    parent: list[int] = []

    def root(n: int) -> int:
        while parent[n] != n:
            parent[n] = n = parent[parent[n]]
        return n

    runs: list[tuple[int, int, int]] = []  # row, first column, one past the last
    above: list[int] = []
    for y in range(height):
        row: list[int] = []
        for start, stop in zip(np.flatnonzero(edges[y] == 1), np.flatnonzero(edges[y] == -1), strict=True):
            n = len(runs)
            runs.append((y, int(start), int(stop)))
            parent.append(n)
            row.append(n)
            for other in above:
                if runs[other][1] <= stop and start <= runs[other][2]:
                    parent[root(other)] = root(n)
        above = row
    names: dict[int, int] = {}
    labels = np.zeros(mask.shape, np.int32)
    for n, (y, start, stop) in enumerate(runs):
        labels[y, start:stop] = names.setdefault(root(n), len(names) + 1)
    return labels, len(names)

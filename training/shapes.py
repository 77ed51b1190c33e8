"""The demo model's world: scenes of flat-coloured shapes, the captions that describe them, and a renderer.

A scene is a plain dict, as in `tests/data/heldout.jsonl`:
`{"background": colour, "objects": [{"color", "shape", "size", "position"}, …], "relation": None | "left of" | …}`,
where `None` means that the caption says nothing; with two objects, objects[0] RELATION objects[1].
"""

import hashlib
import json
from random import Random

import numpy as np

COLORS = {
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
SHAPES = ("circle", "square", "triangle")
SIZES = (None, "small", "large")
POSITIONS = (
    None,
    "center",
    "top left",
    "top right",
    "bottom left",
    "bottom right",
    "top",
    "bottom",
    "left",
    "right",
)
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"right of": "left of", "below": "above"}

# Half the extent of an object as a share of the picture's shorter side; two objects must fit beside each other.
RADII_ONE = {"small": 0.12, None: 0.20, "large": 0.30}
RADII_TWO = {"small": 0.098, None: 0.148, "large": 0.206}
# (half width, half height) over the radius: squares look bigger than circles, so they get a little less
EXTENTS = {"circle": (1.0, 1.0), "square": (0.92, 0.92), "triangle": (1.0, 0.88)}
MARGIN = 0.05  # between an object and the picture's edge, as a share of the shorter side
SIDE = 0.24  # where a "left" object's centre lies, as a share of the width, if it fits
HELD_OUT_SHARE = 0.1

ON_BACKGROUND = ("on {bg}", "against {bg}", "over {bg}")
OPENERS = ("{}", "{}", "{}", "{}", "an image of {}", "a picture of {}", "a drawing of {}", "there is {}")
POSITION_WORDS = {
    "center": ("in the center", "in the middle", "at the center"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
}
for _corner in ("top left", "top right", "bottom left", "bottom right"):
    POSITION_WORDS[_corner] = (f"in the {_corner}", f"in the {_corner} corner", f"at the {_corner}")
RELATION_WORDS = {
    "left of": ("{} to the left of {}", "{} to the left of {}", "{} left of {}", "{} on the left and {} on the right"),
    "right of": (
        "{} to the right of {}",
        "{} to the right of {}",
        "{} right of {}",
        "{} on the right and {} on the left",
    ),
    "above": ("{} above {}", "{} above {}", "{} on top and {} at the bottom"),
    "below": ("{} below {}", "{} below {}", "{} under {}"),
}


def held_out(scene: dict) -> bool:
    """Whether a scene is kept from training, in any wording: decided by its attributes alone."""
    objects = [[item[key] for key in ("color", "shape", "size", "position")] for item in scene["objects"]]
    relation = scene["relation"]
    if relation in OPPOSITE:  # "a right of b" is the same scene as "b left of a"
        objects, relation = objects[::-1], OPPOSITE[relation]
    text = json.dumps([scene["background"], objects, relation])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") < HELD_OUT_SHARE * 2**32


def sample_scene(random: Random, two: bool | None = None) -> dict:
    """A random scene; `two` fixes whether it has two objects. Held-out scenes are not excluded here."""
    if two is None:
        two = random.random() < 0.6
    background = random.choice(list(COLORS))
    colors = [color for color in COLORS if color != background]
    if not two:
        item = {
            "color": random.choice(colors),
            "shape": random.choice(SHAPES),
            "size": random.choice(SIZES),
            "position": random.choice(POSITIONS) if random.random() < 0.8 else None,
        }
        return {"background": background, "objects": [item], "relation": None}
    sized = random.random() < 0.4
    while True:
        items = [
            {
                "color": random.choice(colors),
                "shape": random.choice(SHAPES),
                "size": random.choice(SIZES) if sized else None,
                "position": None,
            }
            for _ in range(2)
        ]
        if (items[0]["color"], items[0]["shape"]) != (items[1]["color"], items[1]["shape"]):
            return {"background": background, "objects": items, "relation": random.choice(RELATIONS)}


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def color_word(color: str, random: Random) -> str:
    return "grey" if color == "gray" and random.random() < 0.15 else color


def object_words(item: dict, random: Random) -> str:
    words = [color_word(item["color"], random), item["shape"]]
    if item["size"]:
        words.insert(0, "big" if item["size"] == "large" and random.random() < 0.2 else item["size"])
    return with_article(" ".join(words))


def caption(scene: dict, random: Random) -> str:
    """One of the many ways to say a scene."""
    background = color_word(scene["background"], random) + " background"
    words = [object_words(item, random) for item in scene["objects"]]
    if scene["relation"]:
        subject = random.choice(RELATION_WORDS[scene["relation"]]).format(*words)
    else:
        subject = words[0]
        if position := scene["objects"][0]["position"]:
            subject += " " + random.choice(POSITION_WORDS[position])
    draw = random.random()
    if draw < 0.65:
        on = "on {bg}" if random.random() < 0.7 else random.choice(ON_BACKGROUND)
        text = random.choice(OPENERS).format(subject) + " " + on.format(bg=with_article(background))
    elif draw < 0.8:
        text = f"on {with_article(background)}, {'there is ' if random.random() < 0.3 else ''}{subject}"
    elif draw < 0.95:
        text = f"{background if random.random() < 0.6 else with_article(background)} with {subject}"
    else:
        text = f"{subject}, {background}"
    draw = random.random()
    if draw < 0.3:
        text = text[0].upper() + text[1:]
    elif draw < 0.33:
        text = text.upper()
    return text + "." if random.random() < 0.35 else text


def place(scene: dict, height: int, width: int, random: Random) -> list[tuple[float, float, float, str, str]]:
    """The objects of a scene in pixels, with a little chance: centre x, centre y, radius, shape, colour."""
    unit = min(height, width)
    jitter = unit * 0.018
    placed = []
    for index, item in enumerate(scene["objects"]):
        radii = RADII_TWO if scene["relation"] else RADII_ONE
        radius = unit * radii[item["size"]] * random.uniform(0.965, 1.035)
        x, y = width / 2, height / 2
        if scene["relation"]:
            first = scene["relation"] in ("left of", "above")
            share = 0.25 if (index == 0) == first else 0.75
            if scene["relation"] in ("left of", "right of"):
                x = width * share
            else:
                y = height * share
        elif position := item["position"]:
            across, down = (max(SIDE * side, radius + MARGIN * unit) for side in (width, height))
            x = across if "left" in position else width - across if "right" in position else x
            y = down if "top" in position else height - down if "bottom" in position else y
        wobble = jitter if scene["relation"] or item["position"] else 2 * jitter
        x, y = x + random.uniform(-wobble, wobble), y + random.uniform(-wobble, wobble)
        placed.append((x, y, radius, item["shape"], item["color"]))
    return placed


def coverage(x, y, half_width, half_height, shape: str):
    """How much of each pixel a shape covers, 0 to 1: a one-pixel ramp over the distance to its edge.

    x and y are pixel centres relative to the shape's centre; works for numpy arrays and torch tensors alike.
    """
    if shape == "circle":
        distance = (x**2 + y**2) ** 0.5 - half_width
    elif shape == "square":
        distance = _max(abs(x) - half_width, abs(y) - half_height)
    else:  # a triangle that points up
        length = (half_width**2 + 4 * half_height**2) ** 0.5
        slope = (2 * half_height * abs(x) - half_width * (y + half_height)) / length
        distance = _max(slope, y - half_height)
    return (0.5 - distance).clip(0, 1)


def _max(a, b):
    return (a + b + abs(a - b)) / 2


def paint(background: str, placed: list[tuple[float, float, float, str, str]], height: int, width: int) -> np.ndarray:
    """The picture, uint8 [height, width, 3]."""
    x, y = np.arange(width) + 0.5, (np.arange(height) + 0.5)[:, None]
    picture = np.empty((height, width, 3), np.float64)
    picture[:] = COLORS[background]
    for center_x, center_y, radius, shape, color in placed:
        half_width, half_height = (radius * share for share in EXTENTS[shape])
        alpha = coverage(x - center_x, y - center_y, half_width, half_height, shape)[..., None]
        picture += alpha * (np.array(COLORS[color]) - picture)
    return picture.round().astype(np.uint8)


def render(scene: dict, height: int, width: int, random: Random) -> np.ndarray:
    return paint(scene["background"], place(scene, height, width, random), height, width)

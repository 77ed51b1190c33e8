"""The grader is right about rendered scenes, and about pictures made wrong on purpose."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from random import Random

import numpy as np
import pytest
from grader import PALETTE, grade

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from shapes import COLORS, SHAPES, held_out, paint, place, render, sample_scene

SIZES = [(128, 128), (96, 96), (192, 192), (96, 160), (160, 96), (192, 128)]  # height x width
COLUMNS = ("background", "count", "color", "shape", "size", "position", "relation")
HELD_OUT = Path(__file__).parent / "data" / "heldout.jsonl"


def red_circle(**changes) -> dict:
    item = {"color": "red", "shape": "circle", "size": None, "position": None, **changes}
    return {"background": "white", "objects": [item], "relation": None}


def pair(relation: str = "left of") -> dict:
    first = {"color": "blue", "shape": "square", "size": None, "position": None}
    second = {"color": "green", "shape": "circle", "size": None, "position": None}
    return {"background": "gray", "objects": [first, second], "relation": relation}


def draw(scene: dict, seed: int = 0) -> np.ndarray:
    return render(scene, 128, 128, Random(seed))


def wrong(picture: np.ndarray, scene: dict) -> set[str]:
    return {column for column, value in asdict(grade(picture, scene)).items() if value is False}


def test_grader_and_renderer_know_the_same_colors():
    assert PALETTE == COLORS


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[1]}x{size[0]}")
def test_right_pictures_pass(size):
    random = Random(f"{size}")
    scenes = [sample_scene(random) for _ in range(300)]
    grades = [grade(render(scene, *size, random), scene) for scene in scenes]
    for column in COLUMNS:
        values = [getattr(result, column) for result in grades]
        asked = [value for value in values if value is not None]
        assert len(asked) > 30
        assert np.mean(asked) >= 0.995, column


def test_right_pictures_pass_with_a_little_noise():
    random, noise = Random(1), np.random.default_rng(1)
    for _ in range(60):
        scene = sample_scene(random)
        noisy = render(scene, 128, 128, random) + noise.normal(0, 4, (128, 128, 3))
        assert wrong(noisy.clip(0, 255).astype(np.uint8), scene) == set()


@pytest.mark.parametrize("color", [color for color in COLORS if color not in ("red", "white")])
def test_wrong_color(color):
    assert wrong(draw(red_circle(color=color)), red_circle()) == {"color"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wanted", SHAPES)
def test_wrong_shape(shape, wanted):
    assert wrong(draw(red_circle(shape=shape)), red_circle(shape=wanted)) == ({"shape"} - {shape == wanted and "shape"})


@pytest.mark.parametrize("background", [color for color in COLORS if color not in ("red", "white")])
def test_wrong_background(background):
    assert wrong(draw({**red_circle(), "background": background}), red_circle()) == {"background"}


@pytest.mark.parametrize(
    ("shown", "wanted"), [("small", "large"), ("large", "small"), (None, "small"), (None, "large")]
)
def test_wrong_size(shown, wanted):
    assert wrong(draw(red_circle(size=shown)), red_circle(size=wanted)) == {"size"}


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [("left", "right"), ("top left", "top"), ("top", "center"), ("bottom right", "top right"), ("center", "bottom")],
)
def test_wrong_position(shown, wanted):
    assert wrong(draw(red_circle(position=shown)), red_circle(position=wanted)) == {"position"}


@pytest.mark.parametrize("relation", ["right of", "above", "below"])
def test_wrong_relation(relation):
    assert wrong(draw(pair(relation)), pair()) == {"relation"}


def test_colors_on_each_others_shapes():
    swapped = pair()
    for item, color in zip(swapped["objects"], ("green", "blue"), strict=True):
        item["color"] = color
    assert "shape" in wrong(draw(swapped), pair())


def test_missing_object():
    one = paint("gray", place(pair(), 128, 128, Random(0))[:1], 128, 128)
    assert wrong(one, pair()) >= {"count", "color", "shape", "relation"}


def test_extra_object():
    extra = paint("white", [(40, 64, 25, "circle", "red"), (100, 100, 12, "circle", "blue")], 128, 128)
    assert wrong(extra, red_circle()) == {"count"}


def test_touching_objects_are_not_two():
    touching = paint("gray", [(50, 64, 20, "square", "blue"), (80, 64, 20, "circle", "green")], 128, 128)
    assert wrong(touching, pair()) >= {"count", "color", "relation"}


def test_blank():
    assert wrong(paint("white", [], 128, 128), red_circle()) == {"count", "color", "shape"}


def test_noise():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    assert wrong(noise, red_circle()) >= {"background", "color", "shape"}


def test_held_out_prompts_are_held_out():
    lines = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 200
    assert sum(line["scene"]["relation"] is not None for line in lines) == 100
    assert all(held_out(line["scene"]) for line in lines)


def test_a_relation_read_backwards_is_the_same_scene():
    random = Random(3)
    back = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for _ in range(200):
        scene = sample_scene(random, two=True)
        mirrored = {**scene, "objects": scene["objects"][::-1], "relation": back[scene["relation"]]}
        assert held_out(scene) == held_out(mirrored)

"""The demo model draws what it is told. The whole table: `python tests/grade_demo.py`."""

from pathlib import Path

import numpy as np
from grade_demo import TARGETS, draw, held_out
from grader import grade
from PIL import Image


def test_the_quickstart_draws_a_red_circle_on_white(qwen_stage_process, tmp_path):
    result = qwen_stage_process("run", "a red circle on a white background")
    assert result.code == 0, result.err
    picture = Image.open(tmp_path / result.out[-1])
    assert picture.size == (128, 128)
    circle = {"color": "red", "shape": "circle", "size": None, "position": None}
    assert grade(np.array(picture), {"background": "white", "objects": [circle], "relation": None}).right


def test_held_out_prompts(tmp_path):
    """Prompts that training never saw, at the model's own settings; a sample, as it takes two seconds each."""
    cases = held_out(limit=20)
    paths = draw((case["prompt"] for case in cases), tmp_path / "run", [])
    grades = [grade(np.array(Image.open(path)), case["scene"]) for path, case in zip(paths, cases, strict=True)]
    for column, target in TARGETS.items():
        asked = [getattr(g, column) for g in grades if getattr(g, column) is not None]
        assert len(asked) >= 5
        assert np.mean(asked) >= target, column


def test_sizes_and_a_negative_prompt(qwen_stage, tmp_path):
    """Another aspect ratio still fits the prompt, and what the negative prompt names is pushed away."""
    (tmp_path / "p.txt").write_text("a blue square on a yellow background")
    square = {"color": "blue", "shape": "square", "size": None, "position": None}
    scene = {"background": "yellow", "objects": [square], "relation": None}
    pictures = []
    for run, negative in (("plain", " "), ("pushed", "a yellow square on a blue background")):
        assert qwen_stage("encode", "p.txt", f"--out={run}", f"--negative-prompt={negative}").code == 0
        assert qwen_stage("denoise", f"--embeddings={run}", "--size=160x96").code == 0
        (path,) = qwen_stage("decode", run).out
        pictures.append(np.array(Image.open(Path(path))))
    assert pictures[0].shape == (96, 160, 3)
    assert grade(pictures[0], scene).right
    assert np.abs(pictures[0].astype(int) - pictures[1]).mean() > 0.5

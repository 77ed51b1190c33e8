"""How well the demo model draws what it is told: held-out prompts through the real stages, judged on pixels.

usage: python tests/grade_demo.py [--limit N] [--out DIR] [qwen-stage denoise options, e.g. --size 160x96 --cfg 3]
Prints a table of what is right; the pictures stay in DIR (default: a new folder under the system's temporary one).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from grader import Grade, grade
from PIL import Image

HELD_OUT = Path(__file__).parent / "data" / "heldout.jsonl"
TARGETS = {"background": 0.97, "color": 0.95, "shape": 0.90, "relation": 0.80}


def held_out(limit: int | None = None) -> list[dict[str, Any]]:
    """The held-out prompts and what they describe; `limit` takes evenly spaced ones."""
    cases = [json.loads(line) for line in HELD_OUT.read_text().splitlines()]
    return cases if limit is None else cases[:: max(1, len(cases) // limit)][:limit]


def draw(prompts: Iterable[str], out: Path, options: list[str]) -> list[Path]:
    """Makes the pictures with the three commands, as a user would."""

    def qwen_stage(*arguments: str, input: str = "") -> list[str]:
        command = [sys.executable, "-P", "-m", "orchestrator.cli", *arguments]
        return subprocess.run(command, input=input, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()

    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    qwen_stage("encode", "-", "--format=jsonl", f"--out={out}", "--model=demo", input=lines)
    qwen_stage("denoise", f"--embeddings={out}", "--batch=8", *options)
    return [Path(line) for line in qwen_stage("decode", str(out))]


def table(grades: list[Grade]) -> str:
    lines = [f"{'':12} {'right':>5} {'of':>4} {'':>7}"]
    for column in [*asdict(grades[0]), "all of it"]:
        values = [g.right if column == "all of it" else getattr(g, column) for g in grades]
        asked = [value for value in values if value is not None]
        if asked:
            target = f"(target {TARGETS[column]:.0%})" if column in TARGETS else ""
            share = sum(asked) / len(asked)
            lines.append(f"{column:12} {sum(asked):5} {len(asked):4} {share:7.1%} {target}".rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path)
    args, options = parser.parse_known_args()
    cases = held_out(args.limit)
    out = args.out or Path(tempfile.mkdtemp(prefix="qwen-stage-grade-"))
    started = time.perf_counter()
    paths = draw((case["prompt"] for case in cases), out, options)
    grades = [grade(np.array(Image.open(path)), case["scene"]) for path, case in zip(paths, cases, strict=True)]
    for path, case, result in zip(paths, cases, grades, strict=True):
        if not result.right:
            wrong = ", ".join(column for column, value in asdict(result).items() if value is False)
            print(f"wrong {wrong}: {case['prompt']!r}  {path}")
    print(f"\n{table(grades)}\n\n{len(cases)} pictures in {time.perf_counter() - started:.0f} s: {out}")


if __name__ == "__main__":
    main()

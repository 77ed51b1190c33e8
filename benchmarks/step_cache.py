"""What caching steps gains, and what it costs in quality: `python benchmarks/step_cache.py [--pictures N]`

The demo model draws held-out prompts, at each number of steps exactly and then with each threshold: the time of all
pictures, how far they are from the exact ones, and how many of them show what their prompt says.
"""

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from grade_demo import draw, held_out
from grader import grade

from artifacts_schema import store
from artifacts_schema.manifests import LatentsManifest

STEPS = (20, 50)
THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)  # the first is exact


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.square(one.astype(float) - other).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=60)
    args = parser.parse_args()
    cases = held_out(args.pictures)
    print("| steps | threshold | time | mean difference of 255 | PSNR, median and least | right |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as work:
        os.environ["QWEN_STAGE_CACHE"] = f"{work}/cache"
        for steps in STEPS:
            exact: list[np.ndarray] = []
            exact_seconds = 0.0
            for threshold in THRESHOLDS:
                run = Path(work) / f"{steps}-{threshold}"
                options = ["--batch=1", f"--steps={steps}", f"--cache-steps={threshold}"]
                pictures = [
                    np.array(Image.open(path)) for path in draw((case["prompt"] for case in cases), run, options)
                ]
                manifest, _ = store.read_manifest(run / "latents", LatentsManifest)
                seconds = sum(item.cost.seconds for item in manifest.items)
                exact, exact_seconds = exact or pictures, exact_seconds or seconds
                right = sum(grade(picture, case["scene"]).right for picture, case in zip(pictures, cases, strict=True))
                line = f"| {steps} | {threshold or 'exact'} | {seconds / exact_seconds:.0%} | "
                if threshold:
                    away = np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(pictures, exact, strict=True)])
                    alike = [psnr(a, b) for a, b in zip(pictures, exact, strict=True)]
                    line += f"{away:.2f} | {median(alike):.1f}, {min(alike):.1f} dB | "
                else:
                    line += "– | – | "
                print(line + f"{right} of {len(cases)} |", flush=True)


if __name__ == "__main__":
    main()

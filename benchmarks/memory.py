"""What each stage takes of memory and time, at the shapes of Qwen-Image 2512: `python benchmarks/memory.py`

Random weights are written to disk first (57 GB with all layers; `full_size.py`). Every line is a process of its own,
and its figures are those of its manifest. With fewer layers than the model has, what is held in memory is extrapolated
by the missing layers' weights, which are all of one size; nothing else is.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import full_size
import numpy as np
from PIL import Image

from artifacts_schema import arrays, keys, store
from artifacts_schema.manifests import (
    Cost,
    EmbeddingsManifest,
    LatentsItem,
    LatentsManifest,
    PromptItem,
    Settings,
    SourceImage,
)
from artifacts_schema.prompts import Wanted, to_jsonl
from stages.checkpoint import open_checkpoint, weight_files
from stages.models.transformer import QwenImageTransformer2DModel
from stages.weights import mlx_dtype, weights_of

GIB = 1 << 30
WORDS = ["a", "small", "red", "circle", "above", "a", "large", "blue", "square", "on", "a", "white", "background"]
COLUMNS = ("stage", "target GiB, in bfloat16", "MLX peak GiB", "process peak GiB", "seconds", "remarks")


class Row(NamedTuple):
    stage: str
    target: str
    mlx_peak: float  # bytes
    process_peak: float
    seconds: str
    remarks: str = ""

    def line(self) -> str:
        peaks = (f"{peak / GIB:.2f}" if peak else "" for peak in (self.mlx_peak, self.process_peak))
        return f"| {' | '.join([self.stage, self.target, *peaks, self.seconds, self.remarks])} |"


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.scratch = Path(tempfile.mkdtemp(dir=args.directory))
        started = time.monotonic()
        self.model = full_size.write(args.directory / "model", args.blocks, args.text_layers)
        print(f"wrote the checkpoint in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    def stage(self, *arguments: object) -> float:
        """Runs `qwen-stage ARGUMENTS` with an empty cache. Returns its seconds from start to exit."""
        drop_page_cache()
        command = [sys.executable, "-P", "-m", "orchestrator.cli", *map(str, arguments)]
        with tempfile.TemporaryDirectory(dir=self.scratch) as cache:
            started = time.monotonic()
            environment = {**os.environ, "QWEN_STAGE_CACHE": cache}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[3:])} failed")
        return time.monotonic() - started

    def encode(self, prompts: int) -> Row:
        directory = self.model / "text_encoder"
        path = self.scratch / "prompts.txt"
        # the demo's tokenizer makes one token of each of these words; five end the template
        lines = (" ".join(WORDS[(i + n) % len(WORDS)] for n in range(self.args.tokens - 5)) for i in range(prompts))
        path.write_text("\n".join(lines))
        read = read_seconds(weight_files(directory))
        wall = self.stage("encode", path, f"--model={self.model}", f"--out={self.scratch / 'run'}", *self.dtype)
        manifest = json.loads((self.scratch / "run/embeddings/manifest.json").read_bytes())
        cost, tokens = manifest["cost"], {each["tokens"] for each in manifest["embeddings"]}
        table = 2 * full_size.TEXT_ENCODER["vocab_size"] * full_size.TEXT_ENCODER["hidden_size"]
        size = sum(file.stat().st_size for file in weight_files(directory))
        share = read * (size - table) / size  # the table of embeddings is not read
        remarks = (
            f"{prompts} prompts of {max(tokens)} tokens, {self.layers('text')}; reading alone takes {share:.1f} s: "
            f"{cost['seconds'] / share:.2f} times that"
        )
        return Row(f"encode, {self.args.dtype}", "1.1", cost["mlx_peak"], cost["process_peak"], f"{wall:.1f}", remarks)

    def denoise(self, name: str, target: str, *options: str, streamed: bool = False, bits: int | None = None) -> Row:
        out = self.scratch / f"run-{name.replace(chr(32), chr(45))}"
        steps = self.args.streamed_steps if streamed else self.args.steps
        items = self.scratch / "items.jsonl"
        items.write_bytes(to_jsonl([self.picture(steps)]))
        common = ["--embeddings", self.scratch / "run", "--items", items, f"--model={self.model}", "--out", out]
        first = self.stage("denoise", *common, *self.dtype, *options)
        manifest = json.loads((out / "latents/manifest.json").read_bytes())
        cost = manifest["items"][0]["cost"]
        mlx_peak, process_peak, note = cost["mlx_peak"], cost["process_peak"], ""
        missing = full_size.TRANSFORMER["num_layers"] - self.args.blocks
        if missing and not streamed:
            weights = weights_of(
                self.model / "transformer", QwenImageTransformer2DModel, mlx_dtype(self.args.dtype), bits
            )
            note = f"; +{missing * weights.layer / GIB:.1f} GiB extrapolated"
            mlx_peak, process_peak = (peak + missing * weights.layer for peak in (mlx_peak, process_peak))
        each = cost["seconds"] / steps
        remarks = f"{self.args.size}, {steps} steps, {self.layers('blocks')}{note}; {each:.2f} s a step"
        return Row(f"denoise, {self.args.dtype}, {name}", target, mlx_peak, process_peak, f"{first:.1f}", remarks)

    def picture(self, steps: int) -> Wanted:
        """Of the first prompt, without guidance."""
        embeddings, _ = store.read_manifest(self.scratch / "run/embeddings", EmbeddingsManifest)
        width, height = map(int, self.args.size.split("x"))
        return Wanted(
            prompt_key=embeddings.items[0].prompt_key,
            negative_key=None,
            seed=1,
            width=width,
            height=height,
            num_inference_steps=steps,
            true_cfg_scale=1.0,
        )

    def decode(self, size: int, *options: str) -> Row:
        run = self.scratch / f"run-{size}{''.join(options)}"
        make_latents(run / "latents", self.model, size)
        wall = self.stage("decode", run, f"--model={self.model}", *options)
        (item,) = json.loads((run / "images/manifest.json").read_bytes())["items"]
        cost = item["cost"]
        remarks = f"{item['dtype']}; {cost['seconds']:.2f} s of it the picture"
        return Row(f"decode, {size}²", "2", cost["mlx_peak"], cost["process_peak"], f"{wall:.1f}", remarks)

    def encode_image(self, size: int) -> Row:
        run = self.scratch / f"run-image-{size}"
        make_prompt_with_image(run / "embeddings", self.model, size)
        wall = self.stage("encode-image", run, f"--model={self.model}")
        (item,) = json.loads((run / "image_latents/manifest.json").read_bytes())["items"]
        cost = item["cost"]
        remarks = f"{item['dtype']}; {cost['seconds']:.2f} s of it the picture"
        return Row(f"encode-image, {size}²", "", cost["mlx_peak"], cost["process_peak"], f"{wall:.1f}", remarks)

    def convert(self) -> Row:
        drop_page_cache()
        target = self.scratch / "q4"
        code = (
            "import resource, sys; from orchestrator import cli; code = cli.main(sys.argv[1:]); import mlx.core as mx; "
            "print(mx.get_peak_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); sys.exit(code)"
        )
        arguments = ["models", "convert", str(self.model), str(target), "--quantize=4"]
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        wall = time.monotonic() - started
        mlx_peak, process_peak = map(int, done.stdout.splitlines()[-1].split())
        written = sum(path.stat().st_size for path in (target / "transformer").iterdir())
        shutil.rmtree(target)
        remarks = f"{self.layers('blocks')}, {written / 1e9:.1f} GB written"
        return Row("convert to 4-bit", "2", mlx_peak, process_peak, f"{wall:.1f}", remarks)

    def layers(self, kind: str) -> str:
        here, all_of_them = {
            "text": (self.args.text_layers, full_size.TEXT_ENCODER["num_hidden_layers"]),
            "blocks": (self.args.blocks, full_size.TRANSFORMER["num_layers"]),
        }[kind]
        return f"{here} layers" if here == all_of_them else f"{here} of {all_of_them} layers"

    @property
    def dtype(self) -> list[str]:
        return [f"--dtype={self.args.dtype}"]


def read_seconds(files: list[Path]) -> float:
    """How long the disk takes to read these files, four at a time."""
    drop_page_cache()

    def read(path: Path, begin: int, end: int) -> None:
        buffer = bytearray(8 << 20)
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            while begin < end and (count := file.readinto(buffer)):
                begin += count

    parts = [(path, begin, begin + (256 << 20)) for path in files for begin in range(0, path.stat().st_size, 256 << 20)]
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda part: read(*part), parts))
    return time.monotonic() - started


def drop_page_cache() -> None:
    """So that reading is reading from disk, where one may; else it comes from memory, for all alike."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")


def make_latents(directory: Path, model: Path, size: int) -> None:
    """A latents artifact of one picture of noise."""
    directory.mkdir(parents=True)
    shape = (16, size // 8, size // 8)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    key = keys.key({"benchmark": size})
    files = store.publish(directory, f"{key}.zarr", arrays.pack(latents))
    item = LatentsItem(
        key=key,
        prompt="noise",
        negative_prompt=" ",
        prompt_key=key,
        negative_key=None,
        seed=0,
        width=size,
        height=size,
        num_inference_steps=1,
        true_cfg_scale=1.0,
        dtype="float32",
        shape=shape,
        files=files,
        cost=Cost(seconds=0, process_peak=0, mlx_peak=0),
    )
    made_with = open_checkpoint(str(model)).model("vae")
    store.write_manifest(directory, LatentsManifest(versions={}, model=made_with, items=(item,)))


def make_prompt_with_image(directory: Path, model: Path, size: int) -> None:
    """An embeddings artifact without embeddings, whose only prompt begins with a picture of noise."""
    directory.mkdir(parents=True)
    image = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)).save(image, "PNG")
    (file,) = store.publish(directory, f"{keys.sha256(image.getvalue())}.png", image.getvalue())
    key = keys.key({"benchmark": "prompt"})
    item = PromptItem(
        prompt="noise",
        negative_prompt=" ",
        prompt_key=key,
        negative_key=key,
        settings=Settings(image=file.sha256, width=size, height=size),
    )
    manifest = EmbeddingsManifest(
        versions={},
        model=open_checkpoint(str(model)).model("tokenizer"),
        items=(item,),
        embeddings=(),
        images=(SourceImage(name="noise.png", width=size, height=size, file=file),),
        cost=Cost(seconds=0, process_peak=0, mlx_peak=0),
    )
    store.write_manifest(directory, manifest)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--directory", type=Path, default=Path(tempfile.gettempdir()) / "qwen-stage-benchmark")
    add("--blocks", type=int, default=60, help="of the transformer's 60")
    add("--text-layers", type=int, default=28, help="of the text encoder's 28")
    add("--tokens", type=int, default=64, help="of each prompt")
    add("--prompts", type=int, default=8)
    add(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="float32 for CPUs, which are slow in other"
    )
    add("--size", default="1024x1024")
    add("--steps", type=int, default=20)
    add("--streamed-steps", type=int, default=20)
    add(
        "--decode",
        type=int,
        nargs="*",
        default=[1024, 4096],
        metavar="PIXELS",
        help="edges of pictures to decode, or to encode",
    )
    add("--only", nargs="+", default=["encode", "encode-image", "denoise", "decode", "convert"])
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)

    def show(row: Row) -> None:
        print(row.line(), flush=True)

    if "encode" in args.only or "denoise" in args.only:
        show(bench.encode(args.prompts))
    if "denoise" in args.only:
        show(bench.denoise("in memory", "27.5", "--no-stream"))
        show(bench.denoise("streamed", "6", "--stream", streamed=True))
        show(bench.denoise("4 bits in memory", "8", "--no-stream", "--quantize=4", bits=4))
    if "encode-image" in args.only:
        for size in args.decode:
            show(bench.encode_image(size))
    if "decode" in args.only:
        for size in args.decode:
            show(bench.decode(size))
            show(bench.decode(size, "--memory=2147MB"))
            show(bench.decode(size, "--memory=2147MB", "--dtype=float32"))
    if "convert" in args.only:
        show(bench.convert())
    shutil.rmtree(bench.scratch)


if __name__ == "__main__":
    main()

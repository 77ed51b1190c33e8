"""What quantizing costs in quality, by class of layer: `python benchmarks/quantization.py [--only TABLE ...]`

    velocity   the demo model, one class quantized at a time: the error of the velocity
    pictures   the demo model, whole pictures: how the error of the latents grows step by step, pixels, the grader
    shapes     a random block with the shapes of Qwen-Image 2512, one class at a time: the error of what it adds
    depth      sixty narrow random blocks, some of them quantized: the error of the last one's output

Weights are rounded as `--quantize` rounds them, from bfloat16 in groups of 64 with scales in bfloat16; everything is
computed in float32, so that nothing but this rounding is seen. Errors are relative: the norm of the difference over the
norm. GiB are those of the whole 20B model. The demo model is 128 wide: two groups in a row, eight in the widest.
"""

import argparse
import io
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import full_size
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from grade_demo import held_out
from grader import grade

from artifacts_schema import store
from artifacts_schema.manifests import EmbeddingsManifest
from artifacts_schema.prompts import Prompt
from stages.checkpoint import open_checkpoint, weight_files
from stages.denoise import guided
from stages.encode import encode
from stages.joined import joined, parted
from stages.models.kernels import Norm
from stages.models.transformer import (
    SCALE1,
    SHIFT1,
    Modulation,
    Modulator,
    QwenImageTransformer2DModel,
    QwenImageTransformerBlock,
    Stream,
    Text,
    TransformerConfig,
    pack_latents,
    unpack_latents,
)
from stages.models.vae import AutoencoderKLQwenImage, VAEConfig
from stages.modulation import model_timestep
from stages.quantized import GROUP_SIZE
from stages.scheduler import SchedulerConfig
from stages.weights import Loading, load_model

GIB = 1 << 30
OVERHEAD = 2 * 16 / GROUP_SIZE  # bits a weight: its share of a scale and a bias
BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
MLPS = [f"{stream}_mlp.net.{part}" for stream in ("img", "txt") for part in ("0.proj", "2")]
CLASSES = [*(f"attn.{name}" for name in ATTENTION), *MLPS]
TEXT = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", *MLPS[2:]]
MODULATION = ["img_mod.1", "txt_mod.1", "norm_out.linear"]
OUTSIDE = ["img_in", "txt_in", "proj_out"]
STEPS_SHOWN = (1, 5, 10, 20, 30, 40, 50)
STEPS = 20  # whose noise levels the velocity is looked at ...
LEVELS = (0.9, 0.7, 0.5, 0.3, 0.1)  # ... near these: evenly spread, as what a step adds to a picture is level times it

BitsOf = Callable[[str], "int | None"]  # a layer's name -> to how many bits; None: not at all


def class_of(layer: str) -> str:
    """`transformer_blocks.3.attn.to_q` -> `attn.to_q`"""
    return BLOCK.sub("", layer)


def block_of(layer: str) -> int | None:
    found = BLOCK.match(layer)
    return int(found[1]) if found else None


def only(bits: int, classes: Iterable[str] = CLASSES, blocks: Iterable[int] | None = None) -> BitsOf:
    """Layers of some classes, in all blocks or in some."""
    wanted, numbers = set(classes), None if blocks is None else set(blocks)
    return lambda layer: bits if class_of(layer) in wanted and (numbers is None or block_of(layer) in numbers) else None


def first(*plans: BitsOf) -> BitsOf:
    """What the first of them says that says anything."""
    return lambda layer: next((bits for plan in plans if (bits := plan(layer))), None)


def rounded(
    weight: mx.array, bits: int, group_size: int = GROUP_SIZE, scales: mx.Dtype = mx.bfloat16, shuffle: int = 0
) -> mx.array:
    """What quantization leaves of a weight, float32. With `shuffle`, groups are of weights drawn by that seed."""
    order = (
        mx.random.permutation(weight.shape[1], key=mx.random.key(shuffle)) if shuffle else mx.arange(weight.shape[1])
    )
    stored = weight.astype(mx.bfloat16).astype(scales)[:, order]
    packed, *scaling = mx.quantize(stored, group_size=group_size, bits=bits)
    scaling = [part.astype(mx.float32) for part in scaling]
    return mx.dequantize(packed, *scaling, group_size=group_size, bits=bits)[:, mx.argsort(order)]


def quantized(weights: dict[str, mx.array], bits_of: BitsOf, **form: Any) -> dict[str, mx.array]:
    made = {}
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        bits = bits_of(layer) if kind == "weight" and weight.ndim == 2 else None
        made[name] = rounded(weight, bits, **form) if bits else weight
    return made


def error(other: mx.array, true: mx.array) -> np.ndarray:
    """Relative, of each picture: [B, ...] -> [B]"""
    one, two = (np.array(x, np.float64).reshape(len(x), -1) for x in (other, true))
    return np.linalg.norm(one - two, axis=1) / np.linalg.norm(two, axis=1)


@cache
def sizes(blocks: int = 60) -> dict[str, int]:
    """Weights of each layer at full size, modulation included."""
    config = TransformerConfig(**{**full_size.TRANSFORMER, "num_layers": blocks})
    models = QwenImageTransformer2DModel(config), Modulator(config)
    named = [parted(dict(tree_flatten(model.parameters())), model) for model in models]
    matrices = ((name, array) for each in named for name, array in each.items() if array.ndim == 2)
    return {name.removesuffix(".weight"): prod(array.shape) for name, array in matrices}


def gib(bits_of: BitsOf) -> float:
    """What a plan's quantized layers take at full size."""
    wanted = [(size, bits_of(layer)) for layer, size in sizes().items()]
    return sum(size * (bits + OVERHEAD) / 8 for size, bits in wanted if bits) / GIB


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]], title: str) -> None:
    columns = list(columns)
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def percent(value: float) -> str:
    return f"{100 * value:.3g}%"


class Models(NamedTuple):
    transformer: QwenImageTransformer2DModel
    modulator: Modulator


class Demo:
    """The demo model, pictures to draw with it, and what it draws in full precision."""

    def __init__(self, pictures: int, shuffle: int = 0) -> None:
        self.shuffle = shuffle
        self.checkpoint = open_checkpoint("demo")
        self.config = self.checkpoint.config("transformer", TransformerConfig)
        self.schedule = self.checkpoint.config("scheduler", SchedulerConfig, "scheduler_config.json")
        defaults = self.checkpoint.defaults
        self.cfg, self.side = defaults.true_cfg_scale, defaults.width // self.checkpoint.vae_scale_factor
        self.cases = held_out(pictures)
        shape = (16, self.side, self.side)  # each picture has a seed of its own
        noise = [mx.random.normal(shape, key=mx.random.key(seed)) for seed in range(len(self.cases))]
        self.noise = pack_latents(mx.stack(noise))
        self.weights = {}
        for file in weight_files(self.checkpoint.component("transformer")):
            self.weights |= {name: weight.astype(mx.float32) for name, weight in mx.load(str(file)).items()}
        self.full = self.models(lambda layer: None)
        self.texts = self._texts()

    def _texts(self) -> list[Text]:
        """The prompts, and as many times the negative one."""
        with tempfile.TemporaryDirectory() as out:
            prompts = [Prompt(case["prompt"]) for case in self.cases]
            run = encode(prompts, self.checkpoint, Path(out), dtype="float32", report=nothing, notice=nothing)
            directory = store.find(run, EmbeddingsManifest)
            manifest, _ = store.read_manifest(directory, EmbeddingsManifest)
            read = {
                each.key: mx.load(io.BytesIO(store.read_embeddings(directory, each)), format="safetensors")
                for each in manifest.embeddings
            }
        items = {item.prompt: item for item in manifest.items}
        texts = []
        for key in ("prompt_key", "negative_key"):
            packed = [read[getattr(items[case["prompt"]], key)]["prompt_embeds"] for case in self.cases]
            lengths = [len(each) for each in packed]
            side = self.side // 2
            texts.append(self.full.transformer.text(mx.concatenate(packed).astype(mx.float32), lengths, side, side))
        return texts

    def models(self, bits_of: BitsOf) -> Models:
        models = Models(QwenImageTransformer2DModel(self.config), Modulator(self.config))
        weights = quantized(self.weights, bits_of, shuffle=self.shuffle)
        for model in models:
            model.load_weights(list(joined(model.sanitize(weights), model).items()))
        return models

    def sigmas(self, steps: int) -> list[float]:
        return self.schedule.sigmas(steps, (self.side // 2) ** 2)

    def modulations(self, models: Models, sigmas: list[float]) -> list[Modulation]:
        whole = models.modulator([model_timestep(sigma, mx.float32) for sigma in sigmas], mx.float32)
        mx.eval(whole)
        return [Modulation(*parts) for parts in zip(*whole, strict=True)]

    def velocity(self, models: Models, latents: mx.array, modulation: Modulation) -> mx.array:
        """As the loop takes it: with guidance. [B, S, C]"""
        velocity: mx.array = guided(*models.transformer(latents, self.texts, modulation), self.cfg)
        mx.eval(velocity)
        return velocity

    def trajectory(self, models: Models, steps: int) -> list[mx.array]:
        """The latents before every step, and the final ones."""
        sigmas = self.sigmas(steps)
        reached = [self.noise]
        for i, modulation in enumerate(self.modulations(models, sigmas[:-1])):
            velocity = self.velocity(models, reached[-1], modulation)
            reached.append(reached[-1] + (sigmas[i + 1] - sigmas[i]) * velocity)
            mx.eval(reached[-1])
        return reached

    def pixels(self, latents: mx.array) -> np.ndarray:
        """uint8 [B, H, W, 3]"""
        vae = load_model(Loading(self.checkpoint, "vae", AutoencoderKLQwenImage, VAEConfig, "float32"))
        drawn = [vae.decode(each[None])[0] for each in unpack_latents(latents, self.side, self.side)]
        return np.stack([np.array(mx.round((rgb * 0.5 + 0.5) * 255).astype(mx.uint8)) for rgb in drawn])

    def right(self, pixels: np.ndarray) -> str:
        """How many of the pictures show what was asked for."""
        rights = [grade(each, case["scene"]).right for each, case in zip(pixels, self.cases, strict=True)]
        return f"{sum(rights)}/{len(rights)}"


def nothing(*_: object) -> None:
    pass


def velocities(demo: Demo) -> None:
    sigmas, reached = demo.sigmas(STEPS), demo.trajectory(demo.full, STEPS)
    nearest = [min(range(STEPS), key=lambda i: abs(sigmas[i] - level)) for level in LEVELS]
    levels, latents = [sigmas[i] for i in nearest], [reached[i] for i in nearest]

    def at(models: Models) -> list[mx.array]:
        each = zip(latents, demo.modulations(models, levels), strict=True)
        return [demo.velocity(models, *arguments) for arguments in each]

    true = at(demo.full)

    def errors(bits_of: BitsOf) -> list[float]:
        made = at(demo.models(bits_of))
        return [float(error(other, one).mean()) for other, one in zip(made, true, strict=True)]

    last = demo.config.num_layers - 1
    plans: dict[str, Callable[[int], BitsOf]] = {"all blocks": lambda bits: only(bits)}
    plans |= {name: lambda bits, name=name: only(bits, [name]) for name in CLASSES}
    plans["text stream (add_*, txt_mlp)"] = lambda bits: only(bits, TEXT)
    plans |= {
        f"block {n}{' (first)' if n == 0 else ' (last)' if n == last else ''}": lambda bits, n=n: only(bits, blocks=[n])
        for n in range(last + 1)
    }
    plans |= {f"_{name}_": lambda bits, name=name: only(bits, [name]) for name in OUTSIDE}
    plans |= {f"_{name}_": lambda bits, name=name: only(bits, [name]) for name in MODULATION}
    plans["_all modulation_"] = lambda bits: only(bits, MODULATION)
    whole = np.mean(errors(only(4)))

    def rows() -> Iterable[list[str]]:
        for name, plan in plans.items():
            four, eight = errors(plan(4)), errors(plan(8))
            share = (np.mean(four) / whole) ** 2
            block = only(4, blocks=[0]) if name.startswith("block") else plan(4)
            weights = sum(size for layer, size in sizes().items() if block(layer))
            more = weights * 4 / 8 / GIB
            figures = [f"{weights / 1e9:.3f}", f"{more:.2f}", *map(percent, four), percent(float(np.mean(four)))]
            yield [name, *figures, percent(float(np.mean(eight))), percent(share)]

    columns = ["quantized alone", "10⁹ weights at full size", "GiB that 8 bits cost more"]
    columns += [f"4 bits, σ {sigma:.2f}" for sigma in levels] + [
        "4 bits, mean",
        "8 bits, mean",
        "share of squared error",
    ]
    table(columns, rows(), f"Error of the demo's velocity, {len(demo.cases)} pictures")


def candidates(last: int) -> dict[str, BitsOf]:
    """Plans for a model with blocks 0 to `last`."""
    four, out = only(4), ["attn.to_v", "attn.to_out.0"]
    image = [name for name in CLASSES if name not in TEXT]
    return {
        "8 bits": only(8),
        "5 bits": only(5),
        "4 bits": four,
        "4; to_q, to_k 5": first(only(5, ["attn.to_q", "attn.to_k"]), four),
        "4; to_v, to_out 5": first(only(5, out), four),
        "4; to_v 5, to_out 6": first(only(5, out[:1]), only(6, out[1:]), four),
        "4; to_v, to_out 8": first(only(8, out), four),
        "4; last block 8": first(only(8, blocks=[last]), four),
        "4; first and last block 8": first(only(8, blocks=[0, last]), four),
        "4; img_mlp.net.2 8": first(only(8, ["img_mlp.net.2"]), four),
        "4; text stream 8": first(only(8, TEXT), four),
        "4; image stream 8": first(only(8, image), four),
        "3; image stream 5": first(only(5, image), only(3)),
        "8; modulation 8": first(only(8), only(8, MODULATION)),
        "4; modulation 8": first(four, only(8, MODULATION)),
        "4; modulation 4": first(four, only(4, MODULATION)),
    }


def pictures(demo: Demo, steps: int, plans: list[str] | None) -> None:
    true = demo.trajectory(demo.full, steps)
    drawn = demo.pixels(true[-1])
    shown = [step for step in STEPS_SHOWN if step <= steps]
    at_full_size = candidates(full_size.TRANSFORMER["num_layers"] - 1)

    def rows() -> Iterable[list[str]]:
        yield ["full precision", "", *("" for _ in shown), "", "", demo.right(drawn)]
        for name, bits_of in candidates(demo.config.num_layers - 1).items():
            if plans and name not in plans:
                continue
            made = demo.trajectory(demo.models(bits_of), steps)
            pixels = demo.pixels(made[-1])
            off = np.abs(pixels.astype(int) - drawn).reshape(len(drawn), -1).mean(axis=1)
            grown = [percent(float(error(made[step], true[step]).mean())) for step in shown]
            yield [
                name,
                f"{gib(at_full_size[name]):.2f}",
                *grown,
                f"{off.mean():.2f}",
                f"{off.max():.2f}",
                demo.right(pixels),
            ]

    columns = ["plan", "GiB", *(f"after {step}" for step in shown), "pixels, mean of 255", "worst picture", "right"]
    table(columns, rows(), f"Error of the demo's latents, {len(demo.cases)} pictures, {steps} steps")


KINDS = ("normal", "heavy tails", "outlier columns")


def drawn_weight(kind: str, shape: tuple[int, ...], key: mx.array) -> mx.array:
    """A random weight [out, in] that keeps the size of what it multiplies."""
    keys = mx.random.split(key, 5)
    weight = mx.random.normal(shape, key=keys[4])
    if kind == "heavy tails":  # Student's t with four degrees of freedom
        chi = sum(mx.random.normal(shape, key=each) ** 2 for each in keys[:4])
        weight = weight / mx.sqrt(chi / 2)
    elif kind == "outlier columns":
        weight[:, ::512] = weight[:, ::512] * 10
    return weight * shape[1] ** -0.5


class Blocks:
    """Random blocks, a random input and modulation: 256 tokens of a picture and 64 of a prompt."""

    def __init__(self, kind: str, heads: int, blocks: int) -> None:
        self.config = TransformerConfig(**{**full_size.TRANSFORMER, "num_attention_heads": heads, "num_layers": 1})
        dim, keys = self.config.dim, iter(mx.random.split(mx.random.key(0), 1000 * blocks))
        model = QwenImageTransformer2DModel(self.config)
        self.text = Text(mx.zeros(0), [64], model.pos_embed(16, 16, [64]))
        self.img = mx.random.normal((1, 256, dim), key=next(keys))
        self.txt = mx.random.normal((64, dim), key=next(keys))
        self.modulation = 0.3 * mx.random.normal((blocks, 2, 6 * dim), key=next(keys))
        self.weights = []
        for number in range(blocks):
            own = {}
            whole = dict(tree_flatten(QwenImageTransformerBlock(self.config).parameters()))
            for name, array in parted(whole, QwenImageTransformer2DModel).items():
                vector = mx.zeros if name.endswith(".bias") else mx.ones
                drawn = drawn_weight(kind, array.shape, next(keys)) if array.ndim == 2 else vector(array.shape)
                own[f"transformer_blocks.{number}.{name}"] = drawn
            mx.eval(own)
            self.weights.append(own)

    def added(self, bits_of: BitsOf, **form: Any) -> tuple[mx.array, mx.array]:
        """What the blocks add to both streams, with a first axis of one."""
        norms = [[Norm(mod, SHIFT1, SCALE1) for mod in pair] for pair in self.modulation]
        norms.append([Norm(mx.zeros(2 * self.config.dim), 0, 1)] * 2)
        img, txt = (Stream(x, norm(x)) for x, norm in zip((self.img, self.txt), norms[0], strict=True))
        block = QwenImageTransformerBlock(self.config)
        for number, own in enumerate(self.weights):
            made = joined(quantized(own, bits_of, **form), QwenImageTransformer2DModel)
            block.load_weights([(class_of(name), weight) for name, weight in made.items()])
            img, txt = block(img, txt, self.text, *self.modulation[number], norms[number + 1])
            mx.eval(img, txt)
        return img.x - self.img, (txt.x - self.txt)[None]

    def errors(self, true: tuple[mx.array, mx.array], bits_of: BitsOf, **form: Any) -> list[str]:
        made = self.added(bits_of, **form)
        return [percent(float(error(*pair)[0])) for pair in zip(made, true, strict=True)]


def shapes(heads: int) -> None:
    forms = {
        "4 bits": (4, {}),
        "4 bits, groups of 32": (4, {"group_size": 32}),
        "8 bits": (8, {}),
        "8 bits, float32 scales": (8, {"scales": mx.float32}),
    }
    columns = [f"{name}: {stream}" for name in forms for stream in ("image", "text")]
    for kind in KINDS:
        block = Blocks(kind, heads, 1)
        true = block.added(lambda layer: None)

        def rows(block: Blocks = block, true: tuple[mx.array, mx.array] = true) -> Iterable[list[str]]:
            for name, classes in {"all of it": CLASSES, **{name: [name] for name in CLASSES}}.items():
                figures = [block.errors(true, only(bits, classes), **form) for bits, form in forms.values()]
                yield [name, *(each for pair in figures for each in pair)]

        title = f"Error of what a random block adds, {kind}, {block.config.dim} wide"
        table(["quantized alone", *columns], rows(), title)


def depth(heads: int, blocks: int) -> None:
    stack = Blocks("heavy tails", heads, blocks)
    true = stack.added(lambda layer: None)
    last, four = blocks - 1, only(4)
    plans = {f"block {n} alone": only(4, blocks=[n]) for n in (0, 1, blocks // 2, last - 1, last)}
    plans |= {"all": four, "all but the first and the last": only(4, blocks=range(1, last))}
    plans |= {"all, 8 bits": only(8)}
    rows = ([name, *stack.errors(true, bits_of)] for name, bits_of in plans.items())
    title = f"Error of what {blocks} random blocks add, heavy tails, {stack.config.dim} wide"
    table(["4 bits", "image", "text"], rows, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", default=["velocity", "pictures", "shapes", "depth"])
    add("--pictures", type=int, default=40, help="held-out prompts, each with a seed of its own")
    add("--steps", type=int, nargs="+", default=[20, 50])
    add("--plans", nargs="+", help="for pictures, as the table names them; default: all")
    add("--shuffle", type=int, default=0, metavar="SEED", help="other groups, for another draw of the demo's rounding")
    add("--heads", type=int, default=24, help="of the random block, 128 wide each")
    args = parser.parse_args()
    if "velocity" in args.only or "pictures" in args.only:
        demo = Demo(args.pictures, args.shuffle)
        if "velocity" in args.only:
            velocities(demo)
        if "pictures" in args.only:
            for steps in args.steps:
                pictures(demo, steps, args.plans)
    if "shapes" in args.only:
        shapes(args.heads)
    if "depth" in args.only:
        depth(3, 60)


if __name__ == "__main__":
    main()

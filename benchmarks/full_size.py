"""Writes a checkpoint with the shapes of Qwen-Image 2512 and random weights, in bfloat16: 57 GB with all its layers.

    python benchmarks/full_size.py DIRECTORY [--blocks 60] [--text-layers 28]

It is written file by file, with one layer's numbers over and over: what they are makes no difference to time or memory.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from itertools import groupby
from math import prod
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from stages.checkpoint import DEMO_DIRECTORY
from stages.joined import parted
from stages.layouts import SCHEDULER
from stages.models.text_encoder import TextEncoder, TextEncoderConfig
from stages.models.transformer import Modulator, QwenImageTransformer2DModel, TransformerConfig
from stages.models.vae import AutoencoderKLQwenImage, VAEConfig
from stages.models.vae_encoder import AutoencoderKLQwenImageEncoder

TEXT_ENCODER = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
TRANSFORMER = {
    "num_layers": 60,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 3584,
    "in_channels": 64,
    "out_channels": 16,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
}
VAE = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
SPREAD = 0.02  # of weights: their standard deviation
NUMBERS = 1 << 26  # drawn once; every tensor takes its first ones
BYTES = 2  # of a bfloat16
FILE_NUMBERS = 1 << 30  # at most, in one file of a component

Shapes = dict[str, tuple[int, ...]]


def write(directory: Path, blocks: int = 60, text_layers: int = 28) -> Path:
    """Writes the checkpoint, but for components that are there already."""
    drawn = (mx.random.normal((NUMBERS,), key=mx.random.key(0)) * SPREAD).astype(mx.bfloat16)
    random = memoryview(drawn.view(mx.uint16)).tobytes()
    text = {**TEXT_ENCODER, "num_hidden_layers": text_layers}
    transformer = {**TRANSFORMER, "num_layers": blocks}
    config = TransformerConfig(**{**transformer, "axes_dims_rope": tuple(TRANSFORMER["axes_dims_rope"])})
    shapes = {
        "text_encoder": {f"model.{name}": shape for name, shape in _shapes(TextEncoder(TextEncoderConfig(**text)))},
        "transformer": dict([*_shapes(QwenImageTransformer2DModel(config)), *_shapes(Modulator(config))]),
        "vae": _vae_shapes(),
    }
    for component, configured in (("text_encoder", text), ("transformer", transformer), ("vae", VAE)):
        if not (directory / component / "config.json").exists():
            _write_component(directory / component, shapes[component], random)
            (directory / component / "config.json").write_text(json.dumps(configured))
    shutil.copytree(DEMO_DIRECTORY / "tokenizer", directory / "tokenizer", dirs_exist_ok=True)
    (directory / "scheduler").mkdir(exist_ok=True)
    (directory / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (directory / "model_index.json").write_text("{}")
    return directory


def _shapes(model) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, array.shape) for name, array in parted(dict(tree_flatten(model.parameters())), model).items()]


def _vae_shapes() -> Shapes:
    """As the checkpoint has them: kernels in three dimensions, channels first."""
    config = VAEConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in VAE.items()})
    shapes = {}
    for name, shape in (*_shapes(AutoencoderKLQwenImageEncoder(config)), *_shapes(AutoencoderKLQwenImage(config))):
        if len(shape) == 4 and ".resample." not in name:  # [out, h, w, in] -> [out, in, time, h, w]
            shape = (shape[0], shape[3], 3, *shape[1:3])
        elif len(shape) == 4:
            shape = (shape[0], shape[3], *shape[1:3])
        elif name.endswith(".gamma") or len(shape) == 2:
            shape = (*shape, 1, 1)
        shapes[name] = shape
    return shapes


def _write_component(directory: Path, shapes: Shapes, random: bytes) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    files = list(_split(shapes))
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for name, own in zip(names, files, strict=True):
        header, end = {}, 0
        for tensor, shape in own.items():
            begin, end = end, end + BYTES * prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        encoded = json.dumps(header).encode()
        with (directory / name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for shape in own.values():
                size = BYTES * prod(shape)
                for begin in range(0, size, len(random)):
                    file.write(memoryview(random)[: min(len(random), size - begin)])
    weight_map = {tensor: name for name, own in zip(names, files, strict=True) for tensor in own}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _split(shapes: Shapes) -> Iterator[Shapes]:
    """In files of a few gigabytes, layers whole."""
    file: Shapes = {}
    for _, layer in groupby(sorted(shapes), key=lambda name: name.split(".")[:3]):
        own = {name: shapes[name] for name in layer}
        if file and sum(map(prod, (file | own).values())) > FILE_NUMBERS:
            yield file
            file = {}
        file |= own
    yield file


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--text-layers", type=int, default=28)
    args = parser.parse_args()
    print(write(args.directory, args.blocks, args.text_layers))


if __name__ == "__main__":
    main()

"""Random LoRAs, in the spellings of the programs that write them."""

import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from stages.checkpoint import weight_files
from stages.lora import layers_of
from stages.tensors import tensors_of

Changes = dict[str, tuple[np.ndarray, np.ndarray, float | None]]  # of layers: down, up, alpha


def layers(checkpoint: Path) -> dict[str, tuple[int, int]]:
    return layers_of(tensors_of(weight_files(checkpoint / "transformer")))


def drawn(checkpoint: Path, seed: int, *, share: float = 0.5, alphas: bool = True, strength: float = 0.3) -> Changes:
    """Changes of about that share of a transformer's layers, each of them `strength` of a usual weight."""
    draw, random_ = random.Random(seed), np.random.RandomState(seed)
    changes: Changes = {}
    for layer, (outputs, inputs) in layers(checkpoint).items():
        if draw.random() < share or not changes:
            rank = draw.randint(1, 4)
            down = random_.standard_normal((rank, inputs)) / np.sqrt(inputs)
            up = strength * random_.standard_normal((outputs, rank)) / np.sqrt(rank)
            alpha = draw.choice([None, 1.0, 0.5 * rank, 2.0 * rank]) if alphas else None
            changes[layer] = (down.astype(np.float32), up.astype(np.float32), alpha)
    return changes


SPELLINGS = {  # the name of a layer, and of what is said of it: down, up, alpha
    "diffusers": ("transformer.{}", ".lora_A.weight", ".lora_B.weight"),
    "peft": ("{}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "lightx2v": ("{}", ".lora_down.weight", ".lora_up.weight"),
    "kohya": ("lora_unet_{}", ".lora_down.weight", ".lora_up.weight"),
    "comfyui": ("diffusion_model.{}", ".lora_A.weight", ".lora_B.weight"),
}


def spelled(changes: Changes, spelling: str) -> dict[str, np.ndarray]:
    name, down_end, up_end = SPELLINGS[spelling]
    tensors = {}
    for layer, (down, up, alpha) in changes.items():
        place = name.format(layer.replace(".", "_") if spelling == "kohya" else layer)
        tensors |= {place + down_end: down, place + up_end: up}
        if alpha is not None:
            tensors[f"{place}.alpha"] = np.array(alpha, np.float32)
    return tensors


def write(path: Path, changes: Changes, spelling: str = "diffusers") -> Path:
    save_file(spelled(changes, spelling), path, {"format": "pt"})
    return path

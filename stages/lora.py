"""LoRAs: small changes to a transformer's weights, W + scale * up @ down, put in while the weights are read.

Files of several programs are read: they agree on the two matrices and differ in what they call them. A layer whose
weights are quantized keeps the two beside it: so small a change to weights that lie on a grid would be rounded away.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from artifacts_schema.errors import UserError
from stages.tensors import NUMBERS, Tensor, checked_tensors, metadata_of, shown

if TYPE_CHECKING:
    import mlx.core as mx

# diffusers and PEFT, the latter with the adapter's name between; lightx2v, kohya and ComfyUI
DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight")
UP = (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight")
ALPHA = (".alpha",)
PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.")
FLAT_PREFIX = "lora_unet_"  # kohya's, and then the layer's name with underscores for dots
ADAPTER = "lora_adapter_metadata"  # where diffusers says what PEFT was told, if it does: the alpha of all layers
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as PEFT saves them
MOST_ALPHA = 1e6
SIDE = ("lora_a", "lora_b")  # parameters of a quantized layer: [rank, in] and [out, rank]


class Lora(NamedTuple):
    path: Path
    scale: float

    def fingerprint(self) -> str:
        """Of all that the file holds, as a sample could miss the alphas; and of the alpha that is said elsewhere."""
        said = self.path.stat()
        own = _sha256(self.path, said.st_size, said.st_mtime_ns)
        return f"{own} {_alpha_of_all(self.path)}" if self.path.name == PEFT_FILE else own


class Change(NamedTuple):
    """Of one layer, by the names of tensors in the file."""

    down: str  # [rank, in]
    up: str  # [out, rank]
    alpha: str | None = None  # a number: the change counts alpha / rank times


@cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_scale(said: str) -> tuple[str, float]:
    """ "FILE:0.8" -> its two parts; without a number, 1."""
    path, colon, number = said.rpartition(":")
    try:
        scale = float(number) if colon else 1.0
    except ValueError:
        return said, 1.0
    if not math.isfinite(scale):
        raise UserError(f"--lora {said}: {number} is no strength")
    return (path, scale) if colon else (said, 1.0)


def changes_in(path: Path, layers: dict[str, tuple[int, int | None]]) -> dict[str, Change]:
    """Which layers a file changes, of those by name that there are; with the shapes of their weights, [out, in].

    Raises UserError for a tensor that it cannot place.
    """
    tensors = checked_tensors(path)
    flat = {layer.replace(".", "_"): layer for layer in layers}
    found: dict[str, dict[str, str]] = {}
    unknown = []
    for name in tensors:
        kind, suffix = next(
            ((kind, end) for kind, ends in (("down", DOWN), ("up", UP), ("alpha", ALPHA)) for end in ends
             if name.endswith(end)), ("", "")
        )  # fmt: skip
        layer = name.removesuffix(suffix)
        if layer.startswith(FLAT_PREFIX):
            layer = flat.get(layer.removeprefix(FLAT_PREFIX), "")
        for prefix in PREFIXES:
            layer = layer.removeprefix(prefix)
        if not suffix or layer not in layers or kind in found.get(layer, {}):
            unknown.append(name)
        else:
            found.setdefault(layer, {})[kind] = name
    if unknown:
        raise UserError(f"{path} holds {shown(sorted(unknown))}, for which this model has no place; is it for another?")
    changes = {}
    for layer, parts in found.items():
        if not {"down", "up"} <= parts.keys():
            raise UserError(f"{path} holds {next(iter(parts.values()))} without the other half; download it again")
        changes[layer] = change = Change(**parts)
        down, up = tensors[change.down].shape, tensors[change.up].shape
        if odd := [name for name in parts.values() if tensors[name].dtype not in NUMBERS]:
            raise UserError(f"{path}: {odd[0]} is stored as {tensors[odd[0]].dtype}, which no LoRA is read in")
        if change.alpha and prod(tensors[change.alpha].shape) != 1:
            raise UserError(f"{path}: {change.alpha} is no single number; download it again")
        outputs, inputs = layers[layer]
        if len(down) != 2 or len(up) != 2 or 0 in down or up != (outputs, down[0]) or down[1] != (inputs or down[1]):
            raise UserError(
                f"{path}: {up} x {down} does not fit {layer}, {outputs} x {inputs}; is it for another model?"
            )
    return changes


def applied(weights: "dict[str, mx.array]", loras: Sequence[Lora]) -> "dict[str, mx.array]":
    """Weights by their names in the checkpoint, unread, with the LoRAs in them; unread as well."""
    import mlx.core as mx

    halves: dict[str, tuple[list[mx.array], list[mx.array]]] = {}
    for lora in loras:
        changes = changes_in(lora.path, layers_of(weights))
        alpha_of_all = _alpha_of_all(lora.path)
        loaded = mx.load(str(lora.path), format="safetensors")
        for layer, change in changes.items():
            down, up = (loaded[name].astype(mx.float32) for name in (change.down, change.up))
            alpha = loaded[change.alpha].astype(mx.float32).reshape(()) if change.alpha else alpha_of_all or len(down)
            downs, ups = halves.setdefault(layer, ([], []))
            downs.append(down * (lora.scale * alpha / len(down)))
            ups.append(up)
    made = dict(weights)
    for layer, (downs, ups) in halves.items():
        all_down, all_up = mx.concatenate(downs, axis=0), mx.concatenate(ups, axis=1)
        if f"{layer}.scales" in weights:
            made |= dict(zip((f"{layer}.{side}" for side in SIDE), (all_down, all_up), strict=True))
        else:
            weight = weights[f"{layer}.weight"]
            made[f"{layer}.weight"] = (weight.astype(mx.float32) + all_up @ all_down).astype(weight.dtype)
    return made


def layers_of(weights: "Mapping[str, mx.array | Tensor]") -> dict[str, tuple[int, int | None]]:
    """The layers that LoRAs can change, by the names of their weights, and how large those are: [out, in].

    Packed weights do not say how many inputs they have.
    """
    layers: dict[str, tuple[int, int | None]] = {}
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and len(weight.shape) == 2:
            outputs, inputs = weight.shape
            layers[layer] = outputs, None if f"{layer}.scales" in weights else inputs
    return layers


def _alpha_of_all(path: Path) -> float | None:
    try:
        if path.name == PEFT_FILE:
            said = json.loads((path.parent / PEFT_CONFIG).read_bytes())
        else:
            said = json.loads(metadata_of(path)[ADAPTER])
        said = {name.rpartition(".")[2]: value for name, value in said.items()}
    except FileNotFoundError:
        raise UserError(f"{path} is PEFT's, which says how strong it is in {PEFT_CONFIG}: put that beside it") from None
    except (KeyError, ValueError, AttributeError, RecursionError, OSError):
        return None
    if unknown := [name for name in ("alpha_pattern", "use_rslora", "use_dora") if said.get(name)]:
        raise UserError(f"{path} asks for {unknown[0]}, which is not known here; merge it into the model elsewhere")
    alpha = said.get("lora_alpha")
    return float(alpha) if isinstance(alpha, int | float) and abs(alpha) < MOST_ALPHA else None

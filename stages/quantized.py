"""Quantized weights, as MLX packs them: made, told from their shapes, and given to a model."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from artifacts_schema.errors import UserError
from stages.lora import SIDE
from stages.models.linear import QuantizedLinear

GROUP_SIZE = 64  # weights that share a scale and a bias
GROUP_SIZES = (32, 64, 128)
BITS = (2, 3, 4, 5, 6, 8)  # that MLX knows
QUANTIZED_PARTS = ("weight", "scales", "biases")


def is_floating(weight: mx.array) -> bool:
    return mx.issubdtype(weight.dtype, mx.floating)


def quantized_weights(weights: dict[str, mx.array], bits_of: Callable[[str], int | None]) -> dict[str, mx.array]:
    """Exchanges `x.weight` [out, in] for packed `x.weight`, `x.scales` and `x.biases` where `bits_of(name)` says so."""
    quantized: dict[str, mx.array] = {}
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        is_matrix = weight.ndim == 2 and is_floating(weight)
        bits = bits_of(layer) if kind == "weight" else None
        if bits and is_matrix and weight.shape[1] % GROUP_SIZE == 0:
            parts = mx.quantize(weight, group_size=GROUP_SIZE, bits=bits)
            quantized |= {f"{layer}.{part}": each for part, each in zip(QUANTIZED_PARTS, parts, strict=True)}
        else:
            quantized[name] = weight
    return quantized


def exchange_quantized(model: nn.Module, weights: dict[str, mx.array]) -> None:
    """Exchanges the model's layers for quantized ones where the weights are; bits and groups are told by shapes."""

    def exchanged(path: str, module: nn.Module) -> nn.Module:
        packed, scales = weights.get(f"{path}.weight"), weights.get(f"{path}.scales")
        if not isinstance(module, nn.Linear | nn.Embedding) or packed is None or scales is None:
            return module
        if packed.dtype != mx.uint32 or packed.ndim != 2 or scales.ndim != 2:
            raise UserError(f"tensor {path}.weight is {packed.dtype} {packed.shape}, which no quantized weight is")
        outputs, inputs = module.weight.shape
        bits, group_size = 32 * packed.shape[-1] / inputs, inputs / max(1, scales.shape[-1])
        if bits not in BITS or group_size not in GROUP_SIZES:
            raise UserError(f"tensor {path}.weight is quantized to {bits:g} bits in groups of {group_size:g}: unknown")
        if isinstance(module, nn.Embedding):
            return nn.QuantizedEmbedding(outputs, inputs, int(group_size), int(bits))
        layer = QuantizedLinear(inputs, outputs, "bias" in module, int(group_size), int(bits))
        for side in SIDE:
            if f"{path}.{side}" in weights:
                layer[side] = weights[f"{path}.{side}"]
        return layer

    leaves = tree_map_with_path(exchanged, model.leaf_modules(), is_leaf=nn.Module.is_module)
    model.update_modules(leaves)


def unpacked(layer: dict[str, mx.array]) -> dict[str, mx.array]:
    """A quantized layer with full weights; others as they are, and what cannot be told."""
    if not {*QUANTIZED_PARTS} <= layer.keys():
        return layer
    packed, scales, biases = (layer[part] for part in QUANTIZED_PARTS)
    bits = 32 * packed.shape[-1] / max(1, scales.shape[-1] * GROUP_SIZE)
    if packed.dtype != mx.uint32 or bits not in BITS:
        return layer
    full = mx.dequantize(packed, scales, biases, group_size=GROUP_SIZE, bits=int(bits))
    return {"weight": full, **{kind: each for kind, each in layer.items() if kind not in QUANTIZED_PARTS}}

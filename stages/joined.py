"""Layers that a checkpoint has apart and a model as one: it multiplies with all of their rows at once.

A model class says which, in `JOINED`: the name of its own layer, and theirs.
"""

from typing import Any

import mlx.core as mx

from stages.lora import SIDE
from stages.quantized import unpacked


def joined(weights: dict[str, mx.array], model: Any) -> dict[str, mx.array]:
    """Joins the rows of layers that the model has as one, by its `JOINED`: it multiplies with all of them at once."""
    layers = _layers(weights)
    for whole, names in _to_join(layers, model):
        parts = [layers.get(name, {}) for name in names]
        if _are_alike(parts):
            layers[whole] = _rows_of(parts)
            for name in names:
                del layers[name]
    return _flat(layers)


def alike(weights: dict[str, mx.array], model: Any) -> dict[str, mx.array]:
    """Gives layers that are to be joined full weights, if they are quantized to different bits."""
    layers = _layers(weights)
    for _, names in _to_join(layers, model):
        parts = [layers.get(name, {}) for name in names]
        if not _are_alike(parts):
            layers |= {name: unpacked(part) for name, part in zip(names, parts, strict=True) if part}
    return _flat(layers)


def _layers(weights: dict[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    """`attn.to_q.weight` -> `attn.to_q`: `weight`"""
    layers: dict[str, dict[str, mx.array]] = {}
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        layers.setdefault(layer, {})[kind] = weight
    return layers


def _flat(layers: dict[str, dict[str, mx.array]]) -> dict[str, mx.array]:
    pairs = (
        (f"{layer}.{kind}" if layer else kind, weight) for layer, own in layers.items() for kind, weight in own.items()
    )
    return dict(pairs)


def _to_join(layers: dict[str, Any], model: Any) -> list[tuple[str, list[str]]]:
    """The layers that a model has as one: its name, and theirs."""
    return [
        (name.removesuffix(names[0]) + whole, [name.removesuffix(names[0]) + each for each in names])
        for whole, names in getattr(model, "JOINED", {}).items()
        for name in layers
        if name.rpartition(".")[2] == names[0]
    ]


def _are_alike(parts: list[dict[str, mx.array]]) -> bool:
    """Whether layers have the same kinds of weights, in the same form: else something is missing or wrong."""
    forms = [{kind: (each.shape[1:], each.dtype) for kind, each in part.items() if kind not in SIDE} for part in parts]
    return all(form == forms[0] for form in forms)


def _rows_of(parts: list[dict[str, mx.array]]) -> dict[str, mx.array]:
    """The weights of layers as those of one, rows after rows. Of LoRAs beside them, each reaches its own rows alone."""
    made = {kind: mx.concatenate([part[kind] for part in parts]) for kind in parts[0] if kind not in SIDE}
    down, up = SIDE
    changed = [number for number, part in enumerate(parts) if down in part]
    if changed:
        made[down] = mx.concatenate([parts[number][down] for number in changed])
        blocks = [
            [
                parts[column][up] if row == column else mx.zeros((part["weight"].shape[0], parts[column][up].shape[1]))
                for column in changed
            ]
            for row, part in enumerate(parts)
        ]
        made[up] = mx.concatenate([mx.concatenate(row, axis=1) for row in blocks]).astype(made[down].dtype)
    return made


def parted(weights: dict[str, mx.array], model: Any) -> dict[str, mx.array]:
    """Undoes what `joined` does."""
    made: dict[str, mx.array] = {}
    for name, weight in weights.items():
        *before, layer, kind = ["", *name.split(".")]
        parts = getattr(model, "JOINED", {}).get(layer, (layer,))
        rows = weight.split(len(parts)) if len(parts) > 1 else [weight]
        made |= {".".join([*before, part, kind])[1:]: each for part, each in zip(parts, rows, strict=True)}
    return made

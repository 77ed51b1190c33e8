"""A component's weights: checked strictly against its model, then in memory or streamed.

Everything is read lazily, by MLX itself. A layer whose arrays are exchanged for unread ones takes no memory, and its
model stays whole and right: when weights are read and dropped again decides about memory alone, never about results.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from artifacts_schema.errors import Unreadable, UserError
from stages import layouts
from stages.checkpoint import Checkpoint, has_cuda, weight_files
from stages.joined import alike, joined, parted
from stages.lora import SIDE, Lora, applied
from stages.measure import Report
from stages.memory import Weights
from stages.quantized import QUANTIZED_PARTS, exchange_quantized, is_floating, quantized_weights
from stages.tensors import Tensor, shown, tensors_of

# as safetensors calls them
NUMBERS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, layouts.FLOAT8: mx.uint8}

LORA_LAYERS = 4  # as much as so many: what LoRAs make of one on the way, in float32

_loaded: dict[tuple[Any, ...], tuple[bool, Any]] = {}  # the last model by its key, and whether it is streamed


class Loading(NamedTuple):
    """What is to be loaded: a component as `model(config)`, computing in `dtype`.

    With `bits`, 4 or 8, the weights that the model allows are quantized to that.
    """

    checkpoint: Checkpoint
    component: str
    model: Any
    config: type
    dtype: str
    bits: int | None = None

    def key(self) -> tuple[Any, ...]:
        """What tells one model from another: the files may be exchanged for others while a process lasts."""
        return (*self, self.checkpoint.fingerprint(self.component))

    def was_loaded(self) -> bool:
        """Whether this process has loaded or streamed it before, and nothing else since."""
        return self.key() in _loaded

    def weights(self) -> Weights:
        """What it takes in memory."""
        directory = self.checkpoint.component(self.component)
        loras = self.checkpoint.loras(self.component)
        return weights_of(directory, self.model, mlx_dtype(self.dtype), self.bits, loras)


def load_model(loading: Loading, *, stream: bool = False, report: Report | None = None) -> Any:
    """A model with its weights; streamed, or in memory.

    The last one is kept: a process that is given one order after the other loads it once.
    """
    key = loading.key()
    if _loaded.get(key, (None, None))[0] != stream:
        _loaded.clear()  # first: there is room for one
        checkpoint, component, model, config, dtype, bits = loading
        made = model(checkpoint.config(component, config))
        directory = checkpoint.component(component)
        loras = checkpoint.loras(component)
        load_weights(made, directory, mlx_dtype(dtype), bits=bits, loras=loras, stream=stream, report=report)
        _loaded[key] = (stream, made)
    return _loaded[key][1]


def weights_of(
    directory: Path, model: Any, dtype: mx.Dtype, bits: int | None = None, loras: Sequence[Lora] = ()
) -> Weights:
    """What the weights of `model`, one of the model classes, will take. Reads no more than the files' headers."""
    files = Files.of(directory, loras)
    stored, kept = _lazy(files, model, None, None), _lazy(files, model, dtype, bits)
    if bits and (quantized := [name for name in stored if name.endswith(".scales")]):
        raise UserError(f"{directory} is quantized already ({quantized[0]}); leave out --quantize")
    for name in getattr(model, "ROWS_ON_DISK", ()):
        for part in QUANTIZED_PARTS:
            stored.pop(f"{name}.{part}", None)
            kept.pop(f"{name}.{part}", None)

    def size(weights: dict[str, mx.array]) -> int:
        return sum(weight.nbytes for weight in weights.values())

    layers = getattr(model, "LAYERS", "")
    layer_sizes = [
        (size(own), size(read))
        for own, read in zip(*[_by_layer(w, layers).values() for w in (kept, stored)], strict=True)
    ]
    changed = LORA_LAYERS * max((max(sizes) for sizes in layer_sizes), default=0) if loras else 0
    return Weights(
        whole=size(kept),
        layers=sum(own for own, _ in layer_sizes),
        layer=max((own for own, _ in layer_sizes), default=0),
        stored_layer=changed + max((read for own, read in layer_sizes if own != read), default=0),
        stored=size(stored),
    )


def load_weights(
    model: nn.Module,
    directory: Path,
    dtype: mx.Dtype,
    *,
    bits: int | None = None,
    loras: Sequence[Lora] = (),
    stream: bool = False,
    report: Report | None = None,
) -> None:
    """Gives a model its weights in `dtype`. A missing, extra or mis-shaped tensor is an error naming it.

    Weights that are stored quantized stay so; `bits` quantizes others, with the LoRAs in them. A model may name a list
    of layers, `LAYERS`: these are streamed, or read one by one with a report. A table that it names in `ROWS_ON_DISK`
    stays on disk: of it only the rows are read that are looked up.
    """
    files = Files.of(directory, loras)

    def unread() -> dict[str, mx.array]:
        return _joined(_lazy(files, model, dtype, bits), model)

    stored = _lazy(files, model, dtype, bits)
    weights = _joined(stored, model)
    exchange_quantized(model, weights)
    _check(model, stored, directory)
    del stored  # or what was joined would be held twice
    for name in getattr(model, "ROWS_ON_DISK", ()):
        for part in QUANTIZED_PARTS:
            weights.pop(f"{name}.{part}", None)
        setattr(model, name, _rows_on_disk(files.paths, model, name, dtype))
    model.load_weights(list(weights.items()))
    if layers := getattr(model, "LAYERS", None):
        if stream:
            setattr(model, layers, Streamed(model[layers], lambda: _by_layer(unread(), layers), directory))
        else:
            for number, layer in enumerate(ahead(model[layers], directory), 1):
                _move_to_gpu(layer)
                if report:
                    report(f"read {directory.name}", number, len(model[layers]))
    with _reading(directory):
        mx.eval(model.parameters())  # what is no layer


class Streamed:
    """Layers that have their weights only while they are at work, to be iterated once a pass.

    What a layer returns is evaluated, so that nothing needs its weights any longer when the next one's turn comes.
    """

    def __init__(
        self, layers: list[nn.Module], unread: Callable[[], dict[int, dict[str, mx.array]]], directory: Path
    ) -> None:
        """`unread()` gives the arrays of all layers by their numbers; `directory` is for errors."""
        self.layers, self.unread, self.directory = layers, unread, directory
        self.after_layer: Callable[[int, int], None] = lambda done, total: None

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        unread = self.unread()

        def forget(number: int) -> None:
            mx.synchronize()  # a task that has just ended may still hold its inputs
            self.layers[number].update(tree_unflatten(list(unread.pop(number).items())))

        try:
            for number, layer in enumerate(ahead(self.layers, self.directory)):
                yield _evaluated(layer)
                forget(number)
                self.after_layer(number + 1, len(self.layers))
        finally:
            for number in list(unread):  # where a pass broke off: also what was read ahead
                forget(number)


def ahead(layers: list[nn.Module], directory: Path) -> Iterator[nn.Module]:
    """Layers whose weights are read, each while the one before is at work."""
    with _reading(directory):
        mx.async_eval(layers[0].parameters())
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        with _reading(directory):
            if following:
                mx.async_eval(following.parameters())
            mx.eval(layer.parameters())
        yield layer


def _move_to_gpu(layer: nn.Module) -> None:
    """On CUDA, what the CPU has read stays in its memory until the GPU looks at it: that it does while more is read."""
    if has_cuda():
        mx.async_eval([mx.max(weight, stream=_streams()[1]) for _, weight in tree_flatten(layer.parameters())])


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Unreadable(f"the weights in {directory} cannot be read any more: {error}") from None


def _evaluated(layer: nn.Module) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        result = layer(*arguments)
        mx.eval(result)
        return result

    return call


class RowsOnDisk:
    """An embedding table of which only the rows are read that are looked up. It may be quantized, as MLX does it."""

    def __init__(
        self, table: dict[str, Tensor], dtype: mx.Dtype, form: dict[str, int], scale: mx.array | None = None
    ) -> None:
        """`table` has its `weight`, and `scales` and `biases` if that is quantized, as `form` says; `scale` is that of
        a float8 table: of all of it, or [rows, 1]."""
        self.table, self.dtype, self.form, self.scale = table, dtype, form, scale

    def __call__(self, ids: list[int]) -> mx.array:
        """[len(ids), dim]"""
        rows = {part: _rows(tensor, ids) for part, tensor in self.table.items()}
        weight = rows["weight"]
        if self.form:
            weight = mx.dequantize(weight, rows["scales"], rows["biases"], **self.form)
        elif self.table["weight"].dtype == layouts.FLOAT8:
            weight = mx.from_fp8(weight, mx.float32)
        if self.scale is not None:
            weight = weight * (self.scale[mx.array(ids)] if self.scale.ndim else self.scale)
        return weight.astype(self.dtype)


def _joined(weights: dict[str, mx.array], model: Any) -> dict[str, mx.array]:
    with mx.stream(_streams()[1]):
        return joined(weights, model)


def _rows_on_disk(files: list[Path], model: Any, name: str, dtype: mx.Dtype) -> RowsOnDisk:
    """What looks up the rows of the model's table of that name, which has the form that they are stored in."""
    stored = tensors_of(files)
    tensors = model.sanitize({new: (old, stored[old]) for old, new in layouts.renamed(stored).items()})
    table = {part: tensors[f"{name}.{part}"][1] for part in QUANTIZED_PARTS if f"{name}.{part}" in tensors}
    module = getattr(model, name)
    form = {"group_size": module.group_size, "bits": module.bits} if "scales" in table else {}
    scale = None
    for old, tensor in (tensors[f"{name}{end}"] for end in layouts.SCALES if f"{name}{end}" in tensors):
        scale = mx.load(str(tensor.file), format="safetensors")[old]
        scale = layouts.scale_of(scale, table["weight"].shape, old)
    return RowsOnDisk(table, dtype, form, scale)


def _rows(table: Tensor, ids: list[int]) -> mx.array:
    """[len(ids), columns], in the file's format; of float8 its bytes."""
    stored, columns = NUMBERS[table.dtype], table.shape[1]
    row = columns * stored.size
    file = os.open(table.file, os.O_RDONLY)
    try:
        data = b"".join(os.pread(file, row, table.begin + row * i) for i in ids)
    finally:
        os.close(file)
    return mx.array(memoryview(data)).view(stored).reshape(len(ids), columns)


class Files(NamedTuple):
    """Where a component's weights are, and what is put into them."""

    paths: list[Path]
    float8: set[str]  # the names of tensors that are
    loras: Sequence[Lora]

    @classmethod
    def of(cls, directory: Path, loras: Sequence[Lora]) -> "Files":
        paths = weight_files(directory)
        tensors = tensors_of(paths)
        if sides := sorted(name for name in tensors if name.endswith(SIDE)):
            raise UserError(f"{directory} holds tensors its config.json does not account for: {shown(sides)}")
        return cls(paths, {name for name, tensor in tensors.items() if tensor.dtype == layouts.FLOAT8}, loras)


def _lazy(files: Files, model: Any, dtype: mx.Dtype | None, bits: int | None) -> dict[str, mx.array]:
    """Every tensor by the model's name for it, unread; in `dtype` or quantized, or as it is stored."""
    reader, converter = _streams()
    weights: dict[str, mx.array] = {}
    for file in files.paths:
        try:
            weights.update(mx.load(str(file), format="safetensors", stream=reader))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None
    with mx.stream(converter):
        weights = layouts.standard(weights, files.float8, as_stored=dtype is None)
        if dtype is None:
            return dict(model.sanitize(weights))
        weights = model.sanitize(applied(alike(weights, model), files.loras))
        if bits:
            weights = quantized_weights(weights, partial(model.bits_of, bits=bits))
        return {name: weight.astype(dtype) if is_floating(weight) else weight for name, weight in weights.items()}


_made_streams: list[Any] = []


def _streams() -> list[Any]:
    """Where weights are read, and where they are made ready: not where the model computes, which goes on meanwhile."""
    if not _made_streams:
        reader = mx.new_stream(mx.cpu)
        on_gpu = mx.default_device() != mx.Device(mx.cpu)
        _made_streams.extend([reader, mx.new_stream(mx.default_device()) if on_gpu else reader])
    return _made_streams


def _check(model: nn.Module, weights: dict[str, mx.array], directory: Path) -> None:
    own = {name: each for name, each in tree_flatten(model.parameters()) if not name.endswith(SIDE)}
    wanted, weights = parted(own, model), {name: each for name, each in weights.items() if not name.endswith(SIDE)}
    if missing := sorted(wanted.keys() - weights.keys()):
        raise UserError(f"{directory} lacks the tensors {shown(missing)}; download the model again")
    if extra := sorted(weights.keys() - wanted.keys()):
        raise UserError(f"{directory} holds tensors its config.json does not account for: {shown(extra)}")
    for name, weight in weights.items():
        if not is_floating(weight) and weight.dtype != wanted[name].dtype:  # float8 comes as uint8
            kind = str(weight.dtype).removeprefix("mlx.core.")
            raise UserError(f"{directory}: tensor {name} is stored as {kind}, which is not supported")
        if weight.shape != wanted[name].shape:
            raise UserError(
                f"{directory}: tensor {name} has the wrong shape: {weight.shape} where config.json asks for "
                f"{wanted[name].shape}"
            )


def _by_layer(weights: dict[str, mx.array], layers: str) -> dict[int, dict[str, mx.array]]:
    """`layers.3.mlp.weight` -> 3: `mlp.weight`."""
    found: dict[int, dict[str, mx.array]] = {}
    for name, weight in weights.items():
        if name.startswith(f"{layers}."):
            number, _, rest = name.removeprefix(f"{layers}.").partition(".")
            if number.isdecimal():
                found.setdefault(int(number), {})[rest] = weight
    return found


def to_safetensors(tensors: dict[str, mx.array], metadata: dict[str, str] | None = None) -> bytes:
    file = io.BytesIO()
    mx.save_safetensors(file, tensors, metadata or {})
    return file.getvalue()


def mlx_dtype(name: str) -> mx.Dtype:
    return {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}[name]

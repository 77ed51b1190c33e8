"""A checkpoint -> the same with quantized weights: layer by layer, so that no more than one is in memory at a time.

Every layer becomes a file of its own, published whole, the index last: what was converted before an interruption is
there, and is not converted again. A layer's modulation stays as it is: its table is made from full precision.
"""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from artifacts_schema import disk
from artifacts_schema.errors import UserError
from stages import gguf_file, layouts
from stages.checkpoint import (
    COMPONENTS,
    INDEX_SUFFIX,
    Checkpoint,
    open_checkpoint,
    weight_files,
)
from stages.gguf_file import PackedTensor
from stages.measure import Notice, Report
from stages.memory import gigabytes
from stages.tensors import NUMBERS, WEIGHTS_SUFFIX, Tensor, tensors_of

LAYER = re.compile(r"(?:^|\.)(?:layers|transformer_blocks)\.(\d+)\.")
METADATA = "qwen-stage"
NUMBER_BYTES = 4  # of a scale or a bias, at most; for the estimate of the disk that is needed
SCHEDULER_CONFIG = "scheduler_config.json"
RECORD = "converted.json"  # what is written where, in a checkpoint that was converted
PART_BYTES = 512 << 20  # of what is in no layer: so much goes into one file
MAX_HEADER_BYTES = 100 << 20


class Quantization(NamedTuple):
    """What is done to one component, as its files say it."""

    component: str
    bits: int
    group_size: int
    made_from: str  # the fingerprint of the original component

    def metadata(self, part: int, parts: int) -> dict[str, str]:
        said = {
            "bits": self.bits,
            "group_size": self.group_size,
            "made_from": self.made_from,
            "part": f"{part}/{parts}",
        }
        return {"format": "mlx", METADATA: json.dumps(said)}


def convert(
    model: str | None, target: Path, bits: int, *, text_bits: int | None = None, report: Report, notice: Notice
) -> Path:
    """Writes the checkpoint `model` to `target`, the transformer's blocks quantized to `bits` (4 or 8).

    With `text_bits`, the text encoder's layers as well. Weights that stay as they are become hard links, or copies on
    another disk. Goes on where an earlier conversion was interrupted. Raises UserError for what cannot be converted.
    """
    from stages.quantized import GROUP_SIZE

    source = open_checkpoint(model)
    if source.lora_files or any(path.suffix != gguf_file.SUFFIX for path in source.others.values()):
        raise UserError("convert a checkpoint itself; LoRAs and components from elsewhere can be put in afterwards")
    place = target.resolve()
    if place.is_relative_to(source.directory) or source.directory.is_relative_to(place):
        raise UserError(f"{target} lies in the original, or around it; choose another place")
    wanted = {"transformer": bits} | ({} if text_bits is None else {"text_encoder": text_bits})
    record = _record(source, wanted)
    _refuse_strangers(target, record)
    _, schedule = source.fields("scheduler", SCHEDULER_CONFIG)
    components = [
        Component(source, Quantization(name, each, GROUP_SIZE, source.fingerprint(name)), target / name)
        for name, each in wanted.items()
    ]
    disk.make_directory(target)
    others = _others(source.directory, set(wanted))
    needed = sum(component.missing_bytes() for component in components)
    needed += sum(path.stat().st_size for path in others if path.stat().st_dev != target.stat().st_dev)
    if needed > (free := shutil.disk_usage(target).free):
        raise UserError(f"{target} needs {gigabytes(needed)}, its disk has {gigabytes(free)} left")
    try:
        with disk.lock(target):
            for directory in (target, *(path for path in target.iterdir() if path.is_dir())):
                disk.sweep(directory)
            if not (target / RECORD).exists():
                disk.publish(target, RECORD, record)
            for number, path in enumerate(others, 1):
                place = target / path.relative_to(source.directory)
                disk.make_directory(place.parent)
                disk.bring(path, place, link=path.suffix == WEIGHTS_SUFFIX)
                report("take over", number, len(others))
            if not source.has("scheduler"):
                disk.make_directory(target / "scheduler")
                disk.publish(target / "scheduler", SCHEDULER_CONFIG, json.dumps(schedule, indent=2).encode())
            for component in components:
                component.write(report, notice)
    except BlockingIOError:
        raise UserError(f"another process writes to {target}") from None
    return target


class Component:
    """One component, on its way from one directory to another."""

    def __init__(self, checkpoint: Checkpoint, quantization: Quantization, target: Path) -> None:
        from stages.models.text_encoder import TextEncoder
        from stages.models.transformer import QwenImageTransformer2DModel

        models: dict[str, Any] = {"transformer": QwenImageTransformer2DModel, "text_encoder": TextEncoder}
        self.model = models[quantization.component]
        self.quantization, self.target = quantization, target
        self.source = checkpoint.component(quantization.component)
        self.packed = gguf_file.packed_tensors(self.source) if self.source.suffix == gguf_file.SUFFIX else {}
        self.files = [] if self.packed else weight_files(self.source)
        stored: Mapping[str, Tensor | gguf_file.PackedTensor] = self.packed or tensors_of(self.files)
        self.tensors = {new: stored[old] for old, new in layouts.renamed(stored).items()}
        self.config = checkpoint.fields(quantization.component)[1]
        if packed := [name for name in self.tensors if name.endswith(".scales")]:
            raise UserError(f"{self.source} is quantized already ({packed[0]}); convert the original")
        if odd := [name for name, tensor in self.tensors.items() if tensor.dtype not in NUMBERS]:
            kind = self.tensors[odd[0]].dtype
            raise UserError(f"{self.source}: tensor {odd[0]} is stored as {kind}, which cannot be quantized")
        layers: dict[int, list[str]] = defaultdict(list)
        rest: list[list[str]] = [[]]
        for name, tensor in self.tensors.items():
            if found := LAYER.search(name):
                layers[int(found[1])].append(name)
            elif rest[-1] and sum(self.tensors[each].size for each in rest[-1]) + tensor.size > PART_BYTES:
                rest.append([name])
            else:
                rest[-1].append(name)
        self.parts = [part for part in (*rest, *(layers[number] for number in sorted(layers))) if part]
        self.stem = "model" if quantization.component == "text_encoder" else "diffusion_pytorch_model"
        count = len(self.parts)
        self.names = [f"{self.stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        ours = {name for number, name in enumerate(self.names) if self._is_there(number)}
        if strangers := {path.name for path in target.glob("*.safetensors")} - ours:
            raise UserError(
                f"{target} holds {min(strangers)}, which this conversion did not write; choose another place"
            )

    def missing_bytes(self) -> int:
        sizes = [sum(self._size(name) for name in part) for part in self.parts]
        return sum(size for number, size in enumerate(sizes) if not self._is_there(number))

    def write(self, report: Report, notice: Notice) -> None:
        import mlx.core as mx

        from stages.quantized import quantized_weights
        from stages.weights import to_safetensors

        disk.make_directory(self.target)
        there = [number for number in range(len(self.parts)) if self._is_there(number)]
        if there:
            notice(f"{len(there)} of {len(self.parts)} files of {self.target} are there already")
        unread: dict[str, mx.array] = {}
        for file in self.files:
            unread.update(mx.load(str(file), format="safetensors"))
        unread = layouts.standard(unread, set(), as_stored=False)
        for number, (part, name) in enumerate(zip(self.parts, self.names, strict=True)):
            own = {each: unread.pop(each) for each in part if each in unread}
            if number not in there:
                own |= {
                    each: packed.unpacked() for each in part if isinstance(packed := self.tensors[each], PackedTensor)
                }
                quantized = quantized_weights(own, self._bits)
                del own
                metadata = self.quantization.metadata(number + 1, len(self.parts))
                disk.publish(self.target, name, to_safetensors(quantized, metadata))
                del quantized
            report(f"convert {self.quantization.component}", number + 1, len(self.parts))
        config = dict(self.config)
        config["quantization"] = {"bits": self.quantization.bits, "group_size": self.quantization.group_size}
        self._put("config.json", config)
        written = tensors_of([self.target / name for name in self.names])
        index = {
            "metadata": {"total_size": sum(tensor.size for tensor in written.values())},
            "weight_map": {name: tensor.file.name for name, tensor in sorted(written.items())},
        }
        self._put(f"{self.stem}{INDEX_SUFFIX}", index)

    def _put(self, name: str, content: dict[str, Any]) -> None:
        data = json.dumps(content, indent=2).encode()
        if not (self.target / name).exists() or (self.target / name).read_bytes() != data:
            disk.publish(self.target, name, data)

    def _is_there(self, number: int) -> bool:
        """Whether a part was written by this very conversion: only whole files get their names."""
        path = self.target / self.names[number]
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size)) if size < MAX_HEADER_BYTES else None
        except (OSError, ValueError, RecursionError):
            return False
        said = self.quantization.metadata(number + 1, len(self.parts))
        return isinstance(header, dict) and header.get("__metadata__") == said

    def _bits(self, layer: str) -> int | None:
        """By the name that a layer has in the file."""
        for name in self.model.sanitize({f"{layer}.weight": None}):
            bits: int | None = self.model.bits_of(name.removesuffix(".weight"), self.quantization.bits)
            return bits
        return None

    def _size(self, name: str) -> int:
        tensor = self.tensors[name]
        layer, _, kind = name.rpartition(".")
        bits = self._bits(layer) if kind == "weight" and len(tensor.shape) == 2 else None
        if bits is None:
            return tensor.size
        count = prod(tensor.shape)
        return count * bits // 8 + 2 * NUMBER_BYTES * count // self.quantization.group_size


def _record(source: Checkpoint, converted: dict[str, int]) -> bytes:
    """What is made of what."""
    here = [name for name in COMPONENTS if name in source.others or (source.directory / name).is_dir()]
    components = {name: source.fingerprint(name) for name in here}
    return json.dumps({"bits": converted, "made_from": components}, indent=2).encode()


def _refuse_strangers(target: Path, record: bytes) -> None:
    if (target / RECORD).exists():
        if (target / RECORD).read_bytes() != record:
            raise UserError(f"{target} holds another conversion, or one of another model; choose another place")
    elif target.is_dir() and any(not each.name.startswith(".") for each in target.iterdir()):
        raise UserError(f"{target} holds something else already; choose another place")


def _others(source: Path, converted: set[str]) -> list[Path]:
    """The files of a checkpoint that stay as they are."""
    inner = [path for path in source.glob("*/*") if path.parent.name in set(COMPONENTS) - converted]
    return sorted(path for path in [*source.iterdir(), *inner] if path.is_file() and not path.name.startswith("."))

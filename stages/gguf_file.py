"""GGUF files, as llama.cpp and others quantize transformers: brought to full numbers by the `gguf` package."""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from artifacts_schema.errors import UserError

if TYPE_CHECKING:
    import mlx.core as mx

SUFFIX = ".gguf"


class PackedTensor(NamedTuple):
    """What can be had of a tensor, in bfloat16."""

    shape: tuple[int, ...]
    blocks: Any  # the file's own, read where they are needed
    kind: Any  # how they are packed
    dtype: str = "BF16"  # of what comes out, as safetensors calls it

    @property
    def size(self) -> int:
        """Bytes of what comes out."""
        return 2 * prod(self.shape)

    def unpacked(self) -> "mx.array":
        import mlx.core as mx
        from gguf import quants

        return mx.array(quants.dequantize(self.blocks, self.kind).reshape(self.shape)).astype(mx.bfloat16)


def packed_tensors(path: Path) -> dict[str, PackedTensor]:
    """Those in a file, by their names. UserError for one that is no whole GGUF, or cannot be unpacked."""
    try:
        from gguf import GGUFReader, quants
    except ImportError:
        raise UserError(f"{path} needs the package gguf: pip install 'qwen-stage[gguf]'") from None
    try:
        found = GGUFReader(path).tensors
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} is no whole GGUF file ({error}); download it again") from None
    for each in {each.tensor_type: each for each in found}.values():  # one of each kind
        try:
            quants.dequantize(each.data[:1] if each.data.ndim > 1 else each.data, each.tensor_type)
        except NotImplementedError:
            kind = each.tensor_type.name
            raise UserError(f"{path}: {each.name} is packed as {kind}, which the package gguf cannot undo") from None
    return {
        each.name: PackedTensor(tuple(int(size) for size in reversed(each.shape)), each.data, each.tensor_type)
        for each in found
    }

"""Which tensors safetensors files hold, read from their headers alone.

The package of that name would do the same, but imports numpy, which takes longer than encoding a prompt.
"""

from math import prod
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from artifacts_schema.errors import UserError

WEIGHTS_SUFFIX = ".safetensors"
SHOWN_NAMES = 3  # in an error
METADATA = "__metadata__"  # in a safetensors header
HEADER_SIZE_BYTES = 8  # a safetensors file begins with the size of its header
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
BITS_PER_NUMBER = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # in safetensors files
BITS_PER_NUMBER |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8)
BITS_PER_NUMBER |= dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
BITS_PER_NUMBER |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
BITS_PER_NUMBER |= dict.fromkeys(("I32", "U32", "F32"), 32)
BITS_PER_NUMBER |= dict.fromkeys(("C64", "F64", "I64", "U64"), 64)
NUMBERS = ("BF16", "F16", "F32")  # formats of weights, as safetensors calls them


class Tensor(NamedTuple):
    """Where a tensor lies in a file, and what it is."""

    file: Path
    dtype: str  # safetensors' name: BF16, F32, U32
    shape: tuple[int, ...]
    begin: int
    size: int  # bytes


class _Entry(msgspec.Struct):
    """What a safetensors header says of a tensor."""

    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]


def tensors_of(files: list[Path]) -> dict[str, Tensor]:
    """The tensors in safetensors files that were checked before, by name."""
    return {name: tensor for path in files for name, tensor in tensors_in(path).items()}


def tensors_in(path: Path) -> dict[str, Tensor]:
    """What the header of a safetensors file promises. Raises ValueError unless the file holds just that."""
    total = path.stat().st_size
    header, start = _header(path, total)
    msgspec.json.decode(header.pop(METADATA, b"null"), type=dict[str, str] | None)
    entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in header.items()}
    at = start
    tensors = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = (start + offset for offset in entry.data_offsets)
        size = end - begin
        if entry.dtype not in BITS_PER_NUMBER:
            raise ValueError(f"tensor {name} is {entry.dtype}, which is unknown")
        if begin != at or 8 * size != BITS_PER_NUMBER[entry.dtype] * prod(entry.shape):
            raise ValueError(f"tensor {name} is not where or not as large as its header says")
        tensors[name] = Tensor(path, entry.dtype, entry.shape, begin, size)
        at = end
    if at != total:
        raise ValueError(f"it should have {at} bytes and has {total}")
    return tensors


def _header(path: Path, total: int) -> tuple[dict[str, msgspec.Raw], int]:
    """That of a safetensors file of so many bytes, and where it ends."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(HEADER_SIZE_BYTES), "little")
        if header_bytes > min(MAX_HEADER_BYTES, total - HEADER_SIZE_BYTES):
            raise ValueError("its header does not end")
        header = msgspec.json.decode(file.read(header_bytes), type=dict[str, msgspec.Raw])
    return header, HEADER_SIZE_BYTES + header_bytes


def checked_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in one safetensors file, by name. UserError for a file that is none, or not whole."""
    try:
        return tensors_in(path)
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}); download it again") from None


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file that was checked says of itself."""
    header, _ = _header(path, path.stat().st_size)
    return msgspec.json.decode(header.get(METADATA, b"{}"), type=dict[str, str] | None) or {}


def shown(names: list[str]) -> str:
    """Some of the names, for an error."""
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")

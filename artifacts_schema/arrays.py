"""Latents and trajectories as zarr arrays: float32, one checksummed chunk a picture or a step, no compression.

The arrays are made in memory, by zarr; the files they consist of are published, and checked, as any others. What the
check lets through is a chunk of plain numbers and read as such: importing zarr takes longer than reading many arrays.
"""

import json
import math
from collections.abc import Mapping
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

METADATA = "zarr.json"
MAX_METADATA_BYTES = 64 << 10
CHECKSUM_BYTES = 4  # crc32c, after each chunk
MAY_BE_EMPTY = ("attributes", "storage_transformers", "dimension_names")  # zarr's releases differ in writing these

Shape = tuple[int, ...]


def begin_to_pack() -> None:
    """Lets what packing imports be imported beside other work."""
    Thread(target=import_module, args=("zarr",), daemon=True).start()


def pack(latents: "np.ndarray") -> dict[str, bytes]:
    """The files of an array of one chunk."""
    return _pack(latents.shape, latents.shape, ..., latents)


def unpack(files: Mapping[str, bytes], shape: Shape) -> "np.ndarray":
    """The array of one chunk that these files are. Raises ValueError if we would not have written them so."""
    return _unpack(files, shape, shape)


def pack_step(shape: Shape, step: int, latents: "np.ndarray") -> dict[str, bytes]:
    """The metadata of a trajectory [steps + 1, …], and the chunk of one step."""
    return _pack(shape, (1, *shape[1:]), step, latents)


def unpack_step(files: Mapping[str, bytes], shape: Shape, step: int) -> "np.ndarray":
    """One step of a trajectory, from its metadata and that step's chunk. Raises ValueError as `unpack`."""
    return _unpack(files, shape, (1, *shape[1:]), step)[0]


def chunk_name(step: int | None = None) -> str:
    """The path of a step's chunk inside the array's directory; of the only one without `step`."""
    return "c/0/0/0" if step is None else f"c/{step}/0/0/0"


def chunk_bytes(shape: Shape) -> int:
    return 4 * math.prod(shape) + CHECKSUM_BYTES


def _pack(shape: Shape, chunks: Shape, where: Any, values: "np.ndarray") -> dict[str, bytes]:
    import zarr  # first: another thread may be at it, and waits for none of its parts
    from zarr.codecs import Crc32cCodec
    from zarr.storage import MemoryStore

    held: dict[str, Any] = {}
    array = zarr.create_array(
        store=MemoryStore(store_dict=held),
        shape=shape,
        chunks=chunks,
        dtype="float32",
        filters=None,
        compressors=[Crc32cCodec()],  # compression would save 8%
        fill_value=float("nan"),  # an absent chunk must not pass for latents
        config={"write_empty_chunks": True},
    )
    array[where] = values
    return {name: buffer.to_bytes() for name, buffer in held.items()}


def _unpack(files: Mapping[str, bytes], shape: Shape, chunks: Shape, step: int | None = None) -> "np.ndarray":
    """One chunk."""
    import google_crc32c  # as zarr does
    import numpy as np

    check(files[METADATA], shape, chunks)
    chunk = memoryview(files[chunk_name(step)])
    if len(chunk) != chunk_bytes(chunks):
        raise ValueError(f"has a chunk of {len(chunk)} bytes instead of {chunk_bytes(chunks)}")
    numbers, checksum = chunk[:-CHECKSUM_BYTES], chunk[-CHECKSUM_BYTES:]
    if google_crc32c.value(bytes(numbers)) != int.from_bytes(checksum, "little"):
        raise ValueError("has a chunk that its checksum does not fit")
    values = np.frombuffer(numbers, "<f4").reshape(chunks)
    if not np.isfinite(values).all():
        raise ValueError("holds NaN or infinite numbers")
    return values


def check(metadata: bytes, shape: Shape, chunks: Shape) -> None:
    """Raises ValueError unless this is what we write: another codec could turn a small chunk into gigabytes."""
    try:
        found = json.loads(metadata)
    except (ValueError, RecursionError):
        raise ValueError("its metadata is not JSON") from None
    if not isinstance(found, dict):
        raise ValueError("its metadata is not an object")
    found = {name: value for name, value in found.items() if value or name not in MAY_BE_EMPTY}
    wanted = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN",
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    if json.dumps(found, sort_keys=True) != json.dumps(wanted, sort_keys=True):  # in Python, 4.0 == 4 == True + 3
        raise ValueError("is not an array as qwen-stage writes them")

"""Canonical bytes to SHA-256: the keys that name results, and the fingerprints that identify checkpoint components."""

import hashlib
from pathlib import Path
from typing import Any

import msgspec

KEY_LENGTH = 32  # hex digits, 128 bits: short enough for file names, long enough never to collide
SAMPLE_BLOCKS = 16  # content blocks read from each weight file: 1 MB a file, however large the component
SAMPLE_BLOCK_BYTES = 1 << 16


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def key(determined_by: Any) -> str:
    """The key of a result: a hash of everything that determines it (any msgspec-encodable value, floats finite)."""
    return sha256(msgspec.json.encode(determined_by, order="deterministic"))[:KEY_LENGTH]


def fingerprint(files: list[Path]) -> str:
    """Identifies a checkpoint component by its files' names, sizes and sampled content, wherever it is stored.

    Small files count whole; of large ones the first and last block and evenly spaced ones between are read: the
    safetensors header lies in the first, and no two trainings share the rest.
    """
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.name):
        size = path.stat().st_size
        digest.update(msgspec.json.encode([path.name, size]))
        with path.open("rb") as file:
            if size <= SAMPLE_BLOCKS * SAMPLE_BLOCK_BYTES:
                digest.update(file.read())
                continue
            for i in range(SAMPLE_BLOCKS):
                file.seek((size - SAMPLE_BLOCK_BYTES) * i // (SAMPLE_BLOCKS - 1))
                digest.update(file.read(SAMPLE_BLOCK_BYTES))
    return digest.hexdigest()

"""A picture's latents step by step: the checkpoint from which an interrupted `denoise` goes on.

`<key>.trajectory.zarr` is float32 [steps + 1, C, h, w], one checksummed chunk a step; step 0 is the noise. A chunk is
there whole or not at all, and counts only if its checksum holds and all of it is finite.
"""

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts_schema import arrays, disk, store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import File

if TYPE_CHECKING:
    import numpy as np


class Trajectory:
    def __init__(self, directory: Path, key: str, steps: int, shape: tuple[int, int, int]) -> None:
        self.directory = directory
        self.name = f"{key}.trajectory.zarr"
        self.path = directory / self.name
        self.shape = (steps + 1, *shape)

    def steps(self) -> set[int]:
        """The steps that have a chunk, whatever is in it."""
        return {int(path.name) for path in (self.path / "c").glob("*") if path.name.isdecimal()}

    def read(self, step: int) -> "np.ndarray | None":
        """The latents [C, h, w] after so many steps, or None if they are not there or damaged."""
        name = arrays.chunk_name(step)
        try:
            files = {
                arrays.METADATA: disk.read(self.path / arrays.METADATA, arrays.MAX_METADATA_BYTES),
                name: disk.read(self.path / name, arrays.chunk_bytes(self.shape[1:])),
            }
            return arrays.unpack_step(files, self.shape, step)
        except (OSError, UserError, ValueError, IndexError):
            return None

    def write(self, step: int, latents: "np.ndarray") -> None:
        files = arrays.pack_step(self.shape, step, latents)
        name = arrays.chunk_name(step)
        if self._is_begun():
            disk.publish(self.directory, f"{self.name}/c/{step}", {name.removeprefix(f"c/{step}/"): files[name]})
        else:
            disk.publish(self.directory, self.name, files)

    def forget(self, steps: set[int]) -> None:
        for step in steps:
            disk.remove(self.path / "c" / str(step))

    def remove(self) -> None:
        disk.remove(self.path)

    def files(self) -> tuple[File, ...]:
        """All of it, as a manifest lists it."""
        names = (arrays.METADATA, *(arrays.chunk_name(step) for step in range(self.shape[0])))
        content = {name: disk.read(self.path / name, store.MAX_FILE_BYTES) for name in names}
        return store.describe(self.name, content)

    def _is_begun(self) -> bool:
        try:
            metadata = disk.read(self.path / arrays.METADATA, arrays.MAX_METADATA_BYTES)
            arrays.check(metadata, self.shape, (1, *self.shape[1:]))
        except (OSError, UserError, ValueError):
            return False
        return True


def resume_step(trajectories: list[Trajectory], whole: bool) -> int:
    """The last step that all of them hold undamaged; with `whole`, the last before the first gap. 0: start anew."""

    def held(step: int) -> bool:
        return all(trajectory.read(step) is not None for trajectory in trajectories)

    common = set.intersection(*(trajectory.steps() for trajectory in trajectories))
    if whole:
        return max(0, sum(1 for _ in takewhile(held, range(len(common)))) - 1)
    return next(filter(held, sorted(common, reverse=True)), 0)

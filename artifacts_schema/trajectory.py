"""A picture's latents step by step: the checkpoint from which an interrupted `denoise` goes on.

`<key>.trajectory.zarr` is float32 [steps + 1, C, h, w], one checksummed chunk a step; step 0 is the noise. A chunk is
written whole or not at all, and counts only if its checksum holds and all of it is finite.
"""

import shutil
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts_schema import store
from artifacts_schema.manifests import File

if TYPE_CHECKING:
    import numpy as np


class Trajectory:
    def __init__(self, directory: Path, key: str, steps: int, shape: tuple[int, int, int]) -> None:
        self.directory = directory
        self.path = directory / f"{key}.trajectory.zarr"
        self.shape = (steps + 1, *shape)
        self._array: Any = None

    def steps(self) -> set[int]:
        """The steps that have a chunk, whatever is in it."""
        if not self._open():
            return set()
        return {
            int(path.name) for path in (self.path / "c").glob("*") if path.name.isdecimal() and any(path.rglob("0"))
        }

    def read(self, step: int) -> "np.ndarray | None":
        """The latents [C, h, w] after so many steps, or None if they are not there or damaged."""
        import numpy as np

        if not self._open():
            return None
        try:
            latents = np.asarray(self._array[step])
        except (OSError, ValueError, IndexError):
            return None
        return latents if np.isfinite(latents).all() else None

    def write(self, step: int, latents: "np.ndarray") -> None:
        if not self._open():
            self.remove()
            store.publish(self.directory, self.path.name, lambda path: store.create_array(path, self.shape, (1,)))
            self._open()
        self._array[step] = latents
        chunk = self.path / "c" / str(step) / "0" / "0" / "0"
        for path in (chunk, *list(chunk.parents)[:4], self.path):  # zarr renames it into place, but syncs nothing
            store.sync(path)

    def forget(self, steps: set[int]) -> None:
        for step in steps:
            shutil.rmtree(self.path / "c" / str(step), ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def files(self) -> tuple[File, ...]:
        return store.describe(self.path, self.path.name)

    def _open(self) -> bool:
        """Whether there is an array as we would write it."""
        if self._array is None and self.path.is_dir():
            import zarr

            try:
                array = zarr.open_array(store=self.path, mode="r+")
                if array.shape == self.shape and array.chunks == (1, *self.shape[1:]) and array.dtype == "float32":
                    self._array = array
            except (OSError, ValueError, KeyError, TypeError):
                return False
        return self._array is not None


def resume_step(trajectories: list[Trajectory], whole: bool) -> int:
    """The last step that all of them hold undamaged; with `whole`, the last before the first gap. 0: start anew."""

    def held(step: int) -> bool:
        return all(trajectory.read(step) is not None for trajectory in trajectories)

    common = set.intersection(*(trajectory.steps() for trajectory in trajectories))
    if whole:
        return max(0, sum(1 for _ in takewhile(held, range(len(common)))) - 1)
    return next(filter(held, sorted(common, reverse=True)), 0)

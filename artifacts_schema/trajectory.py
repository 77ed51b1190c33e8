"""A picture's latents step by step: the checkpoint from which an interrupted `denoise` goes on.

    <key>.trajectory.zarr   float32 [steps + 1, C, h, w], one chunk a step; step 0 is the noise
    <key>.trajectory.json   the hash of each chunk: without it, one step's chunk could stand in another's place

A chunk is there whole or not at all, after its hash; it counts if it matches that. A step that reuses what an earlier
one computed cannot be gone on from: for it the record names that earlier one.
"""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from artifacts_schema import arrays, disk, keys, store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import File, LatentsManifest, Record, Sha256

if TYPE_CHECKING:
    import numpy as np

MAX_RECORD_BYTES = 1 << 20


class TrajectoryRecord(Record, frozen=True, kw_only=True):
    key: str
    chunks: dict[int, Sha256]
    resumable: dict[int, int] = msgspec.field(default_factory=dict)  # by the step: the one to go on from instead
    checksum: str = ""


class Trajectory:
    def __init__(self, directory: Path, key: str, steps: int, shape: tuple[int, int, int]) -> None:
        self.directory = directory
        self.key = key
        self.name = f"{key}.trajectory.zarr"
        self.path = directory / self.name
        self.record = directory / f"{key}.trajectory.json"
        self.shape = (steps + 1, *shape)
        self._record: TrajectoryRecord | None = None

    def steps(self) -> set[int]:
        """The steps that have a chunk, whatever is in it."""
        found = {int(path.name) for path in (self.path / "c").glob("*") if path.name.isdecimal()}
        return found & self._recorded().chunks.keys()

    def read(self, step: int) -> "np.ndarray | None":
        """The latents [C, h, w] after so many steps, or None if they are not there or damaged."""
        name = arrays.chunk_name(step)
        try:
            files = {
                arrays.METADATA: disk.read(self.path / arrays.METADATA, arrays.MAX_METADATA_BYTES),
                name: disk.read(self.path / name, arrays.chunk_bytes(self.shape[1:])),
            }
            if keys.sha256(files[name]) != self._recorded().chunks.get(step):
                return None
            return arrays.unpack_step(files, self.shape, step)
        except (OSError, UserError, ValueError, IndexError):
            return None

    def resumable(self, reached: int) -> int:
        """The step to go on from where the steps up to `reached` are there."""
        return self._recorded().resumable.get(reached, reached)

    def write(self, step: int, latents: "np.ndarray", resumable: int) -> None:
        """The latents [C, h, w] after so many steps; `resumable` is the step to go on from, mostly this one."""
        files = arrays.pack_step(self.shape, step, latents)
        name = arrays.chunk_name(step)
        before = self._recorded()
        instead = {own: other for own, other in before.resumable.items() if own != step}
        self._record = TrajectoryRecord(
            key=self.key,
            chunks={**before.chunks, step: keys.sha256(files[name])},
            resumable=instead if resumable == step else {**instead, step: resumable},
        )
        disk.publish(self.directory, self.record.name, store.seal(self._record, TrajectoryRecord))
        if self._is_begun():
            disk.publish(self.directory, f"{self.name}/c/{step}", {name.removeprefix(f"c/{step}/"): files[name]})
        else:
            disk.publish(self.directory, self.name, files)

    def forget(self, steps: set[int]) -> None:
        for step in steps:
            disk.remove(self.path / "c" / str(step))

    def remove(self) -> None:
        disk.remove(self.record)
        disk.remove(self.path)

    def files(self) -> tuple[File, ...]:
        """All of it, as a manifest lists it."""
        names = (arrays.METADATA, *(arrays.chunk_name(step) for step in range(self.shape[0])))
        content = {name: disk.read(self.path / name, store.MAX_FILE_BYTES) for name in names}
        record = store.describe(self.record.name, disk.read(self.record, MAX_RECORD_BYTES))
        return (*store.describe(self.name, content), *record)

    def _recorded(self) -> TrajectoryRecord:
        if self._record is None:
            self._record = TrajectoryRecord(key=self.key, chunks={})  # as if there were no steps
            with suppress(OSError, UserError, ValueError):
                record = store.unseal(disk.read(self.record, MAX_RECORD_BYTES), TrajectoryRecord)
                self._record = record if record.key == self.key else self._record
        return self._record

    def _is_begun(self) -> bool:
        try:
            metadata = disk.read(self.path / arrays.METADATA, arrays.MAX_METADATA_BYTES)
            arrays.check(metadata, self.shape, (1, *self.shape[1:]))
        except (OSError, UserError, ValueError):
            return False
        return True


def forget_steps(directory: Path) -> None:
    """Removes the steps of finished pictures whose steps are not to be kept: a kill can leave them."""
    manifest, _ = store.read_manifest(directory, LatentsManifest)
    for item in manifest.items:
        if not item.trajectory:
            Trajectory(directory, item.key, item.num_inference_steps, item.shape).remove()


def resume(trajectories: list[Trajectory], whole: bool) -> "tuple[int, list[np.ndarray]] | None":
    """The last step that all of them hold undamaged, and their latents there; with `whole`, the last before a gap.

    Or the step before it that they say is the one to go on from.
    """
    common = set.intersection(*(trajectory.steps() for trajectory in trajectories))
    steps = list(range(len(common))) if whole else sorted(common, reverse=True)
    best = None
    for step in steps:
        latents = [found for trajectory in trajectories if (found := trajectory.read(step)) is not None]
        if len(latents) == len(trajectories):
            best = step, latents
        if whole == (len(latents) < len(trajectories)):  # the first gap, or the first that has none
            break
    if best and (resumable := min(trajectory.resumable(best[0]) for trajectory in trajectories)) != best[0]:
        latents = [found for trajectory in trajectories if (found := trajectory.read(resumable)) is not None]
        best = (resumable, latents) if resumable < best[0] and len(latents) == len(trajectories) else None
    return best if best and best[0] else None

"""The modulation of a whole schedule: a table that is computed once, from a third of the transformer's parameters.

It depends on the transformer and the noise levels alone. The cache keeps it (88 MB for 20 steps of the 20B model in
bfloat16), so that `denoise` never loads those 6.8 billion parameters: where a table is missing they are streamed.
"""

import io
from functools import partial
from typing import TYPE_CHECKING

from artifacts_schema import cache, keys
from artifacts_schema.manifests import ModulationTable
from stages.checkpoint import Checkpoint
from stages.measure import Notice, Report

if TYPE_CHECKING:
    import mlx.core as mx

    from stages.models.transformer import Modulation, TransformerConfig

CODE_VERSION = 1  # raised whenever the same noise levels would give another table
SCHEDULES_AT_ONCE = 4  # that share one pass over the weights; more would hold too many tables in memory

Sigmas = tuple[float, ...]  # noise levels: one for each step, then the one after the last


class Tables:
    """The modulations for a transformer's schedules, in the cache; without one, in memory."""

    def __init__(
        self, checkpoint: Checkpoint, config: "TransformerConfig", dtype: str, report: Report, notice: Notice
    ) -> None:
        self.checkpoint, self.config, self.dtype, self.report, self.notice = checkpoint, config, dtype, report, notice

    def prepare(self, schedules: list[Sigmas]) -> None:
        """Makes the tables that are missing, several in one pass over the weights."""
        missing = [sigmas for sigmas in dict.fromkeys(schedules) if not self._find(sigmas)]
        for start in range(0, len(missing), SCHEDULES_AT_ONCE):
            self._make(missing[start : start + SCHEDULES_AT_ONCE])

    def of(self, sigmas: Sigmas) -> "list[Modulation]":
        """One for each step."""
        import mlx.core as mx

        from stages.models.transformer import Modulation

        if self._find(sigmas):
            item = self._item(sigmas)
            content = cache.take(cache.MODULATIONS, item.key, partial(_check, item=item), self.notice)
            if content is not None:
                table = Modulation(**mx.load(io.BytesIO(content), format="safetensors"))
                return _by_step(table)
        return _by_step(self._make([sigmas])[0])

    def _find(self, sigmas: Sigmas) -> bool:
        item = self._item(sigmas)
        return cache.find(cache.MODULATIONS, item.key, self.notice) == item

    def _item(self, sigmas: Sigmas) -> ModulationTable:
        determined_by = {
            "transformer": self.checkpoint.fingerprint("transformer"),
            "sigmas": sigmas[:-1],
            "dtype": self.dtype,
            "code": CODE_VERSION,
        }
        key = keys.key({"modulation": determined_by})
        steps, layers, dim = len(sigmas) - 1, self.config.num_layers, self.config.dim
        return ModulationTable(key=key, steps=steps, layers=layers, dim=dim, dtype=self.dtype)

    def _make(self, schedules: list[Sigmas]) -> "list[Modulation]":
        """One pass over the weights: each layer is read once, the next one meanwhile."""
        import mlx.core as mx

        from stages.models.transformer import Modulation, Modulator
        from stages.weights import Streamed, load_weights, mlx_dtype, to_safetensors

        dtype = mlx_dtype(self.dtype)
        modulator = Modulator(self.config)
        load_weights(modulator, self.checkpoint.component("transformer"), dtype, stream=True)
        if isinstance(modulator.transformer_blocks, Streamed):
            modulator.transformer_blocks.after_layer = partial(self.report, "modulation")
        levels = list(dict.fromkeys(sigma for sigmas in schedules for sigma in sigmas[:-1]))
        whole = modulator([model_timestep(sigma, dtype) for sigma in levels], dtype)
        tables = []
        for sigmas in schedules:
            rows = mx.array([levels.index(sigma) for sigma in sigmas[:-1]])
            table = Modulation(*[part[rows] for part in whole])
            item = self._item(sigmas)
            cache.put(cache.MODULATIONS, item.key, item, to_safetensors(table._asdict()))
            tables.append(table)
        return tables


def model_timestep(sigma: float, compute: "mx.Dtype") -> "mx.array":
    """A noise level as the transformer takes it: a scalar, rounded to the compute dtype where the reference rounds."""
    import mlx.core as mx

    return mx.array(1000 * sigma).astype(compute) / 1000


def _by_step(table: "Modulation") -> "list[Modulation]":
    from stages.models.transformer import Modulation

    return [Modulation(*parts) for parts in zip(*table, strict=True)]


def _check(content: bytes, item: ModulationTable) -> None:
    """Raises ValueError for what is not such a table."""
    import mlx.core as mx

    from stages.weights import mlx_dtype

    try:
        tensors = mx.load(io.BytesIO(content), format="safetensors")
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    blocks = (item.steps, item.layers, 6 * item.dim)
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    shapes = {"img": blocks, "txt": blocks, "out": (item.steps, 2 * item.dim)}
    if found != {name: (shape, mlx_dtype(item.dtype)) for name, shape in shapes.items()}:
        raise ValueError("not the table that its record describes")

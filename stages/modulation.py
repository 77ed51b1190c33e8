"""The modulation of a whole schedule: a table that is computed once, from a third of the transformer's parameters.

It depends on the transformer and the noise levels alone. The cache keeps it (88 MB for 20 steps of the 20B model in
bfloat16), so that `denoise` never loads those 6.8 billion parameters: where a table is missing they are streamed.
"""

import io
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from artifacts_schema import cache, keys
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import ModulationTable
from stages import memory
from stages.checkpoint import Checkpoint, weight_files, with_loras
from stages.lora import Lora, changes_in, layers_of
from stages.measure import Notice, Report
from stages.tensors import tensors_of

if TYPE_CHECKING:
    import mlx.core as mx

    from stages.models.transformer import Modulation, TransformerConfig

CODE_VERSION = 1  # raised whenever the same noise levels would give another table
SCHEDULES_AT_ONCE = 4  # that share one pass over the weights
COPIES = 3  # of a table in memory, while it is made and written

Sigmas = tuple[float, ...]  # noise levels: one for each step, then the one after the last


class Tables:
    """The modulations for a transformer's schedules, in the cache; without one, in memory."""

    def __init__(
        self, checkpoint: Checkpoint, config: "TransformerConfig", dtype: str, report: Report, notice: Notice
    ) -> None:
        self.checkpoint, self.config, self.dtype, self.report, self.notice = checkpoint, config, dtype, report, notice
        self.held: dict[Sigmas, Modulation] = {}  # what the cache did not take
        # most LoRAs leave these weights alone: then the table is that of the model itself
        self.fingerprint = with_loras(checkpoint.without_loras().fingerprint("transformer"), _own_loras(checkpoint))

    def prepare(self, schedules: list[Sigmas], within: memory.Budget) -> None:
        """Makes the tables that are missing, several in one pass over the weights if there is room for them.

        Raises UserError beyond a promised budget.
        """
        missing = [sigmas for sigmas in dict.fromkeys(schedules) if not self._find(sigmas)]
        while missing:
            at_once = self._how_many(missing, within)
            for sigmas, table in self._make(missing[:at_once]):
                if not self._find(sigmas):  # the cache did not take it
                    self.held[sigmas] = table
            missing = missing[at_once:]

    def of(self, sigmas: Sigmas) -> "list[Modulation]":
        """One for each step."""
        import mlx.core as mx

        from stages.models.transformer import Modulation

        if sigmas not in self.held:
            item = self._item(sigmas)
            content = cache.take(cache.MODULATIONS, item.key, partial(_check, item=item), self.notice)
            if content is None:  # damaged or trimmed meanwhile
                ((_, table),) = self._make([sigmas])
                return _by_step(table)
            return _by_step(Modulation(**mx.load(io.BytesIO(content), format="safetensors")))
        return _by_step(self.held[sigmas])

    def _how_many(self, schedules: list[Sigmas], within: memory.Budget) -> int:
        from stages.models.transformer import Modulator, TransformerConfig
        from stages.weights import Loading

        weights = Loading(self.checkpoint, "transformer", Modulator, TransformerConfig, self.dtype).weights()
        steps = max(len(sigmas) - 1 for sigmas in schedules)
        table = COPIES * memory.table_bytes(self.config, steps, self.dtype)
        _, needed = memory.needs(weights, table)
        if within.promised and needed > within.size:
            gigabytes = memory.gigabytes
            raise UserError(f"the table of modulations needs {gigabytes(needed)}, more than {within}; take fewer steps")
        return max(1, min(SCHEDULES_AT_ONCE, 1 + (within.size - needed) // table))

    def _find(self, sigmas: Sigmas) -> bool:
        item = self._item(sigmas)
        return cache.find(cache.MODULATIONS, item.key, self.notice) == item

    def _item(self, sigmas: Sigmas) -> ModulationTable:
        determined_by = {
            "transformer": self.fingerprint,
            "sigmas": sigmas[:-1],
            "dtype": self.dtype,
            "code": CODE_VERSION,
        }
        key = keys.key({"modulation": determined_by})
        steps, layers, dim = len(sigmas) - 1, self.config.num_layers, self.config.dim
        return ModulationTable(key=key, steps=steps, layers=layers, dim=dim, dtype=self.dtype)

    def _make(self, schedules: list[Sigmas]) -> "Iterator[tuple[Sigmas, Modulation]]":
        """One pass over the weights: each layer is read once, the next one meanwhile."""
        import mlx.core as mx

        from stages.models.transformer import Modulation, Modulator
        from stages.weights import Streamed, load_weights, mlx_dtype, to_safetensors

        dtype = mlx_dtype(self.dtype)
        modulator = Modulator(self.config)
        directory, loras = self.checkpoint.component("transformer"), self.checkpoint.loras("transformer")
        load_weights(modulator, directory, dtype, loras=loras, stream=True)
        if isinstance(modulator.transformer_blocks, Streamed):
            modulator.transformer_blocks.after_layer = partial(self.report, "modulation")
        levels = list(dict.fromkeys(sigma for sigmas in schedules for sigma in sigmas[:-1]))
        whole = modulator([model_timestep(sigma, dtype) for sigma in levels], dtype)
        mx.eval(whole)
        for sigmas in schedules:
            rows = mx.array([levels.index(sigma) for sigma in sigmas[:-1]])
            table = Modulation(*[part[rows] for part in whole])
            item = self._item(sigmas)
            cache.put(cache.MODULATIONS, item.key, item, to_safetensors(table._asdict()))
            yield sigmas, table


def model_timestep(sigma: float, compute: "mx.Dtype") -> "mx.array":
    """A noise level as the transformer takes it: a scalar, rounded to the compute dtype where the reference rounds."""
    import mlx.core as mx

    return mx.array(1000 * sigma).astype(compute) / 1000


def _own_loras(checkpoint: Checkpoint) -> list[Lora]:
    """Those that change the modulation."""
    from stages.models.transformer import Modulator

    if not (loras := checkpoint.loras("transformer")):
        return []
    layers = layers_of(tensors_of(weight_files(checkpoint.component("transformer"))))
    changed = [(lora, changes_in(lora.path, layers)) for lora in loras]
    return [lora for lora, changes in changed if any(Modulator.owns(f"{layer}.weight") for layer in changes)]


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

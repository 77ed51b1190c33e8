"""The modulation of a whole schedule: a table that is computed once, from a third of the transformer's parameters.

It depends on the transformer and the noise levels alone. The cache keeps it (88 MB for 20 steps of the 20B model in
bfloat16), so that `denoise` never loads those 6.8 billion parameters: where a table is missing they are streamed.
"""

import io
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from artifacts_schema import cache, keys
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import ModulationTable
from stages import memory
from stages.checkpoint import Checkpoint, weight_files, with_loras
from stages.lora import Lora, changes_in, layers_of
from stages.measure import Notice, Report
from stages.tensors import HEADER_SIZE_BYTES, tensors_of

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
        self.held: dict[Sigmas, bytes] = {}  # what the cache did not take
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

    def of(self, sigmas: Sigmas, first: int = 0) -> "Table":
        """One for each step from `first` on."""
        item = self._item(sigmas)
        content = self.held.get(sigmas)
        if content is None:
            content = cache.take(cache.MODULATIONS, item.key, partial(_check, item=item), self.notice)
        if content is None:  # damaged or trimmed meanwhile
            ((_, content),) = self._make([sigmas])
        return Table(content, item, first)

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

    def _make(self, schedules: list[Sigmas]) -> Iterator[tuple[Sigmas, bytes]]:
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
            table = to_safetensors(Modulation(*[part[rows] for part in whole])._asdict())
            item = self._item(sigmas)
            cache.put(cache.MODULATIONS, item.key, item, table)
            yield sigmas, table


class Table(Sequence["Modulation"]):
    """The modulation of each step of a schedule; in MLX's memory is only that which is used."""

    def __init__(self, content: bytes, item: ModulationTable, first: int) -> None:
        """`content` is a safetensors file; the steps before `first` are left out."""
        begin = HEADER_SIZE_BYTES + int.from_bytes(content[:HEADER_SIZE_BYTES], "little")
        header = msgspec.json.decode(content[HEADER_SIZE_BYTES:begin], type=dict[str, Any])
        offsets = {name: header[name]["data_offsets"] for name in ("img", "txt", "out")}
        self.item, self.first = item, first
        self.parts = {name: memoryview(content)[begin + start : begin + end] for name, (start, end) in offsets.items()}

    def __len__(self) -> int:
        return self.item.steps - self.first

    def __getitem__(self, step: int) -> "Modulation":  # type: ignore[override]
        import mlx.core as mx

        from stages.models.transformer import Modulation
        from stages.weights import mlx_dtype

        if not 0 <= step < len(self):
            raise IndexError(step)

        def own(name: str) -> mx.array:
            size = len(self.parts[name]) // self.item.steps
            begin = (self.first + step) * size
            return mx.array(self.parts[name][begin : begin + size]).view(mlx_dtype(self.item.dtype))

        layers = (self.item.layers, -1)
        return Modulation(own("img").reshape(layers), own("txt").reshape(layers), own("out"))


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

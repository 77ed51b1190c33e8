"""How much memory a stage needs, told from configs and headers before anything is loaded, and how much there is.

Estimates are meant to err on the large side; `benchmarks/memory.py` shows what MLX measures.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from artifacts_schema.errors import UserError
from stages.checkpoint import has_cuda
from stages.measure import Notice, gigabytes

if TYPE_CHECKING:
    from stages.models.text_encoder import TextEncoderConfig
    from stages.models.transformer import TransformerConfig
    from stages.models.vae import VAEConfig

PROCESS_BYTES = 250 << 20  # Python, MLX and the other libraries
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
HELD_BACK_AT = 0.8  # of the estimated states: with less a GPU begins to wait, and MLX goes a little beyond ...
LEAST_STATES = 704 << 20  # ... nor for less than this, where it is not promised away: small pictures would wait
BLOCK_ACTIVATIONS = 30  # numbers for each of a token's, at the widest point of a transformer block
CACHED = 3  # numbers for each of a token's, of the states before and what was added to them
ATTENTION_COPIES = 4.4  # of the decoder's middle: normed, keys, values, what comes out; and scores
# numbers for each of a tile's pixels and channels, halo included: on CPUs, a convolution's unfolded input
TILE_ACTIVATIONS = 8 if has_cuda() else 18
# pixels, the edge of what the VAE works on at a time: halos add 23% to decoding with 512; with 256 they add 50%
TILES = (1024, 512, 256, 128) if has_cuda() else (512, 256, 128)
SMALLEST_TILE = 64  # pixels: here the halos are three quarters of the arithmetic already
CACHE_BYTES = 256 << 20  # of freed memory that MLX may keep for reuse: two layers of such a tile at full resolution
CGROUP = Path("/sys/fs/cgroup")
WORTH_A_LINE = 1 << 30  # bytes of weights: how small models are held needs no word


class Weights(NamedTuple):
    """Bytes of a component's weights."""

    whole: int  # in memory
    layers: int  # of these, in layers
    layer: int  # the largest layer in memory
    stored_layer: int  # and on disk, where it is read in another form than it is kept in
    stored: int  # on disk, all of them

    @property
    def streamed(self) -> int:
        """What is in memory of them while they are streamed."""
        return self.whole - self.layers + 2 * self.layer + self.stored_layer


@dataclass(frozen=True)
class Budget:
    """What a stage may use: a promise to keep, or what is free by now."""

    size: int
    promised: bool

    def __str__(self) -> str:
        return f"--memory {gigabytes(self.size)}" if self.promised else f"the {gigabytes(self.size)} that are free"


def budget(limit: int | None) -> Budget:
    """`limit` in bytes as the user gave it, or what the machine has free, this process's own models included."""
    if limit is not None:
        return Budget(limit, True)
    mlx = sys.modules.get("mlx.core")
    held = mlx.get_active_memory() + mlx.get_cache_memory() if mlx else 0
    return Budget(available() + held, False)


def available() -> int:
    """Bytes that are free for a model: the GPU's own where it has its own, and no more than a container allows."""
    if has_cuda():
        import mlx.core as mx

        return int(mx.device_info()["free_memory"])
    if sys.platform == "darwin":
        import mlx.core as mx

        return min(system_memory(), int(mx.device_info()["max_recommended_working_set_size"]))
    return system_memory()


def system_memory() -> int:
    """Bytes that may be taken without swapping, or without more than a container allows."""
    import psutil

    return min(int(psutil.virtual_memory().available), _left_in_container())


def total() -> int:
    """Bytes of memory that models can be held in: the GPU's own where it has its own."""
    if has_cuda():
        import mlx.core as mx

        return int(mx.device_info()["total_memory"])
    import psutil

    return int(psutil.virtual_memory().total)


def _left_in_container() -> int:
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        pages = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # none, or "max": no limit
        return sys.maxsize
    return limit - used + int(pages.get("inactive_file", 0))


def text_states(config: "TextEncoderConfig", longest: int, together: int, dtype: str) -> int:
    """Bytes of what passes through the text encoder: one text's widest point, and the states of those that wait."""
    widest = 3 * config.intermediate_size + 8 * config.hidden_size
    scores = 0 if _has_gpu() else 2 * config.num_attention_heads * longest**2
    return DTYPE_BYTES[dtype] * (longest * widest + 2 * together * config.hidden_size + scores)


def image_states(
    config: "TransformerConfig", tokens: int, waiting: int, attended: int, steps: int, dtype: str, cached: bool = False
) -> int:
    """Bytes of what passes through the transformer: `tokens` at work in a block, of which one attends to `attended`;
    those `waiting` for it, with what a cache keeps of them; and the table of its modulation."""
    scores = 0 if _has_gpu() else 2 * config.num_attention_heads * attended**2
    kept = 2 + (CACHED if cached else 0)
    at_work = config.dim * (BLOCK_ACTIVATIONS * tokens + kept * waiting) + scores
    return DTYPE_BYTES[dtype] * at_work + table_bytes(config, steps, dtype)


def table_bytes(config: "TransformerConfig", steps: int, dtype: str) -> int:
    """Of a schedule's modulations."""
    return DTYPE_BYTES[dtype] * steps * (12 * config.num_layers + 2) * config.dim


def picture_states(config: "VAEConfig", height: int, width: int, edge: int, dtype: str, halo: int = 0) -> int:
    """Bytes that a picture takes in the VAE in tiles of edge x edge pixels, beside the weights.

    `halo`: of pixels around a tile; a decoder's is among its latents.
    """
    factor, dims = config.vae_scale_factor, config.base_dim * config.dim_mult[-1]
    attention = DTYPE_BYTES[dtype] * ATTENTION_COPIES * dims * (height // factor) * (width // factor)
    unfolded = DTYPE_BYTES[dtype if _has_gpu() else "float32"]  # in which MLX convolves on CPUs, whatever the dtype
    sides = [min(edge + 2 * halo, side) for side in (height, width)]
    tile = unfolded * TILE_ACTIVATIONS * config.base_dim * sides[0] * sides[1]
    return int(max(attention, tile)) + 3 * height * width


def tile(weights: Weights, states: dict[int, int], asked: int | None, within: Budget) -> int:
    """The edge of the tiles to work in: as asked, or the largest that fits. UserError beyond a promised budget.

    `states` are the bytes that the tiles take, by their edges.
    """
    needed = {edge: needs(weights, each)[0] for edge, each in states.items()}
    largest = largest_tile(needed, within)
    edge = asked or largest
    if within.promised and needed[edge] > within.size:
        smaller = f"; --tile {largest} needs less" if needed[largest] <= within.size else ""
        raise UserError(
            f"working in tiles of {edge} needs {gigabytes(needed[edge])}, more than {within}"
            + (smaller or f"; give it at least {gigabytes(min(needed.values()))}")
        )
    return edge


def check_tile(tile: int | None, unit: int) -> None:
    """Raises UserError for tiles that the VAE, which makes a latent of unit x unit pixels, cannot work on."""
    if tile is not None and (tile < SMALLEST_TILE or tile % unit):
        raise UserError(f"--tile {tile}: must be a multiple of {unit}, at least {SMALLEST_TILE}")


def limit_cache() -> None:
    """For the VAE, whose layers' memory is of little use to one another."""
    if not has_cuda():
        import mlx.core as mx

        mx.set_cache_limit(CACHE_BYTES)


def largest_tile(needed: dict[int, int], within: Budget) -> int:
    """Of tiles by their edges and the bytes they need, the largest that fits; the smallest if none does."""
    return max((edge for edge in needed if needed[edge] <= within.size), default=min(needed))


@contextmanager
def bounded(weights: int, states: int, within: Budget) -> Iterator[None]:
    """Makes MLX wait for the GPU rather than allocate more than it needs beside weights that are or will be in memory.

    A GPU lags behind, and what it has not computed yet takes memory as well: 10 GB and more if nothing holds it back.
    On Macs the memory is wired meanwhile, as macOS would page weights out between two steps.
    """
    import mlx.core as mx

    mx.clear_cache()  # it counts as well, and another size's buffers are of no use
    held = max(weights, mx.get_active_memory())  # beyond its limit MLX may wait for what never ends
    floor = min(LEAST_STATES, within.size - held) if has_cuda() else 0
    before = mx.set_memory_limit(held + max(int(HELD_BACK_AT * states), floor))
    to_wire = int(mx.device_info()["max_recommended_working_set_size"]) if mx.metal.is_available() else 0
    wired = mx.set_wired_limit(to_wire) if to_wire else 0
    try:
        yield
    finally:
        if to_wire:
            mx.synchronize()  # what is at work must stay wired
            mx.set_wired_limit(wired)
        mx.set_memory_limit(before)


def _has_gpu() -> bool:
    return sys.platform == "darwin" or has_cuda()


def needs(weights: Weights, states: int) -> tuple[int, int]:
    """Bytes that a stage takes whose weights are in memory, and one that streams them."""
    resident = weights.whole + max(2 * weights.stored_layer, states)  # they are read, and then at work
    return _process_bytes() + resident, _process_bytes() + weights.streamed + states


def _process_bytes() -> int:
    """What a process takes of the memory that models are in."""
    return 0 if has_cuda() else PROCESS_BYTES


def had_better_stream(weights: Weights, states: int, within: Budget, once: bool) -> bool:
    """Where nobody says; `once` as in `streams`."""
    resident, _ = needs(weights, states)
    return once or resident > within.size


def streams(
    what: str, weights: Weights, states: int, asked: bool | None, within: Budget, notice: Notice, once: bool = False
) -> bool:
    """Whether to stream a component's weights, as asked or as memory allows. Raises UserError beyond a promised budget.

    `once` says that streaming costs nothing: the weights are needed for one pass.
    """
    resident, streamed = needs(weights, states)
    stream = had_better_stream(weights, states, within, once) if asked is None else asked
    needed = streamed if stream else resident
    if within.promised and needed > within.size:
        raise UserError(
            f"the {what} needs {gigabytes(needed)} {'streamed' if stream else 'in memory'}, more than {within}; "
            + (f"with --stream {gigabytes(streamed)} are enough" if not stream and streamed <= within.size else
               f"give it at least {gigabytes(streamed)}")
        )  # fmt: skip
    if asked is None and weights.whole >= WORTH_A_LINE:
        if not stream:
            notice(f"the {what} is held in memory: {gigabytes(resident)} of {within}")
        elif not once:
            notice(
                f"the {what} is streamed from disk, {gigabytes(weights.stored)} a pass: in memory it would need "
                f"{gigabytes(resident)}, more than {within}"
            )
    return stream

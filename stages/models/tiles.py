"""Local layers, tile by tile: what they make of everything at once, exactly, in memory that a tile bounds.

A 3x3 convolution sees one pixel further than it writes, so a tile needs a halo around it of what lies below. Each layer
is given the halo that it and those above still need: at a tile's inner edges its convolutions find zeros where the
neighbours are, so what those zeros reached is cut off again. At the picture's own borders nothing is cut: there the
whole has zeros too.

All tiles of a picture have one shape, in every layer: a GPU's libraries prepare for every shape anew, and memory that
one tile leaves behind is what the next one needs. So the last tile begins early enough to be as large as the others.
"""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from math import ceil, prod
from typing import NamedTuple

import mlx.core as mx


class Tile(NamedTuple):
    """A part of a grid of pixels."""

    y: slice
    x: slice


class Local(NamedTuple):
    """A layer each of whose output pixels depends on the input pixels near it."""

    layer: Callable[[mx.array], mx.array]
    reach: int  # 3x3 convolutions in a row: so far an output pixel sees, counted in output pixels
    scale: int | Fraction = 1  # output pixels for an input pixel, each way; where they get fewer, one through a number

    def source(self, span: slice, size: int) -> slice:
        """What of `size` input pixels in a row so many output pixels depend on."""
        begin, end = (span.start - self.reach) // self.scale, ceil((span.stop + self.reach) / self.scale)
        return slice(max(0, begin), min(size, end))


def in_tiles(layers: Sequence[Local], x: mx.array, edge: int) -> Iterator[tuple[Tile, mx.array]]:
    """What layers make of x [B, H, W, C], in tiles of at most edge x edge, which may overlap; as `along` counts."""
    _, height, width, _ = x.shape
    for ys in along(layers, height, edge):
        for xs in along(layers, width, edge):
            yield Tile(ys[-1], xs[-1]), part(layers, x, ys, xs)


def along(layers: Sequence[Local], size: int, edge: int) -> list[tuple[slice, ...]]:
    """For each tile along `size` pixels what it needs of them, then of what every layer makes; the last is the tile.

    A tile has at most `edge` pixels where there are fewest of them: below the layers, or above those that make fewer.
    """
    scale = prod((layer.scale for layer in layers), start=Fraction(1))
    fewest, unit = int(size * min(1, scale)), int(max(1, scale))
    count = ceil(fewest / edge)
    each = unit * ceil(fewest / count)
    size = int(size * scale)
    spans = [slice(begin, begin + each) for begin in (min(number * each, size - each) for number in range(count))]
    levels = [spans]
    for layer in reversed(layers):
        size = int(size / layer.scale)
        levels.append(_equal([layer.source(span, size) for span in levels[-1]], size))
    return list(zip(*reversed(levels), strict=True))


def _equal(spans: list[slice], size: int) -> list[slice]:
    """All as long as the longest, within `size`."""
    length = max(span.stop - span.start for span in spans)
    return [slice(begin, begin + length) for begin in (min(span.start, size - length) for span in spans)]


def part(layers: Sequence[Local], x: mx.array, ys: Sequence[slice], xs: Sequence[slice]) -> mx.array:
    """One tile of what layers make of x [B, H, W, C], by what `along` says of it."""
    made = x[:, ys[0], xs[0]]
    for local, down, right in zip(layers, pairwise(ys), pairwise(xs), strict=True):
        made = local.layer(made)
        made = mx.contiguous(made[:, _within(*down, local.scale), _within(*right, local.scale)])
        settle(made)  # a layer at a time: a graph of several would keep more than two layers' pixels alive
    return made


def whole(layers: Sequence[Local], x: mx.array, edge: int) -> mx.array:
    """All that layers make of x [B, H, W, C], computed in tiles of at most edge x edge; as `along` counts."""
    _, height, width, _ = x.shape
    rows, down = [], 0
    for ys in along(layers, height, edge):
        row, right = [], 0
        for xs in along(layers, width, edge):
            row.append(part(layers, x, ys, xs)[:, down - ys[-1].start :, right - xs[-1].start :])
            mx.async_eval(row[-1])  # or MLX might begin with all of them
            right = xs[-1].stop
        rows.append(mx.concatenate(row, axis=2))
        down = ys[-1].stop
    return mx.concatenate(rows, axis=1)


def settle(*arrays: mx.array) -> None:
    """Computes arrays now, so that what they were made of can go. Not on CUDA: there MLX's memory limit sees to that,
    and the GPU would stand still meanwhile."""
    if not mx.cuda.is_available():
        mx.eval(arrays)


def _within(source: slice, span: slice, scale: int | Fraction) -> slice:
    """Where a span is in what was made of its source."""
    begin = int(source.start * scale)
    return slice(span.start - begin, span.stop - begin)

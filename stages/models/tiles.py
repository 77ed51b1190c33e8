"""Local layers, tile by tile: what they make of everything at once, exactly, in memory that a tile bounds.

A 3x3 convolution sees one pixel further than it writes, so a tile needs a halo around it of what lies below. Each layer
is given just the halo that it and those above still need: at a tile's inner edges its convolutions find zeros where the
neighbours are, so what those zeros reached is cut off again. At the picture's own borders nothing is cut: there the
whole has zeros too.
"""

from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import NamedTuple

import mlx.core as mx


class Tile(NamedTuple):
    """A part of a grid of pixels."""

    y: slice
    x: slice

    def scaled(self, scale: int) -> "Tile":
        return Tile(*(slice(scale * span.start, scale * span.stop) for span in self))


class Local(NamedTuple):
    """A layer each of whose output pixels depends on the input pixels near it."""

    layer: Callable[[mx.array], mx.array]
    reach: int  # 3x3 convolutions in a row: so far an output pixel sees, counted in output pixels
    scale: int = 1  # output pixels for an input pixel, each way

    def source(self, tile: Tile) -> Tile:
        """What of its input a tile of its output depends on. It may end beyond the picture, as slices may."""
        y, x = (
            slice(max(0, (span.start - self.reach) // self.scale), -(-(span.stop + self.reach) // self.scale))
            for span in tile
        )
        return Tile(y, x)


def grid(height: int, width: int, edge: int) -> Iterator[Tile]:
    """The tiles of at most edge x edge that cover so many pixels, row by row, as equal as can be: on CUDA every other
    shape costs a search for how to convolve it."""
    for y in _spans(height, edge):
        for x in _spans(width, edge):
            yield Tile(y, x)


def part(layers: Sequence[Local], x: mx.array, tile: Tile) -> mx.array:
    """One tile of what the layers make of x [B, H, W, C], computed now."""
    if not layers:
        return x[:, tile.y, tile.x]
    *below, last = layers
    source = last.source(tile)
    made = last.layer(part(below, x, source))
    made = mx.contiguous(made[:, _within(tile.y, source.y, last.scale), _within(tile.x, source.x, last.scale)])
    settle(made)  # a layer at a time: a graph of several would keep more than two layers' pixels alive
    return made


def whole(layers: Sequence[Local], x: mx.array, edge: int) -> mx.array:
    """All that layers of scale 1 make of x [B, H, W, C], computed in tiles of edge x edge."""
    rows = []
    for y in _spans(x.shape[1], edge):
        rows.append(mx.concatenate([part(layers, x, Tile(y, along)) for along in _spans(x.shape[2], edge)], axis=2))
    return mx.concatenate(rows, axis=1)


def settle(*arrays: mx.array) -> None:
    """Computes arrays now, so that what they were made of can go. Not on CUDA: there MLX's memory limit sees to that,
    and the GPU would stand still meanwhile."""
    if not mx.cuda.is_available():
        mx.eval(arrays)


def _spans(size: int, edge: int) -> list[slice]:
    each = ceil(size / ceil(size / edge))
    return [slice(start, min(start + each, size)) for start in range(0, size, each)]


def _within(span: slice, source: slice, scale: int) -> slice:
    """Where a span is in what was made of its source."""
    begin = source.start * scale
    return slice(span.start - begin, span.stop - begin)

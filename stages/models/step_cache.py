"""First-block caching: where the first block adds much the same as it did before, so will the others.

Then their work is not done again: what they added when all of them last ran is added once more. That is an
approximation, and off unless it is asked for. The idea and its measure are those of ParaAttention's first-block cache.
"""

import mlx.core as mx


class StepCache:
    """What the blocks of one picture's denoising added, from step to step. All lists have an array for each text."""

    def __init__(self, threshold: float) -> None:
        """`threshold`: how much the first block's part may change, as a share of it, for the rest to be reused."""
        self.threshold = threshold
        self.reused = False  # at the step before
        self._first: list[mx.array] = []
        self._rest: list[mx.array] = []

    def reuse(self, first: list[mx.array]) -> list[mx.array] | None:
        """What to add in place of the blocks behind the first, whose own part is `first` [B, S, dim] now; or None."""
        changes = [_change(before, now) for before, now in zip(self._first, first, strict=bool(self._first))]
        self.reused = bool(changes) and mx.concatenate(changes).max().item() < self.threshold
        if not self.reused:
            self._first, self._rest = first, []
        return self._rest if self.reused else None

    def keep(self, rest: list[mx.array]) -> None:
        """What the blocks behind the first have added."""
        self._rest = rest
        mx.async_eval(rest)  # or everything that it is made of would be kept as well


def _change(before: mx.array, now: mx.array) -> mx.array:
    """The mean absolute change of each image [B], as a share of what was there."""
    before, now = before.astype(mx.float32), now.astype(mx.float32)
    return mx.abs(now - before).mean((1, 2)) / mx.abs(before).mean((1, 2))

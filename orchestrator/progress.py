"""What a waiting person sees on stderr: bars when it is a terminal, only the notices in a pipe."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

FORMAT = "{desc} |{bar}| {n_fmt}/{total_fmt}, {remaining} left, {rate_fmt}"


class Voice(NamedTuple):
    """How work tells of itself."""

    report: Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much
    notice: Callable[[str], None]  # one line that a person should see


class Terminal:
    def __init__(self, leave: bool = True) -> None:
        """`leave`: whether a bar stays on the screen when its work is done."""
        self.leave = leave
        self.bars: dict[int, tuple[str, Any]] = {}  # by their line: what is being done, and its bar
        self.finished: dict[int, tuple[str, int]] = {}  # by their line: what was done last, of how much

    def report(self, label: str, done: int, total: int, line: int = 0) -> None:
        """One bar a label; each line of the display shows the latest."""
        if not self.is_live() or self.finished.get(line) == (label, done):
            return
        from tqdm import tqdm

        if line not in self.bars or self.bars[line][0] != label:
            self.close(line)
            self.bars[line] = (
                label,
                tqdm(total=total, desc=label, leave=self.leave, dynamic_ncols=True, position=line, bar_format=FORMAT),
            )
        _, bar = self.bars[line]
        bar.update(done - bar.n)
        self.finished.pop(line, None)
        if done >= total:  # the next thing that is printed begins a line
            self.close(line)
            self.finished[line] = (label, done)

    def is_live(self) -> bool:
        return sys.stderr is not None and sys.stderr.isatty()

    def notice(self, line: str) -> None:
        """Nothing that is said is worth dying for: where it goes may be full, or gone."""
        with contextlib.suppress(OSError, ValueError):
            for _, bar in self.bars.values():
                bar.clear()
            print(f"qwen-stage: {line}", file=sys.stderr, flush=True)
            for _, bar in self.bars.values():
                bar.refresh()

    def close(self, line: int = 0) -> None:
        if line in self.bars:
            _, bar = self.bars.pop(line)
            bar.close()

    def voice(self) -> Voice:
        return Voice(self.report, self.notice)

"""What a waiting person sees on stderr: one bar when it is a terminal, nothing of it in a pipe."""

import sys
from typing import Any


class Bar:
    """Called as report(label, done, total); one bar a label."""

    def __init__(self) -> None:
        self.label: str | None = None
        self.bar: Any = None

    def __call__(self, label: str, done: int, total: int) -> None:
        if sys.stderr is None or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        if label != self.label or self.bar is None:
            self.close()
            self.label = label
            self.bar = tqdm(total=total, desc=label, leave=True, dynamic_ncols=True)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None

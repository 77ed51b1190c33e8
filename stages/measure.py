"""What the work tells: progress while it goes on, its cost and the versions it ran with afterwards."""

import platform
import resource
import sys
import time
from collections.abc import Callable

from artifacts_schema import __version__
from artifacts_schema.manifests import Cost

Report = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much
Notice = Callable[[str], None]  # one line that a person should see


class Stopwatch:
    """Starts when made; MLX's peak counts from there, or goes on to count, the process's from its start."""

    def __init__(self, keep_peak: bool = False) -> None:
        if not keep_peak:
            forget_peak()
        self.started = time.perf_counter()

    def cost(self, pictures: int = 1) -> Cost:
        """The cost so far, its time shared by so many pictures."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mlx = sys.modules.get("mlx.core")
        return Cost(
            seconds=round((time.perf_counter() - self.started) / pictures, 3),
            process_peak=peak if sys.platform == "darwin" else peak * 1024,  # Linux counts in KiB
            mlx_peak=mlx.get_peak_memory() if mlx else 0,
        )


def forget_peak() -> None:
    """Lets MLX's peak count from here."""
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].reset_peak_memory()


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def versions() -> dict[str, str]:
    """Of what ran here; MLX is not there when everything was cached."""
    mlx = {"mlx": sys.modules["mlx.core"].__version__} if "mlx.core" in sys.modules else {}
    return {"qwen-stage": __version__, **mlx, "python": platform.python_version()}

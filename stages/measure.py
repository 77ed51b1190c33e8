"""What a stretch of work costs: wall time and peak memory."""

import resource
import sys
import time

from artifacts_schema.manifests import Cost


class Stopwatch:
    """Starts when made; MLX's peak counts from there, the process's from its start."""

    def __init__(self):
        if "mlx.core" in sys.modules:
            sys.modules["mlx.core"].reset_peak_memory()
        self.started = time.perf_counter()

    def cost(self) -> Cost:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mlx = sys.modules.get("mlx.core")
        return Cost(
            seconds=round(time.perf_counter() - self.started, 3),
            process_peak=peak if sys.platform == "darwin" else peak * 1024,  # Linux counts in KiB
            mlx_peak=mlx.get_peak_memory() if mlx else 0,
        )

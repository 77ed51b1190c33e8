"""diffusers' `FlowMatchEulerDiscreteScheduler`, as QwenImagePipeline drives it: the noise levels and the Euler step.

Plain numbers, no arrays: a schedule is a few dozen floats, fixed by `scheduler_config.json`, the number of steps and
the number of image tokens.
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class SchedulerConfig:
    """The fields of `scheduler/scheduler_config.json`; defaults are the reference's, shifts the pipeline's."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None
    invert_sigmas: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    stochastic_sampling: bool = False

    def __post_init__(self):
        for flag in ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
                     "stochastic_sampling"):  # fmt: skip
            if getattr(self, flag):
                raise ValueError(f"{flag} is true, which qwen-stage does not support")
        if self.time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type {self.time_shift_type!r} is neither 'exponential' nor 'linear'")
        if self.max_image_seq_len <= self.base_image_seq_len:
            raise ValueError("max_image_seq_len must be larger than base_image_seq_len")
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, not {self.shift}")
        if self.shift_terminal is not None and not 0 <= self.shift_terminal < 1:
            raise ValueError(f"shift_terminal must lie in [0, 1), not {self.shift_terminal}")
        if self.num_train_timesteps != 1000:
            raise ValueError(f"num_train_timesteps {self.num_train_timesteps} is not supported, only 1000")

    def shifted(self, shift: float) -> "SchedulerConfig":
        """With one shift for all sizes and nothing stretched, as the checkpoints for few steps want it."""
        return replace(self, shift=shift, use_dynamic_shifting=False, shift_terminal=None)

    def sigmas(self, num_inference_steps: int, image_seq_len: int) -> list[float]:
        """The noise levels, from 1 down to the final 0: num_inference_steps + 1 numbers."""
        n = num_inference_steps
        sigmas = [1.0 - (1.0 - 1.0 / n) * i / (n - 1) for i in range(n)] if n > 1 else [1.0]
        sigmas = [self._shifted(sigma, image_seq_len) for sigma in sigmas]
        # `shift_terminal` stretches the schedule to end there. One step has nothing to stretch (NaN in the reference).
        if self.shift_terminal and n > 1:
            stretch = (1.0 - sigmas[-1]) / (1.0 - self.shift_terminal)
            sigmas = [1.0 - (1.0 - sigma) / stretch for sigma in sigmas]
        return [*sigmas, 0.0]

    def _shifted(self, sigma: float, image_seq_len: int) -> float:
        if not self.use_dynamic_shifting:
            return self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma)
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        mu = self.base_shift + slope * (image_seq_len - self.base_image_seq_len)
        factor = math.exp(mu) if self.time_shift_type == "exponential" else mu
        return factor / (factor + (1.0 / sigma - 1.0))

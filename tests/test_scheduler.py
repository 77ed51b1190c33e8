import itertools
import math

import pytest

from stages.scheduler import SchedulerConfig

QWEN = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}


@pytest.mark.parametrize("steps", [1, 2, 20, 50])
@pytest.mark.parametrize("tokens", [36, 256, 4096, 20000])
def test_sigmas_fall_from_one_through_the_terminal_to_zero(steps, tokens):
    sigmas = SchedulerConfig(**QWEN).sigmas(steps, tokens)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0
    assert all(a > b for a, b in itertools.pairwise(sigmas))
    if steps > 1:
        assert sigmas[-2] == pytest.approx(0.02, abs=1e-12)


def test_lightning_schedules():
    """Lightning distillations: base_shift = max_shift = ln 3 without a terminal; values from its authors' examples."""
    config = SchedulerConfig(use_dynamic_shifting=True, base_shift=math.log(3), max_shift=math.log(3))
    four = config.sigmas(4, 4096)
    eight = config.sigmas(8, 1024)
    assert four == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-3)
    assert eight == pytest.approx([1, 0.955, 0.9, 0.833, 0.75, 0.643, 0.5, 0.3, 0], abs=1e-3)
    own = SchedulerConfig(**QWEN).shifted(3.0)  # what the preset makes of the model's own schedule
    assert (own.sigmas(4, 100), own.sigmas(8, 4096)) == (pytest.approx(four), pytest.approx(eight))


def test_static_shift():
    assert SchedulerConfig(shift=3.0).sigmas(2, 4096) == pytest.approx([1, 0.75, 0])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"time_shift_type": "cubic"}, "cubic"),
        ({"num_train_timesteps": 500}, "num_train_timesteps"),
    ],
)
def test_what_is_not_supported_is_named(fields, named):
    with pytest.raises(ValueError, match=named):
        SchedulerConfig(**fields)

"""How close is close enough."""

import numpy as np

RELATIVE = 1e-4  # of the largest value, per component, in float32
PIXEL = 2  # of 255


def assert_close(actual: object, expected: np.ndarray, relative: float = RELATIVE) -> None:
    actual = np.array(actual)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= relative, f"relative error {error:.2e}"  # also fails for NaN


def assert_same_picture(actual: np.ndarray, expected: np.ndarray) -> None:
    """Both uint8 [H, W, 3]."""
    assert actual.shape == expected.shape
    error = np.abs(actual.astype(int) - expected.astype(int)).max()
    assert error <= PIXEL, f"a pixel differs by {error}/255"

"""Linear layers with quantized weights, for the many rows of a picture."""

import mlx.core as mx
import mlx.nn as nn


class QuantizedLinear(nn.QuantizedLinear):
    """MLX's own, which multiplies with the packed weights, on Metal; elsewhere it unpacks them first.

    With the rows of a picture `quantized_matmul` reaches a fifth of the speed of `dequantize` and a plain product on
    CUDA, and a twentieth of it on CPUs in bfloat16.
    """

    def __call__(self, x: mx.array) -> mx.array:
        if mx.metal.is_available():
            made: mx.array = super().__call__(x)
            return made
        weight = mx.dequantize(
            self["weight"], self["scales"], self["biases"], group_size=self.group_size, bits=self.bits, mode=self.mode
        )
        made = x @ weight.T
        return made + self["bias"] if "bias" in self else made

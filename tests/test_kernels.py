"""Each CUDA kernel says what its plain twin says. On a machine without CUDA there is nothing to compare."""

import secrets
from itertools import count

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map

from stages.models import kernels
from stages.models.kernels import Heads, ImageTextRotary, Norm, Part, Rotary

SEED = secrets.randbelow(2**31)  # printed with every failure, as part of an assertion
# of the largest number; in bfloat16 the plain ones round often
TOLERANCE = {mx.float32: 1e-5, mx.float16: 3e-3, mx.bfloat16: 2e-2}
keys = map(mx.random.key, count(SEED))
DTYPES = [mx.float32, mx.bfloat16]
pytestmark = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs CUDA")


def plainly(monkeypatch, call):
    """What a call gives without kernels."""
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_is_cuda", lambda: False)
        made = call()
        mx.eval(made)
    return made


def assert_same(made, plain, dtype):
    for one, other in zip(made, plain, strict=True):
        assert (one.shape, one.dtype) == (other.shape, dtype)
        one, other = one.astype(mx.float32), other.astype(mx.float32)
        error = (mx.abs(one - other).max() / mx.abs(other).max()).item()
        assert error < TOLERANCE[dtype], (error, SEED)


def drawn(*shape, dtype):
    return mx.random.normal(shape, key=next(keys)).astype(dtype)


def random_layer(layer, dtype):
    layer.update(tree_map(lambda array: drawn(*array.shape, dtype=dtype) * 0.1 + (array.ndim == 1), layer.parameters()))
    layer.set_dtype(dtype)
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "lengths"), [(2, [3, 17]), (24, [5])])
def test_joint_heads(monkeypatch, dtype, heads, lengths):
    dim, places = heads * 128, 33

    def stream():
        return Heads(
            random_layer(nn.Linear(dim, 3 * dim), dtype),
            *(random_layer(nn.RMSNorm(128, 1e-6), dtype) for _ in range(2)),
        )

    def rotary(tokens):
        angles = 100 * drawn(tokens, 1, 64, dtype=mx.float32)
        return Rotary(mx.stack([mx.cos(angles), mx.sin(angles)], axis=-1).flatten(-2))

    img_heads, txt_heads, turns = stream(), stream(), ImageTextRotary(rotary(places), rotary(sum(lengths)))
    img, txt = drawn(len(lengths), places, dim, dtype=dtype), drawn(sum(lengths), dim, dtype=dtype)

    def call():
        return list(kernels.joint_heads(img_heads, img, txt_heads, txt, lengths, turns))

    assert kernels._runs_on_cuda(dim)
    for made, plain in zip(call(), plainly(monkeypatch, call), strict=True):
        assert_same(made, plain, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [256, 3072])
def test_gated_norm(monkeypatch, dtype, dim):
    layer = random_layer(nn.Linear(64, dim), dtype)
    x, h = drawn(2, 9, dim, dtype=dtype), drawn(2, 9, 64, dtype=dtype)
    mods = [drawn(6 * dim, dtype=dtype) for _ in range(2)]

    def call():
        return kernels.gated_norm(x, layer, h, Part(mods[0], 5), Norm(mods[1], 1, 0))

    assert_same(call(), plainly(monkeypatch, call), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(monkeypatch, dtype):
    layer = random_layer(nn.Linear(256, 1024), dtype)
    h = 3 * drawn(2, 37, 256, dtype=dtype)
    assert_same([kernels.gelu(layer, h)], [plainly(monkeypatch, lambda: kernels.gelu(layer, h))], dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, mx.float16])
@pytest.mark.parametrize("channels", [8, 96, 384])
def test_what_the_vae_does_between_its_convolutions(monkeypatch, dtype, channels):
    x, y = (3 * drawn(2, 5, 7, channels, dtype=dtype) for _ in range(2))
    corners = drawn(2, 5, 7, 2, 2, channels, dtype=dtype)
    gamma, bias = (drawn(channels, dtype=dtype) for _ in range(2))

    def call():
        normed = [kernels.norm_silu(x, gamma), kernels.norm_silu(x, gamma, bias)]
        return [*normed, kernels.sum_of(x, y, bias), kernels.doubled(corners, bias)]

    assert_same(call(), plainly(monkeypatch, call), dtype)
    x[0, 0, 0, 0] = mx.inf  # as after an overflow, which must be seen at the end
    assert all(mx.isnan(kernels.norm_silu(x, gamma, *more)).any() for more in ([], [bias]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_unpacked(monkeypatch, dtype, bits):
    layer = nn.QuantizedLinear.from_linear(random_layer(nn.Linear(192, 37), dtype), 64, bits)
    assert_same([kernels.unpacked(layer)], [plainly(monkeypatch, lambda: kernels.unpacked(layer))], dtype)

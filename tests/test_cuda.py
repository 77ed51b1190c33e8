"""Our CUDA kernels compile for the GPUs that MLX runs on. No GPU is needed for that, only NVIDIA's compiler."""

import ctypes
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import mlx.core as mx
import pytest

from stages.models import cuda, kernels
from stages.models.cuda import Kernel

pytestmark = pytest.mark.reference  # what installs the compiler
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_120")
CONSTANTS = {
    "joint_heads": [{"HEADS": heads} for heads in (2, 24)],
    "gated_norm": [{"DIM": dim} for dim in (256, 3072)],
    "unpacked": [{"BITS": bits, "GROUP": group} for bits in (4, 8) for group in (32, 64, 128)],
}
KERNELS = [each for each in vars(kernels).values() if isinstance(each, Kernel)]
OTHER_TYPES = {"img_turns": mx.float32, "txt_turns": mx.float32, "packed": mx.uint32}


@pytest.fixture(scope="module")
def compiler():
    spec = find_spec("nvidia")
    found = [
        path
        for place in (spec.submodule_search_locations if spec else ())
        for path in Path(place).rglob("libnvrtc.so.*")
    ]
    if not found:
        pytest.skip("needs nvidia-cuda-nvrtc")
    ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)  # as MLX has opened it where it runs on CUDA


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels_compile(compiler, kernel):
    assert len(KERNELS) == 7
    names = set()
    choices = list(product((mx.float32, mx.float16, mx.bfloat16), CONSTANTS.get(kernel.name, [{}])))
    for dtype, constants in choices:
        dtypes = [OTHER_TYPES.get(name, dtype) for name in kernel.inputs]
        name, source = kernel.source([*dtypes, dtype], constants)
        names.add(name)
        for architecture in ARCHITECTURES:
            assert cuda.compiled(source, architecture).startswith(b"\x7fELF")
    assert len(names) == len(choices)  # MLX knows them by their names


def test_what_does_not_compile_says_why(compiler):
    broken = Kernel("broken", ["x"], ["out"], [], "out[0] = nothing;")
    with pytest.raises(RuntimeError, match=r'cannot be compiled for sm_90: .*"nothing" is undefined'):
        cuda.compiled(broken.source([mx.float32, mx.float32], {})[1], "sm_90")

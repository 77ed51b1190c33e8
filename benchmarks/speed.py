"""How long the models take at the shapes of Qwen-Image 2512, with random weights: `python benchmarks/speed.py`

One step of the transformer, one picture decoded, one prompt encoded: medians after a warm-up, beside the arithmetic
they are made of and the rate at which this machine multiplies matrices. Where diffusers (with PyTorch) or mflux are
installed, the same work is timed with them in the same run. Every measurement is a process of its own.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import full_size

RUNS, WARM_UP = 7, 2
LAYERS = full_size.TRANSFORMER["num_layers"]
DIM = 128 * full_size.TRANSFORMER["num_attention_heads"]
PEERS = {"diffusers": ("diffusers", "torch"), "mflux": ("mflux",)}  # and what must be installed for them


class Work(NamedTuple):
    """What is timed: `step` or `decode` at size x size pixels, or `encode`."""

    what: str
    size: int = 1024
    batch: int = 1
    tokens: int = 64
    dtype: str = "bfloat16"
    bits: int | None = None

    def __str__(self) -> str:
        if self.what == "encode":
            return f"encode {self.tokens} tokens, {self.dtype}"
        bits = f", {self.bits} bits" if self.bits else ""
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        texts = f", {self.tokens} text tokens" if self.what == "step" and self.tokens != 64 else ""
        return f"{self.what} {self.size}²{batch}{texts}, {self.dtype}{bits}"

    def arithmetic(self) -> float:
        """Floating-point operations of a step's products and attention; 0 for what is not counted."""
        if self.what != "step":
            return 0.0
        tokens = (self.size // 16) ** 2 + self.tokens
        return self.batch * LAYERS * (24.0 * tokens * DIM**2 + 4.0 * tokens**2 * DIM)


def median_ms(call: Callable[[], object]) -> float:
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


# -- ours


def ours(works: list[Work]) -> None:
    from stages.backend import prepare_mlx

    prepare_mlx({"step": "denoise"}.get(works[0].what, works[0].what))
    for work in works:
        say(work, "qwen-stage", *{"step": our_step, "decode": our_decode, "encode": our_encode}[work.what](work))


def randomize(model: Any, dtype: str) -> Any:
    import mlx.core as mx
    from mlx.utils import tree_map

    from stages.weights import mlx_dtype

    def drawn(array: Any) -> Any:
        made = (mx.random.normal(array.shape) * full_size.SPREAD).astype(mlx_dtype(dtype))
        mx.eval(made)  # one by one: in float32 all of them would be too much
        return made

    model.update(tree_map(drawn, model.parameters()))
    return model


_made: dict[Any, Any] = {}  # the last model: works that want the same follow one another


def our_transformer(dtype: str, bits: int | None) -> Any:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from stages.joined import joined, parted
    from stages.models.transformer import QwenImageTransformer2DModel, TransformerConfig
    from stages.quantized import exchange_quantized, quantized_weights

    if (dtype, bits) not in _made:
        _made.clear()
        axes = tuple(full_size.TRANSFORMER["axes_dims_rope"])
        config = TransformerConfig(**{**full_size.TRANSFORMER, "axes_dims_rope": axes})
        model = randomize(QwenImageTransformer2DModel(config), dtype)
        if bits:
            weights = parted(dict(tree_flatten(model.parameters())), model)
            made = joined(quantized_weights(weights, lambda layer: model.bits_of(layer, bits)), model)
            exchange_quantized(model, made)
            weights.clear()
            model.load_weights(list(made.items()))
            made.clear()
            for layer in model.transformer_blocks:
                mx.eval(layer.parameters())
        _made[dtype, bits] = model
    return _made[dtype, bits]


def our_step(work: Work) -> tuple[float, float]:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from stages import memory
    from stages.models.transformer import Modulation
    from stages.weights import mlx_dtype

    model, dtype = our_transformer(work.dtype, work.bits), mlx_dtype(work.dtype)
    grid = work.size // 16
    embeds = mx.random.normal((work.batch * work.tokens, full_size.TRANSFORMER["joint_attention_dim"])).astype(dtype)
    text = model.text(embeds, [work.tokens] * work.batch, grid, grid)
    parts = ((LAYERS, 6 * DIM), (LAYERS, 6 * DIM), (2 * DIM,))
    modulation = Modulation(*[(0.1 * mx.random.normal(shape)).astype(dtype) for shape in parts])
    latents = mx.random.normal((work.batch, grid**2, full_size.TRANSFORMER["in_channels"]))
    mx.eval(latents, modulation)
    held = sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))
    tokens = work.batch * (grid**2 + work.tokens)
    states = memory.image_states(model.config, tokens, tokens, grid**2 + work.tokens, 1, work.dtype)

    def step() -> None:
        (velocity,) = model(latents.astype(dtype), [text], modulation)
        mx.eval(latents - 0.05 * velocity.astype(mx.float32))

    mx.reset_peak_memory()
    with memory.bounded(held, states, memory.budget(None)):
        return median_ms(step), mx.get_peak_memory()


def our_decode(work: Work) -> tuple[float, float]:
    """As the stage does it, up to the pixels in this process's memory."""
    import mlx.core as mx
    import numpy as np

    from stages import memory
    from stages.decode import pixels_of
    from stages.models.vae import AutoencoderKLQwenImage, VAEConfig

    config = {name: tuple(value) if isinstance(value, list) else value for name, value in full_size.VAE.items()}
    vae = randomize(AutoencoderKLQwenImage(VAEConfig(**config)), work.dtype)
    latents = np.random.default_rng(0).standard_normal((16, work.size // 8, work.size // 8), np.float32)
    held = mx.get_active_memory()
    edge = min(work.size, memory.TILES[0])
    states = memory.picture_states(vae.config, work.size, work.size, edge, work.dtype)
    mx.reset_peak_memory()
    with memory.bounded(held, states, memory.budget(None)):
        return median_ms(lambda: pixels_of(vae, latents, edge, lambda: None)), mx.get_peak_memory()


def our_encode(work: Work) -> tuple[float, float]:
    import mlx.core as mx

    from stages.models.text_encoder import TextEncoder, TextEncoderConfig

    if "text encoder" not in _made:
        _made.clear()
        model = TextEncoder(TextEncoderConfig(**full_size.TEXT_ENCODER))
        width = full_size.TEXT_ENCODER["hidden_size"]
        model.embed_tokens = lambda ids: mx.ones((len(ids), width), mx.bfloat16)  # the stage has the table on disk
        _made["text encoder"] = randomize(model, work.dtype)
    model = _made["text encoder"]
    mx.reset_peak_memory()
    return median_ms(lambda: mx.eval(model([[0] * work.tokens]))), mx.get_peak_memory()


# -- peers


def diffusers(works: list[Work]) -> None:
    import torch
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    def timed(call: Callable[[], object]) -> tuple[float, float]:
        def run() -> None:
            with torch.no_grad():
                call()
            torch.cuda.synchronize()

        torch.cuda.reset_peak_memory_stats()
        return median_ms(run), torch.cuda.max_memory_allocated()

    steps = [work for work in works if work.what == "step" and not work.bits]
    if steps:
        with torch.device("meta"):
            model = QwenImageTransformer2DModel()
        model = model.to(torch.bfloat16).to_empty(device="cuda").eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, full_size.SPREAD)
        model.pos_embed = QwenEmbedRope(theta=10_000, axes_dim=[16, 56, 56], scale_rope=True)
        for way in ("eager", "compiled"):
            if way == "compiled":
                model.compile_repeated_blocks(fullgraph=True)
            for work in steps:
                grid = work.size // 16
                new = dict(device="cuda", dtype=torch.bfloat16)
                arguments = dict(
                    hidden_states=torch.randn(work.batch, grid**2, 64, **new),
                    encoder_hidden_states=torch.randn(work.batch, work.tokens, 3584, **new),
                    encoder_hidden_states_mask=None,
                    timestep=torch.full((work.batch,), 0.5, **new),
                    img_shapes=[[(1, grid, grid)]] * work.batch,
                    return_dict=False,
                )
                say(work, f"diffusers, {way}", *timed(lambda arguments=arguments: model(**arguments)))
        del model
    for work in works:
        if work.what == "decode":
            dtype = getattr(torch, work.dtype)
            vae = AutoencoderKLQwenImage().to(dtype).cuda().eval()
            z = torch.randn(1, 16, 1, work.size // 8, work.size // 8, device="cuda", dtype=dtype)
            say(work, "diffusers", *timed(lambda vae=vae, z=z: vae.decode(z, return_dict=False)))


def mflux(works: list[Work]) -> None:
    from types import SimpleNamespace

    import mlx.core as mx
    from mflux.models.qwen.model.qwen_transformer.qwen_transformer import QwenTransformer
    from mflux.models.qwen.model.qwen_vae.qwen_vae import QwenVAE

    def timed(call: Callable[[], object]) -> tuple[float, float]:
        mx.clear_cache()
        mx.reset_peak_memory()
        return median_ms(lambda: mx.eval(call())), mx.get_peak_memory()

    steps = [work for work in works if work.what == "step" and not work.bits]
    if steps:
        model = randomize(QwenTransformer(), "bfloat16")
        for work in steps:
            size = SimpleNamespace(height=work.size, width=work.size)
            size.scheduler = SimpleNamespace(sigmas=[0.5], timesteps=[])
            arguments = dict(
                t=0,
                config=size,
                hidden_states=mx.random.normal((work.batch, (work.size // 16) ** 2, 64)).astype(mx.bfloat16),
                encoder_hidden_states=mx.random.normal((work.batch, work.tokens, 3584)).astype(mx.bfloat16),
                encoder_hidden_states_mask=mx.ones((work.batch, work.tokens)),
            )
            mx.eval([each for each in arguments.values() if isinstance(each, mx.array)])
            say(work, "mflux", *timed(lambda arguments=arguments: model(**arguments)))
        del model
    vae = QwenVAE()
    for work in works:
        if work.what == "decode" and work.dtype == "float32" and work.size <= 1024:  # it crashes beyond
            z = mx.random.normal((1, 16, 1, work.size // 8, work.size // 8))
            say(work, "mflux", *timed(lambda z=z: vae.decode(z)))


# -- all together


def rate(_: list[Work]) -> None:
    """TFLOP/s of a matrix product of the transformer's, the one with most arithmetic."""
    import mlx.core as mx

    x, weight = (mx.random.normal(shape).astype(mx.bfloat16) for shape in ((4096, DIM), (4 * DIM, DIM)))
    mx.eval(x, weight)
    ms = median_ms(lambda: mx.eval([x @ weight.T for _ in range(50)])) / 50
    print(json.dumps([2 * 4096 * 4 * DIM * DIM / ms / 1e9, str(mx.device_info().get("device_name"))]), flush=True)


def say(work: Work, who: str, ms: float, peak: float) -> None:
    print(json.dumps([work, who, ms, peak]), flush=True)


MEASURES = {"ours": ours, "diffusers": diffusers, "mflux": mflux, "rate": rate}


def measured(who: str, works: list[Work]) -> list[Any]:
    if len(kinds := dict.fromkeys(work.what for work in works)) > 1:
        return [each for kind in kinds for each in measured(who, [work for work in works if work.what == kind])]
    command = [sys.executable, __file__, "--measure", who, json.dumps(works)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{who} failed", file=sys.stderr, flush=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


SPEED = [
    Work("step"),
    Work("step", 512),
    Work("step", 2048),
    Work("step", batch=2),
    Work("step", bits=4),
    *(Work("decode", size, dtype=dtype) for dtype in ("float16", "bfloat16", "float32") for size in (1024, 2048)),
    Work("encode", tokens=64),
    Work("encode", tokens=512),
]
GROWTH = [
    *(Work("step", size) for size in (512, 768, 1024, 1536, 2048)),
    *(Work("step", 512, batch) for batch in (2, 4, 8)),
    *(Work("step", 1024, batch) for batch in (2, 4, 8)),
    *(Work("step", tokens=tokens) for tokens in (16, 256, 512)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=("step", "decode", "encode", "growth"), help="default: all")
    add("--peers", nargs="*", choices=tuple(PEERS), help="default: those that are installed")
    add("--measure", nargs=2, help=argparse.SUPPRESS)  # what this calls itself with
    args = parser.parse_args()
    if args.measure:
        who, works = args.measure
        return MEASURES[who]([Work(*each) for each in json.loads(works)])
    installed = [peer for peer, needed in PEERS.items() if all(find_spec(name) for name in needed)]
    peers = installed if args.peers is None else args.peers
    ((tflops, device),) = measured("rate", [])
    print(f"{platform.platform()}, {device}: matrix products in bfloat16 at {tflops:.0f} TFLOP/s\n")
    wanted = args.only or ("step", "decode", "encode", "growth")
    if works := [work for work in SPEED if work.what in wanted]:
        table(works, ["ours", *peers], tflops)
    if "growth" in wanted:
        table(GROWTH, ["ours"], tflops)


def table(works: list[Work], whose: list[str], tflops: float) -> None:
    print("| work | by | ms | times ours | peak GiB | TFLOP/s | of the machine's |\n|" + " --- |" * 7, flush=True)
    mine: dict[Work, float] = {}
    for who in whose:
        for fields, name, ms, peak in measured(who, works):
            work = Work(*fields)
            mine.setdefault(work, ms)
            reached = work.arithmetic() / ms / 1e9
            share = f"{reached:.0f} | {reached / tflops:.0%}" if reached else " | "
            print(f"| {work} | {name} | {ms:.1f} | {ms / mine[work]:.2f} | {peak / 2**30:.1f} | {share} |", flush=True)


if __name__ == "__main__":
    main()

"""Small random checkpoints as other programs write them, by tables of names that are written here once more."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import random_models
from mlx.utils import tree_flatten

from stages import layouts
from stages.joined import parted
from stages.models.text_encoder import TextEncoder, TextEncoderConfig
from stages.models.transformer import Modulator, QwenImageTransformer2DModel, TransformerConfig
from stages.models.vae import AutoencoderKLQwenImage, VAEConfig
from stages.models.vae_encoder import AutoencoderKLQwenImageEncoder

Weights = dict[str, mx.array]
FLOAT8_MOST = 448  # the largest float8 e4m3


def write(directory: Path, seed: int) -> Path:
    """In the layout of diffusers, with heads as wide as Qwen-Image's and its VAE's statistics."""
    configs = random_models.configs(heads=1, axes=(16, 56, 56), layers=2, base_dim=8)
    text = {**configs["text_encoder"]["text_config"], "hidden_size": 256, "intermediate_size": 192}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [16, 24, 24]}
    configs["text_encoder"] = {**configs["text_encoder"], "text_config": text}
    configs["transformer"]["joint_attention_dim"] = 256
    configs["vae"] |= {name: list(layouts.VAE[name]) for name in ("latents_mean", "latents_std")}
    configs["scheduler"] |= layouts.SCHEDULER
    return random_models.write_checkpoint(directory, configs, _shapes(configs), seed)


def _shapes(configs: dict) -> dict[str, dict[str, list[int]]]:
    def of(model) -> dict[str, list[int]]:
        return {name: list(each.shape) for name, each in parted(dict(tree_flatten(model.parameters())), model).items()}

    def config(kind, component):
        fields = getattr(kind, "fields_of", dict)(configs[component])
        known = {
            name: tuple(v) if isinstance(v, list) else v for name, v in fields.items() if name in kind.__annotations__
        }
        return kind(**known)

    transformer, vae = config(TransformerConfig, "transformer"), {}
    halves = [half(config(VAEConfig, "vae")) for half in (AutoencoderKLQwenImageEncoder, AutoencoderKLQwenImage)]
    for name, shape in (of(halves[0]) | of(halves[1])).items():
        if len(shape) == 4:
            time = [] if ".resample." in name else [3]
            shape = [shape[0], shape[3], *time, *shape[1:3]]
        elif name.endswith(".gamma") or len(shape) == 2:
            shape = [*shape, 1, 1] if "attentions" in name else [*shape, 1, 1, 1]
        vae[name] = shape
    text = {
        f"model.{name}": shape for name, shape in of(TextEncoder(config(TextEncoderConfig, "text_encoder"))).items()
    }
    return {
        "transformer": of(QwenImageTransformer2DModel(transformer)) | of(Modulator(transformer)),
        "text_encoder": text | {"visual.patch_embed.proj.weight": [8, 3, 2, 2, 2], "lm_head.weight": [2048, 256]},
        "vae": vae,
    }


def read(checkpoint: Path, component: str) -> Weights:
    weights: Weights = {}
    for path in sorted((checkpoint / component).glob("*.safetensors")):
        weights |= mx.load(str(path))
    return weights


def renamed(weights: Weights, *pairs: tuple[str, str]) -> Weights:
    made = {}
    for name, weight in weights.items():
        for old, new in pairs:
            name = re.sub(old, new, name)
        made[name] = weight
    return made


# -- mflux: three directories without configs


def mflux_transformer(weights: Weights) -> Weights:
    return renamed(
        weights,
        (r"\.(img|txt)_mod\.1\.", r".\1_mod_linear."),
        (r"\.attn\.to_out\.0\.", ".attn.attn_to_out.0."),
        (r"\.(img|txt)_mlp\.net\.0\.proj\.", r".\1_ff.mlp_in."),
        (r"\.(img|txt)_mlp\.net\.2\.", r".\1_ff.mlp_out."),
    )


def mflux_text_encoder(weights: Weights) -> Weights:
    kept = {name: weight for name, weight in weights.items() if not name.startswith("lm_head")}
    return renamed(kept, (r"^model\.", "encoder."), (r"^visual\.", "encoder.visual."))


def mflux_vae(weights: Weights) -> Weights:
    def down_block(found: re.Match) -> str:
        """Two residual blocks, and but for the last what halves the size."""
        block, layer = divmod(int(found[1]), 3)
        return f"encoder.down_blocks.{block}." + ("downsamplers.0." if layer == 2 else f"resnets.{layer}.")

    made = {}
    for name, weight in weights.items():
        if weight.ndim > 3 and name.endswith(".weight"):
            weight = mx.moveaxis(weight, 1, -1)
        elif name.endswith(".gamma"):
            weight = weight.flatten()
        kernel = name.rpartition(".")[2] in ("weight", "bias")
        if kernel and not re.search(r"attentions|resample", name):
            name = re.sub(r"\.(weight|bias)$", r".conv3d.\1", name)
        made[re.sub(r"^encoder\.down_blocks\.(\d+)\.", down_block, name)] = weight
    return renamed(
        made,
        (r"\.gamma$", ".weight"),
        (r"\.up_blocks\.(\d+)\.", r".up_block\1."),
        (r"\.conv_shortcut\.", ".skip_conv."),
        (r"\.resample\.1\.", ".resample_conv."),
    )


def quantized(weights: Weights, bits_of) -> Weights:
    """As MLX does it; `bits_of(layer)` says to what, or None."""
    made = {}
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        bits = bits_of(layer) if kind == "weight" and weight.ndim == 2 and weight.shape[1] % 64 == 0 else None
        if bits:
            packed, scales, biases = mx.quantize(weight, 64, bits)
            made |= {f"{layer}.weight": packed, f"{layer}.scales": scales, f"{layer}.biases": biases}
        else:
            made[name] = weight
    return made


def dequantized(weights: Weights, bits_of) -> Weights:
    """What of the same weights remains, as full ones."""
    made = {}
    for name, weight in quantized(weights, bits_of).items():
        layer, _, kind = name.rpartition(".")
        if weight.dtype == mx.uint32:
            parts = (quantized({name: weights[name]}, bits_of)[f"{layer}.{part}"] for part in ("scales", "biases"))
            made[name] = mx.dequantize(weight, *parts, group_size=64, bits=bits_of(layer))
        elif kind not in ("scales", "biases"):
            made[name] = weight
    return made


def write_mflux(checkpoint: Path, target: Path, bits_of=lambda layer: None, text_bits=lambda layer: None) -> Path:
    for component, named, bits in (
        ("transformer", mflux_transformer, bits_of),
        ("text_encoder", mflux_text_encoder, text_bits),
        ("vae", mflux_vae, lambda layer: None),
    ):
        weights = quantized(named(read(checkpoint, component)), bits)
        directory = target / component
        directory.mkdir(parents=True)
        half = sorted(weights)[len(weights) // 2]
        files = [{n: w for n, w in weights.items() if (n < half) == first} for first in (True, False)]
        for number, file in enumerate(files):
            metadata = {"quantization_level": "4", "mflux_version": "0.24.0"}
            mx.save_safetensors(str(directory / f"{number}.safetensors"), file, metadata)
        index = {"weight_map": {name: f"{number}.safetensors" for number, file in enumerate(files) for name in file}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copytree(checkpoint / "tokenizer", target / "tokenizer")
    return target


# -- ComfyUI: a file for each model


def comfyui_transformer(weights: Weights) -> Weights:
    return {f"model.diffusion_model.{name}": weight for name, weight in weights.items()}


def float8(weights: Weights, spelling: str | None, is_packed) -> tuple[Weights, Weights, set[str]]:
    """Those with float8 where `is_packed(name)`; what full weights that is; and the names of float8 tensors.

    `spelling` is what a weight's scale is called; None for none.
    """
    packed, full, names = {}, {}, set()
    for name, weight in weights.items():
        packed[name] = full[name] = weight
        if name.endswith(".weight") and weight.ndim == 2 and is_packed(name):
            scale = mx.abs(weight).max() / FLOAT8_MOST if spelling else mx.array(1.0)
            packed[name] = mx.to_fp8(weight / scale)
            full[name] = mx.from_fp8(packed[name], mx.float32) * scale
            names.add(name)
            if spelling:
                packed[name.removesuffix("weight") + spelling] = scale
    return packed, full, names


def save_float8(path: Path, weights: Weights, names: set[str]) -> None:
    """MLX writes float8 as bytes; the header says what they are."""
    mx.save_safetensors(str(path), weights, {"format": "pt"})
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for name in names:
        header[name]["dtype"] = "F8_E4M3"
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + size :])


def wan_vae(weights: Weights) -> Weights:
    made = renamed(
        weights,
        (r"^post_quant_conv\.", "conv2."),
        (r"^quant_conv\.", "conv1."),
        (r"^(..coder)\.conv_in\.", r"\1.conv1."),
        (r"^(..coder)\.norm_out\.", r"\1.head.0."),
        (r"^(..coder)\.conv_out\.", r"\1.head.2."),
        (r"^(..coder\.(?:mid_block|(?:up|down)_blocks)\..*)\.norm1\.", r"\1.residual.0."),
        (r"^(..coder\.(?:mid_block|(?:up|down)_blocks)\..*)\.conv1\.", r"\1.residual.2."),
        (r"^(..coder\.(?:mid_block|(?:up|down)_blocks)\..*)\.norm2\.", r"\1.residual.3."),
        (r"^(..coder\.(?:mid_block|(?:up|down)_blocks)\..*)\.conv2\.", r"\1.residual.6."),
        (r"\.conv_shortcut\.", ".shortcut."),
        (r"^(..coder)\.mid_block\.resnets\.0\.", r"\1.middle.0."),
        (r"^(..coder)\.mid_block\.attentions\.0\.", r"\1.middle.1."),
        (r"^(..coder)\.mid_block\.resnets\.1\.", r"\1.middle.2."),
        (r"^encoder\.down_blocks\.", "encoder.downsamples."),
    )
    # four blocks of three residual ones, and but for the last what doubles the size
    return {
        re.sub(
            r"^decoder\.up_blocks\.(\d)\.(?:resnets\.(\d)|upsamplers\.0)\.",
            lambda found: f"decoder.upsamples.{4 * int(found[1]) + int(found[2] or 3)}.",
            name,
        ): weight
        for name, weight in made.items()
    }


def with_weights(checkpoint: Path, target: Path, component: str, weights: Weights) -> Path:
    """A copy in diffusers' layout, one component with other weights."""
    shutil.copytree(checkpoint, target)
    (file,) = (target / component).glob("*.safetensors")
    mx.save_safetensors(str(file), weights, {"format": "pt"})
    return target

"""Checkpoints as other programs write them, brought to the names and shapes of diffusers' files.

Each layout is a table of names and a mark by which it is known. What such files do not say, the configs, is told from
the shapes of their tensors; what no shape tells is as in every Qwen-Image.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from artifacts_schema.errors import UserError

if TYPE_CHECKING:
    import mlx.core as mx

FLOAT8 = "F8_E4M3"  # as safetensors calls it
SCALES = (".scale_weight", ".weight_scale")  # of a float8 weight, by the spellings there are
# for computing in float8, or saying that it is one; and what mflux keeps although it knows it: of no use here
IGNORED = re.compile(r"(^|\.)(scaled_fp8|scale_input|input_scale|comfy_quant|rotary_emb\.inv_freq)$")

SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
HEAD_DIM = 128  # of the transformer and of the text encoder
AXES_DIMS_ROPE = (16, 56, 56)
VAE = {
    "z_dim": 16,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "temperal_downsample": (False, True, True),
    "latents_mean": (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                     0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    "latents_std": (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
}  # fmt: skip


class Layout(NamedTuple):
    mark: str  # a pattern that some tensor's name has in it
    renames: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]  # patterns, and what comes in their place
    channels_last: bool = False  # convolutions' kernels are [out, ..., in], not [out, in, ...]


def _down_block(block: str, layer: str) -> str:
    return f"encoder.down_blocks.{3 * int(block) + int(layer)}."


DIFFUSERS = Layout("", ())
LAYOUTS = {
    "mflux transformer": Layout(
        r"\.img_mod_linear\.",
        (
            (r"\.(img|txt)_mod_linear\.", r".\1_mod.1."),
            (r"\.attn_to_out\.", ".to_out."),
            (r"\.(img|txt)_ff\.mlp_in\.", r".\1_mlp.net.0.proj."),
            (r"\.(img|txt)_ff\.mlp_out\.", r".\1_mlp.net.2."),
        ),
    ),
    "mflux text encoder": Layout(
        r"^encoder\.layers\.", ((r"^encoder\.visual\.", "visual."), (r"^encoder\.", "model."))
    ),
    "mflux VAE": Layout(
        r"\.conv3d\.",
        (
            (r"\.conv3d\.", "."),
            (r"\.up_block(\d+)\.", r".up_blocks.\1."),
            (r"\.skip_conv\.", ".conv_shortcut."),
            (r"\.resample_conv\.", ".resample.1."),
            # diffusers counts the encoder's lower layers through: two residual blocks, and what halves the size
            (r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d)\.", lambda found: _down_block(found[1], found[2])),
            (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", lambda found: _down_block(found[1], "2")),
            (r"\b(norm1|norm2|norm|norm_out)\.weight$", r"\1.gamma"),
        ),
        channels_last=True,
    ),
    "ComfyUI transformer": Layout(r"^(model\.)?diffusion_model\.", ((r"^(model\.)?diffusion_model\.", ""),)),
    "Wan VAE": Layout(
        r"^decoder\.middle\.0\.residual\.",
        (
            (r"^conv1\.", "quant_conv."),
            (r"^conv2\.", "post_quant_conv."),
            (r"^(en|de)coder\.conv1\.", r"\1coder.conv_in."),
            (r"^(en|de)coder\.head\.0\.", r"\1coder.norm_out."),
            (r"^(en|de)coder\.head\.2\.", r"\1coder.conv_out."),
            (r"^(en|de)coder\.middle\.1\.", r"\1coder.mid_block.attentions.0."),
            (r"^(en|de)coder\.middle\.0\.", r"\1coder.mid_block.resnets.0."),
            (r"^(en|de)coder\.middle\.2\.", r"\1coder.mid_block.resnets.1."),
            (r"^encoder\.downsamples\.", "encoder.down_blocks."),
            (r"\.residual\.0\.", ".norm1."),
            (r"\.residual\.2\.", ".conv1."),
            (r"\.residual\.3\.", ".norm2."),
            (r"\.residual\.6\.", ".conv2."),
            (r"\.shortcut\.", ".conv_shortcut."),
        ),
    ),
}
WAN_UPSAMPLES = re.compile(r"^decoder\.upsamples\.(\d+)\.")


def layout_of(names: Iterable[str]) -> Layout:
    """That of tensors with these names; diffusers' own, if no other is known by them."""
    names = list(names)
    for layout in LAYOUTS.values():
        if any(re.search(layout.mark, name) for name in names):
            return layout
    return DIFFUSERS


def renamed(names: Iterable[str]) -> dict[str, str]:
    """What diffusers calls the tensors of these names, by those; what is of no use is left out."""
    names = [name for name in names if not IGNORED.search(name)]
    layout, blocks = layout_of(names), _wan_blocks(names)
    made: dict[str, str] = {}
    for name in names:
        new = WAN_UPSAMPLES.sub(lambda found: blocks[int(found[1])], name)
        for pattern, replacement in layout.renames:
            new = re.sub(pattern, replacement, new)
        made[name] = new
    if len(set(made.values())) < len(made):
        double = next(new for new in made.values() if list(made.values()).count(new) > 1)
        raise UserError(f"the checkpoint holds {double} twice, under two names")
    return made


def standard(weights: "Mapping[str, mx.array]", float8: set[str], as_stored: bool) -> "dict[str, mx.array]":
    """Unread tensors by diffusers' names and in its shapes; unread as well.

    `float8`: the names of those that are, in the file. `as_stored` leaves the numbers as they are.
    """
    import mlx.core as mx

    names = renamed(weights)
    layout, made = layout_of(weights), {}
    for name, new in names.items():
        weight = weights[name]
        if name in float8 and not as_stored:
            others = (name.removesuffix(".weight") + end for end in SCALES)
            scales = [scale_of(weights[other], weight.shape, other) for other in others if other in weights]
            weight = mx.from_fp8(weight, mx.float32)
            for scale in scales:
                weight = weight * scale
        elif name.endswith(SCALES) and f"{name.rpartition('.')[0]}.weight" not in float8:
            raise UserError(f"the checkpoint holds {name}, which scales no float8 weight: a layout that is not known")
        if layout.channels_last and weight.ndim in (4, 5):
            weight = mx.moveaxis(weight, -1, 1)
        made[new] = weight
    return {new: weight for new, weight in made.items() if not new.endswith(SCALES)}


def scale_of(scale: "mx.array", shape: tuple[int, ...], name: str) -> "mx.array":
    """A float8 weight's scale, of all of it or of each row, to multiply that with."""
    import mlx.core as mx

    if scale.size == 1:
        return scale.reshape(()).astype(mx.float32)
    if scale.size == shape[0] and scale.shape in ((shape[0],), (shape[0], 1)):
        return scale.reshape(-1, *[1] * (len(shape) - 1)).astype(mx.float32)
    raise UserError(f"the checkpoint holds {name} of shape {scale.shape} for a weight of {shape}, which is not known")


def config_of(component: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A component's config, by its tensors' names and shapes as diffusers has them. KeyError names one that lacks."""
    if component == "scheduler":
        return SCHEDULER
    numbers = [int(found[1]) for name in shapes if (found := re.search(r"(?:layers|_blocks)\.(\d+)\.", name))]
    layers = 1 + max(numbers, default=-1)
    if component == "transformer":
        head_dim = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
        if head_dim != HEAD_DIM:
            raise UserError(f"heads of {head_dim} are none of Qwen-Image's, which have {HEAD_DIM}")
        return {
            "num_layers": layers,
            "num_attention_heads": shapes["img_in.bias"][0] // HEAD_DIM,
            "attention_head_dim": HEAD_DIM,
            "joint_attention_dim": shapes["txt_norm.weight"][0],
            "in_channels": shapes["proj_out.bias"][0],
            "out_channels": shapes["proj_out.bias"][0] // 4,  # for each of a token's 2x2 latents
            "axes_dims_rope": AXES_DIMS_ROPE,
        }
    if component == "text_encoder":
        within = (
            "model.language_model." if any(name.startswith("model.language_model.") for name in shapes) else "model."
        )
        layer = f"{within}layers.0."
        return {
            "hidden_size": shapes[f"{within}norm.weight"][0],
            "intermediate_size": shapes[f"{layer}mlp.gate_proj.weight"][0],
            "num_hidden_layers": layers,
            "num_attention_heads": shapes[f"{layer}self_attn.q_proj.bias"][0] // HEAD_DIM,
            "num_key_value_heads": shapes[f"{layer}self_attn.k_proj.bias"][0] // HEAD_DIM,
            "vocab_size": shapes[f"{within}embed_tokens.weight"][0],
        }
    first = shapes["decoder.norm_out.gamma"]
    return {**VAE, "base_dim": first[0]}


def _wan_blocks(names: Iterable[str]) -> dict[int, str]:
    """Wan counts the decoder's upper layers through: where each is in a block, by its number."""
    numbers = sorted({int(found[1]) for name in names if (found := WAN_UPSAMPLES.match(name))})
    doubling = {int(found[1]) for name in names if ".resample." in name and (found := WAN_UPSAMPLES.match(name))}
    places, block, resnet = {}, 0, 0
    for number in numbers:
        if number in doubling:
            places[number] = f"decoder.up_blocks.{block}.upsamplers.0."
            block, resnet = block + 1, 0
        else:
            places[number] = f"decoder.up_blocks.{block}.resnets.{resnet}."
            resnet += 1
    return places

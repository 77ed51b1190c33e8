"""The denoiser: diffusers' `QwenImageTransformer2DModel`, a dual-stream diffusion transformer, as two models.

A third of its parameters sees nothing but the timestep. `Modulator` is that third: it is asked once for a whole
schedule. `QwenImageTransformer2DModel` is the rest, and takes the answers.

Shapes: B images of one size, S image tokens each (a token is a 2x2 patch of latents), and the B prompts packed one
after the other without padding: `encoder_hidden_states` is [sum(txt_seq_lens), joint_attention_dim]. Matrix products
then run over all tokens at once, attention runs per image, and no mask exists anywhere.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from stages.models import kernels
from stages.models.kernels import NORM_EPS, Heads, ImageTextRotary, Norm, Part, Rotary
from stages.models.step_cache import StepCache

ROPE_THETA = 10_000
TIME_PROJ_DIM = 256
TIME_SCALE = 1000
TIME_MAX_PERIOD = 10_000
PATCH_SIZE = 2
SHIFT1, SCALE1, GATE1, SHIFT2, SCALE2, GATE2 = range(6)  # in a block's modulation: of its attention, then of its MLP


@dataclass(frozen=True)
class TransformerConfig:
    """The fields of `transformer/config.json`."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int
    in_channels: int
    axes_dims_rope: tuple[int, int, int]
    out_channels: int | None = None
    patch_size: int = PATCH_SIZE
    guidance_embeds: bool = False
    zero_cond_t: bool = False
    use_layer3d_rope: bool = False
    use_additional_t_cond: bool = False

    def __post_init__(self):
        for flag in ("guidance_embeds", "zero_cond_t", "use_layer3d_rope", "use_additional_t_cond"):
            if getattr(self, flag):
                raise ValueError(f"{flag} is true, which qwen-stage does not support (an edit or layered variant?)")
        if self.patch_size != PATCH_SIZE:
            raise ValueError(f"patch_size {self.patch_size} is not supported, only {PATCH_SIZE}")
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(dim % 2 for dim in self.axes_dims_rope):
            raise ValueError(f"axes_dims_rope {self.axes_dims_rope} must be even and sum to attention_head_dim")
        if PATCH_SIZE**2 * (self.out_channels or self.in_channels) != self.in_channels:
            raise ValueError(f"in_channels must be {PATCH_SIZE**2} x out_channels: text-to-image models only")

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class Text(NamedTuple):
    """The prompts of a batch as the first block takes them, packed, and where they and their images stand."""

    hidden_states: mx.array  # [sum(txt_seq_lens), dim], in the compute dtype
    txt_seq_lens: list[int]
    image_rotary_emb: ImageTextRotary


class Stream(NamedTuple):
    """The hidden states of images or texts on their way through the blocks."""

    x: mx.array  # [..., dim]
    normed: mx.array  # and modulated, for the layer that is next


class Modulation(NamedTuple):
    """What a timestep makes of the blocks: shift, scale and gate of their attention, then of their MLP."""

    img: mx.array  # [num_layers, 6 * dim]
    txt: mx.array  # [num_layers, 6 * dim]
    out: mx.array  # [2 * dim]: scale and shift of the last norm


class TimestepEmbedding(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(TIME_PROJ_DIM, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(nn.silu(self.linear_1(x)))


class TimeTextEmbed(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(dim)

    def __call__(self, timestep: mx.array, dtype: mx.Dtype) -> mx.array:
        """timestep: a scalar in [0, 1], already rounded to the compute dtype -> [dim]."""
        half = TIME_PROJ_DIM // 2
        freqs = mx.exp(-mx.log(mx.array(float(TIME_MAX_PERIOD))) * mx.arange(half, dtype=mx.float32) / half)
        angles = timestep.astype(mx.float32) * freqs * TIME_SCALE
        return self.timestep_embedder(mx.concatenate([mx.cos(angles), mx.sin(angles)]).astype(dtype))


class GELU(nn.Module):
    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out)

    def __call__(self, x: mx.array) -> mx.array:
        return kernels.gelu(self.proj, x)


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = [GELU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)]  # Identity: dropout in training

    def __call__(self, stream: Stream, gate: Part, norm: Norm) -> Stream:
        """The stream with what this adds to it, normed for what is next."""
        return Stream(*kernels.gated_norm(stream.x, self.net[2], self.net[0](stream.normed), gate, norm))


class JointAttention(nn.Module):
    """Every image attends to its own prompt and itself; prompt tokens come first."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.to_qkv, self.add_qkv_proj = (nn.Linear(dim, 3 * dim) for _ in range(2))
        self.norm_q, self.norm_k = (nn.RMSNorm(head_dim, NORM_EPS) for _ in range(2))
        self.norm_added_q, self.norm_added_k = (nn.RMSNorm(head_dim, NORM_EPS) for _ in range(2))
        self.to_out = [nn.Linear(dim, dim)]
        self.to_add_out = nn.Linear(dim, dim)

    def __call__(self, img: mx.array, txt: mx.array, text: Text) -> tuple[mx.array, mx.array]:
        """What each attends to, before `to_out` and `to_add_out`: [B, S, dim] and [sum(txt_seq_lens), dim]."""
        img_heads = Heads(self.to_qkv, self.norm_q, self.norm_k)
        txt_heads = Heads(self.add_qkv_proj, self.norm_added_q, self.norm_added_k)
        joint = kernels.joint_heads(img_heads, img, txt_heads, txt, text.txt_seq_lens, text.image_rotary_emb)
        img_out, txt_out = [], []
        for length, (q, k, v) in zip(text.txt_seq_lens, joint, strict=True):
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
            out = out.swapaxes(1, 2).reshape(q.shape[2], -1)  # a view, where indexing would gather
            txt_out.append(out[:length])
            img_out.append(out[length:])
        return mx.stack(img_out), mx.concatenate(txt_out)


class QwenImageTransformerBlock(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim = config.dim
        self.attn = JointAttention(dim, config.attention_head_dim)
        self.img_mlp = FeedForward(dim)
        self.txt_mlp = FeedForward(dim)

    def __call__(
        self, img: Stream, txt: Stream, text: Text, img_mod: mx.array, txt_mod: mx.array, next_norms: list[Norm]
    ) -> tuple[Stream, Stream]:
        """`next_norms` are those that images and texts come to next; without one for texts, they need not go on."""

        def second_half(stream: Stream, to_out: nn.Linear, attn: mx.array, mod: mx.array) -> Stream:
            return Stream(*kernels.gated_norm(stream.x, to_out, attn, Part(mod, GATE1), Norm(mod, SHIFT2, SCALE2)))

        img_attn, txt_attn = self.attn(img.normed, txt.normed, text)
        img = second_half(img, self.attn.to_out[0], img_attn, img_mod)
        img = self.img_mlp(img, Part(img_mod, GATE2), next_norms[0])
        if len(next_norms) > 1:
            txt = second_half(txt, self.attn.to_add_out, txt_attn, txt_mod)
            txt = self.txt_mlp(txt, Part(txt_mod, GATE2), next_norms[1])
        return img, txt


class QwenImageTransformer2DModel(nn.Module):
    LAYERS = "transformer_blocks"
    JOINED: ClassVar = {"to_qkv": ("to_q", "to_k", "to_v"), "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj")}

    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim = config.dim
        self.config = config
        self.txt_norm = nn.RMSNorm(config.joint_attention_dim, NORM_EPS)
        self.img_in = nn.Linear(config.in_channels, dim)
        self.txt_in = nn.Linear(config.joint_attention_dim, dim)
        self.transformer_blocks = [QwenImageTransformerBlock(config) for _ in range(config.num_layers)]
        self.proj_out = nn.Linear(dim, config.in_channels)

    def __call__(
        self, hidden_states: mx.array, texts: list[Text], modulation: Modulation, cache: StepCache | None = None
    ) -> list[mx.array]:
        """Predicts the velocity (noise - image) of the same images beside each of several texts.

        hidden_states [B, S, in_channels] in the compute dtype; a text that packs n x B prompts takes the images n times
        over. Returns [n x B, S, in_channels] for each text. All of them pass one block before any passes the next.
        With a cache, what the blocks behind the first add may be what they added at an earlier step.
        """
        mods = list(zip(modulation.img, modulation.txt, strict=True))
        norms = [[Norm(mod, SHIFT1, SCALE1) for mod in pair] for pair in mods]
        norms.append([Norm(modulation.out, shift=1, scale=0)])
        streams: list[tuple[Stream, Stream]] = []

        def added(before: list[mx.array]) -> list[mx.array]:
            return [img.x - x for (img, _), x in zip(streams, before, strict=True)]

        for text in texts:
            images = mx.concatenate([hidden_states] * (len(text.txt_seq_lens) // hidden_states.shape[0]))
            begin = zip((self.img_in(images), text.hidden_states), norms[0], strict=True)
            img, txt = (Stream(x, norm(x)) for x, norm in begin)
            streams.append((img, txt))
        before = [img.x for img, _ in streams]
        for block, pair, next_norms in zip(self.transformer_blocks, mods, norms[1:], strict=True):
            streams = [
                block(img, txt, text, *pair, next_norms) for (img, txt), text in zip(streams, texts, strict=True)
            ]
            kernels.begin(*(img.normed for img, _ in streams))
            if cache and pair is mods[0]:
                first, before = added(before), [img.x for img, _ in streams]
                if (rest := cache.reuse(first)) is not None:
                    (last_norm,) = norms[-1]
                    return [self.proj_out(last_norm(x + more)) for x, more in zip(before, rest, strict=True)]
        if cache:
            cache.keep(added(before))
        return [self.proj_out(img.normed) for img, _ in streams]

    def text(self, encoder_hidden_states: mx.array, txt_seq_lens: list[int], height: int, width: int) -> Text:
        """What is the same at every step about prompts [sum(txt_seq_lens), joint_attention_dim] and the places of
        images of height x width tokens, computed now."""
        hidden_states = self.txt_in(self.txt_norm(encoder_hidden_states))
        text = Text(hidden_states, txt_seq_lens, self.pos_embed(height, width, txt_seq_lens))
        mx.eval(text)
        return text

    def pos_embed(self, height: int, width: int, txt_seq_lens: list[int]) -> ImageTextRotary:
        """RoPE tables for images of height x width tokens: image positions are centred, prompts start after them."""
        rows = mx.arange(height) - (height - height // 2)
        columns = mx.arange(width) - (width - width // 2)
        shape = (height, width)
        image = [mx.zeros(shape), mx.broadcast_to(rows[:, None], shape), mx.broadcast_to(columns[None], shape)]
        start = max(height // 2, width // 2)
        text = mx.concatenate([mx.arange(start, start + length) for length in txt_seq_lens])
        return ImageTextRotary(self._rotary([axis.flatten() for axis in image]), self._rotary([text] * 3))

    def _rotary(self, positions: list[mx.array]) -> Rotary:
        """positions: [tokens] for each of the three axes."""
        angles = []
        for axis, dim in zip(positions, self.config.axes_dims_rope, strict=True):
            freqs = 1.0 / mx.power(float(ROPE_THETA), mx.arange(0, dim, 2, dtype=mx.float32) / dim)
            angles.append(axis.astype(mx.float32)[:, None] * freqs)
        table = mx.concatenate(angles, axis=-1)[:, None]
        return Rotary(mx.stack([mx.cos(table), mx.sin(table)], axis=-1).flatten(-2))

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return {name: weight for name, weight in weights.items() if not Modulator.owns(name)}

    @staticmethod
    def bits_of(layer: str, bits: int) -> int | None:
        """To how many bits a layer's weights are quantized where `bits` are asked for: those of the blocks, all alike.

        Why so: docs/quantization.md.
        """
        return bits if layer.startswith("transformer_blocks.") else None


class BlockModulator(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.img_mod = [nn.SiLU(), nn.Linear(dim, 6 * dim)]
        self.txt_mod = [nn.SiLU(), nn.Linear(dim, 6 * dim)]

    def __call__(self, silu_tembs: list[mx.array]) -> tuple[mx.array, mx.array]:
        img, txt = self.img_mod[1], self.txt_mod[1]
        return mx.stack([img(temb) for temb in silu_tembs]), mx.stack([txt(temb) for temb in silu_tembs])


class NormOut(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)


class Modulator(nn.Module):
    """The part of the transformer that sees the timestep alone."""

    LAYERS = "transformer_blocks"

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.time_text_embed = TimeTextEmbed(config.dim)
        self.transformer_blocks = [BlockModulator(config.dim) for _ in range(config.num_layers)]
        self.norm_out = NormOut(config.dim)

    def __call__(self, timesteps: list[mx.array], dtype: mx.Dtype) -> Modulation:
        """Scalars in [0, 1] -> their modulation, with a first axis for them: img [timesteps, num_layers, 6 * dim].

        Each goes through alone, as it would in its own step: the result does not depend on what else was asked for.
        """
        silu_tembs = [nn.silu(self.time_text_embed(timestep.astype(dtype), dtype)) for timestep in timesteps]
        img, txt = zip(*[block(silu_tembs) for block in self.transformer_blocks], strict=True)
        out = mx.stack([self.norm_out.linear(temb) for temb in silu_tembs])
        return Modulation(mx.stack(img, axis=1), mx.stack(txt, axis=1), out)

    @staticmethod
    def owns(name: str) -> bool:
        return name.startswith(("time_text_embed.", "norm_out.linear.")) or ".img_mod." in name or ".txt_mod." in name

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return {name: weight for name, weight in weights.items() if Modulator.owns(name)}


def pack_latents(latents: mx.array) -> mx.array:
    """[B, C, h, w] -> [B, h/2 * w/2, 4C]: one token is a 2x2 patch, channels outermost within it."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack_latents(tokens: mx.array, height: int, width: int) -> mx.array:
    """The inverse of `pack_latents`; height and width are those of the latents."""
    b, _, c = tokens.shape
    patches = tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, c // 4, height, width)

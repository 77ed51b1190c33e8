"""The denoiser: diffusers' `QwenImageTransformer2DModel`, a dual-stream diffusion transformer.

Shapes: B images of one size, S image tokens each (a token is a 2x2 patch of latents), and the B prompts packed one
after the other without padding: `encoder_hidden_states` is [sum(txt_seq_lens), joint_attention_dim]. Matrix products
then run over all tokens at once, attention runs per image, and no mask exists anywhere.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

NORM_EPS = 1e-6
ROPE_THETA = 10_000
TIME_PROJ_DIM = 256
TIME_SCALE = 1000
TIME_MAX_PERIOD = 10_000
PATCH_SIZE = 2


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


class Rotary(NamedTuple):
    """cos and sin of one stream's angles, [tokens, 1, head_dim / 2], float32."""

    cos: mx.array
    sin: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """Rotates the interleaved pairs of x [..., tokens, heads, head_dim], in float32 as the reference does."""
        pairs = x.astype(mx.float32).reshape(*x.shape[:-1], -1, 2)
        real, imag = pairs[..., 0], pairs[..., 1]
        rotated = mx.stack([real * self.cos - imag * self.sin, real * self.sin + imag * self.cos], axis=-1)
        return rotated.reshape(x.shape).astype(x.dtype)


class ImageTextRotary(NamedTuple):
    img: Rotary
    txt: Rotary


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
        return nn.gelu_approx(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = [GELU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)]  # Identity: dropout in training

    def __call__(self, x: mx.array) -> mx.array:
        return self.net[2](self.net[0](x))


class JointAttention(nn.Module):
    """Every image attends to its own prompt and itself; prompt tokens come first."""

    def __init__(self, dim: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(head_dim, NORM_EPS) for _ in range(2))
        self.norm_added_q, self.norm_added_k = (nn.RMSNorm(head_dim, NORM_EPS) for _ in range(2))
        self.to_out = [nn.Linear(dim, dim)]
        self.to_add_out = nn.Linear(dim, dim)

    def __call__(
        self, img: mx.array, txt: mx.array, txt_seq_lens: list[int], rotary: ImageTextRotary
    ) -> tuple[mx.array, mx.array]:
        def heads(y: mx.array) -> mx.array:
            return y.reshape(*y.shape[:-1], self.num_heads, self.head_dim)

        img_q = rotary.img(self.norm_q(heads(self.to_q(img))))
        img_k = rotary.img(self.norm_k(heads(self.to_k(img))))
        img_v = heads(self.to_v(img))
        txt_q = rotary.txt(self.norm_added_q(heads(self.add_q_proj(txt))))
        txt_k = rotary.txt(self.norm_added_k(heads(self.add_k_proj(txt))))
        txt_v = heads(self.add_v_proj(txt))

        img_out, txt_out = [], []
        for i, (end, length) in enumerate(zip(accumulate(txt_seq_lens), txt_seq_lens, strict=True)):
            own = slice(end - length, end)
            q, k, v = (
                mx.concatenate([t[own], x[i]])[None].swapaxes(1, 2)
                for t, x in ((txt_q, img_q), (txt_k, img_k), (txt_v, img_v))
            )
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
            out = out.swapaxes(1, 2).flatten(2)[0]
            txt_out.append(out[:length])
            img_out.append(out[length:])
        return self.to_out[0](mx.stack(img_out)), self.to_add_out(mx.concatenate(txt_out))


def modulated_norm(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """LayerNorm without affine, then x * (1 + scale) + shift; all tokens share one timestep, so it is one affine."""
    return mx.fast.layer_norm(x, 1 + scale, shift, NORM_EPS)


class QwenImageTransformerBlock(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim = config.num_attention_heads * config.attention_head_dim
        self.img_mod = [nn.SiLU(), nn.Linear(dim, 6 * dim)]
        self.txt_mod = [nn.SiLU(), nn.Linear(dim, 6 * dim)]
        self.attn = JointAttention(dim, config.num_attention_heads, config.attention_head_dim)
        self.img_mlp = FeedForward(dim)
        self.txt_mlp = FeedForward(dim)

    def __call__(
        self, img: mx.array, txt: mx.array, txt_seq_lens: list[int], silu_temb: mx.array, rotary: ImageTextRotary
    ) -> tuple[mx.array, mx.array]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod[1](silu_temb).split(6)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod[1](silu_temb).split(6)
        img_attn, txt_attn = self.attn(
            modulated_norm(img, img_shift1, img_scale1),
            modulated_norm(txt, txt_shift1, txt_scale1),
            txt_seq_lens,
            rotary,
        )
        img = img + img_gate1 * img_attn
        txt = txt + txt_gate1 * txt_attn
        img = img + img_gate2 * self.img_mlp(modulated_norm(img, img_shift2, img_scale2))
        txt = txt + txt_gate2 * self.txt_mlp(modulated_norm(txt, txt_shift2, txt_scale2))
        return img, txt


class AdaLayerNormContinuous(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def __call__(self, x: mx.array, silu_temb: mx.array) -> mx.array:
        scale, shift = self.linear(silu_temb).split(2)  # the other way round than in the blocks
        return modulated_norm(x, shift, scale)


class QwenImageTransformer2DModel(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim = config.num_attention_heads * config.attention_head_dim
        self.config = config
        self.time_text_embed = TimeTextEmbed(dim)
        self.txt_norm = nn.RMSNorm(config.joint_attention_dim, NORM_EPS)
        self.img_in = nn.Linear(config.in_channels, dim)
        self.txt_in = nn.Linear(config.joint_attention_dim, dim)
        self.transformer_blocks = [QwenImageTransformerBlock(config) for _ in range(config.num_layers)]
        self.norm_out = AdaLayerNormContinuous(dim)
        self.proj_out = nn.Linear(dim, config.in_channels)

    def __call__(
        self,
        hidden_states: mx.array,
        encoder_hidden_states: mx.array,
        txt_seq_lens: list[int],
        timestep: mx.array,
        image_rotary_emb: ImageTextRotary,
    ) -> mx.array:
        """Predicts the velocity (noise - image).

        hidden_states [B, S, in_channels] and encoder_hidden_states [sum(txt_seq_lens), joint_attention_dim] in the
        compute dtype; timestep: one scalar in [0, 1] for the whole batch; image_rotary_emb from `pos_embed`.
        Returns [B, S, in_channels].
        """
        img = self.img_in(hidden_states)
        txt = self.txt_in(self.txt_norm(encoder_hidden_states))
        silu_temb = nn.silu(self.time_text_embed(timestep.astype(img.dtype), img.dtype))
        for block in self.transformer_blocks:
            img, txt = block(img, txt, txt_seq_lens, silu_temb, image_rotary_emb)
        return self.proj_out(self.norm_out(img, silu_temb))

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
        return Rotary(mx.cos(table), mx.sin(table))

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return weights


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

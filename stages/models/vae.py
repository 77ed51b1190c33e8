"""The decoder half of diffusers' `AutoencoderKLQwenImage`, for single frames.

The reference is a causal video VAE: a 3-D kernel's last temporal slice is the only one that meets a single frame, the
others see the zero padding before it. So 2-D convolutions with that slice are exact, at a third of the arithmetic.
Everything is channels-last, [B, H, W, C].
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

RMS_EPS = 1e-24  # the reference normalizes by max(norm, 1e-12); this only guards the all-zero vector
ATTENTION_QUERIES = 4096  # queries at a time in the middle attention, whose score matrix grows with pixels squared


@dataclass(frozen=True)
class VAEConfig:
    """The fields of `vae/config.json` that the decoder needs."""

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temperal_downsample: tuple[bool, ...]  # the checkpoint's spelling
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    input_channels: int = 3

    def __post_init__(self):
        if self.input_channels != 3:
            raise ValueError(f"input_channels {self.input_channels} is not supported, only 3 (RGB)")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError("temperal_downsample must have one entry less than dim_mult")
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise ValueError(f"latents_mean and latents_std must have z_dim = {self.z_dim} entries")

    @property
    def vae_scale_factor(self) -> int:
        return 2 ** len(self.temperal_downsample)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = mx.ones(dim)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.gamma, RMS_EPS)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.norm1 = RMSNorm(in_dim)
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, padding=1)
        self.norm2 = RMSNorm(out_dim)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = nn.Linear(in_dim, out_dim) if in_dim != out_dim else nn.Identity()

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv1(nn.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(nn.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels of the latent grid."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        b, h, w, dim = x.shape
        q, k, v = self.to_qkv(self.norm(x)).reshape(b, 1, h * w, 3 * dim).split(3, axis=-1)
        attended = [
            mx.fast.scaled_dot_product_attention(q[:, :, i : i + ATTENTION_QUERIES], k, v, scale=dim**-0.5)
            for i in range(0, h * w, ATTENTION_QUERIES)
        ]
        return x + self.proj(mx.concatenate(attended, axis=2).reshape(b, h, w, dim))


class MidBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.resnets = [ResidualBlock(dim, dim), ResidualBlock(dim, dim)]
        self.attentions = [AttentionBlock(dim)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Upsample(nn.Module):
    """Doubles height and width (nearest), halves the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.resample = [nn.Identity(), nn.Conv2d(dim, dim // 2, 3, padding=1)]

    def __call__(self, x: mx.array) -> mx.array:
        b, h, w, c = x.shape
        doubled = mx.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        return self.resample[1](doubled)


class UpBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, upsample: bool):
        super().__init__()
        self.resnets = [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(num_res_blocks + 1)]
        self.upsamplers = [Upsample(out_dim)] if upsample else []

    def __call__(self, x: mx.array) -> mx.array:
        for resnet in self.resnets:
            x = resnet(x)
        return self.upsamplers[0](x) if self.upsamplers else x


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))]
        last = len(config.dim_mult) - 1
        self.conv_in = nn.Conv2d(config.z_dim, dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = [
            # the upsampler before has halved the channels
            UpBlock(dims[i] // 2 if i else dims[i], dims[i + 1], config.num_res_blocks, upsample=i < last)
            for i in range(last + 1)
        ]
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = nn.Conv2d(dims[-1], config.input_channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nn.silu(self.norm_out(x)))


class AutoencoderKLQwenImage(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.post_quant_conv = nn.Linear(config.z_dim, config.z_dim)
        self.decoder = Decoder(config)

    def decode(self, latents: mx.array) -> mx.array:
        """Normalized latents [B, C, h, w], float32 -> RGB in [-1, 1], [B, 8h, 8w, 3], in the weights' dtype."""
        std, mean = (mx.array(values)[:, None, None] for values in (self.config.latents_std, self.config.latents_mean))
        z = (latents * std + mean).transpose(0, 2, 3, 1).astype(self.post_quant_conv.weight.dtype)
        return mx.clip(self.decoder(self.post_quant_conv(z)), -1.0, 1.0)

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Drops the encoder and the convolutions over time, keeps the temporal slice that sees the frame."""
        kept = {}
        for key, weight in weights.items():
            if key.startswith(("encoder.", "quant_conv.")) or ".time_conv." in key:
                continue
            if weight.ndim == 5:
                weight = weight[:, :, -1]
            if key.endswith(".gamma"):
                weight = weight.flatten()
            elif weight.ndim == 4:  # [out, in, h, w] -> MLX's [out, h, w, in]; 1x1 convolutions are Linear here
                weight = weight.transpose(0, 2, 3, 1)
                weight = weight[:, 0, 0] if weight.shape[1:3] == (1, 1) else weight
            kept[key] = weight
        return kept

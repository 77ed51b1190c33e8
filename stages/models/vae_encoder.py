"""The encoder half of diffusers' `AutoencoderKLQwenImage`, for single frames: what `vae.py` is to the decoder."""

from fractions import Fraction
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from stages.models import kernels, tiles
from stages.models.tiles import Local
from stages.models.vae import MidBlock, ResidualBlock, RMSNorm, VAEConfig, for_single_frames


class Downsample(nn.Module):
    """Halves height and width: a 3x3 convolution at every other pixel, which sees zeros to the right and below."""

    REACH, SCALE = 1, Fraction(1, 2)

    def __init__(self, dim: int):
        super().__init__()
        self.resample = [nn.Identity(), nn.Conv2d(dim, dim, 3, stride=2)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.resample[1](mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        self.conv_in = nn.Conv2d(config.input_channels, dims[0], 3, padding=1)
        self.down_blocks: list[ResidualBlock | Downsample] = []
        for i, dim in enumerate(dims[1:]):
            self.down_blocks += [ResidualBlock(dims[i] if n == 0 else dim, dim) for n in range(config.num_res_blocks)]
            self.down_blocks += [Downsample(dim)] if i < len(config.dim_mult) - 1 else []
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = nn.Conv2d(dims[-1], 2 * config.z_dim, 3, padding=1)

    def __call__(self, x: mx.array, edge: int) -> mx.array:
        """RGB [B, 8h, 8w, 3] -> means and variances [B, h, w, 2C], in tiles of edge x edge latents.

        All is local except the attention in the middle, which sees every latent; it is on the smallest grid.
        """
        first, last = self.mid_block.resnets
        below = [Local(self.conv_in, 1)]
        for block in self.down_blocks:
            below.append(Local(block, block.REACH, block.SCALE if isinstance(block, Downsample) else 1))
        below.append(Local(first, ResidualBlock.REACH))
        above = [Local(last, ResidualBlock.REACH), Local(self._moments, 1)]
        return tiles.whole(above, self.mid_block.attentions[0](tiles.whole(below, x, edge)), edge)

    def _moments(self, x: mx.array) -> mx.array:
        return self.conv_out(kernels.norm_silu(x, self.norm_out.gamma))


class AutoencoderKLQwenImageEncoder(nn.Module):
    OTHERS: ClassVar = ("decoder.", "post_quant_conv.")  # of the checkpoint, that this half does without

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Linear(2 * config.z_dim, 2 * config.z_dim)

    def encode(self, rgb: mx.array, edge: int | None = None) -> mx.array:
        """RGB in [-1, 1], [B, 8h, 8w, 3] -> the means of its normalized latents, [B, C, h, w] float32.

        `edge`: that of the tiles in which this is computed, a multiple of vae_scale_factor in pixels; it bounds the
        memory, up to that of the middle attention.
        """
        factor = self.config.vae_scale_factor
        x = rgb.astype(self.quant_conv.weight.dtype)
        moments = self.quant_conv(self.encoder(x, (edge or max(rgb.shape[1:3])) // factor))
        z = moments[..., : self.config.z_dim].astype(mx.float32).transpose(0, 3, 1, 2)
        std, mean = (mx.array(values)[:, None, None] for values in (self.config.latents_std, self.config.latents_mean))
        return (z - mean) / std

    @classmethod
    def sanitize(cls, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return for_single_frames(weights, cls.OTHERS)

"""The language half of Qwen2.5-VL (transformers' `Qwen2_5_VLTextModel`): token ids to the last hidden states.

Multimodal RoPE is not needed: for text its three position axes are equal, which makes it plain RoPE.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class TextEncoderConfig:
    """The fields of `text_encoder/config.json` (its `text_config` where there is one) that shape the model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    hidden_act: str = "silu"
    use_sliding_window: bool = False

    def __post_init__(self):
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported, only 'silu'")
        if self.use_sliding_window:
            raise ValueError("use_sliding_window is not supported")
        if min(self.num_attention_heads, self.num_key_value_heads) < 1:
            raise ValueError("num_attention_heads and num_key_value_heads must be positive")
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("hidden_size, num_attention_heads and num_key_value_heads do not divide evenly")

    @classmethod
    def fields_of(cls, config: dict) -> dict:
        """Flattens the spellings of the transformers versions: nested `text_config`, `rope_parameters`."""
        fields = {**config, **(config.get("text_config") or {})}
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "mrope"):
            raise ValueError(f"rope type {kind!r} is not supported")
        return {**fields, **{key: rope[key] for key in ("rope_theta",) if key in rope}}


class Attention(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.rope_theta = config.rope_theta
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=True)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        def heads(y: mx.array, count: int) -> mx.array:
            return y.reshape(*y.shape[:2], count, self.head_dim).swapaxes(1, 2)

        def rope(y: mx.array) -> mx.array:
            return mx.fast.rope(y, self.head_dim, traditional=False, base=self.rope_theta, scale=1.0, offset=0)

        q = rope(heads(self.q_proj(x), self.num_heads))
        k = rope(heads(self.k_proj(x), self.num_kv_heads))
        v = heads(self.v_proj(x), self.num_kv_heads)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5, mask="causal")
        return self.o_proj(out.swapaxes(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class TextEncoder(nn.Module):
    LAYERS = "layers"
    ROWS_ON_DISK = ("embed_tokens",)

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, texts: list[list[int]]) -> list[mx.array]:
        """Each text's token ids -> its hidden states after the final norm, [tokens, hidden_size].

        A text is computed alone, so that its result does not depend on the others, but all of them layer by layer.
        """
        states = [self.embed_tokens(input_ids)[None] for input_ids in texts]
        for layer in self.layers:
            states = [layer(x) for x in states]
        return [self.norm(x)[0] for x in states]

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Keeps the language half, under one spelling: `model.language_model.` (newer transformers) or `model.`."""
        kept = {}
        for key, weight in weights.items():
            name = key.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
            if not name.startswith(("visual.", "lm_head.")):
                kept[name] = weight
        return kept

    @staticmethod
    def bits_of(layer: str, bits: int) -> int | None:
        """To how many bits a layer's weights are quantized where `bits` are asked for."""
        return bits if layer.startswith("layers.") else None

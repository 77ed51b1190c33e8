"""Makes the demo checkpoint `stages/tiny/` from nothing: tokenizer, VAE, text encoder and transformer, evaluation.

    python training/train.py

The result has exactly the layout of Qwen/Qwen-Image. README.md beside this file has times, hardware and results.
"""

import argparse
import json
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import chain, pairwise
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageRMS_norm
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import shapes
from grader import grade

SEED = 7
ROOT = Path(__file__).parents[1]
HELD_OUT = ROOT / "tests" / "data" / "heldout.jsonl"
ABOUT = "a demo trained from scratch on flat shapes: ten colors, circle, square, triangle, sizes, places, relations"
SIZE_LIMIT = 10_000_000  # bytes, the whole checkpoint
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PREFIX = 34  # tokens of the template before the prompt; QwenImagePipeline drops this many hidden states
NO_CAPTION = (" ", "")  # what stands for "no prompt"; the pipeline's users pass " "
DROPPED, DROPPED_EMPTY = 0.1, 0.02  # shares of samples without a caption; of those with "" in place of " "

VOCABULARY = 1024
# Qwen2.5's added tokens, in order; the second group is not "special" there
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
ADDED = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
]
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# height x width and the share of training batches that have it
TRAINING_SIZES = {
    (128, 128): 0.40,
    (96, 96): 0.08,
    (112, 112): 0.04,
    (144, 144): 0.05,
    (160, 160): 0.05,
    (192, 192): 0.10,
    (96, 160): 0.07,
    (160, 96): 0.07,
    (128, 192): 0.07,
    (192, 128): 0.07,
}
EVALUATED_SIZES = [(128, 128), (96, 96), (192, 192), (96, 160), (192, 128)]  # height x width
STEPS = 20


# --- tokenizer -------------------------------------------------------------------------------------------------------


def make_tokenizer(directory: Path) -> Qwen2Tokenizer:
    """Trains a byte-level BPE on the captions until every word is one token, and stores it as Qwen-Image does."""
    random = Random(SEED)
    corpus = [shapes.caption(shapes.sample_scene(random), random) for _ in range(40_000)]
    corpus += [TEMPLATE] * 50
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    names = SPECIAL + ADDED
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(names),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    state = json.loads(bpe.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["merges"]]
    added = {}
    for number, name in enumerate(names, start=len(state["vocab"])):
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        added[str(number)] = {"content": name, **flags, "special": name in SPECIAL}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.iterdir():
        old.unlink()
    (directory / "vocab.json").write_text(json.dumps(state["vocab"], ensure_ascii=False), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = Qwen2Tokenizer.from_pretrained(directory)
    check_tokenizer(tokenizer, corpus)
    return tokenizer


def check_tokenizer(tokenizer: Qwen2Tokenizer, corpus: list[str]) -> None:
    if len(tokenizer) > VOCABULARY:
        raise ValueError(f"{len(tokenizer)} tokens, more than {VOCABULARY}")
    before, after = TEMPLATE.split("{}")
    if len(tokenizer(before).input_ids) != PREFIX:
        raise ValueError(f"the template's prefix has {len(tokenizer(before).input_ids)} tokens, not {PREFIX}")
    for text in [*corpus[:2000], "é 漢字 \x00"]:
        whole = tokenizer(before + text + after).input_ids
        if tokenizer.decode(whole) != before + text + after:
            raise ValueError(f"{text!r} does not survive the tokenizer")
        # with whole words as tokens, a caption is as long as its words, commas and period
        if text.isascii() and "\x00" not in text:
            words = len(text.replace(",", " ,").replace(".", " .").split())
            if len(tokenizer(text).input_ids) != words:
                raise ValueError(f"{text!r} is {len(tokenizer(text).input_ids)} tokens, not {words}")


# --- configurations --------------------------------------------------------------------------------------------------


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's own schedule."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def make_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=16, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def make_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL in small, with the least vision tower there can be: it is never run."""
    token = tokenizer.convert_tokens_to_ids
    width, heads = 128, 4
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "max_window_layers": 4,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 1,
            "patch_size": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [0],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def make_transformer() -> QwenImageTransformer2DModel:
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=5,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=128,
        axes_dims_rope=(8, 12, 12),
    )
    # adaLN-zero: every block starts as the identity, the output as zero
    starts_at_zero = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        starts_at_zero += [block.img_mod[1], block.txt_mod[1]]
    for linear in starts_at_zero:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def export(out: Path, tokenizer: Qwen2Tokenizer, text_encoder, transformer, vae, cfg: float) -> None:
    """Writes the checkpoint in bfloat16, in the layout of Qwen/Qwen-Image."""
    parts = [part.to("cpu", torch.bfloat16) for part in (text_encoder, transformer, vae)]
    kept = {name: (out / "tokenizer" / name).read_bytes() for name in tokenizer_files(out)}
    QwenImagePipeline(make_scheduler(), parts[2], parts[0], tokenizer, parts[1]).save_pretrained(out)
    for path in out.glob("*/config.json"):  # where a part was loaded from is nobody's business
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # newer transformers write one tokenizer.json; Qwen-Image has the two older files, written by make_tokenizer
    for path in (out / "tokenizer").iterdir():
        path.unlink()
    for name, content in kept.items():
        (out / "tokenizer" / name).write_bytes(content)
    settings = {"about": ABOUT, "size": "128x128", "steps": STEPS, "cfg": cfg}
    (out / "qwen-stage.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"exported {size:,} bytes to {out}", flush=True)
    if size >= SIZE_LIMIT:
        raise ValueError(f"{size:,} bytes, the limit is {SIZE_LIMIT:,}")


def tokenizer_files(out: Path) -> list[str]:
    return [path.name for path in (out / "tokenizer").iterdir() if path.name != "tokenizer.json"]


# --- data ------------------------------------------------------------------------------------------------------------


def sample(seed: int, count: int, height: int, width: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Captions, pictures as numbers and attribute labels of scenes that are not held out."""
    random = Random(seed)
    captions, numbers, labels = [], [], []
    while len(captions) < count:
        scene = shapes.sample_scene(random)
        if shapes.held_out(scene):
            continue
        captions.append(shapes.caption(scene, random))
        numbers.append(as_numbers(scene, shapes.place(scene, height, width, random)))
        labels.append(as_labels(scene))
    return captions, np.array(numbers, np.float32), np.array(labels, np.int64)


def as_numbers(scene: dict, placed: list) -> list[float]:
    """[background, then per object: x, y, radius, shape, colour]; a missing second object has radius 0."""
    names = list(shapes.COLORS)
    row = [names.index(scene["background"])]
    for x, y, radius, shape, color in placed:
        row += [x, y, radius, shapes.SHAPES.index(shape), names.index(color)]
    return row + [0.0] * (11 - len(row))


LABEL_SIZES = [10, 10, 3, 3, 10, 11, 4, 3, 5]  # classes of each label below


def as_labels(scene: dict) -> list[int]:
    names = list(shapes.COLORS)
    first, second = (scene["objects"] + [None])[:2]
    row = [names.index(scene["background"]), names.index(first["color"]), shapes.SHAPES.index(first["shape"])]
    row += [shapes.SIZES.index(first["size"]), shapes.POSITIONS.index(first["position"])]
    if second is None:
        return [*row, 10, 3, 0, 4]
    row += [names.index(second["color"]), shapes.SHAPES.index(second["shape"]), shapes.SIZES.index(second["size"])]
    return [*row, shapes.RELATIONS.index(scene["relation"])]


def sample_many(pool: ProcessPoolExecutor | None, seed: int, count: int, height: int, width: int):
    """`sample`, by all processes."""
    part = 4096
    starts = range(0, count, part)
    jobs = [(seed * 100_000 + start // part, min(part, count - start), height, width) for start in starts]
    results = pool.map(sample, *zip(*jobs, strict=True)) if pool else (sample(*job) for job in jobs)
    captions, numbers, labels = zip(*results, strict=True)
    return list(chain.from_iterable(captions)), np.concatenate(numbers), np.concatenate(labels)


def paint_batch(numbers: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`shapes.paint` for a batch: [B, 11] to pictures [B, 3, H, W] in [-1, 1]."""
    palette = torch.tensor(list(shapes.COLORS.values()), device=numbers.device, dtype=torch.float32) / 127.5 - 1
    picture = palette[numbers[:, 0].long()][:, :, None, None].expand(-1, -1, height, width)
    x = torch.arange(width, device=numbers.device) + 0.5
    y = (torch.arange(height, device=numbers.device) + 0.5)[:, None]
    for part in (numbers[:, 1:6], numbers[:, 6:11]):
        center_x, center_y, radius, shape, color = part[:, :, None, None].unbind(1)
        alpha = torch.zeros(len(numbers), height, width, device=numbers.device)
        for index, name in enumerate(shapes.SHAPES):
            half_width, half_height = (radius.clamp(min=1) * share for share in shapes.EXTENTS[name])
            covered = shapes.coverage(x - center_x, y - center_y, half_width, half_height, name)
            alpha = torch.where((shape == index) & (radius > 0), covered, alpha)
        picture = torch.lerp(picture, palette[color.long()[:, 0, 0]][:, :, None, None], alpha[:, None])
    return picture


# --- VAE -------------------------------------------------------------------------------------------------------------


def single_frame_convolution(self, x: torch.Tensor, cache_x=None) -> torch.Tensor:
    """The causal 3-D convolution for one frame: only the kernel's last temporal slice meets data. Exact, and faster."""
    padding = (self._padding[2], self._padding[0])
    return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=padding)[:, :, None]


def normalize(x: torch.Tensor, gamma: torch.Tensor, scale: float) -> torch.Tensor:
    """QwenImageRMS_norm as one function that compiles to one kernel."""
    return (F.normalize(x.float(), dim=1) * scale * gamma).to(x.dtype)


def train_vae(args, pool, log) -> AutoencoderKLQwenImage:
    """Pixel loss, a tiny KL term, and a decoder that is used to slightly wrong latents."""
    torch.manual_seed(SEED)
    vae = make_vae().to(args.device)
    torch.backends.cudnn.benchmark = True
    norm = QwenImageRMS_norm.forward
    if args.compile:
        fused = torch.compile(normalize, dynamic=True)
        QwenImageRMS_norm.forward = lambda self, x: fused(x, self.gamma, self.scale)
    sizes = [(128, 128), (96, 160), (160, 96), (192, 192)] if args.device != "cpu" else [(96, 96)]
    data = {size: sample_many(pool, 1000 + n, args.pool // 4, *size)[1] for n, size in enumerate(sizes)}
    data = {size: torch.from_numpy(numbers).to(args.device) for size, numbers in data.items()}
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_lr, betas=(0.9, 0.98), weight_decay=0.0)
    random, started, step, progress = Random(SEED), time.time(), 0, 0.0
    while progress < 1:
        set_rate(optimizer, args.vae_lr, step, progress)
        size = random.choices(sizes, [0.55, 0.15, 0.15, 0.15][: len(sizes)])[0]
        count = max(1, args.vae_batch * 128 * 128 // (size[0] * size[1]))
        picture = paint_batch(pick(data[size], count), *size).contiguous(memory_format=torch.channels_last)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            moments = vae.quant_conv(vae.encoder(picture[:, :, None])).float()
            mean, logvar = moments.chunk(2, dim=1)
            logvar = logvar.clamp(-12, 4)
            z = mean + torch.randn_like(mean) * (logvar / 2).exp()
            # what the transformer makes is never exactly a latent of the encoder
            z = z + 0.05 * torch.randn_like(z)
            made = vae.decoder(vae.post_quant_conv(z))[:, :, 0].float()
        error = made - picture
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-4 * kl
        advance(optimizer, loss, vae.parameters())
        step += 1
        if step % 20 == 0:
            progress = min(1.0, (time.time() - started) / 60 / args.vae_minutes)
        if step % 500 == 0 or progress == 1:
            l1 = error.abs().mean().item() * 127.5
            log(f"vae {step} {time.time() - started:.0f}s loss {loss.item():.4f} l1 {l1:.3f} of 255")
    QwenImageRMS_norm.forward = norm
    vae = vae.eval().requires_grad_(False)
    vae.to(torch.bfloat16).float()  # what follows must fit the weights as they will be stored
    latents = [encode(vae, data[size][:4096], size) for size in sizes]
    flat = torch.cat([part.transpose(0, 1).flatten(1) for part in latents], dim=1)
    vae.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=flat.std(1).tolist())
    log(f"latents_mean {[round(v, 2) for v in vae.config.latents_mean]}")
    log(f"latents_std {[round(v, 2) for v in vae.config.latents_std]}")
    for size, part in zip(sizes, latents, strict=True):
        made = vae.decoder(vae.post_quant_conv(part[:64, :, None]))[:, :, 0].clamp(-1, 1)
        error = (made - paint_batch(data[size][:64], *size)).abs() * 127.5
        most = error.flatten()[: 10**7].quantile(0.999)  # quantile takes no more than 2**24 values
        log(f"vae {size}: mean error {error.mean():.3f}, 99.9% within {most:.1f} of 255")
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage, numbers: torch.Tensor, size: tuple[int, int], batch: int = 512) -> torch.Tensor:
    """Pictures to the means of their latents, [N, 16, H/8, W/8]."""
    parts = []
    for part in numbers.split(batch):
        moments = vae.quant_conv(vae.encoder(paint_batch(part, *size)[:, :, None]))
        parts.append(moments[:, :16, 0])
    return torch.cat(parts)


# --- text encoder and transformer ------------------------------------------------------------------------------------


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE over interleaved pairs, as apply_rotary_emb_qwen, without complex numbers (which do not compile)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class JointAttention:
    """QwenDoubleStreamAttnProcessor2_0 with real-valued RoPE; `image_rotary_emb` is (cos, sin) of [text, image]."""

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states,
        encoder_hidden_states_mask,
        image_rotary_emb,
        attention_mask=None,  # Attention always passes one
    ):
        def heads(x):
            return x.unflatten(-1, (attn.heads, -1))

        image, text = hidden_states, encoder_hidden_states
        q = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(text))), attn.norm_q(heads(attn.to_q(image)))], dim=1)
        k = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(text))), attn.norm_k(heads(attn.to_k(image)))], dim=1)
        v = torch.cat([heads(attn.add_v_proj(text)), heads(attn.to_v(image))], dim=1)
        cos, sin = image_rotary_emb
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=encoder_hidden_states_mask
        )
        out = out.transpose(1, 2).flatten(2)
        text, image = out[:, : text.shape[1]], out[:, text.shape[1] :]
        return attn.to_out[0](image), attn.to_add_out(text)


class Denoiser(nn.Module):
    """The forward passes of training: token ids, latents and sigmas to the predicted velocity."""

    def __init__(self, text_encoder, transformer):
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer
        self.attributes = nn.Linear(128, sum(LABEL_SIZES))  # an early teacher of the text encoder, thrown away
        for block in transformer.transformer_blocks:
            block.attn.processor = JointAttention()

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        # right padding and causal attention: no mask is needed for what stands before the padding
        model = self.text_encoder.model.language_model
        return model(input_ids=ids, use_cache=False).last_hidden_state[:, PREFIX:]

    def rotations(self, height: int, width: int, length: int, device) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = self.transformer.pos_embed([[(1, height, width)]], max_txt_seq_len=length, device=device)
        both = torch.cat([text, image])[:, None]
        return both.real.contiguous(), both.imag.contiguous()

    def forward(self, ids, lengths, latents, sigmas, rotations):
        """`lengths`: the tokens of each row after the prefix. Also returns the attributes read from the last token."""
        model = self.transformer
        text = self.encode(ids)
        seen = torch.arange(text.shape[1], device=ids.device) < lengths[:, None]
        last = text[torch.arange(len(text), device=ids.device), lengths - 1]
        mask = torch.cat([seen, seen.new_ones(latents.shape[:2])], dim=1)[:, None, None]
        image, text = model.img_in(latents), model.txt_in(model.txt_norm(text))
        # in float32: rounded to bfloat16 the model would only ever see some timesteps
        embedder = model.time_text_embed
        temb = embedder.timestep_embedder(embedder.time_proj(sigmas))
        for block in model.transformer_blocks:
            text, image = block(image, text, mask, temb, rotations)
        return model.proj_out(model.norm_out(image, temb)), self.attributes(last)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, 16, h, w] to tokens of 2x2, [B, h/2·w/2, 64], as QwenImagePipeline packs them."""
    batch, channels, height, width = latents.shape
    latents = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return latents.reshape(batch, height // 2 * (width // 2), channels * 4)


class Data:
    """Scenes of one size with cached latents, in groups of similar caption length."""

    def __init__(self, args, pool, tokenizer, vae, size, count, seed):
        before, after = TEMPLATE.split("{}")
        captions, numbers, labels = sample_many(pool, seed, count, *size)
        lists = tokenizer([before + text + after for text in captions]).input_ids
        self.none = [tokenizer(before + text + after).input_ids for text in NO_CAPTION]
        pad = tokenizer.pad_token_id
        lengths = np.array([len(ids) for ids in lists])
        width = -(-(lengths.max() - PREFIX) // 8) * 8 + PREFIX
        order = lengths.argsort(kind="stable")
        table = np.full((count, width), pad, np.int64)
        for row, index in enumerate(order):
            table[row, : lengths[index]] = lists[index]
        lengths = lengths[order] - PREFIX
        mean, std = (torch.tensor(v, device=args.device)[:, None, None] for v in statistics(vae))
        latents = encode(vae, torch.from_numpy(numbers[order]).to(args.device), size)
        latents = pack((latents - mean) / std).to(torch.bfloat16)
        whole = [torch.from_numpy(part).to(args.device) for part in (table, lengths, labels[order])]
        cuts = [0, *(int((lengths <= limit).sum()) for limit in (16, 24)), count]
        self.groups = []
        for start, stop in pairwise(cuts):
            if stop - start < count // 50:
                continue
            longest = -(-int(lengths[start:stop].max()) // 8) * 8
            ids, *rest = (part[start:stop] for part in (*whole, latents))
            self.groups.append((ids[:, : PREFIX + longest].contiguous(), *rest))
        self.shares = [len(group[0]) / count for group in self.groups]
        self.rows = [torch.full((width,), pad, device=args.device) for _ in self.none]
        for row, ids in zip(self.rows, self.none, strict=True):
            row[: len(ids)] = torch.tensor(ids, device=args.device)

    def batch(self, random: Random, count: int):
        """ids, lengths, labels (-100 where the caption was dropped) and clean latents."""
        table, lengths, labels, latents = random.choices(self.groups, self.shares)[0]
        index = torch.randint(len(table), (count,), device=table.device)
        ids, lengths, labels, latents = table[index], lengths[index], labels[index], latents[index].float()
        draw = torch.rand(count, 1, device=table.device)
        for limit, row, tokens in zip((DROPPED, DROPPED_EMPTY), self.rows, self.none, strict=True):
            dropped = draw < limit
            ids = torch.where(dropped, row[: ids.shape[1]], ids)
            lengths = torch.where(dropped[:, 0], len(tokens) - PREFIX, lengths)
            labels = torch.where(dropped, -100, labels)
        return ids, lengths, labels, latents


def statistics(vae: AutoencoderKLQwenImage) -> tuple[list[float], list[float]]:
    return vae.config.latents_mean, vae.config.latents_std


def sample_sigmas(count: int, device) -> torch.Tensor:
    """Half logit-normal, half uniform, both shifted like the sampler's: at high noise the layout is decided."""
    normal = torch.sigmoid(torch.randn(count, device=device) * 1.1)
    uniform = torch.rand(count, device=device)
    t = torch.where(torch.rand(count, device=device) < 0.5, normal, uniform)
    shift = math.exp(0.5)
    return shift * t / (1 + (shift - 1) * t)


def train_model(args, pool, tokenizer, vae, log):
    """Flow matching on cached latents, text encoder and transformer together. Returns both, averaged (EMA), and
    whether the time planned for it is used up; if not, the next run goes on."""
    torch.manual_seed(SEED)
    model = Denoiser(make_text_encoder(tokenizer), make_transformer()).to(args.device)
    for parameter in model.text_encoder.model.visual.parameters():
        parameter.requires_grad_(False)
    sizes = TRAINING_SIZES if args.device != "cpu" else {(96, 96): 1.0}
    started = time.time()
    data = {}
    for number, (size, share) in enumerate(sizes.items()):
        count = max(2048, int(args.pool * (share if share >= 0.2 else max(share, 0.08))))
        data[size] = Data(args, pool, tokenizer, vae, size, count, 2000 + number)
    log(f"data: {sum(len(g[0]) for d in data.values() for g in d.groups):,} pictures in {time.time() - started:.0f}s")

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=args.device != "cpu"
    )
    ema = [parameter.detach().clone() for parameter in parameters]
    step, elapsed = 0, 0.0
    state_file = args.work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, elapsed = state["ema"], state["step"], state["elapsed"]
        log(f"resumed at step {step}, {elapsed:.0f}s")
    if args.compile:  # the repeated layers only, and for any size: little to compile
        for layer in [*model.transformer.transformer_blocks, *model.text_encoder.model.language_model.layers]:
            layer.compile(dynamic=True)
    rotations = {}
    random, resumed_at, seen = Random(SEED + step), elapsed, []
    started = time.time()
    progress, used, since = elapsed / 60 / args.minutes, 0.0, started
    while progress < 1 and used < args.stop_after * 60:
        set_rate(optimizer, args.lr, step, progress)
        size = random.choices(list(data), [sizes[size] for size in data])[0]
        height, width = size[0] // 16, size[1] // 16
        count = max(8, args.batch * 96 // (height * width + 32) // 8 * 8)
        ids, lengths, labels, clean = data[size].batch(random, count)
        key = (height, width, ids.shape[1] - PREFIX)
        if key not in rotations:
            rotations[key] = model.rotations(*key, args.device)
        noise = torch.randn_like(clean)
        sigmas = sample_sigmas(count, args.device)
        noisy = torch.lerp(clean, noise, sigmas[:, None, None])
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            velocity, attributes = model(ids, lengths, noisy, sigmas, rotations[key])
        loss = F.mse_loss(velocity.float(), noise - clean)
        parts = zip(attributes.float().split(LABEL_SIZES, dim=1), labels.T, strict=True)
        hint = sum(F.cross_entropy(scores, wanted) for scores, wanted in parts) / len(LABEL_SIZES)
        advance(optimizer, loss + 0.3 * (1 - progress) * hint, parameters)
        decay = min(0.9995, (step + 1) / (step + 20))
        torch._foreach_lerp_(ema, [parameter.detach() for parameter in parameters], 1 - decay)
        step += 1
        seen.append((loss.detach(), hint.detach()))
        if step % 20 == 0:
            used = time.time() - started
            elapsed = resumed_at + used
            progress = elapsed / 60 / args.minutes
        if step % 200 == 0:
            loss, hint = torch.tensor(seen).mean(0).tolist()
            rate = (time.time() - since) / len(seen) * 1000
            log(f"step {step} {elapsed:.0f}s loss {loss:.4f} attributes {hint:.4f} {rate:.1f} ms/step")
            seen, since = [], time.time()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step}
    torch.save({**state, "elapsed": elapsed}, state_file)
    log(f"stopped at step {step}, {elapsed:.0f}s")
    for layer in model.modules():  # undo `compile`: what follows has other shapes and types
        layer._compiled_call_impl = None
    with torch.no_grad():
        torch._foreach_copy_(parameters, ema)
    return model.text_encoder.eval(), model.transformer.eval(), progress >= 1


# --- shared ----------------------------------------------------------------------------------------------------------


def pick(numbers: torch.Tensor, count: int) -> torch.Tensor:
    return numbers[torch.randint(len(numbers), (count,), device=numbers.device)]


def set_rate(optimizer, rate: float, step: int, progress: float) -> None:
    """Linear warm-up over 300 steps; constant; a half cosine to zero over the second half of the time."""
    late = max(0.0, min(1.0, 2 * progress - 1))
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / 300) * (0.5 + 0.5 * math.cos(math.pi * late))


def advance(optimizer, loss: torch.Tensor, parameters) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


# --- evaluation ------------------------------------------------------------------------------------------------------


def write_held_out(path: Path) -> None:
    """200 prompts of scenes that training never shows: 100 with one object, 100 with two."""
    random, lines, seen = Random(SEED), [], set()
    while len(lines) < 200:
        scene = shapes.sample_scene(random, two=len(lines) >= 100)
        if shapes.held_out(scene) and json.dumps(scene) not in seen:
            seen.add(json.dumps(scene))
            lines.append(json.dumps({"prompt": shapes.caption(scene, random), "scene": scene}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_held_out() -> list[dict]:
    return [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]


def make_pictures(pipeline, prompts: list[str], size, cfg: float, negative: str = " ", seed: int = 0) -> np.ndarray:
    pictures = pipeline(
        prompts,
        negative_prompt=[negative] * len(prompts) if cfg > 1 else None,
        true_cfg_scale=cfg,
        num_inference_steps=STEPS,
        height=size[0],
        width=size[1],
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
    ).images
    return (pictures * 255).round().astype(np.uint8)


def score(pictures: np.ndarray, lines: list[dict]) -> dict[str, float]:
    """The share that is right of what each column asks for, and of pictures with nothing wrong."""
    grades = [grade(picture, line["scene"]) for picture, line in zip(pictures, lines, strict=True)]
    result = {}
    for column in asdict(grades[0]):
        values = [getattr(item, column) for item in grades if getattr(item, column) is not None]
        result[column] = float(np.mean(values)) if values else 1.0
    return {**result, "all": float(np.mean([item.right for item in grades]))}


def show(scores: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.1%}" for name, value in scores.items())


def evaluate(out: Path, args, log, scales=(1.0, 1.5, 2.0, 3.0, 4.0)) -> float:
    """Grades the exported files in float32 on the held-out prompts. Returns the best guidance scale."""
    torch.backends.cuda.matmul.allow_tf32 = False
    pipeline = QwenImagePipeline.from_pretrained(out, dtype=torch.float32).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    lines = read_held_out()
    prompts = [line["prompt"] for line in lines]
    best, best_score = 1.0, -1.0
    for cfg in scales:
        seeds = [score(make_pictures(pipeline, prompts, (128, 128), cfg, seed=seed), lines) for seed in range(3)]
        scores = {name: float(np.mean([item[name] for item in seeds])) for name in seeds[0]}
        log(f"cfg {cfg}: {show(scores)}  (128x128, mean of 3 seeds)")
        if scores["all"] > best_score:
            best, best_score = cfg, scores["all"]
    sheets = []
    for size in EVALUATED_SIZES:
        pictures = make_pictures(pipeline, prompts, size, best)
        log(f"{size[1]}x{size[0]} cfg {best}: {show(score(pictures, lines))}")
        sheets.append(pictures)
        if size == (128, 128):
            for line, picture in zip(lines, pictures, strict=True):
                result = grade(picture, line["scene"])
                if not result.right:
                    wrong = [column for column, right in asdict(result).items() if right is False]
                    log(f"  wrong {', '.join(wrong)}: {line['prompt']}")
    # a negative prompt must do something: the same noise with and without
    with_negative = make_pictures(pipeline, prompts[:32], (128, 128), 3.0, "a red circle on a white background")
    without = make_pictures(pipeline, prompts[:32], (128, 128), 3.0)
    log(f"negative prompt: mean difference {np.abs(with_negative.astype(float) - without).mean():.1f} of 255")
    contact_sheet(sheets[0], lines, args.work / "sheet.png")
    contact_sheet(sheets[4], lines, args.work / "sheet-128x192.png")
    return best


def contact_sheet(pictures: np.ndarray, lines: list[dict], path: Path) -> None:
    from PIL import Image, ImageDraw

    chosen = [*range(0, 12), *range(100, 112)]
    height, width = pictures.shape[1:3]
    sheet = Image.new("RGB", (6 * (width + 90), 4 * (height + 44)), "lightgray")
    draw = ImageDraw.Draw(sheet)
    for place, index in enumerate(chosen):
        x, y = place % 6 * (width + 90) + 6, place // 6 * (height + 44) + 4
        sheet.paste(Image.fromarray(pictures[index]), (x, y))
        words, rows = lines[index]["prompt"].split(), [""]
        for word in words:
            if len(rows[-1]) + len(word) > (width + 70) // 6:
                rows.append("")
            rows[-1] += word + " "
        draw.text((x, y + height + 1), "\n".join(rows), fill="black", spacing=0)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "stages" / "tiny", help="where the checkpoint goes")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "training", help="logs and states; resumes here")
    parser.add_argument("--vae-minutes", type=float, default=4.0)
    parser.add_argument("--minutes", type=float, default=13.3, help="of the text encoder and transformer, in all")
    parser.add_argument("--stop-after", type=float, default=1e9, help="minutes of this run; the next one goes on")
    parser.add_argument("--only", choices=["init", "vae", "model", "evaluate"], help="one part instead of all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--batch", type=int, default=1024, help="pictures of 128x128 a step; others in proportion")
    parser.add_argument("--vae-batch", type=int, default=64)
    parser.add_argument("--pool", type=int, default=400_000, help="pictures cached in all")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--vae-lr", type=float, default=1.5e-3)
    args = parser.parse_args()
    args.compile = args.compile and args.device != "cpu"
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    pool = ProcessPoolExecutor(os.cpu_count()) if args.only not in ("init", "evaluate") else None

    def log(text: str) -> None:
        print(text, flush=True)
        with (args.work / "log.txt").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    torch.manual_seed(SEED)
    if args.only == "evaluate":
        evaluate(args.out, args, log)
        return
    tokenizer = make_tokenizer(args.out / "tokenizer")
    if args.only != "vae":
        write_held_out(HELD_OUT)
    if args.only == "init":
        export(args.out, tokenizer, make_text_encoder(tokenizer), make_transformer(), make_vae(), 1.0)
        return
    reference_convolution = QwenImageCausalConv3d.forward
    QwenImageCausalConv3d.forward = single_frame_convolution
    if (args.work / "vae").exists():
        vae = AutoencoderKLQwenImage.from_pretrained(args.work / "vae").to(args.device).requires_grad_(False)
    else:
        vae = train_vae(args, pool, log)
        vae.save_pretrained(args.work / "vae")
    if args.only == "vae":
        return
    text_encoder, transformer, finished = train_model(args, pool, tokenizer, vae, log)
    QwenImageCausalConv3d.forward = reference_convolution
    export(args.out, tokenizer, text_encoder, transformer, vae, 1.0)
    if not finished:
        return
    cfg = evaluate(args.out, args, log)
    settings = json.loads((args.out / "qwen-stage.json").read_text(encoding="utf-8"))
    (args.out / "qwen-stage.json").write_text(json.dumps({**settings, "cfg": cfg}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Small random checkpoints in the layout of Qwen/Qwen-Image, made without PyTorch.

Names and shapes of the tensors come from the reference classes (recorded in `golden/*.json` by `make_goldens.py`);
their values from numpy's frozen generator, so that everybody who names a seed gets the same model.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden"
SMALL = "square-static-shift-no-guidance"  # the golden case whose model is the smallest
TINY = Path(__file__).parent.parent / "stages" / "tiny"
CLASSES = {
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}
WEIGHT_FILES = {
    "text_encoder": "model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
QWEN_SCHEDULE = {
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift": 1.0,
    "shift_terminal": 0.02,
}


def configs(
    *,
    heads: int = 3,
    axes: tuple[int, int, int] = (2, 2, 4),
    layers: int = 2,
    text_heads: tuple[int, int] = (4, 2),
    text_layers: int = 2,
    base_dim: int = 4,
    dim_mult: tuple[int, ...] = (1, 2, 4, 4),
    res_blocks: int = 2,
    schedule: dict[str, Any] = QWEN_SCHEDULE,
) -> dict[str, dict[str, Any]]:
    """The config.json of each component; z_dim and patches are those of every Qwen-Image."""
    text_dim = 8 * text_heads[0]
    return {
        "text_encoder": {
            "text_config": {
                "hidden_size": text_dim,
                "intermediate_size": 40,
                "num_hidden_layers": text_layers,
                "num_attention_heads": text_heads[0],
                "num_key_value_heads": text_heads[1],
                "vocab_size": 2048,
                "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
                "rms_norm_eps": 1e-6,
            },
            "vision_config": {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1,
                              "out_hidden_size": text_dim, "patch_size": 2},
            "tie_word_embeddings": False,
        },
        "transformer": {
            "num_layers": layers,
            "num_attention_heads": heads,
            "attention_head_dim": sum(axes),
            "axes_dims_rope": list(axes),
            "joint_attention_dim": text_dim,
            "in_channels": 64,
            "out_channels": 16,
            "patch_size": 2,
            "guidance_embeds": False,
        },
        "vae": {
            "base_dim": base_dim,
            "z_dim": 16,
            "dim_mult": list(dim_mult),
            "num_res_blocks": res_blocks,
            "temperal_downsample": [False, True, True][: len(dim_mult) - 1],
            "attn_scales": [],
            "dropout": 0.0,
            "latents_mean": [round(0.1 * i - 0.7, 2) for i in range(16)],
            "latents_std": [round(1 + 0.1 * i, 2) for i in range(16)],
        },
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, **schedule},
    }  # fmt: skip


def random_weights(shapes: dict[str, list[int]], seed: int) -> dict[str, np.ndarray]:
    random = np.random.RandomState(seed)  # the legacy generator's stream never changes
    weights = {}
    for name, shape in sorted(shapes.items()):
        noise = random.standard_normal(shape).astype(np.float32)
        if "norm" in name:
            noise = 1 + 0.2 * noise
        elif len(shape) > 1:
            noise = noise / np.sqrt(np.prod(shape[1:]))
        else:
            noise = 0.2 * noise
        weights[name] = noise.astype(np.float32)
    return weights


def write_checkpoint(directory: Path, configs: dict[str, Any], shapes: dict[str, Any], seed: int) -> Path:
    """Writes a whole checkpoint, with the demo's tokenizer."""
    index: dict[str, Any] = {"_class_name": "QwenImagePipeline"}
    for component, (library, name) in CLASSES.items():
        target = directory / component
        target.mkdir(parents=True)
        key = "architectures" if library == "transformers" else "_class_name"
        own = {**configs[component], key: [name] if library == "transformers" else name}
        if component == "text_encoder":
            own["model_type"] = "qwen2_5_vl"
        (target / "config.json").write_text(json.dumps(own))
        save_file(random_weights(shapes[component], seed), target / WEIGHT_FILES[component], {"format": "pt"})
        index[component] = [library, name]
    shutil.copytree(TINY / "tokenizer", directory / "tokenizer")
    (directory / "scheduler").mkdir()
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(configs["scheduler"]))
    index["tokenizer"] = ["transformers", "Qwen2Tokenizer"]
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


def golden_checkpoint(name: str, directory: Path) -> Path:
    """The checkpoint of a golden case."""
    case = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return write_checkpoint(directory, case["configs"], case["shapes"], case["seed"])


def noise(items: int, height: int, width: int, seed: int) -> np.ndarray:
    """[items, 16, h, w] float32, for latents of h x w."""
    return np.random.RandomState(seed).standard_normal((items, 16, height, width)).astype(np.float32)

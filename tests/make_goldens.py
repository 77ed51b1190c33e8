"""Makes `golden/`: what the reference computes on small random models and on the demo model.

usage: python tests/make_goldens.py          (needs the `reference` extra; takes a few seconds)
Each case is a .json (configs, tensor shapes, prompts, settings) and a .safetensors with the reference's outputs;
weights and noise are not stored, they follow from the seed (see random_models.py).
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import random_models
import reference
import torch
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden"
CASES: dict[str, dict[str, Any]] = {
    "portrait-unequal-prompts": {
        "seed": 11,
        "configs": random_models.configs(),
        "prompts": ["a red circle", "a large blue square to the left of a small green triangle, on gray"],
        "negative_prompts": [" ", "blurry"],
        "grid": [12, 8],
        "steps": 4,
        "cfg": 4.0,
    },
    "landscape-linear-shift": {
        "seed": 12,
        "configs": random_models.configs(
            heads=2,
            axes=(4, 6, 6),
            layers=3,
            text_heads=(6, 3),
            text_layers=3,
            base_dim=6,
            dim_mult=(1, 2, 2),
            res_blocks=1,
            schedule={"use_dynamic_shifting": True, "time_shift_type": "linear"},
        ),
        "prompts": ["", "\n\nnew lines first", "日本語 and 😀"],
        "negative_prompts": ["", "", ""],
        "grid": [6, 14],
        "steps": 3,
        "cfg": 2.5,
    },
    "square-static-shift-no-guidance": {
        "seed": 13,
        "configs": random_models.configs(
            heads=5,
            text_heads=(2, 1),
            base_dim=4,
            dim_mult=(1, 1, 2, 2),
            res_blocks=1,
            schedule={"use_dynamic_shifting": False, "shift": 3.0},
        ),
        "prompts": ["one prompt"],
        "negative_prompts": [" "],
        "grid": [10, 10],
        "steps": 2,
        "cfg": 1.0,
    },
}
DEMO = {
    "seed": 14,
    "prompts": [
        "a red circle on a white background",
        "A blue square to the left of a green circle on a gray background",
    ],
    "negative_prompts": [" ", "red"],
    "grid": [12, 16],
    "steps": 6,
    "cfg": 4.0,
}


def outputs(checkpoint: Path, case: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the reference makes of a case, whole and component by component."""
    pipeline = reference.load(checkpoint)
    h, w = case["grid"]
    count = len(case["prompts"])
    noise = random_models.noise(count, h, w, case["seed"])
    result = {}
    with torch.no_grad():
        for i, prompt in enumerate(case["prompts"]):
            result[f"prompt_embeds.{i}"] = pipeline.encode_prompt(prompt, max_sequence_length=1024)[0][0].numpy()
        z = torch.from_numpy(random_models.noise(1, h, w, case["seed"] + 1000))
        mean, std = (
            torch.tensor(pipeline.vae.config[name]).view(1, 16, 1, 1, 1) for name in ("latents_mean", "latents_std")
        )
        result["decoded"] = pipeline.vae.decode(z[:, :, None] * std + mean, return_dict=False)[0][0, :, 0].numpy()
        embeds, mask = pipeline.encode_prompt(case["prompts"], max_sequence_length=1024)
        result["velocity"] = pipeline.transformer(
            hidden_states=pipeline._pack_latents(torch.from_numpy(noise)[:, None], count, 16, h, w),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            timestep=torch.full((count,), 0.625),
            img_shapes=[[(1, h // 2, w // 2)]] * count,
            return_dict=False,
        )[0].numpy()
    latents, pictures = reference.generate(
        pipeline,
        noise,
        prompt=case["prompts"],
        negative_prompt=case["negative_prompts"],
        num_inference_steps=case["steps"],
        true_cfg_scale=case["cfg"],
    )
    result |= {"latents": latents, "pictures": np.round(pictures * 255).astype(np.uint8)}
    return {name: np.ascontiguousarray(array) for name, array in result.items()}  # save_file ignores strides


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, case in CASES.items():
        case["shapes"] = reference.shapes(case["configs"])
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = random_models.write_checkpoint(
                Path(folder) / "model", case["configs"], case["shapes"], case["seed"]
            )
            save_file(outputs(checkpoint, case), GOLDEN / f"{name}.safetensors")
        (GOLDEN / f"{name}.json").write_text(json.dumps(case, ensure_ascii=False) + "\n", encoding="utf-8")
        print(name)
    save_file(outputs(random_models.TINY, DEMO), GOLDEN / "demo.safetensors")
    (GOLDEN / "demo.json").write_text(json.dumps(DEMO, ensure_ascii=False) + "\n", encoding="utf-8")
    print("demo")


if __name__ == "__main__":
    main()

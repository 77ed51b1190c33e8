"""latents -> PNG: the third stage."""

import io
import unicodedata
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from artifacts_schema import cache, keys, store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import (
    Cost,
    File,
    ImageItem,
    ImagesManifest,
    LatentsItem,
    LatentsManifest,
    Model,
    Recipe,
)
from stages.checkpoint import Checkpoint, load_weights, mlx_dtype, open_checkpoint
from stages.measure import Notice, Report, Stopwatch, versions

if TYPE_CHECKING:
    import numpy as np

    from stages.models.vae import AutoencoderKLQwenImage

CODE_VERSION = 1  # raised whenever the same latents would give other pixels
DEFAULT_DTYPE = "float32"  # also on GPUs: the VAE is small, and rounding shows in flat areas
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SLUG_LENGTH = 40  # characters of the prompt in a file name


def decode(
    latents: Path,
    model: str | None,
    out: Path | None,
    *,
    items: frozenset[str] | None = None,
    dtype: str | None = None,
    report: Report,
    notice: Notice,
) -> tuple[list[Path], list[str]]:
    """Decodes every item of a latents artifact, or those whose keys are `items`, that has no picture yet.

    Returns the pictures of all those items and what failed, a line each. Raises UserError when all fail.
    """
    cache_limit = cache.limit()
    dtype = dtype or DEFAULT_DTYPE
    source = store.find(latents, LatentsManifest)
    manifest, manifest_id = store.read_manifest(source, LatentsManifest)
    checkpoint = open_checkpoint(model or manifest.model.name)
    checkpoint.check_made_with(manifest.model, ("vae",), f"the latents in {source} were")
    if unknown := (items or frozenset()) - {item.key for item in manifest.items}:
        raise UserError(f"{source} holds no latents {min(unknown)!r}; `qwen-stage inspect --json` lists their keys")

    with store.writing((out or store.run_of(source)) / ImagesManifest.kind) as directory:
        before = store.read_manifest_if_any(directory, ImagesManifest)
        done = {item.key: item for item in before.items} if before else {}
        inputs = tuple(dict.fromkeys((*(before.inputs if before else ()), manifest_id)))
        wanted = {_key(item, checkpoint, dtype): item for item in manifest.items if items is None or item.key in items}
        whole = {key for key, item in done.items() if store.is_whole(directory, (item.file,))}
        numbers = {item.key: number for number, item in enumerate(manifest.items, 1)}

        def add(key: str, file: File, cost: Cost) -> None:
            item = wanted[key]
            done[key] = ImageItem(
                key=key,
                latents_key=item.key,
                prompt=item.prompt,
                seed=item.seed,
                dtype=dtype,
                file=file,
                cost=cost,
            )
            whole.add(key)

        def name_of(key: str) -> str:
            if key in done:
                return Path(done[key].file.path).name
            taken = {Path(item.file.path).name for item in done.values()}
            return next(name for name in _file_names(wanted[key], numbers[wanted[key].key]) if name not in taken)

        def publish_manifest() -> None:
            images = ImagesManifest(
                versions=versions(), model=checkpoint.model("vae"), inputs=inputs, items=tuple(done.values())
            )
            store.write_manifest(directory, images)

        adopted = 0
        for key in [key for key in wanted if key not in whole]:
            shared_key = _shared_key(key, _recipe(wanted[key], manifest.model, dtype))
            if cached := cache.find(cache.IMAGES, shared_key, notice):
                files = cache.adopt(cache.IMAGES, shared_key, directory, name_of(key), _check_png, notice)
                if files:
                    add(key, files[0], cached.cost)
                    adopted += 1
        if adopted:
            publish_manifest()
        if already := len(whole & wanted.keys()):
            notice(f"{already} of {len(wanted)} pictures are decoded already")

        todo, failures = [], []
        for key, item in wanted.items():
            if key not in whole:
                try:  # all are read before the first is decoded: damage is found before the work
                    store.read_latents(source, item)
                    todo.append(key)
                except UserError as error:
                    failures.append(str(error))
        if failures and len(failures) == len(wanted):
            raise UserError(failures[0])
        if todo:
            report("decode", 0, len(todo))
            vae = _load_vae(checkpoint, dtype)
        for number, key in enumerate(todo, 1):
            watch = Stopwatch()
            item = wanted[key]
            recipe = _recipe(item, manifest.model, dtype)
            png = _png(_pixels(vae, store.read_latents(source, item)), recipe)
            (file,) = store.publish(directory, name_of(key), png)
            add(key, file, watch.cost())
            cache.put(cache.IMAGES, _shared_key(key, recipe), done[key], png)
            publish_manifest()  # after every picture, so that an interruption loses none
            report("decode", number, len(todo))
    if todo:
        cache.trim(cache_limit)
    return [directory / done[key].file.path for key in wanted if key in whole], failures


def _key(item: LatentsItem, checkpoint: Checkpoint, dtype: str) -> str:
    vae = checkpoint.fingerprint("vae")
    return keys.key({"latents": item.key, "vae": vae, "dtype": dtype, "code": CODE_VERSION})


def _shared_key(key: str, recipe: Recipe) -> str:
    """What names a picture among all runs: with its recipe, which names the model as this run calls it."""
    return keys.key([key, recipe])


def _check_png(data: bytes) -> None:
    if not data.startswith(PNG_SIGNATURE):
        raise ValueError("not a PNG")


def _load_vae(checkpoint: Checkpoint, dtype: str) -> "AutoencoderKLQwenImage":
    from stages.models.vae import AutoencoderKLQwenImage, VAEConfig

    vae = AutoencoderKLQwenImage(checkpoint.config("vae", VAEConfig))
    load_weights(vae, checkpoint.component("vae"), mlx_dtype(dtype))
    return vae


def _pixels(vae: "AutoencoderKLQwenImage", latents: "np.ndarray") -> "np.ndarray":
    """Latents [C, h, w] -> uint8 [H, W, 3], contiguous."""
    import mlx.core as mx
    import numpy as np

    rgb = vae.decode(mx.array(latents)[None])[0].astype(mx.float32)
    return np.array(mx.contiguous(mx.round((rgb * 0.5 + 0.5) * 255).astype(mx.uint8)))


def _recipe(item: LatentsItem, model: Model, decode_dtype: str) -> Recipe:
    fields = dict(
        prompt=item.prompt,
        negative_prompt=None if item.negative_key is None else item.negative_prompt,
        seed=item.seed,
        noise_sha256=item.noise_sha256,
        width=item.width,
        height=item.height,
        num_inference_steps=item.num_inference_steps,
        true_cfg_scale=item.true_cfg_scale,
        model=Path(model.name).name if Path(model.name).is_absolute() else model.name,  # pictures travel, paths do not
        fingerprints=model.fingerprints,
        dtype=item.dtype,
        decode_dtype=decode_dtype,
        latents_key=item.key,
    )
    return msgspec.convert(fields, type=Recipe)  # checks them: who reads it will


def _png(pixels: "np.ndarray", recipe: Recipe) -> bytes:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("parameters", recipe.parameters())
    info.add_itxt("qwen-stage", msgspec.json.encode(recipe).decode())
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def _file_names(item: LatentsItem, number: int) -> Iterator[str]:
    """0001-a-red-circle-s42.png: its place among the latents, what it shows, the seed; then with -2, -3 behind that."""
    text = (item.name or item.prompt).lower()
    # letters, their marks, and numbers of any script
    words = "".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in text).split()
    slug = "-".join(words)[:SLUG_LENGTH].strip("-")
    seed = "noise" if item.seed is None else f"s{item.seed}"
    name = "-".join(part for part in (f"{number:04d}", slug, seed) if part)
    yield f"{name}.png"
    yield from (f"{name}-{again}.png" for again in count(2))

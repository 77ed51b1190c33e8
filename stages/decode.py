"""latents -> PNG: the third stage."""

import io
import unicodedata
from collections.abc import Callable, Iterator
from itertools import count
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import msgspec
from msgspec.structs import replace

from artifacts_schema import cache, keys, store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import (
    Cost,
    DecodeDtype,
    File,
    ImageItem,
    ImagesManifest,
    LatentsItem,
    LatentsManifest,
    Model,
    Recipe,
)
from stages import memory
from stages.backend import prepare_mlx
from stages.checkpoint import Checkpoint, Fetching, has_cuda, open_checkpoint
from stages.measure import Notice, Report, Stopwatch, versions
from stages.model_name import ModelName, following
from stages.preview import Fit

if TYPE_CHECKING:
    import numpy as np

    from stages.models.vae import AutoencoderKLQwenImage

CODE_VERSION = 2  # raised whenever the same latents would give other pixels
# half the time and memory there, and no more than 1/255 from float32, where bfloat16 is up to 5/255
DEFAULT_DTYPE: DecodeDtype = "float16" if has_cuda() else "float32"
FALLBACK_DTYPE: DecodeDtype = "float32"  # for numbers that the other cannot hold
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SLUG_LENGTH = 40  # characters of the prompt in a file name


def decode(
    latents: Path,
    model: str | None,
    out: Path | None,
    *,
    items: frozenset[str] | None = None,
    dtype: str | None = None,
    budget: int | None = None,
    tile: int | None = None,
    report: Report,
    notice: Notice,
) -> tuple[list[Path], list[str]]:
    """Decodes every item of a latents artifact, or those whose keys are `items`, that has no picture yet.

    No more than `tile` x `tile` pixels are decoded at a time, which bounds the memory and changes no picture. Without a
    `dtype`, a picture in any that is there will do.
    Returns the pictures of all those items and what failed, a line each. Raises UserError when none can be read.
    """
    cache_limit = cache.limit()
    asked, dtype = dtype, dtype or DEFAULT_DTYPE
    source = store.find(latents, LatentsManifest)
    manifest, manifest_id = store.read_manifest(source, LatentsManifest)
    checkpoint = open_checkpoint(following(model, manifest.model.name), Fetching(("decode",), report, notice))
    if ModelName.parse(model or "").of("vae"):  # another one is what is wanted
        manifest = replace(manifest, model=replace(manifest.model, name=checkpoint.name))
    else:
        checkpoint.check_made_with(manifest.model, ("vae",), f"the latents in {source} were")
    memory.check_tile(tile, checkpoint.vae_scale_factor)
    if unknown := (items or frozenset()) - {item.key for item in manifest.items}:
        raise UserError(f"{source} holds no latents {min(unknown)!r}; `qwen-stage inspect --json` lists their keys")

    with store.writing((out or store.run_of(source)) / ImagesManifest.kind) as directory:
        images = Images(directory, manifest, manifest_id, items, checkpoint, asked)
        images.adopt(notice)
        if already := len(images.whole & images.wanted.keys()):
            notice(f"{already} of {len(images.wanted)} pictures are decoded already")
        todo, errors = [], []
        for key in images.missing():
            try:  # all are read before the first is decoded: damage is found before the work
                store.read_latents(source, images.wanted[key])
                todo.append(key)
            except UserError as error:
                errors.append(error)
        if errors and len(errors) == len(images.wanted):
            raise errors[0]
        if todo:
            prepare_mlx("decode")
            memory.limit_cache()
            sizes = {(images.wanted[key].height, images.wanted[key].width) for key in todo}
            decoder = Decoder(checkpoint, dtype, sizes, tile, memory.budget(budget))
            tiles_done, tiles = count(1), sum(_tiles(images.wanted[key], decoder.edge) for key in todo)
            report("decode", 0, tiles)
            fit = Fit.of(checkpoint)
        for key in todo:
            watch, item = Stopwatch(), images.wanted[key]
            normalized = store.read_latents(source, item)
            pixels = decoder.pixels(normalized, lambda: report("decode", next(tiles_done), tiles))
            recipe = images.recipe(key)
            if pixels is None and dtype != FALLBACK_DTYPE:
                notice(f"{item.prompt!r} is beyond what {dtype} can hold; it is decoded in {FALLBACK_DTYPE}")
                recipe = replace(recipe, decode_dtype=FALLBACK_DTYPE)
                try:
                    again = Decoder(checkpoint, FALLBACK_DTYPE, sizes, tile, memory.budget(budget))
                except UserError as error:  # it does not fit; others may not need it
                    errors.append(UserError(f"{item.prompt!r}: {error}"))
                    continue
                pixels = again.pixels(normalized, lambda: None)
            if pixels is None:
                errors.append(UserError(f"{item.prompt!r}: the picture became NaN; are the VAE's weights whole?"))
                continue
            fit.add(normalized, pixels)
            images.add(key, _png(pixels, recipe), watch)
            images.publish()  # after every picture, so that an interruption loses none
    if todo:
        fit.store()
        cache.trim(cache_limit)
    return images.paths(), [str(error) for error in errors]


class Decoder:
    """The VAE in one dtype, and the tiles in which it decodes pictures of these sizes, [height, width] in pixels."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str,
        sizes: set[tuple[int, int]],
        tile: int | None,
        within: memory.Budget,
    ) -> None:
        from stages.models.vae import AutoencoderKLQwenImage, VAEConfig
        from stages.weights import Loading

        self.loading = Loading(checkpoint, "vae", AutoencoderKLQwenImage, VAEConfig, dtype)
        self.within, self.weights = within, self.loading.weights()
        config = checkpoint.config("vae", VAEConfig)
        states = {
            edge: max(memory.picture_states(config, *size, edge, dtype) for size in sizes)
            for edge in (*memory.TILES, *([tile] if tile else []))
        }
        self.edge = memory.tile(self.weights, states, tile, within)
        self.states = states[self.edge]

    def pixels(self, latents: "np.ndarray", tile_done: Callable[[], None]) -> "np.ndarray | None":
        """Those of latents [C, h, w], or None if they became NaN."""
        from stages.weights import load_model

        vae = load_model(self.loading)  # which is there already, unless another was loaded in between
        with memory.bounded(self.weights.whole, self.states, self.within):
            return pixels_of(vae, latents, self.edge, tile_done)


class Images:
    """What a run's images directory lists, what is wanted of it, and what is added to it."""

    def __init__(
        self,
        directory: Path,
        latents: LatentsManifest,
        latents_id: str,
        chosen: frozenset[str] | None,
        checkpoint: Checkpoint,
        asked: str | None,
    ) -> None:
        dtype = asked or DEFAULT_DTYPE
        before = store.read_manifest_if_any(directory, ImagesManifest)
        self.directory, self.made_with, self.dtype = directory, checkpoint.model("vae"), dtype
        fingerprints = {**latents.model.fingerprints, **self.made_with.fingerprints}
        self.whole_model = replace(latents.model, fingerprints=fingerprints)
        self.inputs = tuple(dict.fromkeys((*(before.inputs if before else ()), latents_id)))
        self.items = {item.key: item for item in before.items} if before else {}
        self.numbers = {item.key: number for number, item in enumerate(latents.items, 1)}
        self.wanted: dict[str, LatentsItem] = {}
        self.whole: set[str] = set()
        for item in latents.items:
            if chosen is None or item.key in chosen:
                found = next((key for key in _keys(item, checkpoint, asked) if self._is_whole(key)), None)
                self.wanted[found or _key(item, checkpoint, dtype)] = item
                self.whole |= {found} if found else set()

    def _is_whole(self, key: str) -> bool:
        return key in self.items and store.is_whole(self.directory, (self.items[key].file,))

    def missing(self) -> list[str]:
        return [key for key in self.wanted if key not in self.whole]

    def paths(self) -> list[Path]:
        """The pictures that were wanted and are there."""
        return [self.directory / self.items[key].file.path for key in self.wanted if key in self.whole]

    def recipe(self, key: str) -> Recipe:
        return _recipe(self.wanted[key], self.whole_model, self.dtype)

    def adopt(self, notice: Notice) -> None:
        """Takes from the cache what is missing here."""
        before = len(self.whole)
        for key in self.missing():
            shared_key = _shared_key(key, self.recipe(key))
            if cached := cache.find(cache.IMAGES, shared_key, notice):
                files = cache.adopt(cache.IMAGES, shared_key, self.directory, self._name(key), _check_png, notice)
                if files:
                    self._list(key, files[0], cached.cost)
        if len(self.whole) > before:
            self.publish()

    def add(self, key: str, png: bytes, watch: Stopwatch) -> None:
        (file,) = store.publish(self.directory, self._name(key), png)
        self._list(key, file, watch.cost())
        cache.put(cache.IMAGES, _shared_key(key, self.recipe(key)), self.items[key], png)

    def publish(self) -> None:
        items = tuple(self.items.values())
        manifest = ImagesManifest(versions=versions(), model=self.made_with, inputs=self.inputs, items=items)
        store.write_manifest(self.directory, manifest)

    def _list(self, key: str, file: File, cost: Cost) -> None:
        item = self.wanted[key]
        self.items[key] = ImageItem(
            key=key,
            latents_key=item.key,
            prompt=item.prompt,
            seed=item.seed,
            dtype=self.dtype,
            file=file,
            cost=cost,
        )
        self.whole.add(key)

    def _name(self, key: str) -> str:
        """The name that a picture has, or the next that is free."""
        if key in self.items:
            return Path(self.items[key].file.path).name
        taken = {item.file.path for item in self.items.values()}
        item = self.wanted[key]
        return next(name for name in _file_names(item, self.numbers[item.key]) if name not in taken)


def _key(item: LatentsItem, checkpoint: Checkpoint, dtype: str) -> str:
    vae = checkpoint.fingerprint("vae")  # not the size of the tiles, which changes nothing
    return keys.key({"latents": item.key, "vae": vae, "dtype": dtype, "code": CODE_VERSION})


def _keys(item: LatentsItem, checkpoint: Checkpoint, asked: str | None) -> list[str]:
    """Those under which a picture as asked for may be there."""
    dtypes = [asked] if asked else [DEFAULT_DTYPE, *get_args(DecodeDtype)]
    return [_key(item, checkpoint, dtype) for dtype in dtypes]


def _shared_key(key: str, recipe: Recipe) -> str:
    """What names a picture among all runs: with its recipe, which names the model as this run calls it."""
    return keys.key([key, recipe])


def _check_png(data: bytes) -> None:
    if not data.startswith(PNG_SIGNATURE):
        raise ValueError("not a PNG")


def _tiles(item: LatentsItem, edge: int) -> int:
    return ceil(item.height / edge) * ceil(item.width / edge)


def pixels_of(
    vae: "AutoencoderKLQwenImage", latents: "np.ndarray", edge: int, tile_done: Callable[[], None]
) -> "np.ndarray | None":
    """Latents [C, h, w] -> uint8 [H, W, 3], contiguous, or None if any is NaN. In floats there is a tile at most."""
    import mlx.core as mx
    import numpy as np

    _, h, w = latents.shape
    pixels = np.empty((h * vae.config.vae_scale_factor, w * vae.config.vae_scale_factor, 3), np.uint8)
    for tile, rgb in vae.decode_tiles(mx.array(latents)[None], edge):
        if mx.isnan(rgb).any().item():
            return None
        pixels[tile] = np.array(mx.round((rgb[0].astype(mx.float32) * 0.5 + 0.5) * 255).astype(mx.uint8))
        tile_done()
    return pixels


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
        cache_steps=item.cache_steps,
        shift=item.shift,
        sigmas=item.sigmas,
        image=item.image,
        strength=item.strength,
        model=str(ModelName.parse(model.name).for_others()),
        fingerprints=model.fingerprints,
        embeddings_dtype=item.embeddings_dtype,
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

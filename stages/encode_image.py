"""The pictures that prompts begin with -> latents: a stage of its own, between encode and denoise."""

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from artifacts_schema import arrays, cache, keys, store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import (
    Dtype,
    EmbeddingsManifest,
    ImageLatentsItem,
    ImageLatentsManifest,
    Settings,
)
from artifacts_schema.prompts import Wanted, check_settings, resolve
from stages import memory, picture
from stages.backend import prepare_mlx
from stages.checkpoint import Checkpoint, Fetching, open_checkpoint
from stages.measure import Notice, Report, Stopwatch, versions
from stages.model_name import following

if TYPE_CHECKING:
    import numpy as np

CODE_VERSION = 1  # raised whenever the same picture would give other latents
DTYPE: Dtype = "float32"  # a picture is encoded once, and what the encoder sees decides all that follows


class Sized(NamedTuple):
    """A picture, by its hash, and the size to which it is brought."""

    image: str
    width: int
    height: int


def encode_image(
    embeddings: Path,
    model: str | None,
    overrides: Settings,
    *,
    wanted: list[Wanted] | None = None,
    budget: int | None = None,
    tile: int | None = None,
    report: Report,
    notice: Notice,
) -> Path | None:
    """Encodes the pictures that a run's prompts begin with, at their sizes, or those that are `wanted`.

    `overrides` may say another size. What is there already, in the run or in the cache, is kept. No more than `tile` x
    `tile` pixels are encoded at a time, which bounds the memory and changes nothing. Returns the artifact's directory,
    beside the embeddings; None if no prompt begins with a picture.
    """
    cache_limit = cache.limit()
    source = store.find(embeddings, EmbeddingsManifest)
    manifest, manifest_id = store.read_manifest(source, EmbeddingsManifest)
    checkpoint = open_checkpoint(following(model, manifest.model.name), Fetching(("decode",), report, notice))
    memory.check_tile(tile, checkpoint.vae_scale_factor)
    overrides = check_settings(overrides)
    settings = [resolve(overrides, item.settings, checkpoint.defaults) for item in manifest.items]
    asked: Sequence[Settings | Wanted] = settings if wanted is None else wanted
    sized = {Sized(each.image, each.width or 0, each.height or 0) for each in asked if each.image}
    keyed = {_key(each, checkpoint): each for each in sorted(sized)}
    if not keyed:
        return None
    for each in keyed.values():
        checkpoint.check_size(each.width, each.height, 1)
    held = {image.file.sha256: image for image in manifest.images}

    with store.writing(store.run_of(source) / ImageLatentsManifest.kind) as directory:
        latents = ImageLatents(directory, checkpoint, manifest_id)
        todo = latents.missing(keyed, notice)
        if len(todo) < len(keyed):
            notice(f"{len(keyed) - len(todo)} of {len(keyed)} images are encoded already")
        if todo:
            if unknown := {each.image for each in todo.values()} - held.keys():
                raise UserError(f"{source} holds no image {min(unknown)}; encode the prompts that begin with it again")
            # all are read before the first is encoded: damage is found before the work
            files = {each.image: store.read_file(source, held[each.image].file) for each in todo.values()}
            encoder = Encoder(checkpoint, todo.values(), tile, memory.budget(budget))
            report("encode image", 0, len(todo))
        for number, (key, each) in enumerate(todo.items(), 1):
            watch = Stopwatch()
            rgb = picture.rgb(files[each.image], each.width, each.height, held[each.image].name)
            latents.add(key, each, encoder.latents(rgb), watch)
            latents.publish()
            report("encode image", number, len(todo))
        latents.publish()
    if todo:
        cache.trim(cache_limit)
    return directory


class ImageLatents:
    """What a run's image_latents directory lists, and what is added to it."""

    def __init__(self, directory: Path, checkpoint: Checkpoint, made_from: str) -> None:
        before = store.read_manifest_if_any(directory, ImageLatentsManifest)
        if before:
            checkpoint.check_made_with(before.model, ("vae",), f"the latents already in {directory} were")
        self.directory, self.made_with = directory, checkpoint.model("vae")
        self.inputs = tuple(dict.fromkeys((*(before.inputs if before else ()), made_from)))
        self.items = {item.key: item for item in before.items} if before else {}

    def missing(self, keyed: dict[str, Sized], notice: Notice) -> dict[str, Sized]:
        """Those that are neither here, whole, nor in the cache. What the cache has is here afterwards."""
        return {key: each for key, each in keyed.items() if not self._is_whole(key) and not self._adopt(key, notice)}

    def add(self, key: str, of: Sized, latents: "np.ndarray", watch: Stopwatch) -> None:
        content = arrays.pack(latents)
        files = store.publish(self.directory, f"{key}.zarr", content)
        c, h, w = latents.shape
        self.items[key] = ImageLatentsItem(
            key=key,
            image=of.image,
            width=of.width,
            height=of.height,
            dtype=DTYPE,
            shape=(c, h, w),
            files=files,
            cost=watch.cost(),
        )
        cache.put(cache.IMAGE_LATENTS, key, self.items[key], content)

    def publish(self) -> None:
        items = tuple(self.items.values())
        manifest = ImageLatentsManifest(versions=versions(), model=self.made_with, inputs=self.inputs, items=items)
        store.write_manifest(self.directory, manifest)

    def _is_whole(self, key: str) -> bool:
        item = self.items.get(key)
        return bool(item and store.is_whole(self.directory, item.files) and not store.strangers(self.directory, item))

    def _adopt(self, key: str, notice: Notice) -> bool:
        cached = cache.find(cache.IMAGE_LATENTS, key, notice)
        if cached is None:
            return False
        check = partial(arrays.unpack, shape=cached.shape)
        files = cache.adopt(cache.IMAGE_LATENTS, key, self.directory, f"{key}.zarr", check, notice)
        if files:
            self.items[key] = replace(cached, files=files)
        return bool(files)


class Encoder:
    """The VAE's encoder, and the tiles in which it encodes pictures of these sizes."""

    def __init__(
        self, checkpoint: Checkpoint, pictures: Collection[Sized], tile: int | None, within: memory.Budget
    ) -> None:
        prepare_mlx("encode-image")
        from stages.models.vae import VAEConfig
        from stages.models.vae_encoder import AutoencoderKLQwenImageEncoder
        from stages.weights import Loading, load_model

        memory.limit_cache()
        config = checkpoint.config("vae", VAEConfig)
        loading = Loading(checkpoint, "vae", AutoencoderKLQwenImageEncoder, VAEConfig, DTYPE)
        self.weights, self.within = loading.weights(), within
        states = {
            edge: max(
                memory.picture_states(config, each.height, each.width, edge, DTYPE, config.encoder_halo)
                for each in pictures
            )
            for edge in (*memory.TILES, *([tile] if tile else []))
        }
        self.edge = memory.tile(self.weights, states, tile, within)
        self.states = states[self.edge]
        self.vae = load_model(loading)

    def latents(self, rgb: "np.ndarray") -> "np.ndarray":
        """[H, W, 3] in [-1, 1] -> normalized latents [C, H/8, W/8], float32."""
        import mlx.core as mx
        import numpy as np

        with memory.bounded(self.weights.whole, self.states, self.within):
            latents = np.array(self.vae.encode(mx.array(rgb)[None], self.edge)[0])
        if not np.isfinite(latents).all():
            raise UserError("the image's latents became NaN or infinite; are the VAE's weights whole?")
        return latents


def _key(of: Sized, checkpoint: Checkpoint) -> str:
    vae = checkpoint.fingerprint("vae")
    return keys.key(
        {"image": of.image, "size": [of.width, of.height], "vae": vae, "dtype": DTYPE, "code": CODE_VERSION}
    )

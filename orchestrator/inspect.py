"""Says in human words what an artifact, a whole run or a picture is: what, from what, with what, at what cost."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from artifacts_schema import disk, store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import (
    Embedding,
    EmbeddingsManifest,
    File,
    ImageItem,
    ImageLatentsItem,
    ImageLatentsManifest,
    ImagesManifest,
    LatentsItem,
    LatentsManifest,
    Recipe,
    SourceImage,
    exact,
)

NOT_HERE = "its run is not here"

Origin = ImageItem | LatentsItem | ImageLatentsItem | SourceImage | Embedding


class Picture(NamedTuple):
    """A PNG's recipe, and where it came from, as far as that is still there: itself first, its embeddings last."""

    recipe: Recipe
    lineage: list[tuple[Path, Origin]]
    broken: str | None  # why the lineage ends before


class Artifact(NamedTuple):
    directory: Path
    manifest: Any  # None if it cannot be read
    wrong: str | None  # then, why


def read(path: Path) -> list[Artifact] | Picture:
    """The recipe and lineage of a PNG, or the manifests of a run or an artifact."""
    if path.is_file():
        return Picture(read_recipe(path), *_lineage(path))
    found = []
    for directory in (path, *(path / kind.kind for kind in store.KINDS)):
        if kind := store.kind_of(directory):
            try:
                found.append(Artifact(directory, store.read_manifest(directory, kind)[0], None))
            except UserError as error:
                found.append(Artifact(directory, None, str(error)))
    if not found:
        raise UserError(f"{path} is no run, artifact or picture of qwen-stage")
    return found


def read_recipe(path: Path) -> Recipe:
    from PIL import Image, UnidentifiedImageError

    try:
        # no pipe, and of PNG alone: that reads no pixels to find the text
        with disk.opened(path.resolve()) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
            text = Image.open(file, formats=["PNG"]).info.get("qwen-stage")
        if not isinstance(text, str):
            raise UserError(f"{path} carries no recipe; it was not made by qwen-stage, or lost it on its way")
        recipe = msgspec.json.decode(text.encode(), type=Recipe)
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError):
        raise UserError(f"{path} is not a PNG") from None
    except (RecursionError, ValueError, OSError) as error:  # Pillow's too, for a file cut off or text inflated too far
        raise UserError(f"{path} carries a recipe that cannot be read: {error}") from None
    return recipe


def _lineage(path: Path) -> tuple[list[tuple[Path, Origin]], str | None]:
    """From a picture in its run back to its prompt, through the manifests beside it; and why not further."""
    directory = path.resolve().parent
    run = directory.parent
    found: list[tuple[Path, Origin]] = []
    try:
        images, _ = store.read_manifest(store.find(directory, ImagesManifest), ImagesManifest)
        image = next(item for item in images.items if item.file.path == path.resolve().name)
        found.append((directory / image.file.path, image))
        latents, _ = store.read_manifest(run / LatentsManifest.kind, LatentsManifest)
        item = next(item for item in latents.items if item.key == image.latents_key)
        found.append((run / LatentsManifest.kind / item.directory, item))
        embeddings, _ = store.read_manifest(run / EmbeddingsManifest.kind, EmbeddingsManifest)
        if item.image:
            begin, _ = store.read_manifest(run / ImageLatentsManifest.kind, ImageLatentsManifest)
            own = (item.image, item.width, item.height)
            encoded = next(each for each in begin.items if (each.image, each.width, each.height) == own)
            found.append((run / ImageLatentsManifest.kind / encoded.directory, encoded))
            source = next(each for each in embeddings.images if each.file.sha256 == item.image)
            found.append((run / EmbeddingsManifest.kind / source.file.path, source))
        for embedding in embeddings.embeddings:
            if embedding.key in (item.prompt_key, item.negative_key):
                found.append((run / EmbeddingsManifest.kind / embedding.file.path, embedding))
    except UserError as error:
        return found, str(error) if found or store.is_there(directory) else NOT_HERE
    except StopIteration:
        return found, NOT_HERE
    return found, None


def in_words(directory: Path, manifest: Any) -> Iterator[str]:
    """One line for the artifact, one for each item."""
    count = len(manifest.items)
    noun = {EmbeddingsManifest.kind: "prompt", ImageLatentsManifest.kind: "image"}.get(manifest.kind, "picture")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    yield f"{directory}: {count} {noun}{'' if count == 1 else 's'}, with {manifest.model.name}, by {versions}"
    for number, item in enumerate(manifest.items, 1):
        if isinstance(item, LatentsItem):
            noise = "injected noise" if item.seed is None else f"seed {item.seed}"
            how = f"{noise}, {item.width}x{item.height}, {item.num_inference_steps} steps"
            how += f", cfg {exact(item.true_cfg_scale)}"
            how += "".join(f", {name} {value}" for name, value in item.unusual().items())
            yield f"  {number:04d} {item.prompt!r}: {how}, {item.dtype}, {cost(item)}"
        elif isinstance(item, ImageLatentsItem):
            yield f"  {item.image[:12]}… at {item.width}x{item.height}, {item.dtype}, {cost(item)}"
        elif isinstance(manifest, ImagesManifest):
            yield f"  {item.file.path}: {item.prompt!r}, from latents {item.latents_key}, {cost(item)}"
        else:
            names = {image.file.sha256: image.name for image in manifest.images}
            begins = f", from {names.get(item.settings.image, item.settings.image)!r}" if item.settings.image else ""
            yield f"  {item.prompt!r}, not {item.negative_prompt!r}{begins}"


def cost(item: Any) -> str:
    peak = max(item.cost.process_peak, item.cost.mlx_peak)
    return f"{item.cost.seconds:g} s, at most {peak / 2**30:.2f} GiB"


def picture_as_json(picture: Picture) -> str:
    """The recipe's fields, and `lineage`: what it came from, each with its path."""
    lineage = [{"path": str(place), **msgspec.to_builtins(item)} for place, item in picture.lineage]
    return msgspec.json.encode({**msgspec.to_builtins(picture.recipe), "lineage": lineage}).decode()


def picture_in_words(path: Path, picture: Picture) -> Iterator[str]:
    yield f"{path}: {picture.recipe.prompt!r}"
    for name, value in msgspec.structs.asdict(picture.recipe).items():
        if value is not None and name not in ("prompt", "fingerprints"):
            yield f"  {name.replace('_', ' ')}: {value}"
    for place, item in picture.lineage:
        if isinstance(item, Embedding):
            yield f"  from {place}: {item.tokens} tokens of {item.dim} {item.dtype}"
        elif isinstance(item, LatentsItem):
            yield f"  from {place}: denoised, {cost(item)}"
        elif isinstance(item, ImageLatentsItem):
            yield f"  from {place}: encoded, {cost(item)}"
        elif isinstance(item, SourceImage):
            yield f"  from {place}: {item.name!r}, {item.width}x{item.height}"
        else:
            yield f"  decoded, {cost(item)}"


def damaged(artifact: Artifact) -> list[str]:
    """What is wrong with an artifact, a line each."""
    directory, manifest, wrong = artifact
    if wrong is not None:
        return [wrong]
    found = _wrong(directory, store.listed_files(manifest))
    if os.path.lexists(directory / store.BACKUP):  # there were none with the first manifests
        try:
            if store.read_manifest(directory, type(manifest), store.BACKUP)[0] != manifest:
                found.append(f"{directory / store.BACKUP} is not the same as the manifest; {store.repair(directory)}")
        except UserError as error:
            found.append(str(error))
    if isinstance(manifest, EmbeddingsManifest):
        held = {each.key for each in manifest.embeddings}
        lost = [item.prompt for item in manifest.items if not {item.prompt_key, item.negative_key} <= held]
        found += [f"{directory} lacks the embeddings of {prompt!r}; {store.repair(directory)}" for prompt in lost]
    if isinstance(manifest, LatentsManifest | ImageLatentsManifest):
        strange = [directory / i.directory / name for i in manifest.items for name in store.strangers(directory, i)]
        found += [f"{path} is no part of the array it lies in; {store.repair(directory)}" for path in strange]
    return found


def damaged_lineage(path: Path, picture: Picture) -> list[str]:
    """The same of all that a picture was made from, and of itself."""
    wrong = [f"{path} cannot be verified: {picture.broken}"] if picture.broken else []
    for place, item in picture.lineage:
        if isinstance(item, LatentsItem):
            files: tuple[File, ...] = (*item.files, *item.trajectory)
        else:
            files = item.files if isinstance(item, ImageLatentsItem) else (item.file,)
        wrong += _wrong(place.parent, files)
    return wrong


def _wrong(directory: Path, files: Iterable[File]) -> list[str]:
    wrong = []
    for file in files:
        try:
            store.verify(directory, (file,))
        except UserError as error:
            wrong.append(str(error))
    return wrong

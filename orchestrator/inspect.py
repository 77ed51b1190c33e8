"""Says in human words what an artifact, a whole run or a picture is: what, from what, with what, at what cost."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from artifacts_schema import store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import (
    EmbeddingsManifest,
    File,
    ImagesManifest,
    LatentsItem,
    LatentsManifest,
    Manifest,
    Recipe,
)

KINDS: tuple[type[Manifest], ...] = (EmbeddingsManifest, LatentsManifest, ImagesManifest)


def read(path: Path) -> "list[tuple[Path, Any]] | Recipe":
    """The recipe of a PNG, or the manifests (each with its directory) of a run or an artifact."""
    if path.is_file():
        return read_recipe(path)
    found = []
    for kind in KINDS:
        for directory in (path, path / kind.kind):
            if (directory / store.MANIFEST).exists() and directory.resolve().name == kind.kind:
                found.append((directory, store.read_manifest(directory, kind)[0]))
    if not found:
        raise UserError(f"{path} is no run, artifact or picture of qwen-stage")
    return found


def read_recipe(path: Path) -> Recipe:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            text = picture.info.get("qwen-stage")
        if not isinstance(text, str):
            raise UserError(f"{path} carries no recipe; it was not made by qwen-stage, or lost it on its way")
        return msgspec.json.decode(text.encode(), type=Recipe)
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError):
        raise UserError(f"{path} is not a picture") from None
    except (msgspec.MsgspecError, RecursionError, UnicodeError, ValueError) as error:
        raise UserError(f"{path} carries a recipe that cannot be read: {error}") from None


def in_words(directory: Path, manifest: Any) -> Iterator[str]:
    """One line for the artifact, one for each item."""
    count = len(manifest.items)
    noun = "prompt" if isinstance(manifest, EmbeddingsManifest) else "picture"
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    yield f"{directory}: {count} {noun}{'' if count == 1 else 's'}, with {manifest.model.name}, by {versions}"
    for item in manifest.items:
        if isinstance(item, LatentsItem):
            noise = "injected noise" if item.seed is None else f"seed {item.seed}"
            how = f"{noise}, {item.width}x{item.height}, {item.num_inference_steps} steps, cfg {item.true_cfg_scale:g}"
            yield f"  {item.prompt!r}: {how}, {item.dtype}, {cost(item)}"
        elif isinstance(manifest, ImagesManifest):
            yield f"  {item.file.path}: {item.prompt!r}, from latents {item.latents_key}, {cost(item)}"
        else:
            yield f"  {item.prompt!r}, not {item.negative_prompt!r}"


def cost(item: Any) -> str:
    peak = max(item.cost.process_peak, item.cost.mlx_peak)
    return f"{item.cost.seconds:g} s, at most {peak / 2**30:.2f} GiB"


def recipe_in_words(path: Path, recipe: Recipe) -> Iterator[str]:
    yield f"{path}: {recipe.prompt!r}"
    for name, value in msgspec.structs.asdict(recipe).items():
        if value is not None and name not in ("prompt", "fingerprints"):
            yield f"  {name.replace('_', ' ')}: {value}"


def files(manifest: Any) -> Iterator[File]:
    if isinstance(manifest, EmbeddingsManifest):
        yield from (each.file for each in manifest.embeddings)
    elif isinstance(manifest, LatentsManifest):
        for item in manifest.items:
            yield from (*item.files, *item.trajectory)
    else:
        yield from (item.file for item in manifest.items)


def damaged(directory: Path, manifest: Any) -> list[str]:
    """What is wrong with an artifact's files, a line each."""
    wrong = []
    for file in files(manifest):
        try:
            store.verify(directory, (file,))
        except UserError as error:
            wrong.append(str(error))
    return wrong

"""Makes a run, or parts of it, again: what is damaged, and what is wanted with other settings.

Every stage skips what is there and whole; so to repair is to ask each stage again for what its manifest lists, and to
try other settings is to ask for the same pictures with some of them changed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from msgspec.structs import replace

from artifacts_schema import disk, store
from artifacts_schema.errors import Damaged, UserError
from artifacts_schema.manifests import (
    EmbeddingsManifest,
    ImageLatentsManifest,
    ImagesManifest,
    LatentsItem,
    LatentsManifest,
    Manifest,
    Settings,
    changed,
)
from artifacts_schema.prompts import NO_GUIDANCE, Entry, Wanted, as_wanted, check_settings, to_jsonl
from orchestrator import EXIT_DONE, EXIT_SOME_FAILED
from orchestrator.run import precision, stage
from stages.model_name import following

Notice = Callable[[str], None]
T = TypeVar("T")
K = TypeVar("K")
M = TypeVar("M", bound=Manifest)


class StageFailed(Exception):
    """A stage ended with an exit code that ends the whole."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Changes(NamedTuple):
    """What is to be other than it was."""

    settings: Settings
    more_seeds: int = 0  # this many after the largest that each prompt has
    dtype: str | None = None
    bits: int | None = None  # of quantized weights; 0: not quantized
    keep_trajectory: bool = False


class Rerun:
    def __init__(
        self, run: Path, model: str | None, options: list[str], streaming: list[str], limits: list[str], notice: Notice
    ) -> None:
        """`options` go to `denoise` as they are, `streaming` to `encode` as well, `limits` to every stage."""
        self.run = run
        self.options = [*options, *streaming]
        self.streaming = streaming
        self.limits = limits
        self.notice = notice
        self.own_model = model
        self.model = [] if model is None else [f"--model={model}"]
        self.some_failed = False
        restored = [self._restore(kind) for kind in store.KINDS]
        if not any(restored):
            raise UserError(f"{run} is no run: it holds no embeddings, latents or images")

    def go(self, start: str, numbers: list[int], changes: Changes) -> tuple[int, list[Path]]:
        """Runs the stages from `start` on. Returns the exit code and the pictures that were asked for.

        `numbers`: those of the pictures, as in their names; none means all of the run.
        """
        try:
            items = self._numbered(numbers) if numbers else self._items()
            if start == "encode":
                self._encode({item.prompt_key for item in items} if numbers else None)
                self._repair_images([as_wanted(item) for item in items], everything=not numbers)
            if start == "decode":
                keys = [item.key for item in items]
            elif items:
                keys = self._denoise(items, changes)
            else:
                keys = self._denoise_all(changes)
            own = start == "decode" or changes.dtype == "float32"  # else there is better than bfloat16 for pictures
            pictures = self._decode(keys, changes.dtype if own else None)
            return EXIT_SOME_FAILED if self.some_failed else EXIT_DONE, pictures
        except StageFailed as failed:
            return failed.code, []

    def _restore(self, kind: type[Manifest]) -> bool:
        """Repairs the manifest of an artifact. Returns whether there is that artifact."""
        directory = self.run / kind.kind
        if not store.is_there(directory):
            return False
        with store.writing(directory):
            try:
                if store.restore_manifest(directory, kind):
                    self.notice(f"repaired the manifest of {directory}")
            except Damaged:
                if kind not in (ImagesManifest, ImageLatentsManifest):  # they can be made from the others' alone
                    raise
                for name in (store.MANIFEST, store.BACKUP):
                    disk.remove(directory / name)
                self.notice(f"the manifest of {directory} cannot be read; what it listed is made again")
        return True

    def _read(self, kind: type[M]) -> M | None:
        return store.read_manifest_if_any(self.run / kind.kind, kind)

    def _items(self) -> list[LatentsItem]:
        latents = self._read(LatentsManifest)
        return list(latents.items) if latents else []

    def _numbered(self, numbers: list[int]) -> list[LatentsItem]:
        items = self._items()
        if unknown := [number for number in numbers if number > len(items)]:
            raise UserError(f"{self.run} has no picture {unknown[0]}; `qwen-stage inspect {self.run}` lists them")
        return [items[number - 1] for number in numbers]

    def _encode(self, prompt_keys: set[str] | None) -> None:
        """Encodes the prompts again of which something is damaged."""
        manifest = self._read(EmbeddingsManifest)
        if manifest is None:
            return
        directory = self.run / manifest.kind
        embeddings = {each.key: each for each in manifest.embeddings}
        whole = {key for key, each in embeddings.items() if store.is_whole(directory, (each.file,))}
        damaged = [
            item
            for item in manifest.items
            if (prompt_keys is None or item.prompt_key in prompt_keys)
            and not {item.prompt_key, item.negative_key} <= whole
        ]
        dtypes = {key: each.dtype for key, each in embeddings.items()}
        model = f"--model={following(self.own_model, manifest.model.name)}"
        truncate = any(each.tokens < each.prompt_tokens for each in embeddings.values())
        for own_dtype, items in _grouped(damaged, lambda item: dtypes.get(item.prompt_key)):
            self._stage(
                "encode",
                "-",
                "--format=jsonl",
                f"--out={self.run}",
                model,
                *precision(own_dtype),
                *self.streaming,
                *(["--truncate"] if truncate else []),
                stdin=to_jsonl([Entry.of(item) for item in items]),
            )

    def _repair_images(self, wanted: list[Wanted], everything: bool) -> None:
        """Images and their latents that are damaged or missing; with `everything`, also what no picture begins with."""
        embeddings, latents = self._read(EmbeddingsManifest), self._read(ImageLatentsManifest)
        directory = self.run / EmbeddingsManifest.kind
        lost = {
            each.file.sha256: each.name
            for each in (embeddings.images if embeddings else ())
            if not store.is_whole(directory, (each.file,))
        }
        for name in lost.values():
            self.notice(f"the image {name!r} is damaged or missing; give it again with `qwen-stage run --image`")
            self.some_failed = True
        sizes = {(each.image, each.width, each.height): each for each in wanted if each.image not in lost}
        if everything and wanted:
            for item in latents.items if latents else ():
                if item.image not in lost:
                    own = (item.image, item.width, item.height)
                    sizes.setdefault(own, replace(wanted[0], image=item.image, width=item.width, height=item.height))
        self._encode_images(list(sizes.values()))

    def _encode_images(self, wanted: list[Wanted]) -> None:
        """Those that pictures begin with, where they are missing or damaged."""
        if lines := to_jsonl([each for each in wanted if each.image]):
            self._stage("encode-image", "--items=-", *self.model, "--", str(self.run), stdin=lines)

    def _denoise(self, items: list[LatentsItem], changes: Changes) -> list[str]:
        """Asks for these pictures again, changed. Returns the keys of their latents."""
        if changes.settings.strength is not None and not any(item.image for item in items):
            raise UserError("none of these pictures begins with an image: --strength would change nothing")
        keys = []
        wanted: dict[tuple[Wanted, str], bool] = {}  # with its dtype; whether its trajectory was kept
        embeddings = self._read(EmbeddingsManifest)
        prompts = embeddings.items if embeddings else ()
        negatives = {(item.prompt_key, item.negative_prompt): item.negative_key for item in prompts}
        before, latents = self._items(), self._read(LatentsManifest)
        for item, each in _changed(items, changes, negatives, _largest_seeds(before)):
            if each is not None:
                keep = changes.keep_trajectory or bool(item.trajectory)
                wanted.setdefault((each, changed(item.dtype, changes.dtype, changes.bits)), keep)
            elif self._is_whole(item):
                keys.append(item.key)
            else:
                self.notice(f"{item.prompt!r} cannot be made again: its noise came from a file; use denoise --noise")
                self.some_failed = True
        whole = {(as_wanted(item), item.dtype): bool(item.trajectory) for item in before if self._is_whole(item)}
        missing = [(each, keep) for each, keep in wanted.items() if each not in whole or (keep and not whole[each])]
        if missing and embeddings is None:
            raise UserError(
                f"{self.run} holds latents without their embeddings; make them again where those are, with "
                f"`qwen-stage denoise --embeddings RUN --out {self.run}`"
            )
        self._encode_images([each for (each, _), _ in missing])
        for (dtype, keep), group in _grouped(missing, lambda one: (one[0][1], one[1])):
            options = [*precision(dtype), *(["--keep-trajectory"] if keep else []), *self.options]
            lines = to_jsonl([each for (each, _), _ in group])
            model = following(self.own_model, latents.model.name) if latents else None
            self._stage(
                "denoise", f"--embeddings={self.run}", "--items=-", *_option("--model", model), *options, stdin=lines
            )
        made = {(as_wanted(item), item.dtype): item.key for item in self._items() if item.seed is not None}
        return [*keys, *(made[each] for each in wanted if each in made)]

    def _is_whole(self, item: LatentsItem) -> bool:
        directory = self.run / LatentsManifest.kind
        return store.is_whole(directory, (*item.files, *item.trajectory)) and not store.strangers(directory, item)

    def _denoise_all(self, changes: Changes) -> list[str]:
        """The first pictures of a run that has only embeddings."""
        if changes.more_seeds:
            raise UserError(f"{self.run} has no pictures yet to add seeds to; give the seeds themselves")
        settings, embeddings = changes.settings, self._read(EmbeddingsManifest)
        size = None if settings.width is None else f"{settings.width}x{settings.height}"
        if embeddings and any(item.settings.image for item in embeddings.items):
            self._stage("encode-image", *self.model, *_option("--size", size), "--", str(self.run))
        self._stage(
            "denoise",
            f"--embeddings={self.run}",
            *self.model,
            *_option("--dtype", changes.dtype),
            *_option("--quantize", changes.bits),
            *_option("--size", size),
            *_option("--steps", settings.num_inference_steps),
            *_option("--cfg", settings.true_cfg_scale),
            *_option("--cache-steps", settings.cache_steps),
            *_option("--shift", settings.shift),
            *_option("--strength", settings.strength),
            *_option("--sigmas", settings.sigmas and ",".join(map(str, settings.sigmas))),
            *(["--seed", *map(str, settings.seeds)] if settings.seeds else []),
            *(["--keep-trajectory"] if changes.keep_trajectory else []),
            *self.options,
        )
        return [item.key for item in self._items()]

    def _decode(self, latents_keys: list[str], dtype: str | None) -> list[Path]:
        """Decodes these latents as they were decoded before, or in another dtype. Returns their pictures."""
        images = self._read(ImagesManifest)
        before: defaultdict[str, list[str | None]] = defaultdict(list)
        for item in images.items if images else ():
            before[item.latents_key].append(item.dtype)
        wanted = [(key, own) for key in latents_keys for own in ([dtype] if dtype else before[key] or [None])]
        pictures = []
        for own, group in _grouped(wanted, lambda each: each[1]):
            keys = "".join(f"{key}\n" for key, _ in group).encode()
            options = ["--items=-", *self.model, *_option("--dtype", own)]
            pictures += self._stage("decode", *options, "--", str(self.run), stdin=keys)
        return [Path(picture) for picture in pictures]

    def _stage(self, name: str, *arguments: str, stdin: bytes = b"") -> list[str]:
        code, lines = stage(name, *self.limits, *arguments, stdin=stdin)
        if code not in (EXIT_DONE, EXIT_SOME_FAILED):
            raise StageFailed(code)
        self.some_failed |= code == EXIT_SOME_FAILED
        return lines


def _largest_seeds(items: list[LatentsItem]) -> dict[Wanted, int]:
    """By all the rest that determines a picture."""
    largest: dict[Wanted, int] = {}
    for item in items:
        if item.seed is not None:
            group = replace(as_wanted(item), seed=0)
            largest[group] = max(largest.get(group, 0), item.seed)
    return largest


def _changed(
    items: list[LatentsItem],
    changes: Changes,
    negatives: dict[tuple[str, str], str],
    largest: dict[Wanted, int],
) -> Iterator[tuple[LatentsItem, Wanted | None]]:
    """Each picture as it is wanted; None for one from injected noise, which can only stay as it is.

    `negatives`: the negative prompts by their prompts, for pictures that had no guidance and are to get some.
    """
    settings = check_settings(changes.settings)
    for item in items:
        if item.seed is None:
            yield item, None
            continue
        wanted = as_wanted(item)
        if changes.more_seeds:
            first = largest[replace(wanted, seed=0)] + 1
            seeds: Iterable[int] = range(first, first + changes.more_seeds)
        else:
            seeds = settings.seeds or (item.seed,)
        cfg = max(wanted.true_cfg_scale if settings.true_cfg_scale is None else settings.true_cfg_scale, NO_GUIDANCE)
        sigmas = wanted.sigmas if settings.num_inference_steps is settings.shift is None else ()
        sigmas = sigmas if settings.sigmas is None else settings.sigmas
        changed = replace(
            wanted,
            negative_key=(item.negative_key or negatives.get((item.prompt_key, item.negative_prompt)))
            if cfg > NO_GUIDANCE
            else None,
            width=settings.width or wanted.width,
            height=settings.height or wanted.height,
            num_inference_steps=len(sigmas) or settings.num_inference_steps or wanted.num_inference_steps,
            sigmas=sigmas,
            shift=0.0 if sigmas else wanted.shift if settings.shift is None else settings.shift,
            true_cfg_scale=cfg,
            cache_steps=wanted.cache_steps if settings.cache_steps is None else settings.cache_steps,
            strength=settings.strength if wanted.image and settings.strength else wanted.strength,
        )
        for seed in seeds:
            yield item, replace(changed, seed=seed)


def _grouped(items: Iterable[T], by: Callable[[T], K]) -> Iterator[tuple[K, list[T]]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(by(item), []).append(item)
    yield from groups.items()


def _option(name: str, value: object) -> list[str]:
    return [] if value is None else [f"{name}={value}"]

"""A drop -> a job: reads it once, understands it, and fills in what it leaves open."""

import hashlib
import time
import unicodedata
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from artifacts_schema import disk, keys
from artifacts_schema.errors import Unreadable, UserError
from artifacts_schema.jobs import Ended, Job
from artifacts_schema.manifests import DecodeDtype, Dtype, Precision, Recipe, Settings, changed, split
from artifacts_schema.prompts import Entry, Prompt, parse_changes, parse_prompts, resolve
from orchestrator.inbox import Claim
from orchestrator.inspect import read_recipe
from stages.checkpoint import Checkpoint, default_dtype, open_checkpoint
from stages.decode import DEFAULT_DTYPE
from stages.encode import DEFAULT_NEGATIVE_PROMPT
from stages.model_name import default, following

MAX_DROP_BYTES = 4 << 20  # of prompts; they are held in memory
MAX_PROMPTS = 10_000
MAX_PICTURES = 100_000
MAX_RUN_NAME = 80
UNKNOWN = "0" * 64  # the hash of what was not read

Notice = Callable[[str], None]


class Intake(NamedTuple):
    """What is said for all drops of a watch."""

    model: str | None
    dtype: Dtype | None
    bits: int | None  # of quantized weights; 0: not quantized
    text_bits: int | None  # the same for the text encoder
    notice: Notice

    def job(self, claim: Claim, is_taken: Callable[[str], bool]) -> Job:
        """The job of a claimed drop. `is_taken`: whether a run has that name. Raises UserError for what is no drop."""
        source = _text(claim.name)
        recipe, changes = None, b""
        try:
            if claim.path.suffix.lower() == ".png":
                recipe = read_recipe(claim.path)
                changes = disk.read(claim.changes, MAX_DROP_BYTES) if claim.changes else b""
                sha256 = _sha256(claim.path)
            else:
                data = disk.read(claim.path, MAX_DROP_BYTES)
                sha256 = keys.sha256(data)
        except OSError as error:
            raise Unreadable(f"{source}: {error.strerror}") from None
        except UserError as error:
            raise UserError(str(error).replace(str(claim.path), source)) from None
        if recipe:
            prompts = parse_changes(changes, _made(recipe, source), f"{source}.toml")
            checkpoint = self._checkpoint(recipe, source)
        else:
            prompts = parse_prompts(data, claim.path.suffix.lower().removeprefix("."), source)
        if any(prompt.image for prompt in prompts):
            raise UserError(f"{source} begins with an image, which drops cannot yet; use `qwen-stage run --image`")
        if not recipe:
            checkpoint = open_checkpoint(self.model)
        return Job(
            id=claim.id,
            run=_run_name(claim.name, is_taken),
            source=source,
            sha256=sha256,
            model=checkpoint.name,
            embeddings_dtype=self._embeddings_dtype(recipe),
            dtype=changed(recipe.dtype if recipe else default_dtype(), self.dtype, self.bits),
            decode_dtype=self._decode_dtype(recipe),
            priority=max(prompt.priority for prompt in prompts),
            prompts=_checked([_whole(prompt, checkpoint.defaults) for prompt in prompts], source),
        )

    def refused(self, claim: Claim, reason: str) -> Ended:
        """The record of a drop that became no job, for people to see among the others."""
        job = Job(
            id=claim.id,
            run=_run_name(claim.name, lambda name: False),
            source=_text(claim.name),
            sha256=UNKNOWN,
            model=following(self.model, default()),
            embeddings_dtype=self._embeddings_dtype(None),
            dtype=changed(default_dtype(), self.dtype, self.bits),
            decode_dtype=self._decode_dtype(None),
            prompts=(),
        )
        return Ended(job=job, outcome="failed", at=time.time(), reason=reason)

    def _decode_dtype(self, recipe: Recipe | None) -> DecodeDtype:
        if self.dtype == "float32":
            return "float32"
        if recipe is None:
            return DEFAULT_DTYPE
        return recipe.decode_dtype or "float32"  # as it was before it was recorded

    def _embeddings_dtype(self, recipe: Recipe | None) -> Precision:
        before = recipe and (recipe.embeddings_dtype or split(recipe.dtype)[0])
        return changed(before or default_dtype(), self.dtype, self.text_bits)

    def _checkpoint(self, recipe: Recipe, source: str) -> Checkpoint:
        try:
            checkpoint = open_checkpoint(following(self.model, recipe.model))
            checkpoint.loras("transformer")  # pictures bring downloads about no more than drops do
        except UserError as error:
            raise UserError(f"{source} was made with {recipe.model!r}; start `watch` with --model ({error})") from None
        if others := checkpoint.other_than(recipe.fingerprints):
            self.notice(f"{source} was made with another {' and '.join(others)}: this picture will be another")
        return checkpoint


def _text(name: str) -> str:
    """A file's name; Linux knows some that are no text."""
    return name.encode("utf-8", "replace").decode()


def _made(recipe: Recipe, source: str) -> Entry:
    if recipe.image:
        raise UserError(f"{source} began with an image, which drops cannot yet; use `qwen-stage run --like` in its run")
    if recipe.seed is None:
        raise UserError(f"{source} was made from a file of noise; make it again with `qwen-stage run --like --noise`")
    return Entry(
        prompt=recipe.prompt,
        negative_prompt=recipe.negative_prompt,
        seed=recipe.seed,
        size=f"{recipe.width}x{recipe.height}",
        steps=recipe.num_inference_steps,
        cfg=recipe.true_cfg_scale,
        cache_steps=recipe.cache_steps,
        shift=recipe.shift,
        sigmas=None if recipe.sigmas is None else list(recipe.sigmas),
    )


def _whole(prompt: Prompt, defaults: Settings) -> Prompt:
    """With nothing left open but images, of which drops have none; as `encode` will list it."""
    negative = DEFAULT_NEGATIVE_PROMPT if prompt.negative_prompt is None else prompt.negative_prompt
    settings = replace(resolve(prompt.settings, defaults), image=None, strength=None)
    return replace(prompt, negative_prompt=negative, settings=settings, priority=0)


def _checked(prompts: list[Prompt], source: str) -> tuple[Prompt, ...]:
    pictures = sum(len(prompt.settings.seeds or ()) for prompt in prompts)
    if len(prompts) > MAX_PROMPTS or pictures > MAX_PICTURES:
        raise UserError(
            f"{source} holds {len(prompts):,} prompts for {pictures:,} pictures; a drop may hold {MAX_PROMPTS:,} and "
            f"{MAX_PICTURES:,}: split it"
        )
    return tuple(dict.fromkeys(prompts))


def _run_name(drop: str, is_taken: Callable[[str], bool]) -> str:
    """A directory's name for a drop: its own without suffix, of letters, digits, dashes; or the next that is free."""
    stem = unicodedata.normalize("NFC", Path(drop).stem)
    # letters, their marks, and numbers of any script
    words = "".join(char if char in "_." or unicodedata.category(char)[0] in "LMN" else " " for char in stem).split()
    name = "-".join(words)[:MAX_RUN_NAME].strip("-.") or "job"
    while len(name.encode()) > 2 * MAX_RUN_NAME:
        name = name[:-1]
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(name for name in names if not is_taken(name))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with disk.opened(path) as file:
        for block in disk.blocks(file):
            digest.update(block)
    return digest.hexdigest()

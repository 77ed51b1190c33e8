"""What a user asks for: prompt files (.txt, .toml, .jsonl) and the settings that travel with a prompt."""

import math
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from artifacts_schema.errors import UserError
from artifacts_schema.manifests import Key, LatentsItem, PromptItem, Record, Settings, SettingsV4

FORMATS = ("txt", "toml", "jsonl")
MAX_SEED = 2**64 - 1
MAX_STEPS = 1000  # as many as training had noise levels
NO_GUIDANCE = 1.0  # a cfg of that or less; all guidance that is none is the same
USUAL = Settings(cache_steps=0.0, shift=0.0, sigmas=(), image="", strength=0.6)  # unless somebody says otherwise
ALL_THE_WAY = 1.0  # the strength of what begins with noise
HELD = "sha256:"  # before the hash of an image that a run holds already

T = TypeVar("T")


class PromptV1(Record, frozen=True):
    """A prompt as jobs had it up to qwen-stage/job/2."""

    prompt: str
    negative_prompt: str | None = None
    name: str | None = None
    settings: SettingsV4 = SettingsV4()
    priority: int = 0  # of the job that it came with, among the jobs of a drop folder

    def upgrade(self) -> "Prompt":
        settings = Settings(**msgspec.structs.asdict(self.settings))
        return Prompt(**{**msgspec.structs.asdict(self), "settings": settings})


class Prompt(PromptV1, frozen=True):
    """One prompt and what it asks for."""

    settings: Settings = Settings()
    image: str | None = None  # the path of what to begin with, or its hash in a run that holds it


class Entry(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A prompt as .toml and .jsonl files spell it."""

    prompt: str
    negative_prompt: str | None = None
    name: str | None = None
    seed: int | None = None
    seeds: list[int] | None = None
    size: str | None = None
    steps: int | None = None
    cfg: float | None = None
    cache_steps: float | None = None
    shift: float | None = None
    sigmas: list[float] | None = None
    image: str | None = None
    strength: float | None = None
    priority: int = 0

    @classmethod
    def of(cls, prompt: "Prompt | PromptItem") -> "Entry":
        settings = prompt.settings
        return cls(
            prompt=prompt.prompt,
            negative_prompt=prompt.negative_prompt,
            name=prompt.name,
            seeds=None if settings.seeds is None else list(settings.seeds),
            size=None if settings.width is None else f"{settings.width}x{settings.height}",
            steps=settings.num_inference_steps,
            cfg=settings.true_cfg_scale,
            cache_steps=settings.cache_steps,
            shift=settings.shift,
            sigmas=None if settings.sigmas is None else list(settings.sigmas),
            image=f"{HELD}{settings.image}" if settings.image else None,
            strength=settings.strength if settings.image else None,
        )


class Wanted(Record, frozen=True):
    """One picture that `denoise --items` is to make; the prompts are those of a run, named by their keys."""

    prompt_key: Key
    negative_key: Key | None
    seed: int
    width: int
    height: int
    num_inference_steps: int
    true_cfg_scale: float
    cache_steps: float = 0.0
    shift: float = 0.0
    sigmas: tuple[float, ...] = ()
    image: str = ""  # the hash of what it begins with, which the run holds
    strength: float = ALL_THE_WAY

    def settings(self) -> Settings:
        return Settings(
            seeds=(self.seed,),
            width=self.width,
            height=self.height,
            num_inference_steps=self.num_inference_steps,
            true_cfg_scale=self.true_cfg_scale,
            cache_steps=self.cache_steps,
            shift=self.shift,
            sigmas=self.sigmas,
            image=self.image,
            strength=self.strength,
        )


def parse_prompts(data: bytes, format: str, source: str) -> list[Prompt]:
    """Parses a prompt file's bytes; `source` names the file in errors. Raises UserError, naming the line or prompt."""
    text = _decode(data, source)
    prompts = {"txt": _parse_txt, "toml": _parse_toml, "jsonl": _parse_jsonl}[format](text, source)
    if not prompts:
        raise UserError(f"{source} holds no prompts; write one a line")
    return prompts


def resolve(*layers: Settings) -> Settings:
    """Settings with nothing left open: the first layer that says something wins, field by field.

    Noise levels count where they come before any number of steps or shift, and then they are what says those.
    Checked again, as manifests can be edited.
    """
    layers = (*layers, USUAL)

    def first(field: str) -> Any:
        return next(value for layer in layers if (value := getattr(layer, field)) is not None)

    fields = {field: first(field) for field in Settings.__struct_fields__}
    fields["sigmas"] = next(layer.sigmas or () for layer in layers if _says_noise_levels(layer))
    if fields["sigmas"]:
        fields |= {"num_inference_steps": len(fields["sigmas"]), "shift": 0.0}
    if not fields["image"]:
        fields["strength"] = ALL_THE_WAY
    settings = check_settings(Settings(**fields))
    return replace(settings, true_cfg_scale=max(first("true_cfg_scale"), NO_GUIDANCE))


def _says_noise_levels(settings: Settings) -> bool:
    return not settings.sigmas == settings.shift == settings.num_inference_steps is None


def pictures_of(item: PromptItem, *layers: Settings) -> Iterator[Wanted]:
    """What an encoded prompt asks for; `layers` say what it leaves open."""
    settings = resolve(item.settings, *layers)
    for seed in settings.seeds or ():
        fields = {**msgspec.structs.asdict(settings), "seed": seed, "prompt_key": item.prompt_key}
        del fields["seeds"]
        yield Wanted(**fields, negative_key=item.negative_key if fields["true_cfg_scale"] > NO_GUIDANCE else None)


def as_wanted(item: LatentsItem) -> Wanted:
    """What would be made again as this was; of injected noise, that is only nearly so."""
    return Wanted(
        prompt_key=item.prompt_key,
        negative_key=item.negative_key,
        seed=item.seed or 0,
        width=item.width,
        height=item.height,
        num_inference_steps=item.num_inference_steps,
        true_cfg_scale=max(item.true_cfg_scale, NO_GUIDANCE),
        cache_steps=item.cache_steps or 0.0,
        shift=item.shift or 0.0,
        sigmas=item.sigmas or (),
        image=item.image or "",
        strength=item.strength or ALL_THE_WAY,
    )


def parse_wanted(data: bytes, source: str) -> list[Wanted]:
    """Parses JSON lines that each say one picture. Raises UserError, naming the line."""
    return [wanted for _, wanted in _json_lines(_decode(data, source), source, Wanted)]


def to_jsonl(entries: list[Any]) -> bytes:
    return b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries)


def parse_size(text: str) -> tuple[int, int]:
    """ "1024x768" -> (width, height) in pixels."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})[xX×]([1-9][0-9]{0,5})", text.strip())
    if not match:
        raise UserError(f"size {text!r} is not WIDTHxHEIGHT, as in 1024x768")
    return int(match[1]), int(match[2])


def check_settings(settings: Settings) -> Settings:
    """Raises UserError for values that no model could use."""
    seeds = settings.seeds
    if seeds is not None:
        if not seeds:
            raise UserError("no seeds are given")
        if out_of_range := [seed for seed in seeds if not 0 <= seed <= MAX_SEED]:
            raise UserError(f"seed {out_of_range[0]} is not between 0 and {MAX_SEED}")
        if len(set(seeds)) < len(seeds):
            twice = next(seed for seed, again in pairwise(sorted(seeds)) if seed == again)
            raise UserError(f"seed {twice} is given twice; it would make the same picture twice")
    if settings.num_inference_steps is not None and not 1 <= settings.num_inference_steps <= MAX_STEPS:
        raise UserError(f"steps must be at least 1 and at most {MAX_STEPS}, not {settings.num_inference_steps}")
    if settings.true_cfg_scale is not None and not math.isfinite(settings.true_cfg_scale):
        raise UserError(f"cfg must be a finite number, not {settings.true_cfg_scale}")
    if settings.cache_steps is not None and not 0 <= settings.cache_steps <= 1:
        raise UserError(f"cache_steps must be between 0, which is off, and 1, not {settings.cache_steps}")
    if settings.shift is not None and not (settings.shift >= 0 and math.isfinite(settings.shift)):
        raise UserError(f"shift must be positive, or 0 for the model's own, not {settings.shift}")
    if settings.strength is not None and not 0 < settings.strength <= 1:
        raise UserError(
            f"strength must be above 0, which would leave the image as it is, and at most 1, not {settings.strength}"
        )
    if settings.sigmas:
        _check_sigmas(settings, settings.sigmas)
    return settings


def _check_sigmas(settings: Settings, sigmas: tuple[float, ...]) -> None:
    if len(sigmas) > MAX_STEPS:
        raise UserError(f"there are {len(sigmas)} sigmas, at most {MAX_STEPS} are allowed")
    if not all(1 >= before > after > 0 for before, after in pairwise((*sigmas, sys.float_info.min))):
        raise UserError("sigmas must go down from at most 1 and stay above 0; the 0 at the end goes without saying")
    if settings.num_inference_steps not in (None, len(sigmas)) or settings.shift:
        raise UserError("sigmas say themselves how many steps there are and how they are shifted; leave out the others")


def _decode(data: bytes, source: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}, line {line}: not UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{source}, line {line}: holds a NUL byte; is it text?")
    return text


def _parse_txt(text: str, source: str) -> list[Prompt]:
    lines = (line.strip() for line in re.split(r"\r\n|\n|\r", text))
    return [Prompt(prompt=line) for line in lines if line and not line.startswith("#")]


def _parse_jsonl(text: str, source: str) -> list[Prompt]:
    return [_prompt(entry, where) for where, entry in _json_lines(text, source, Entry)]


def _json_lines(text: str, source: str, kind: type[T]) -> Iterator[tuple[str, T]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{source}, line {number}"
            try:
                yield where, msgspec.json.decode(line, type=kind)
            except (msgspec.MsgspecError, RecursionError) as error:
                raise UserError(f"{where}: {error}") from None


def parse_changes(data: bytes, made: Entry, source: str) -> list[Prompt]:
    """What to make otherwise than it was made: keys of a prompt in TOML, or several `[[prompts]]` of them."""
    changes = _toml(_decode(data, source), source)
    table = _with_defaults(msgspec.to_builtins(made), changes)
    return _from_table(table if "prompts" in table else {**table, "prompts": [{}]}, source)


def _parse_toml(text: str, source: str) -> list[Prompt]:
    """`[[prompts]]` tables; the same keys at the top of the file are defaults for all of them."""
    return _from_table(_toml(text, source), source)


def _toml(text: str, source: str) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError, so is an endless integer
        raise UserError(f"{source}: {error}") from None


def _from_table(table: dict[str, Any], source: str) -> list[Prompt]:
    entries = table.pop("prompts", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{source}: prompts must be written as [[prompts]] tables")
    if not entries:
        raise UserError(f"{source} holds no [[prompts]] tables")
    prompts = []
    for number, own in enumerate(entries, 1):
        where = f"{source}, prompt {number}"
        try:
            prompts.append(_prompt(msgspec.convert(_with_defaults(table, own), type=Entry), where))
        except msgspec.ValidationError as error:
            raise UserError(f"{where}: {error}") from None
    return prompts


def _with_defaults(defaults: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A prompt's own `seed` also replaces a default `seeds`, and the other way round."""
    if "seed" in own or "seeds" in own:
        defaults = {key: value for key, value in defaults.items() if key not in ("seed", "seeds")}
    return {**defaults, **own}


def _prompt(entry: Entry, where: str) -> Prompt:
    try:
        if entry.seed is not None and entry.seeds is not None:
            raise UserError("give either seed or seeds")
        seeds = entry.seeds if entry.seed is None else [entry.seed]
        width, height = (None, None) if entry.size is None else parse_size(entry.size)
        settings = Settings(
            seeds=None if seeds is None else tuple(seeds),
            width=width,
            height=height,
            num_inference_steps=entry.steps,
            true_cfg_scale=entry.cfg,
            cache_steps=entry.cache_steps,
            shift=entry.shift,
            sigmas=None if entry.sigmas is None else tuple(entry.sigmas),
            strength=entry.strength,
        )
        if entry.image is not None and not entry.image.strip():
            raise UserError("image names no file; leave it out to begin with noise")
        if entry.strength is not None and entry.image is None:
            raise UserError("strength says how much an image is to change; say which with image")
        return Prompt(
            prompt=entry.prompt,
            negative_prompt=entry.negative_prompt,
            name=entry.name,
            settings=check_settings(settings),
            priority=entry.priority,
            image=entry.image,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None

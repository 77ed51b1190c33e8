"""How a model is called: a checkpoint, and what is put into it.

In manifests and for `--model` that is one word, `CHECKPOINT?lora=PATH:SCALE&vae=PATH`: so whatever names a model, a job
in a drop folder as well as a picture's recipe, names all of it. People say it with `--lora` and the like.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from artifacts_schema import disk
from artifacts_schema.errors import UserError

DEMO = "demo"
ALIASES = {"qwen-image": "Qwen/Qwen-Image", "qwen-image-2512": "Qwen/Qwen-Image-2512"}
LORA = "lora"
COMPONENTS = ("transformer", "text_encoder", "vae")  # which may come from elsewhere
PARTS = (*COMPONENTS, LORA)
CHOSEN = "model"  # the file that names it
KEPT = "/:@ "  # characters that stay as they are in a name


class ModelName(NamedTuple):
    checkpoint: str  # a directory, a name on the hub, or "": that of the stage before, or that of `models use`
    parts: tuple[tuple[str, str], ...] = ()  # what is put into it, in this order

    @classmethod
    def parse(cls, name: str) -> "ModelName":
        checkpoint, mark, parts = name.partition("?")
        if not mark or _is_directory(name):
            return cls(name)
        pairs: list[tuple[str, str]] = []
        for part in parts.split("&"):
            kind, _, value = part.partition("=")
            if kind not in PARTS or not value or (kind != LORA and kind in dict(pairs)):
                raise UserError(
                    f"model {name!r}: after the ? there may be one {', one '.join(COMPONENTS)}, and lora=FILE"
                )
            pairs.append((kind, unquote(value)))
        return cls(checkpoint, tuple(pairs))

    def __str__(self) -> str:
        parts = "&".join(f"{kind}={quote(value, safe=KEPT)}" for kind, value in self.parts)
        return f"{self.checkpoint}?{parts}" if parts else self.checkpoint

    def of(self, kind: str) -> list[str]:
        return [value for each, value in self.parts if each == kind]

    def for_others(self) -> "ModelName":
        """As pictures carry it: they travel, this machine's paths do not."""

        def shortened(path: str) -> str:
            return Path(path).name if Path(path).is_absolute() else path

        return ModelName(shortened(self.checkpoint), tuple((kind, shortened(value)) for kind, value in self.parts))


def put_together(model: str | None, parts: Iterable[tuple[str, str]]) -> str | None:
    """What the command line says, as one name; None where it says nothing."""
    name, own = ModelName.parse(model or ""), tuple(parts)
    components = {kind for kind, _ in own if kind != LORA}
    kept = tuple(part for part in name.parts if part[0] not in components)
    return str(name._replace(parts=(*kept, *own))) or None


def default() -> str:
    """What `models use` chose, or the demo."""
    try:
        return (_settings() / CHOSEN).read_text("utf-8").strip() or DEMO
    except FileNotFoundError:
        return DEMO
    except (OSError, ValueError) as error:
        raise UserError(f"{_settings() / CHOSEN} cannot be read ({error}); choose with `models use NAME`") from None


def choose(name: str) -> None:
    """Makes this the model of all who name none."""
    disk.make_directory(_settings())
    disk.publish(_settings(), CHOSEN, name.encode())


def _settings() -> Path:
    """`$QWEN_STAGE_CONFIG`, else the platform's directory of settings."""
    if own := os.environ.get("QWEN_STAGE_CONFIG"):
        return Path(own)
    from platformdirs import user_config_path

    return user_config_path("qwen-stage", appauthor=False)


def following(model: str | None, before: str) -> str:
    """The name of a stage's model, where the stage before had one called `before`.

    Parts that it names come in place of those before: a VAE of the VAE, LoRAs of all LoRAs.
    """
    name, earlier = ModelName.parse(model or ""), ModelName.parse(before)
    if name.checkpoint:
        return str(name)
    kinds = {kind for kind, _ in name.parts}
    kept = tuple(part for part in earlier.parts if part[0] not in kinds)
    return str(earlier._replace(parts=(*kept, *name.parts)))


def _is_directory(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # too long for one
        return False

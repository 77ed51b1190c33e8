"""A model's name -> its directory -> each component's config, fingerprint, and the tensors in its files.

The layout is that of `Qwen/Qwen-Image`, `model_index.json` and `scheduler/ text_encoder/ tokenizer/ transformer/ vae/`,
or one that `layouts.py` knows; components may come from elsewhere, and LoRAs with them.
"""

import json
import sys
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from artifacts_schema import keys, manifests
from artifacts_schema.errors import Unavailable, UserError
from artifacts_schema.manifests import Settings
from artifacts_schema.prompts import check_settings, parse_size
from stages import gguf_file, hub, layouts
from stages.lora import Lora, parse_scale
from stages.measure import Notice, Report
from stages.model_name import ALIASES, DEMO, LORA, ModelName, default, following
from stages.tensors import WEIGHTS_SUFFIX, shown, tensors_in, tensors_of

DEMO_DIRECTORY = Path(__file__).parent / "tiny"
COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
INDEX_SUFFIX = ".safetensors.index.json"
CUDA_BACKEND = "mlx_cuda*.dist-info"  # beside MLX's own package
MAX_PIXELS = 8192 * 8192
MAX_POSITIONS = 4096  # the reference's RoPE tables end there; the transformer never saw positions beyond
REAL_MODEL_HINT = "choose a real one with --model, for example --model Qwen/Qwen-Image-2512"
# what Qwen-Image's own examples use
DEFAULTS = Settings(seeds=(42,), width=1024, height=1024, num_inference_steps=50, true_cfg_scale=4.0)

T = TypeVar("T")


class OwnDefaults(msgspec.Struct):
    """The optional `qwen-stage.json` of a checkpoint: what to use where a prompt and the command line are silent."""

    about: str = ""
    size: str | None = None
    steps: int | None = None
    cfg: float | None = None


@dataclass(frozen=True)
class Shape:
    """What other stages need to know of `vae/config.json`."""

    temperal_downsample: tuple[bool, ...]


@dataclass(frozen=True)
class Checkpoint:
    name: str  # as manifests record it and --model takes it: see model_name.py
    directory: Path
    lora_files: tuple[tuple[str, float], ...] = ()  # as the name has them, and how strong each is
    others: dict[str, Path] = field(default_factory=dict, compare=False)  # components from elsewhere, as the name says
    _fingerprints: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # reading takes a moment

    def component(self, name: str) -> Path:
        """Its directory, or its single file."""
        if name in self.others:
            return self.others[name]
        path = self.directory / name
        if not path.is_dir():
            checkpoint = ModelName.parse(self.name).checkpoint
            on_hub = hub.repository(checkpoint)
            how = f"fetch it with `qwen-stage models pull {checkpoint}`" if on_hub else "download the whole model"
            raise Unavailable(f"{self.directory} has no {name}/; {how} or choose another --model")
        return path

    def has(self, component: str) -> bool:
        """Whether a component is here, not just the beginning of a download."""
        place = self.others.get(component, self.directory / component)
        if component in hub.WITHOUT_WEIGHTS:
            return place.is_dir()
        try:
            return all(path.exists() for path in _named_files(place)[0])
        except (UserError, OSError):
            return False

    def config(self, component: str, kind: type[T], file: str = "config.json") -> T:
        """A component's config as the dataclass its model wants; unknown fields are the checkpoint's own business."""
        path, fields = self.fields(component, file)
        try:
            spellings = getattr(kind, "fields_of", dict)  # a model that knows several spellings brings them to one
            return msgspec.convert(spellings(fields), type=kind)
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:  # msgspec's are ValueErrors
            raise UserError(f"{path}: {error}") from None

    def fields(self, component: str, file: str = "config.json") -> tuple[Path, dict[str, Any]]:
        """What a component's config says, and where: of layouts that have none, what their tensors say."""
        weights = "transformer" if component == "scheduler" else component
        lacks_scheduler = component == "scheduler" and not self.has(component)
        path = self.component(weights if lacks_scheduler else component)
        if path.is_file() or lacks_scheduler or not (path / file).exists():
            is_gguf = path.suffix == gguf_file.SUFFIX
            found = gguf_file.packed_tensors(path) if is_gguf else tensors_of(weight_files(path))
            shapes = {name: tensor.shape for name, tensor in found.items()}
            names = layouts.renamed(shapes)
            if path.is_file() or component in self.others or layouts.layout_of(shapes) != layouts.DIFFUSERS:
                try:
                    return path, layouts.config_of(component, {names[name]: shapes[name] for name in names})
                except (KeyError, ValueError, IndexError) as error:
                    raise UserError(f"{path} is no {component} of Qwen-Image: it lacks {error}") from None
        if lacks_scheduler:
            self.component(component)
        return path / file, read_json(path / file)

    def fingerprint(self, component: str) -> str:
        if component not in self._fingerprints and component == "scheduler" and not self.has(component):
            said = msgspec.json.encode(self.fields(component)[1], order="deterministic")
            self._fingerprints[component] = keys.sha256(said)
        if component not in self._fingerprints:
            suffixes = (".json", ".txt") if component == "tokenizer" else (".json", WEIGHTS_SUFFIX)
            place = self.component(component)
            files = [place] if place.is_file() else [path for path in place.iterdir() if path.suffix in suffixes]
            own = keys.fingerprint([path for path in files if path.is_file()])
            self._fingerprints[component] = with_loras(own, self.loras(component))
        return self._fingerprints[component]

    def without_loras(self) -> "Checkpoint":
        name = ModelName.parse(self.name)
        parts = tuple(part for part in name.parts if part[0] != LORA)
        return Checkpoint(str(name._replace(parts=parts)), self.directory, others=self.others)

    def loras(self, component: str) -> list[Lora]:
        """What is put into a component's weights, in this order."""
        if component != "transformer":
            return []
        return [Lora(_lora_path(file), scale) for file, scale in self.lora_files]

    def other_than(self, fingerprints: dict[str, str]) -> list[str]:
        """Which components are other than those; what is not here cannot be told."""

        def is_other(component: str) -> bool:
            try:
                return self.fingerprint(component) != fingerprints[component]
            except Unavailable:
                return False

        return [component for component in fingerprints if is_other(component)]

    def model(self, *components: str) -> manifests.Model:
        """How manifests name this checkpoint. A component that is not there has no fingerprint."""
        present = [name for name in components if self.has(name)]
        return manifests.Model(name=self.name, fingerprints={name: self.fingerprint(name) for name in present})

    @cached_property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, from the VAE's config alone; 8, as in every Qwen-Image, where that is not here."""
        if not (self.others.get("vae", self.directory / "vae") / "config.json").exists():
            return 8
        return 2 ** len(self.config("vae", Shape).temperal_downsample)

    @cached_property
    def defaults(self) -> Settings:
        path = self.directory / "qwen-stage.json"
        if not path.exists():
            return DEFAULTS
        try:
            own = msgspec.convert(read_json(path), type=OwnDefaults)
            width, height = parse_size(own.size) if own.size else (DEFAULTS.width, DEFAULTS.height)
            settings = Settings(
                seeds=DEFAULTS.seeds,
                width=width,
                height=height,
                num_inference_steps=DEFAULTS.num_inference_steps if own.steps is None else own.steps,
                true_cfg_scale=DEFAULTS.true_cfg_scale if own.cfg is None else own.cfg,
            )
            return check_settings(settings)
        except (msgspec.ValidationError, UserError) as error:
            raise UserError(f"{path}: {error}") from None

    def check_size(self, width: int, height: int, tokens: int) -> None:
        """Raises for a size that the model cannot draw beside a prompt of so many tokens."""
        unit = 2 * self.vae_scale_factor  # an image token is 2x2 latents
        if width < unit or height < unit or width % unit or height % unit:
            near = "x".join(str(max(unit, round(side / unit) * unit)) for side in (width, height))
            raise UserError(f"size {width}x{height} is not a multiple of {unit} both ways; the nearest is {near}")
        if width * height > MAX_PIXELS:
            raise UserError(f"size {width}x{height} has more than the {MAX_PIXELS} pixels that artifacts may have")
        if max(width, height) // unit // 2 + tokens > MAX_POSITIONS:
            largest = 2 * (MAX_POSITIONS - tokens) * unit
            raise UserError(f"size {width}x{height} is beyond the model's {MAX_POSITIONS} positions; at most {largest}")

    def check_made_with(self, made_with: manifests.Model, components: tuple[str, ...], what: str) -> None:
        """Raises when an artifact comes from other weights than these."""
        here = self.model(*components)
        for component in made_with.fingerprints.keys() & set(components):  # a VAE may not have been there
            if made_with.fingerprints[component] != here.fingerprints.get(component):
                raise UserError(
                    f"{what} made with another {component} ({made_with.name}) than that of {self.name}; "
                    "choose that model with --model, or another directory with --out"
                )


def with_loras(fingerprint: str, loras: list[Lora]) -> str:
    """The fingerprint of weights that LoRAs are put into."""
    changes = [(lora.fingerprint(), lora.scale) for lora in loras]
    return keys.sha256(msgspec.json.encode([fingerprint, changes])) if changes else fingerprint


class Fetching(NamedTuple):
    """For which stages a model may be downloaded, and how that is told."""

    stages: tuple[str, ...]
    report: Report
    notice: Notice


def open_checkpoint(model: str | None, fetching: Fetching | None = None) -> Checkpoint:
    """A directory, a model on the hub, or the built-in demo; when no model is named, that of `models use`.

    What `fetching` names is downloaded if the Hugging Face cache lacks it; without it, what is there must do.
    """
    if model == "":
        raise Unavailable("the model's name is empty; leave --model out, or name one")
    said = ModelName.parse(model or "")
    if not said.checkpoint:
        said = ModelName.parse(following(model, default()))
    loras = tuple(_lora(each, fetching) for each in said.of(LORA))
    others = {kind: _component(kind, place, fetching) for kind, place in said.parts if kind != LORA}
    parts = (
        *((kind, str(place)) for kind, place in others.items()),
        *((LORA, f"{file}:{scale!r}") for file, scale in loras),
    )
    model = said.checkpoint
    if model == DEMO:
        return Checkpoint(str(ModelName(DEMO, parts)), DEMO_DIRECTORY, loras, others)
    path = Path(model)  # the shell has expanded ~
    model = name = model if path.is_dir() else ALIASES.get(model, model)
    if path.is_dir():
        directory = path.resolve()
        name = str(directory)
    elif repository := hub.repository(model):
        directory = _on_hub(repository, fetching, frozenset(others))
    else:
        raise Unavailable(f"unknown model {model!r}: no such directory; give the directory of a Qwen-Image checkpoint")
    if not (directory / "model_index.json").exists() and not any((directory / name).is_dir() for name in COMPONENTS):
        raise Unavailable(f"{directory} is not a Qwen-Image checkpoint: it has no model_index.json and no transformer/")
    return Checkpoint(str(ModelName(name, parts)), directory, loras, others)


def read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; download the model again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); download the model again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not a JSON object; download the model again")
    return fields


def _on_hub(repository: hub.Repository, fetching: Fetching | None, without: frozenset[str]) -> Path:
    """Where the cache has it. Components `without` which it will do are not fetched."""
    directory = hub.cached(repository)
    if fetching is None:
        if directory is None:
            raise Unavailable(
                f"unknown model {str(repository)!r}: not a directory and not in the Hugging Face cache; "
                f"download it with `qwen-stage models pull {repository}`"
            )
        return directory

    def is_here(stage: str) -> bool:
        parts = Checkpoint(str(repository), directory) if directory else None
        needed = hub.needed((stage,), without)
        has_parts = parts is not None and all(
            parts.has(component) or (component == "scheduler" and ("transformer" in without or _is_foreign(parts)))
            for component in needed
        )
        return has_parts and hub.has_files(repository, needed)

    missing = tuple(stage for stage in fetching.stages if not is_here(stage))
    if directory is None or missing:
        return hub.fetch(repository, hub.needed(missing, without), fetching.report, fetching.notice)
    return directory


def _is_foreign(checkpoint: Checkpoint) -> bool:
    """Whether its transformer is in another program's layout: those have no scheduler/."""
    try:
        tensors = tensors_of(weight_files(checkpoint.component("transformer")))
    except (UserError, Unavailable):
        return False
    return layouts.layout_of(tensors) != layouts.DIFFUSERS


def _is_for_pictures(fetching: Fetching | None) -> bool:
    """Whether all is for a stage that needs the VAE alone: what went into latents may be gone by now."""
    return fetching is not None and fetching.stages == ("decode",)


def _component(kind: str, said: str, fetching: Fetching | None) -> Path:
    """Where a component from elsewhere is: not where its links lead to, which may have no names there."""
    path = Path(said).absolute()  # the shell has expanded ~
    if path.is_file() or (path.is_dir() and any(path.glob(f"*{WEIGHTS_SUFFIX}"))):
        return path
    if kind != "vae" and _is_for_pictures(fetching):
        return path
    what = f"holds no {WEIGHTS_SUFFIX} file" if path.is_dir() else "is not there"
    raise Unavailable(
        f"--{kind.replace('_', '-')} {said}: {what}; give a {WEIGHTS_SUFFIX} file, or a directory of them"
    )


def _lora(said: str, fetching: Fetching | None) -> tuple[str, float]:
    """A LoRA's file, an absolute path or one on the hub, and how strong it is; downloaded if `fetching` says so."""
    file, scale = (said, 1.0) if Path(said).is_file() else parse_scale(said)
    path = Path(file)  # the shell has expanded ~
    if path.is_file() or (path.is_absolute() and _is_for_pictures(fetching)):
        return str(path.absolute()), scale
    if (remote := hub.remote_file(file)) is None:
        raise Unavailable(f"--lora {said}: no such file; give one, or OWNER/NAME/FILE.safetensors on the hub")
    if fetching and "denoise" in fetching.stages:
        hub.fetch_file(remote, fetching.report, fetching.notice)
    return file, scale


def _lora_path(file: str) -> Path:
    if (path := Path(file)).is_absolute():
        return path
    remote = hub.remote_file(file)
    found = hub.cached_file(remote) if remote else None
    if found is None:
        raise Unavailable(f"--lora {file} is not in the Hugging Face cache; denoise or run downloads it")
    return found


def _named_files(directory: Path) -> tuple[set[Path], dict[str, str]]:
    """The shards that an index names, and which tensor it says is where; or the single weight file, or that file."""
    if directory.is_file():
        return {directory}, {}
    indexes = sorted(directory.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) == 1:
        try:
            weight_map = read_json(indexes[0])["weight_map"]
            expected = {directory / shard for shard in weight_map.values()}
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{indexes[0]} is damaged; download the model again") from None
    else:
        weight_map = {}
        expected = set(directory.glob(f"*{WEIGHTS_SUFFIX}"))
        if len(expected) != 1 or indexes:
            raise UserError(f"{directory} must hold one {WEIGHTS_SUFFIX} file, or several with one index file")
    return expected, weight_map


def weight_files(directory: Path) -> list[Path]:
    """The shards an index names, or the single weight file; each checked to be complete."""
    if directory.suffix == gguf_file.SUFFIX and directory.is_file():
        raise UserError(
            f"{directory} is GGUF, which takes too long to unpack at every start; bring it into our own form with "
            f"`qwen-stage models convert MODEL DIR --transformer {directory} --quantize 8`"
        )
    expected, weight_map = _named_files(directory)
    for path in sorted(expected):
        if not path.exists():
            raise UserError(f"{path} is missing; download the model again")
        try:
            names = tensors_in(path).keys()
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"{path} is damaged or cut short ({error}); download the model again") from None
        if absent := sorted(name for name, shard in weight_map.items() if shard == path.name and name not in names):
            raise UserError(f"{path} lacks the tensors {shown(absent)} that the index promises; download it again")
    return sorted(expected)


def default_dtype() -> manifests.Dtype:
    """What to compute in: bfloat16 on GPUs, float32 on CPUs, where bfloat16 is many times slower.

    Told from what is installed: asking MLX would mean importing it, which a fully cached `encode` never does.
    """
    return "bfloat16" if sys.platform == "darwin" or has_cuda() else "float32"


def has_cuda() -> bool:
    """Whether MLX's CUDA backend is installed."""
    package = find_spec("mlx")
    places = [Path(place).parent for place in package.submodule_search_locations or ()] if package else []
    return any(any(place.glob(CUDA_BACKEND)) for place in places)

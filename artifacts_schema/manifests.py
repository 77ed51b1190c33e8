"""What a manifest says: one tagged struct for each kind of artifact. Unknown fields are errors.

Any change to a struct makes a new tag; old structs then stay as they are, with a pure upgrade to the next.
"""

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Key = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
Positive = Annotated[int, Meta(ge=1)]
Dtype = Literal["float32", "bfloat16"]
DecodeDtype = Literal["float32", "float16", "bfloat16"]  # what float16 cannot hold is decoded in float32
Bits = Literal[4, 8]
Precision = Annotated[str, Meta(pattern="^(float32|bfloat16)(-q[48])?$")]  # of the numbers computed with: see `split`


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The base of everything in a manifest. msgspec inherits the options but `kw_only`; mypy wants `frozen` again."""


class File(Record, frozen=True, kw_only=True):
    """A published file: its path inside the artifact's directory ("/" between parts), its size, its content."""

    path: str
    size: Annotated[int, Meta(ge=0)]
    sha256: Sha256


class Model(Record, frozen=True, kw_only=True):
    """The checkpoint that a run uses: the built-in demo's name or a directory, and its components' fingerprints."""

    name: str
    fingerprints: dict[str, Sha256]


class Cost(Record, frozen=True, kw_only=True):
    """What making something took. Memory in bytes; `mlx` is MLX's own peak, `process` the whole process's."""

    seconds: float
    process_peak: int
    mlx_peak: int


class SettingsV3(Record, frozen=True, kw_only=True):
    """What a prompt asked of the later stages up to qwen-stage/embeddings/3."""

    seeds: tuple[int, ...] | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    true_cfg_scale: float | None = None


class SettingsV4(SettingsV3, frozen=True, kw_only=True):
    """The same up to qwen-stage/embeddings/4 and qwen-stage/job/2."""

    cache_steps: float | None = None  # 0: every step is computed
    shift: float | None = None  # of the noise levels; 0: as the model has it
    sigmas: tuple[float, ...] | None = None  # the noise levels themselves but for the last, which is 0; none: as above


class Settings(SettingsV4, frozen=True, kw_only=True):
    """What a prompt asks of the later stages; None leaves it to the command line or the checkpoint's defaults."""

    image: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] | None = None  # the hash of what to begin with; "": noise
    strength: float | None = None  # how much of the way to noise that goes: 1 is all of it


class PromptItemV3(Record, frozen=True, kw_only=True):
    """One prompt, as manifests up to qwen-stage/embeddings/3 had it."""

    prompt: str
    negative_prompt: str
    prompt_key: Key
    negative_key: Key
    name: str | None = None
    settings: SettingsV3 = SettingsV3()


class PromptItemV4(PromptItemV3, frozen=True, kw_only=True):
    """One prompt, as manifests up to qwen-stage/embeddings/4 had it."""

    settings: SettingsV4 = SettingsV4()


class PromptItem(PromptItemV4, frozen=True, kw_only=True):
    """One prompt, the files of its embeddings, and the settings that came with it."""

    settings: Settings = Settings()


class SourceImage(Record, frozen=True, kw_only=True):
    """A picture that prompts begin with, as it was given. Its hash is its name in settings."""

    name: str  # that the file had
    width: Positive  # in pixels, as it is to be looked at
    height: Positive
    file: File


class EmbeddingV1(Record, frozen=True, kw_only=True):
    """An embedding as qwen-stage/embeddings/1 had it."""

    key: Key
    tokens: Positive
    dim: Positive
    dtype: str
    file: File


class Embedding(Record, frozen=True, kw_only=True):
    """prompt_embeds [tokens, dim] and prompt_embeds_mask [tokens], unpadded, in one safetensors file."""

    key: Key
    tokens: Positive
    prompt_tokens: Positive  # before the prompt was cut off to `tokens`
    dim: Positive
    dtype: str
    file: File


class ModulationTable(Record, frozen=True, kw_only=True):
    """What a schedule makes of a transformer's blocks: img and txt [steps, layers, 6 * dim], out [steps, 2 * dim]."""

    key: Key
    steps: Positive
    layers: Positive
    dim: Positive
    dtype: str


class LatentsItemV2(Record, frozen=True, kw_only=True):
    """A picture's latents as qwen-stage/latents/1 and /2 had them."""

    key: Key
    prompt: str
    negative_prompt: str
    prompt_key: Key
    negative_key: Key | None  # None: no guidance, the negative prompt was not used
    name: str | None = None
    seed: int | None  # None: the noise came from a file
    noise_sha256: Sha256 | None = None
    width: Positive
    height: Positive
    num_inference_steps: Positive
    true_cfg_scale: float
    dtype: str
    shape: tuple[Positive, Positive, Positive]
    files: tuple[File, ...]
    trajectory: tuple[File, ...] = ()  # float32 [steps + 1, C, h, w] in <key>.trajectory.zarr, where it was kept
    cost: Cost

    @property
    def directory(self) -> str:
        return f"{self.key}.zarr"


class LatentsItemV3(LatentsItemV2, frozen=True, kw_only=True):
    """A picture's latents as qwen-stage/latents/3 had them."""

    embeddings_dtype: Precision | None = None  # None: from before it was recorded
    cache_steps: float | None = None  # None: every step was computed
    shift: float | None = None  # None: as the model has it
    sigmas: tuple[float, ...] | None = None  # None: as the steps and the shift have it


class LatentsItem(LatentsItemV3, frozen=True, kw_only=True):
    """One picture's final latents: normalized, unpacked, float32 [channels, height / 8, width / 8] in a zarr array."""

    image: Sha256 | None = None  # what it began with; None: noise
    strength: float | None = None  # None: there is no image

    def unusual(self) -> dict[str, str]:
        """What most pictures leave alone, by the name of its option."""
        return unusual(self.shift, self.sigmas, self.cache_steps, self.strength)


class ImageLatentsItem(Record, frozen=True, kw_only=True):
    """A picture to begin with, as latents like those of LatentsItem."""

    key: Key
    image: Sha256
    width: Positive  # to which it was brought, in pixels
    height: Positive
    dtype: Dtype
    shape: tuple[Positive, Positive, Positive]
    files: tuple[File, ...]
    cost: Cost

    @property
    def directory(self) -> str:
        return f"{self.key}.zarr"


class Recipe(Record, frozen=True, kw_only=True):
    """What a PNG says of itself, as JSON under `qwen-stage`: everything needed to make it again."""

    prompt: str
    negative_prompt: str | None  # None: no guidance, it was not used
    seed: int | None  # None: the noise came from a file
    noise_sha256: Sha256 | None = None
    width: Positive
    height: Positive
    num_inference_steps: Positive
    true_cfg_scale: float
    cache_steps: float | None = None  # None: every step was computed
    shift: float | None = None  # None: as the model has it
    sigmas: tuple[float, ...] | None = None  # None: as the steps and the shift have it
    image: Sha256 | None = None  # what it began with; None: noise
    strength: float | None = None  # None: there is no image
    model: Annotated[str, Meta(pattern="^[^\0]*$")]
    fingerprints: dict[str, Sha256]
    embeddings_dtype: Precision | None = None  # None: from before it was recorded
    dtype: Precision
    decode_dtype: DecodeDtype | None = None  # None: from before it was recorded
    latents_key: Key  # rather than a manifest's id: that changes with every picture added beside it

    def parameters(self) -> str:
        """The same in the form that other tools read, under `parameters`."""
        own = unusual(self.shift, self.sigmas, self.cache_steps, self.strength)
        settings = {
            "Steps": self.num_inference_steps,
            "Sampler": "Euler",
            "CFG scale": self.true_cfg_scale,
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": self.model,
            **{name.replace("-", " ").capitalize(): value for name, value in own.items()},
        }
        said = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items() if value is not None)
        negative = "" if self.negative_prompt is None else f"Negative prompt: {self.negative_prompt}\n"
        return f"{self.prompt}\n{negative}{said}"


class ImageItem(Record, frozen=True, kw_only=True):
    """One PNG, and the latents it was decoded from."""

    key: Key
    latents_key: Key
    prompt: str
    seed: int | None
    dtype: str
    file: File
    cost: Cost


class ManifestV1(Record, frozen=True, tag_field="schema", kw_only=True):
    """What all manifests said before they had checksums."""

    kind: ClassVar[str]  # also the directory's name inside a run
    older: ClassVar[tuple[type["ManifestV1"], ...]] = ()  # versions that can still be read: each upgrades to the next
    versions: dict[str, str]  # of qwen-stage, Python and MLX
    model: Model
    inputs: tuple[Sha256, ...] = ()  # manifest ids of what it was made from


class Manifest(ManifestV1, frozen=True, kw_only=True):
    """The commit mark of an artifact: what it holds, made from what, with what, at what cost."""

    checksum: str = ""  # of the file's bytes, these digits taken as zeros; given when it is written


class EmbeddingsManifestV1(ManifestV1, frozen=True, tag="qwen-stage/embeddings/1", kw_only=True):
    kind: ClassVar[str] = "embeddings"
    items: tuple[PromptItemV3, ...]
    embeddings: tuple[EmbeddingV1, ...]
    cost: Cost

    def upgrade(self) -> "EmbeddingsManifestV2":
        """Version 1 did not say whether a prompt was cut off; what was counted is what was kept."""
        embeddings = tuple(
            Embedding(key=e.key, tokens=e.tokens, prompt_tokens=e.tokens, dim=e.dim, dtype=e.dtype, file=e.file)
            for e in self.embeddings
        )
        return EmbeddingsManifestV2(**{**msgspec.structs.asdict(self), "embeddings": embeddings})


class EmbeddingsManifestV2(ManifestV1, frozen=True, tag="qwen-stage/embeddings/2", kw_only=True):
    kind: ClassVar[str] = "embeddings"
    items: tuple[PromptItemV3, ...]
    embeddings: tuple[Embedding, ...]
    cost: Cost

    def upgrade(self) -> "EmbeddingsManifestV3":
        return EmbeddingsManifestV3(**msgspec.structs.asdict(self))


class EmbeddingsManifestV3(Manifest, frozen=True, tag="qwen-stage/embeddings/3", kw_only=True):
    kind: ClassVar[str] = "embeddings"
    items: tuple[PromptItemV3, ...]
    embeddings: tuple[Embedding, ...]
    cost: Cost

    def upgrade(self) -> "EmbeddingsManifestV4":
        """Up to version 3 every step was computed, whatever was asked for."""
        items = tuple(
            PromptItemV4(
                **{**msgspec.structs.asdict(item), "settings": SettingsV4(**msgspec.structs.asdict(item.settings))}
            )
            for item in self.items
        )
        return EmbeddingsManifestV4(**{**msgspec.structs.asdict(self), "items": items})


class EmbeddingsManifestV4(Manifest, frozen=True, tag="qwen-stage/embeddings/4", kw_only=True):
    kind: ClassVar[str] = "embeddings"
    items: tuple[PromptItemV4, ...]
    embeddings: tuple[Embedding, ...]
    cost: Cost

    def upgrade(self) -> "EmbeddingsManifest":
        """Up to version 4 all pictures began with noise."""
        items = tuple(
            PromptItem(
                **{**msgspec.structs.asdict(item), "settings": Settings(**msgspec.structs.asdict(item.settings))}
            )
            for item in self.items
        )
        return EmbeddingsManifest(**{**msgspec.structs.asdict(self), "items": items})


class EmbeddingsManifest(Manifest, frozen=True, tag="qwen-stage/embeddings/5", kw_only=True):
    kind: ClassVar[str] = "embeddings"
    older: ClassVar[tuple[type[ManifestV1], ...]] = (
        EmbeddingsManifestV1,
        EmbeddingsManifestV2,
        EmbeddingsManifestV3,
        EmbeddingsManifestV4,
    )
    items: tuple[PromptItem, ...]
    embeddings: tuple[Embedding, ...]
    images: tuple[SourceImage, ...] = ()
    cost: Cost


class ImageLatentsManifest(Manifest, frozen=True, tag="qwen-stage/image-latents/1", kw_only=True):
    kind: ClassVar[str] = "image_latents"
    items: tuple[ImageLatentsItem, ...]


class LatentsManifestV1(ManifestV1, frozen=True, tag="qwen-stage/latents/1", kw_only=True):
    kind: ClassVar[str] = "latents"
    items: tuple[LatentsItemV2, ...]

    def upgrade(self) -> "LatentsManifestV2":
        return LatentsManifestV2(**msgspec.structs.asdict(self))


class LatentsManifestV2(Manifest, frozen=True, tag="qwen-stage/latents/2", kw_only=True):
    kind: ClassVar[str] = "latents"
    items: tuple[LatentsItemV2, ...]

    def upgrade(self) -> "LatentsManifestV3":
        """Version 2 did not say in which precision the prompts were encoded."""
        items = tuple(LatentsItemV3(**msgspec.structs.asdict(item)) for item in self.items)
        return LatentsManifestV3(**{**msgspec.structs.asdict(self), "items": items})


class LatentsManifestV3(Manifest, frozen=True, tag="qwen-stage/latents/3", kw_only=True):
    kind: ClassVar[str] = "latents"
    items: tuple[LatentsItemV3, ...]

    def upgrade(self) -> "LatentsManifest":
        """Up to version 3 all pictures began with noise."""
        items = tuple(LatentsItem(**msgspec.structs.asdict(item)) for item in self.items)
        return LatentsManifest(**{**msgspec.structs.asdict(self), "items": items})


class LatentsManifest(Manifest, frozen=True, tag="qwen-stage/latents/4", kw_only=True):
    kind: ClassVar[str] = "latents"
    older: ClassVar[tuple[type[ManifestV1], ...]] = (LatentsManifestV1, LatentsManifestV2, LatentsManifestV3)
    items: tuple[LatentsItem, ...]


class ImagesManifestV1(ManifestV1, frozen=True, tag="qwen-stage/images/1", kw_only=True):
    kind: ClassVar[str] = "images"
    items: tuple[ImageItem, ...]

    def upgrade(self) -> "ImagesManifest":
        return ImagesManifest(**msgspec.structs.asdict(self))


class ImagesManifest(Manifest, frozen=True, tag="qwen-stage/images/2", kw_only=True):
    kind: ClassVar[str] = "images"
    older: ClassVar[tuple[type[ManifestV1], ...]] = (ImagesManifestV1,)
    items: tuple[ImageItem, ...]


def _quoted(value: str) -> str:
    """As those tools spell a value that holds what separates values."""
    return msgspec.json.encode(value).decode() if "," in value else value


def unusual(
    shift: float | None, sigmas: tuple[float, ...] | None, cache_steps: float | None, strength: float | None
) -> dict[str, str]:
    """Of the settings that are mostly left alone, those that are not, by the names of their options."""
    single = {"shift": shift, "cache-steps": cache_steps, "strength": strength}
    values = {"sigmas": sigmas, **{name: (value,) for name, value in single.items() if value}}
    return {name: ",".join(map(exact, numbers)) for name, numbers in values.items() if numbers}


def exact(number: float) -> str:
    """The shortest spelling that is read as the same number: 4, 0.1."""
    return repr(float(number)).removesuffix(".0")


def split(precision: str) -> tuple[Dtype, Bits | None]:
    """What is computed in, and to how many bits the weights are quantized: `bfloat16-q4` -> bfloat16, 4."""
    dtype, _, bits = precision.partition("-q")
    return msgspec.convert((dtype, int(bits) if bits else None), type=tuple[Dtype, Bits | None])


def changed(precision: str, dtype: str | None, bits: int | None) -> Precision:
    """A precision with another dtype or other bits, 0 for none; what is None stays."""
    own_dtype, own_bits = split(precision)
    bits = own_bits if bits is None else bits
    return f"{dtype or own_dtype}-q{bits}" if bits else dtype or own_dtype

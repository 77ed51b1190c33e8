"""prompts -> prompt_embeds: the first stage. Holds Qwen-Image's prompt template."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from artifacts_schema import keys, store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import Embedding, EmbeddingsManifest, PromptItem
from artifacts_schema.prompts import Prompt
from stages.checkpoint import Checkpoint, compute_dtype, dtype_name, load_weights
from stages.measure import Notice, Report, Stopwatch, versions

if TYPE_CHECKING:
    import mlx.core as mx

    from stages.models.text_encoder import TextEncoder

CODE_VERSION = 1  # raised whenever the same prompt would give other embeddings
TEMPLATE_PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
TEMPLATE_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
MAX_PROMPT_TOKENS = 1024  # what remains of a prompt after the template's prefix is dropped, its suffix included
DEFAULT_NEGATIVE_PROMPT = " "  # as Qwen-Image's own examples have it


@dataclass(frozen=True)
class Encoding:
    """One distinct text: its whole token ids with the template, how many of them to drop, its key."""

    text: str
    ids: list[int]
    drop: int
    key: str


def encode(
    prompts: list[Prompt],
    checkpoint: Checkpoint,
    out: Path | None,
    *,
    negative_prompt: str | None = None,
    dtype: str | None = None,
    truncate: bool = False,
    report: Report,
    notice: Notice,
) -> Path:
    """Encodes prompts and their negative prompts; each distinct text once, and none that the run holds already.

    `negative_prompt` holds for prompts that bring none. Writes `out/embeddings` (a new `run<N>` without `out`),
    adding to the prompts that are there, and returns the run directory. Raises UserError for bad input before any
    weight is read.
    """
    watch = Stopwatch()
    default_negative = DEFAULT_NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
    negatives = [default_negative if p.negative_prompt is None else p.negative_prompt for p in prompts]
    compute = compute_dtype(dtype)
    texts = list(dict.fromkeys([p.prompt for p in prompts] + negatives))
    encodings = _tokenize(texts, checkpoint, dtype_name(compute), truncate)
    for prompt, negative in zip(prompts, negatives, strict=True):
        tokens = max(len(encodings[text].ids) - encodings[text].drop for text in (prompt.prompt, negative))
        _check_size(prompt, tokens, checkpoint)
    with store.run_directory(out) as run, store.writing(run / EmbeddingsManifest.kind) as directory:
        before = _read_before(directory, checkpoint)
        kept = {embedding.key: embedding for embedding in before.embeddings} if before else {}
        todo = [encoding for encoding in encodings.values() if encoding.key not in kept]
        if len(todo) < len(encodings):
            notice(f"{len(encodings) - len(todo)} of {len(encodings)} texts are encoded already")
        if todo:
            kept |= _embed(_load(checkpoint, compute), todo, directory, report)
        items = [
            PromptItem(
                prompt=prompt.prompt,
                negative_prompt=negative,
                prompt_key=encodings[prompt.prompt].key,
                negative_key=encodings[negative].key,
                name=prompt.name,
                settings=prompt.settings,
            )
            for prompt, negative in zip(prompts, negatives, strict=True)
        ]
        manifest = EmbeddingsManifest(
            versions=versions(),
            model=checkpoint.model,
            items=tuple(dict.fromkeys([*(before.items if before else ()), *items])),
            embeddings=tuple(kept.values()),
            cost=watch.cost(),
        )
        store.write_manifest(directory, manifest)
    return run


def _check_size(prompt: Prompt, tokens: int, checkpoint: Checkpoint) -> None:
    """A size that `denoise` would refuse is refused here, before the work."""
    width, height = prompt.settings.width, prompt.settings.height
    if width is not None and height is not None:
        try:
            checkpoint.check_size(width, height, tokens)
        except UserError as error:
            raise UserError(f"prompt {_short(prompt.prompt)}: {error}") from None


def _read_before(directory: Path, checkpoint: Checkpoint) -> EmbeddingsManifest | None:
    """What the run holds already, less the embeddings that are not whole any more."""
    before = store.read_manifest_if_any(directory, EmbeddingsManifest)
    if before is None:
        return None
    checkpoint.check_made_with(
        before.model, ("tokenizer", "text_encoder"), f"the embeddings already in {directory} were"
    )
    whole = [each for each in before.embeddings if store.is_whole(directory, (each.file,), EmbeddingsManifest)]
    return replace(before, embeddings=tuple(whole))


def _tokenize(texts: list[str], checkpoint: Checkpoint, dtype: str, truncate: bool) -> dict[str, Encoding]:
    from stages.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.component("tokenizer"))
    drop = len(tokenizer.encode(TEMPLATE_PREFIX, add_special_tokens=False).ids)
    fingerprints = checkpoint.model.fingerprints
    encodings = {}
    for text in texts:
        ids = tokenizer.encode(TEMPLATE_PREFIX + text + TEMPLATE_SUFFIX, add_special_tokens=False).ids
        kept = len(ids) - drop
        if kept > MAX_PROMPT_TOKENS and not truncate:
            raise UserError(
                f"prompt {_short(text)} has {kept} tokens, more than {MAX_PROMPT_TOKENS}; "
                "shorten it, or cut it off there with --truncate"
            )
        determined_by = {
            "tokenizer": fingerprints["tokenizer"],
            "text_encoder": checkpoint.model.fingerprints.get("text_encoder"),
            "dtype": dtype,
            "template": [TEMPLATE_PREFIX, TEMPLATE_SUFFIX],
            "code": CODE_VERSION,
            "prompt": text,
        }
        encodings[text] = Encoding(text, ids[: drop + MAX_PROMPT_TOKENS], drop, keys.key(determined_by))
    return encodings


def _load(checkpoint: Checkpoint, compute: "mx.Dtype") -> "TextEncoder":
    from stages.models.text_encoder import TextEncoder, TextEncoderConfig

    model = TextEncoder(checkpoint.config("text_encoder", TextEncoderConfig))
    load_weights(model, checkpoint.component("text_encoder"), compute)
    return model


def _embed(model: "TextEncoder", encodings: list[Encoding], directory: Path, report: Report) -> dict[str, Embedding]:
    """Publishes prompt_embeds and their mask for each text, and describes them by key."""
    import mlx.core as mx

    embeddings = {}
    vocab_size = model.embed_tokens.weight.shape[0]
    report("encode", 0, len(encodings))
    for done, encoding in enumerate(encodings, 1):
        if max(encoding.ids) >= vocab_size:
            raise UserError(
                f"the tokenizer has tokens beyond the text encoder's {vocab_size}: they do not belong together"
            )
        prompt_embeds = model(mx.array([encoding.ids]))[0, encoding.drop :]
        if not mx.isfinite(prompt_embeds).all().item():
            raise UserError(f"prompt {_short(encoding.text)} gives embeddings with NaN: the text encoder is damaged")
        tokens, dim = prompt_embeds.shape
        tensors = {"prompt_embeds": prompt_embeds, "prompt_embeds_mask": mx.ones(tokens, dtype=mx.bool_)}
        (file,) = store.publish(directory, f"{encoding.key}.safetensors", partial(_write, tensors=tensors))
        dtype = dtype_name(prompt_embeds.dtype)
        embeddings[encoding.key] = Embedding(key=encoding.key, tokens=tokens, dim=dim, dtype=dtype, file=file)
        report("encode", done, len(encodings))
    return embeddings


def _write(path: Path, tensors: "dict[str, mx.array]") -> None:
    import mlx.core as mx

    try:
        mx.save_safetensors(str(path), tensors)
    except RuntimeError as error:  # how MLX reports a full disk
        raise UserError(f"cannot write to {path.parent}: {error}") from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")

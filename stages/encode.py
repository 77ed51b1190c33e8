"""prompts -> prompt_embeds: the first stage. Holds Qwen-Image's prompt template."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from artifacts_schema import keys, store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import Embedding, EmbeddingsManifest, PromptItem
from artifacts_schema.prompts import Prompt
from stages.checkpoint import Checkpoint, compute_dtype, dtype_name, load_weights
from stages.measure import Stopwatch

CODE_VERSION = 1  # raised whenever the same prompt would give other embeddings
TEMPLATE_PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
TEMPLATE_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
MAX_PROMPT_TOKENS = 1024  # what remains of a prompt after the template's prefix is dropped, its suffix included
DEFAULT_NEGATIVE_PROMPT = " "  # as Qwen-Image's own examples have it

Report = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


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
    created_by: str,
) -> Path:
    """Encodes prompts and their negative prompts; each distinct text once.

    `negative_prompt` holds for prompts that bring none. Writes `out/embeddings` (a new `run<N>` without `out`) and
    returns the run directory. Raises UserError for bad input before any weight is read.
    """
    watch = Stopwatch()
    _check(prompts, checkpoint)
    default_negative = DEFAULT_NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
    negatives = [default_negative if p.negative_prompt is None else p.negative_prompt for p in prompts]
    compute = compute_dtype(dtype)
    texts = list(dict.fromkeys([p.prompt for p in prompts] + negatives))
    encodings = _tokenize(texts, checkpoint, dtype_name(compute), truncate)

    if out is not None:
        store.make_directory(out)
    run = out or store.next_run(Path.cwd())
    directory = run / EmbeddingsManifest.kind
    store.make_directory(directory)
    with store.exclusive(directory):
        embeddings = _embed(list(encodings.values()), checkpoint, compute, directory, report)
        items = [
            PromptItem(
                prompt=p.prompt,
                negative_prompt=negative,
                prompt_key=encodings[p.prompt].key,
                negative_key=encodings[negative].key,
                name=p.name,
                settings=p.settings,
            )
            for p, negative in zip(prompts, negatives, strict=True)
        ]
        manifest = EmbeddingsManifest(
            created_by=created_by,
            model=checkpoint.model,
            items=tuple(items),
            embeddings=tuple(embeddings),
            cost=watch.cost(),
        )
        store.write_manifest(directory, manifest)
    return run


def _check(prompts: list[Prompt], checkpoint: Checkpoint) -> None:
    """What the later stages would refuse is refused here, before the work."""
    for number, prompt in enumerate(prompts, 1):
        if prompt.settings.width is not None and prompt.settings.height is not None:
            try:
                checkpoint.check_size(prompt.settings.width, prompt.settings.height)
            except UserError as error:
                raise UserError(f"prompt {number} ({_short(prompt.prompt)}): {error}") from None


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


def _embed(encodings: list[Encoding], checkpoint: Checkpoint, compute, directory: Path, report: Report):
    import mlx.core as mx

    from stages.models.text_encoder import TextEncoder, TextEncoderConfig

    model = TextEncoder(checkpoint.config("text_encoder", TextEncoderConfig))
    load_weights(model, checkpoint.component("text_encoder"), compute)
    vocab_size = model.embed_tokens.weight.shape[0]
    embeddings = []
    report("encode", 0, len(encodings))
    for done, encoding in enumerate(encodings, 1):
        if max(encoding.ids) >= vocab_size:
            raise UserError(f"the tokenizer of {checkpoint.name} has tokens beyond the text encoder's {vocab_size}")
        prompt_embeds = model(mx.array([encoding.ids]))[0, encoding.drop :]
        if not mx.isfinite(prompt_embeds).all().item():
            raise UserError(f"prompt {_short(encoding.text)} gives embeddings with NaN: the text encoder is damaged")
        tokens, dim = prompt_embeds.shape
        tensors = {"prompt_embeds": prompt_embeds, "prompt_embeds_mask": mx.ones(tokens, dtype=mx.bool_)}

        def write(path: Path, tensors: dict[str, mx.array] = tensors) -> None:
            mx.save_safetensors(str(path), tensors)

        (file,) = store.publish(directory, f"{encoding.key}.safetensors", write)
        embeddings.append(
            Embedding(key=encoding.key, tokens=tokens, dim=dim, dtype=dtype_name(prompt_embeds.dtype), file=file)
        )
        report("encode", done, len(encodings))
    return embeddings


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")

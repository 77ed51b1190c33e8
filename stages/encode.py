"""prompts -> prompt_embeds: the first stage. Holds Qwen-Image's prompt template."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from artifacts_schema import cache, keys, store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import Embedding, EmbeddingsManifest, PromptItem, SourceImage, split
from artifacts_schema.prompts import HELD, Prompt
from stages import memory, picture
from stages.backend import prepare_mlx
from stages.checkpoint import Checkpoint, default_dtype
from stages.measure import Notice, Report, Stopwatch, versions

CODE_VERSION = 1  # raised whenever the same prompt would give other embeddings
TEMPLATE_PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
TEMPLATE_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
MAX_PROMPT_TOKENS = 1024  # what remains of a prompt after the template's prefix is dropped, its suffix included
TOKENS_AT_ONCE = 16_384  # while streaming: 117 MB of bfloat16 states in the 7B model
COMPONENTS = ("tokenizer", "text_encoder")  # of the checkpoint, that determine embeddings
DEFAULT_NEGATIVE_PROMPT = " "  # as Qwen-Image's own examples have it


@dataclass(frozen=True)
class Tokens:
    """A text's token ids with the template around it, cut off at the limit; how many of them to drop and had it."""

    ids: list[int]
    drop: int
    prompt_tokens: int  # before the cut, the template's prefix not counted


def encode(
    prompts: list[Prompt],
    checkpoint: Checkpoint,
    out: Path | None,
    *,
    beside: Path | None = None,
    negative_prompt: str | None = None,
    dtype: str | None = None,
    truncate: bool = False,
    stream: bool | None = None,
    budget: int | None = None,
    report: Report,
    notice: Notice,
) -> Path:
    """Encodes prompts and their negative prompts; each distinct text once, and none that the cache or the run holds.

    Images to begin with become part of the run; their paths are relative to `beside`, and where no size is said, it is
    about the model's own, in the image's shape. `negative_prompt` holds for prompts that bring none. Writes
    `out/embeddings` (a new `run<N>` without `out`), adding to the prompts that are there, and returns the run
    directory. `dtype` may be quantized, as in bfloat16-q8.
    With `stream`, all texts pass through one layer after the other, and no more than two layers are in memory; None
    decides by what is to be done and the memory there is, or that `budget` allows in bytes. Raises UserError for bad
    input before any weight is read. When everything is cached, no tensor library is imported.
    """
    watch = Stopwatch()
    cache_limit = cache.limit()
    dtype = dtype or default_dtype()
    images = {given: _image(given, beside, out) for given in dict.fromkeys(p.image for p in prompts) if given}
    prompts = [
        _with_image(prompt, images[prompt.image][0], checkpoint) if prompt.image else prompt for prompt in prompts
    ]
    default_negative = DEFAULT_NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
    negatives = [default_negative if p.negative_prompt is None else p.negative_prompt for p in prompts]
    texts = {text: _key(text, checkpoint, dtype) for text in [*(p.prompt for p in prompts), *negatives]}
    cached = {text: entry for text, key in texts.items() if (entry := cache.find(cache.EMBEDDINGS, key, notice))}
    tokens = _tokenize([text for text in texts if text not in cached], checkpoint)
    counts = {text: entry.prompt_tokens for text, entry in cached.items()}
    counts |= {text: each.prompt_tokens for text, each in tokens.items()}
    for prompt, negative in zip(prompts, negatives, strict=True):
        for text in (prompt.prompt, negative):
            _check(prompt, text, counts[text], truncate, checkpoint)

    with store.run_directory(out) as run, store.writing(run / EmbeddingsManifest.kind) as directory:
        before = _read_before(directory, checkpoint)
        listed = {each.key: each for each in before.embeddings} if before else {}
        held = {key: each for key, each in listed.items() if store.is_whole(directory, (each.file,))}
        begins = {each.file.sha256: each for each in before.images} if before else {}
        for image, data in images.values():
            known = begins.setdefault(image.file.sha256, image)
            if data is not None and not store.is_whole(directory, (known.file,)):
                store.publish(directory, known.file.path, data)
        images.clear()  # files may be large
        todo = [text for text, key in texts.items() if not _is_held(key, held, directory, notice)]
        if len(todo) < len(texts):
            notice(f"{len(texts) - len(todo)} of {len(texts)} texts are encoded already")
        if todo:
            with cache.lock(cache.EMBEDDINGS, notice):
                # another process may have done it meanwhile
                todo = [text for text in todo if not _is_held(texts[text], held, directory, notice)]
                if todo:
                    tokens |= _tokenize([text for text in todo if text not in tokens], checkpoint)
                    wanted = {text: tokens[text] for text in todo}
                    held |= _embed(wanted, texts, checkpoint, dtype, directory, stream, budget, report, notice)
        items = [
            PromptItem(
                prompt=prompt.prompt,
                negative_prompt=negative,
                prompt_key=texts[prompt.prompt],
                negative_key=texts[negative],
                name=prompt.name,
                settings=prompt.settings,
            )
            for prompt, negative in zip(prompts, negatives, strict=True)
        ]
        manifest = EmbeddingsManifest(
            versions=versions(),
            model=checkpoint.model(*COMPONENTS),
            items=tuple(dict.fromkeys([*(before.items if before else ()), *items])),
            embeddings=tuple({**listed, **held}.values()),  # what is damaged stays listed, for `rerun` to repair
            images=tuple(begins.values()),
            cost=watch.cost(),
        )
        store.write_manifest(directory, manifest)
    if todo:
        cache.trim(cache_limit)
    return run


def _key(text: str, checkpoint: Checkpoint, dtype: str) -> str:
    return keys.key(
        {
            "tokenizer": checkpoint.fingerprint("tokenizer"),
            "text_encoder": checkpoint.fingerprint("text_encoder"),
            "dtype": dtype,
            "template": [TEMPLATE_PREFIX, TEMPLATE_SUFFIX],
            "code": CODE_VERSION,
            "prompt": text,
        }
    )


def _image(given: str, beside: Path | None, run: Path | None) -> tuple[SourceImage, bytes | None]:
    """What a prompt begins with, and its content unless the run holds that already."""
    if not given.startswith(HELD):
        path = (beside or Path()) / given
        data, format, width, height = picture.read(path)
        (file,) = store.describe(f"{keys.sha256(data)}.{format}", data)
        name = path.name.encode("utf-8", "replace").decode()  # Linux knows some that are no text
        return SourceImage(name=name, width=width, height=height, file=file), data
    if run is None:
        raise UserError(f"image {given!r} is one that a run holds; say which with --out")
    before = store.read_manifest_if_any(run / EmbeddingsManifest.kind, EmbeddingsManifest)
    for each in before.images if before else ():
        if each.file.sha256 == given.removeprefix(HELD):
            return each, None
    raise UserError(f"image {given!r} is none that {run} holds; give the file's path")


def _with_image(prompt: Prompt, image: SourceImage, checkpoint: Checkpoint) -> Prompt:
    settings = replace(prompt.settings, image=image.file.sha256)
    if settings.width is settings.height is None:
        area = (checkpoint.defaults.width or 0) * (checkpoint.defaults.height or 0)
        width, height = picture.size_like(image.width, image.height, area, 2 * checkpoint.vae_scale_factor)
        settings = replace(settings, width=width, height=height)
    return replace(prompt, settings=settings)


def _check(prompt: Prompt, text: str, prompt_tokens: int, truncate: bool, checkpoint: Checkpoint) -> None:
    """What could not be encoded, or what `denoise` would refuse, is refused before the work."""
    if prompt_tokens > MAX_PROMPT_TOKENS and not truncate:
        raise UserError(
            f"prompt {_short(text)} has {prompt_tokens} tokens, more than {MAX_PROMPT_TOKENS}; "
            "shorten it, or cut it off there with --truncate"
        )
    width, height = prompt.settings.width, prompt.settings.height
    if width is not None and height is not None:
        try:
            checkpoint.check_size(width, height, min(prompt_tokens, MAX_PROMPT_TOKENS))
        except UserError as error:
            raise UserError(f"prompt {_short(prompt.prompt)}: {error}") from None


def _read_before(directory: Path, checkpoint: Checkpoint) -> EmbeddingsManifest | None:
    before = store.read_manifest_if_any(directory, EmbeddingsManifest)
    if before is not None:
        checkpoint.check_made_with(before.model, COMPONENTS, f"the embeddings already in {directory} were")
    return before


def _is_held(key: str, held: dict[str, Embedding], directory: Path, notice: Notice) -> bool:
    """Whether a run holds an embedding, after looking for it in the cache."""
    if key not in held and (entry := cache.find(cache.EMBEDDINGS, key, notice)):
        check = partial(store.check_embeddings, embedding=entry)
        files = cache.adopt(cache.EMBEDDINGS, key, directory, f"{key}.safetensors", check, notice)
        if files:
            held[key] = replace(entry, file=files[0])
    return key in held


def _tokenize(texts: list[str], checkpoint: Checkpoint) -> dict[str, Tokens]:
    if not texts:
        return {}
    from stages.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.component("tokenizer"))
    drop = len(tokenizer.encode(TEMPLATE_PREFIX, add_special_tokens=False).ids)
    tokens = {}
    for text in texts:
        ids = tokenizer.encode(TEMPLATE_PREFIX + text + TEMPLATE_SUFFIX, add_special_tokens=False).ids
        tokens[text] = Tokens(ids[: drop + MAX_PROMPT_TOKENS], drop, len(ids) - drop)
    return tokens


def _embed(
    todo: dict[str, Tokens],
    texts: dict[str, str],
    checkpoint: Checkpoint,
    dtype: str,
    directory: Path,
    stream: bool | None,
    limit: int | None,
    report: Report,
    notice: Notice,
) -> dict[str, Embedding]:
    """Publishes prompt_embeds and their mask for each text, in the run and in the cache; describes them by key."""
    prepare_mlx("encode")
    import mlx.core as mx

    from stages.models.text_encoder import TextEncoder, TextEncoderConfig
    from stages.weights import Loading, Streamed, load_model, to_safetensors

    config = checkpoint.config("text_encoder", TextEncoderConfig)
    if max(max(each.ids) for each in todo.values()) >= config.vocab_size:
        raise UserError(f"the tokenizer has tokens beyond the text encoder's {config.vocab_size}; they do not match")
    waves = list(_waves(todo))
    compute, bits = split(dtype)
    lengths = [[len(todo[text].ids) for text in wave] for wave in waves]
    states = memory.text_states(config, max(max(wave) for wave in lengths), max(sum(wave) for wave in lengths), compute)
    loading = Loading(checkpoint, "text_encoder", TextEncoder, TextEncoderConfig, compute, bits)
    # a pass over the weights costs no more than loading them, but who is asked again had better keep them
    once = len(waves) == 1 and not loading.was_loaded()
    within = memory.budget(limit)
    stream = memory.streams("text encoder", loading.weights(), states, stream, within, notice, once=once)
    model = load_model(loading, stream=stream, report=report)
    embeddings: dict[str, Embedding] = {}
    if not stream:  # else it is the layers that are counted
        report("encode", 0, len(todo))
    for wave in waves if stream else [[text] for text in todo]:
        if isinstance(model.layers, Streamed):
            model.layers.after_layer = partial(report, f"encode {len(embeddings) + len(wave)}/{len(todo)}")
        for text, states in zip(wave, model([todo[text].ids for text in wave]), strict=True):
            prompt_embeds = states[todo[text].drop :]
            if not mx.isfinite(prompt_embeds).all().item():
                raise UserError(f"prompt {_short(text)} gives embeddings with NaN: the text encoder is damaged")
            tokens, dim = prompt_embeds.shape
            content = to_safetensors({"prompt_embeds": prompt_embeds, "prompt_embeds_mask": mx.ones(tokens, mx.bool_)})
            key = texts[text]
            (file,) = store.publish(directory, f"{key}.safetensors", content)
            embeddings[key] = Embedding(
                key=key, tokens=tokens, prompt_tokens=todo[text].prompt_tokens, dim=dim, dtype=dtype, file=file
            )
            cache.put(cache.EMBEDDINGS, key, embeddings[key], content)
        if not stream:
            report("encode", len(embeddings), len(todo))
    return {texts[text]: embeddings[texts[text]] for text in todo}


def _waves(todo: dict[str, Tokens]) -> Iterator[list[str]]:
    """Texts that pass through the layers together, of like length; so many that their states take little memory."""
    wave: list[str] = []
    tokens = 0
    for text in sorted(todo, key=lambda text: len(todo[text].ids)):
        if wave and tokens + len(todo[text].ids) > TOKENS_AT_ONCE:
            yield wave
            wave, tokens = [], 0
        wave.append(text)
        tokens += len(todo[text].ids)
    yield wave


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")

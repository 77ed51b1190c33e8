"""The `qwen-stage` command. Thin: each sub-command imports what it needs inside itself."""

import argparse
import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts_schema import __version__
from artifacts_schema.errors import UserError
from orchestrator import EXIT_BAD_INPUT, EXIT_DONE, EXIT_INTERRUPTED, EXIT_SOME_FAILED
from orchestrator.progress import Terminal, Voice
from stages.model_name import COMPONENTS, PARTS

if TYPE_CHECKING:
    from artifacts_schema.manifests import Settings

MOST_MORE_SEEDS = 10_000
# of Qwen-Image-Lightning's authors
PRESETS: dict[str, dict[str, float]] = {
    "lightning-4": {"steps": 4, "cfg": 1.0, "shift": 3.0},
    "lightning-8": {"steps": 8, "cfg": 1.0, "shift": 3.0},
}
SAME_GESTURE_SECONDS = 1.0  # a Ctrl-C may arrive twice: from the terminal and from the parent


def main(arguments: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):  # paths and prompts are UTF-8, whatever the terminal claims
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    args = _parser().parse_args(arguments)
    args.voice = Terminal().voice()
    for name, value in PRESETS.get(getattr(args, "preset", None) or "", {}).items():
        if getattr(args, name) is None and (name == "cfg" or args.sigmas is None):
            setattr(args, name, value)
    _SIGNALS.install()
    try:
        if parts := [(kind, value) for kind in PARTS for value in getattr(args, kind, None) or ()]:
            from stages.model_name import put_together

            where = next(where for where in ("name", "source", "model") if hasattr(args, where))
            setattr(args, where, put_together(getattr(args, where), parts))
        code: int = args.command(args)
        print(end="", flush=True)
        return code
    except UserError as error:
        return _fail(str(error), args.debug)
    except OSError as error:  # disk full, no permission: the environment's fault, not a bug
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", args.debug)
    except KeyboardInterrupt:
        _notice("interrupted; what was finished is kept")
        return EXIT_INTERRUPTED


class _Signals:
    """The first signal interrupts, at once or when the work has saved its state; a later second one exits at once."""

    def install(self) -> None:
        self.first: float | None = None
        self.deferred = False
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(name) != signal.SIG_IGN:  # by nohup, or by a script's &
                signal.signal(name, self.handle)

    def handle(self, signum: int, frame: object) -> None:
        if self.first is not None:
            if time.monotonic() - self.first > SAME_GESTURE_SECONDS:
                os._exit(EXIT_INTERRUPTED)
            return
        self.first = time.monotonic()
        if not self.deferred:
            raise KeyboardInterrupt
        # not print: the signal may have come in the middle of one
        os.write(2, b"qwen-stage: finishing this step and saving it; once more to exit at once\n")


_SIGNALS = _Signals()  # as the process has one set of handlers


@contextlib.contextmanager
def _deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, a signal only sets what the yielded function returns."""
    _SIGNALS.deferred = True
    try:
        yield lambda: _SIGNALS.first is not None
    finally:
        _SIGNALS.deferred = False


def _fail(message: str, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    _notice(f"error: {' '.join(message.split())}")
    return EXIT_BAD_INPUT


def _notice(line: str) -> None:
    print(f"qwen-stage: {line}", file=sys.stderr, flush=True)


def _encode(args: argparse.Namespace) -> int:
    from artifacts_schema.prompts import parse_prompts
    from stages.checkpoint import Fetching, open_checkpoint
    from stages.encode import encode

    data, format, source = _read_prompts(args.prompts, args.format)
    prompts = parse_prompts(data, format, source)
    fetching = Fetching(("encode",), args.voice.report, args.voice.notice)
    checkpoint = open_checkpoint(args.model, fetching)
    _announce(args.model, args.voice.notice)
    run = encode(
        prompts,
        checkpoint,
        args.out,
        beside=None if str(args.prompts) == "-" else args.prompts.parent,
        negative_prompt=args.negative_prompt,
        dtype=_precision(args),
        truncate=args.truncate,
        stream=args.stream,
        budget=args.memory,
        report=args.voice.report,
        notice=args.voice.notice,
    )
    print(run)
    return EXIT_DONE


def _encode_image(args: argparse.Namespace) -> int:
    from artifacts_schema.manifests import Settings
    from artifacts_schema.prompts import parse_size, parse_wanted
    from stages.encode_image import encode_image

    wanted = parse_wanted(*_read_items(args.items)) if args.items else None
    if wanted is not None and args.size:
        raise UserError("--items says sizes itself; leave --size out")
    width, height = parse_size(args.size) if args.size else (None, None)
    directory = encode_image(
        args.run,
        args.model,
        Settings(width=width, height=height),
        wanted=wanted,
        budget=args.memory,
        tile=args.tile,
        report=args.voice.report,
        notice=args.voice.notice,
    )
    if directory is None:
        raise UserError(f"no prompt in {args.run} begins with an image; say which with `image` in a prompt file")
    print(directory)
    return EXIT_DONE


def _denoise(args: argparse.Namespace) -> int:
    from artifacts_schema.manifests import Settings
    from artifacts_schema.prompts import parse_wanted
    from stages.denoise import denoise

    wanted = parse_wanted(*_read_items(args.items)) if args.items else None
    settings = _settings(args, args.seed)
    if wanted is not None and settings != Settings():
        raise UserError("--items says seeds, size, steps and cfg itself; leave them out")
    directory, failures = denoise(
        args.embeddings,
        args.model,
        args.out,
        settings,
        wanted=wanted,
        batch=args.batch,
        batch_guidance=args.batch_guidance,
        noise=args.noise,
        keep_trajectory=args.keep_trajectory,
        save_every_step=args.save_every_step,
        preview=args.preview,
        dtype=_precision(args),
        stream=args.stream,
        budget=args.memory,
        deferring=_deferred_interrupts,
        report=args.voice.report,
        notice=args.voice.notice,
    )
    for failure in failures:
        args.voice.notice(f"failed: {failure}")
    print(directory)
    return EXIT_SOME_FAILED if failures else EXIT_DONE


def _decode(args: argparse.Namespace) -> int:
    from stages.decode import decode

    items = frozenset(_read_items(args.items)[0].decode("ascii", "replace").split()) if args.items else None
    pictures, failures = decode(
        args.latents,
        args.model,
        args.out,
        items=items,
        dtype=args.dtype,
        budget=args.memory,
        tile=args.tile,
        report=args.voice.report,
        notice=args.voice.notice,
    )
    for failure in failures:
        args.voice.notice(f"failed: {failure}")
    for picture in pictures:
        print(picture)
    return EXIT_SOME_FAILED if failures else EXIT_DONE


def _fit_preview(args: argparse.Namespace) -> int:
    from stages.preview import fit_made_up

    fit_made_up(args.model)
    return EXIT_DONE


def _run(args: argparse.Namespace) -> int:
    """encode, denoise, decode, each as a process. Settings travel with the prompts, as in a prompt file."""
    from msgspec.structs import replace

    from artifacts_schema import keys
    from artifacts_schema.prompts import Entry, to_jsonl
    from orchestrator.run import stage
    from stages.picture import read

    args.decode_dtype = args.dtype if args.dtype == "float32" else None  # there is better than bfloat16 for pictures
    if args.like is not None:
        _fill_in_from(args.like, args)
    if not args.prompts:
        raise UserError("give a prompt, or a picture to make again with --like")
    settings = _settings(args, args.seed)
    if args.image is None and args.strength is not None:
        raise UserError("--strength says how much an image is to change; give that with --image")
    if args.image is not None:
        settings = replace(settings, image=keys.sha256(read(args.image).data))
    if args.noise is not None and not args.noise.is_file():
        raise UserError(f"--noise {args.noise}: no such file")
    size = None if settings.width is None else f"{settings.width}x{settings.height}"
    entries = [
        Entry(
            prompt=prompt,
            negative_prompt=args.negative_prompt,
            seeds=None if settings.seeds is None else list(settings.seeds),
            size=size,
            steps=settings.num_inference_steps,
            cfg=settings.true_cfg_scale,
            cache_steps=settings.cache_steps,
            shift=settings.shift,
            sigmas=None if settings.sigmas is None else list(settings.sigmas),
            image=None if args.image is None else str(args.image.absolute()),
            strength=settings.strength,
        )
        for prompt in args.prompts
    ]
    common = [*_option("--model", args.model), *(["--debug"] if args.debug else [])]
    common += _option("--memory", args.memory)
    streaming = _flag("stream", args.stream)
    encoding = [*streaming, *_option("--dtype", args.dtype), *_option("--out", args.out)]
    encoding += _option("--quantize", args.quantize_text)
    encoding += ["--truncate"] if args.truncate else []
    code, lines = stage("encode", "-", "--format=jsonl", *common, *encoding, stdin=to_jsonl(entries))
    if code:
        return code
    run = lines[-1]
    if args.image is not None:
        code, _ = stage("encode-image", *common, "--", run)
        if code:
            return code
    denoising = [*streaming, *_option("--dtype", args.dtype), *_option("--quantize", args.quantize)]
    denoising += [f"--batch={args.batch}", *_option("--noise", args.noise)]
    denoising += _flag("batch-guidance", args.batch_guidance)
    denoising += ["--keep-trajectory"] if args.keep_trajectory else []
    denoised, _ = stage("denoise", f"--embeddings={run}", *common, *denoising)
    if denoised not in (EXIT_DONE, EXIT_SOME_FAILED):
        return denoised
    decoded, _ = stage("decode", *common, *_option("--dtype", args.decode_dtype), "--", run)
    if decoded not in (EXIT_DONE, EXIT_SOME_FAILED):
        return decoded
    for picture in _pictures(Path(run), args.prompts, settings):
        print(picture)
    return decoded or denoised


def _fill_in_from(picture: Path, args: argparse.Namespace) -> None:
    """What the command line does not say is as the picture's recipe has it."""
    from artifacts_schema.manifests import split
    from orchestrator.inspect import read_recipe
    from stages.checkpoint import open_checkpoint
    from stages.model_name import following

    recipe = read_recipe(picture)
    try:
        checkpoint = open_checkpoint(following(args.model, recipe.model))
    except UserError as error:
        if args.model:
            raise
        raise UserError(f"{picture} was made with {recipe.model!r}; say with --model where that is ({error})") from None
    if others := checkpoint.other_than(recipe.fingerprints):
        _notice(f"{picture} was made with another {' and '.join(others)}: this picture will be another")
    if recipe.seed is None and not args.seed and args.noise is None:
        raise UserError(f"{picture} was made from a file of noise; give that with --noise, or a --seed")
    if recipe.image:
        args.image = args.image or _source_image(picture, recipe.image)
        args.strength = recipe.strength if args.strength is None else args.strength
    args.prompts = args.prompts or [recipe.prompt]
    args.model = following(args.model, recipe.model)
    args.seed = args.seed or ([] if recipe.seed is None else [recipe.seed])
    args.size = args.size or f"{recipe.width}x{recipe.height}"
    if args.steps is args.shift is args.sigmas is None:
        args.sigmas = recipe.sigmas
    if args.sigmas is None:
        args.steps = args.steps or recipe.num_inference_steps
        args.shift = recipe.shift if args.shift is None else args.shift
    args.cfg = recipe.true_cfg_scale if args.cfg is None else args.cfg
    args.cache_steps = recipe.cache_steps if args.cache_steps is None else args.cache_steps
    args.negative_prompt = recipe.negative_prompt if args.negative_prompt is None else args.negative_prompt
    compute, bits = split(recipe.dtype)
    args.quantize = bits if args.quantize is None else args.quantize
    _, text_bits = split(recipe.embeddings_dtype or compute)
    args.quantize_text = text_bits if args.quantize_text is None else args.quantize_text
    args.dtype, args.decode_dtype = args.dtype or compute, args.decode_dtype or recipe.decode_dtype or "float32"


def _source_image(picture: Path, sha256: str) -> Path:
    """What a picture began with, as its run holds it."""
    from artifacts_schema import store
    from artifacts_schema.manifests import EmbeddingsManifest

    directory = picture.resolve().parent.parent / EmbeddingsManifest.kind
    manifest = store.read_manifest_if_any(directory, EmbeddingsManifest)
    for image in manifest.images if manifest else ():
        if image.file.sha256 == sha256:
            store.verify(directory, (image.file,))
            return directory / image.file.path
    raise UserError(f"{picture} began with an image that is not here; give that with --image")


def _rerun(args: argparse.Namespace) -> int:
    from artifacts_schema.manifests import Settings
    from orchestrator.rerun import Changes, Rerun

    options = [f"--batch={args.batch}"]
    options += _flag("batch-guidance", args.batch_guidance)
    more = [seed for seed in args.seed if seed.startswith("+")]
    if more and (len(args.seed) > 1 or int(more[0]) > MOST_MORE_SEEDS):
        raise UserError(f"give either seeds or +N for N more of them, at most +{MOST_MORE_SEEDS}")
    settings = _settings(args, [] if more else [int(seed) for seed in args.seed])
    changes = Changes(settings, int(more[0]) if more else 0, args.dtype, args.quantize, args.keep_trajectory)
    if args.start == "decode" and (settings != Settings() or more):
        raise UserError("seeds, size, steps and cfg are settings of denoise; rerun with --from denoise")
    rerun = Rerun(
        args.run, args.model, options, _flag("stream", args.stream), _option("--memory", args.memory), _notice
    )
    code, pictures = rerun.go(args.start, args.item or [], changes)
    for picture in pictures:
        print(picture)
    return code


def _pictures(run: Path, prompts: list[str], settings: "Settings") -> list[Path]:
    """A run's pictures of these prompts with these settings; it may hold others, made before."""
    from artifacts_schema import store
    from artifacts_schema.manifests import ImagesManifest, LatentsItem, LatentsManifest
    from artifacts_schema.prompts import USUAL

    def is_asked_for(item: LatentsItem) -> bool:
        seeds = {item.seed} if settings.seeds is None else {*settings.seeds, None}
        fields = ("width", "height", "num_inference_steps", "true_cfg_scale")
        same = all(getattr(settings, field) in (None, getattr(item, field)) for field in fields)
        same &= (settings.image or None) == item.image
        unusual = ("cache_steps", "shift", "sigmas", "strength")
        same &= all(
            getattr(settings, field) in (None, getattr(item, field) or getattr(USUAL, field)) for field in unusual
        )
        return item.prompt in prompts and item.seed in seeds and same

    latents, _ = store.read_manifest(store.find(run, LatentsManifest), LatentsManifest)
    directory = store.find(run, ImagesManifest)
    images, _ = store.read_manifest(directory, ImagesManifest)
    keys = {item.key for item in latents.items if is_asked_for(item)}
    return [directory / item.file.path for item in images.items if item.latents_key in keys]


def _inspect(args: argparse.Namespace) -> int:
    import msgspec

    from orchestrator import inspect

    found = inspect.read(args.path)
    wrong = []
    if isinstance(found, inspect.Picture):
        if args.json:
            print(inspect.picture_as_json(found))
        else:
            print("\n".join(inspect.picture_in_words(args.path, found)))
        wrong += inspect.damaged_lineage(args.path, found) if args.verify else []
    else:
        for artifact in found:
            if artifact.manifest is None:
                wrong += [artifact.wrong] if artifact.wrong else []
            elif args.json:
                print(msgspec.json.encode(artifact.manifest).decode())
            else:
                print("\n".join(inspect.in_words(artifact.directory, artifact.manifest)))
            wrong += inspect.damaged(artifact) if args.verify and artifact.manifest else []
    for line in wrong:
        _notice(f"error: {line}")
    if args.verify and not wrong:
        _notice("every file is whole")
    return EXIT_BAD_INPUT if wrong else EXIT_DONE


def _watch(args: argparse.Namespace) -> int:
    from artifacts_schema import cache, disk
    from artifacts_schema.jobs import STAGES
    from orchestrator.dispatch import Terms
    from orchestrator.watch import Options, Watch
    from stages.checkpoint import open_checkpoint

    wanted = {stage.strip() for stage in args.stages.split(",")}
    stages = tuple(stage for stage in STAGES if stage in wanted)
    if unknown := wanted.difference(STAGES):
        raise UserError(f"--stages {','.join(sorted(unknown))}: the stages are {', '.join(STAGES)}")
    if args.model is not None:
        open_checkpoint(args.model)  # says now what every job would say
    disk.make_directory(args.inbox)
    outbox = args.out or args.inbox.resolve().parent / "outbox"
    if args.inbox.resolve() in (outbox.resolve(), *outbox.resolve().parents):
        raise UserError(f"{outbox} lies in the inbox; choose another --out")
    limits = tuple(_option("--memory", args.memory))
    min_free = cache.parse_bytes(args.min_free)
    terms = Terms(
        stages, args.truncate, args.overlap, args.hang, min_free, args.once, limits, tuple(_flag("stream", args.stream))
    )
    options = Options(terms, args.model, args.dtype, args.quantize, args.quantize_text, args.poll, args.settle)
    terminal = Terminal(leave=False)
    _announce(args.model, terminal.notice)
    with _deferred_interrupts() as interrupted:
        return Watch(args.inbox, outbox, options, terminal, interrupted).run()


def _submit(args: argparse.Namespace) -> int:
    from orchestrator.inbox import submit

    for path in submit(args.files, args.to):
        print(path)
    return EXIT_DONE


def _work(args: argparse.Namespace) -> int:
    import importlib

    from orchestrator.worker import obey
    from stages.backend import prepare_mlx

    def prepare() -> None:
        prepare_mlx(args.stage)
        for module in (f"stages.{args.stage}", "mlx.core", "numpy", "zarr" if args.stage != "encode" else "tokenizers"):
            importlib.import_module(module)

    def perform(arguments: list[str], voice: Voice) -> int:
        order = _parser().parse_args(arguments)
        order.voice = voice
        code: int = order.command(order)
        return code

    return obey(prepare, perform)


def _gallery(args: argparse.Namespace) -> int:
    from orchestrator import gallery, outbox

    if args.sheet:
        gallery.sheet(args.run, args.sheet, args.voice.report)
        print(args.sheet)
    else:
        print((outbox if outbox.is_outbox(args.run) else gallery).write(args.run, args.voice.report))
    return EXIT_DONE


def _doctor(args: argparse.Namespace) -> int:
    from stages.checkpoint import open_checkpoint
    from stages.denoise import resolved
    from stages.doctor import diagnose

    checkpoint = open_checkpoint(args.model)
    for line in diagnose(checkpoint, resolved(_settings(args, []), checkpoint.defaults), args.dtype, args.memory):
        print(line)
    return EXIT_DONE


def _models_list(args: argparse.Namespace) -> int:
    from orchestrator.models import listed

    for line in listed():
        print(line)
    return EXIT_DONE


def _models_show(args: argparse.Namespace) -> int:
    from orchestrator.models import shown

    for line in shown(args.name):
        print(line)
    return EXIT_DONE


def _models_use(args: argparse.Namespace) -> int:
    from stages.checkpoint import open_checkpoint
    from stages.model_name import choose, default

    if args.name is not None:
        choose(open_checkpoint(args.name).name)
    print(default())
    return EXIT_DONE


def _models_pull(args: argparse.Namespace) -> int:
    from stages import hub
    from stages.model_name import ALIASES

    repository = hub.repository(ALIASES.get(args.name, args.name))
    if repository is None:
        raise UserError(f"{args.name!r} is no name on the hub; those are OWNER/NAME, or OWNER/NAME@REVISION")
    components = hub.needed(args.stage or hub.COMPONENTS)
    print(hub.fetch(repository, components, args.voice.report, args.voice.notice))
    return EXIT_DONE


def _models_convert(args: argparse.Namespace) -> int:
    from stages.convert import convert

    print(
        convert(
            args.source,
            args.target,
            args.quantize,
            text_bits=args.quantize_text,
            report=args.voice.report,
            notice=args.voice.notice,
        )
    )
    return EXIT_DONE


def _cache_show(args: argparse.Namespace) -> int:
    from artifacts_schema import cache

    entries = cache.entries()
    for kind in cache.KINDS:
        sizes = [entry.size for entry in entries if entry.kind is kind]
        print(f"{len(sizes)} {kind.name}, {_megabytes(sum(sizes))}")
    print(cache.root())
    return EXIT_DONE


def _cache_verify(args: argparse.Namespace) -> int:
    from artifacts_schema import cache

    entries = cache.entries()
    damaged = [entry for entry in entries if not cache.verify(entry.kind, entry.key, _notice)]
    print(f"{len(entries) - len(damaged)} entries are whole, {len(damaged)} were damaged and are set aside")
    return EXIT_SOME_FAILED if damaged else EXIT_DONE


def _cache_trim(args: argparse.Namespace) -> int:
    from artifacts_schema import cache

    removed, freed = cache.trim(cache.parse_bytes(args.max_size))
    cache.forget_damaged()
    print(f"removed {removed} entries, {_megabytes(freed)}")
    return EXIT_DONE


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _precision(args: argparse.Namespace) -> str | None:
    """What is computed in, and the bits of quantized weights: `bfloat16-q4`; None where neither is said."""
    from artifacts_schema.manifests import changed
    from stages.checkpoint import default_dtype

    return changed(args.dtype or default_dtype(), None, args.quantize) if args.quantize else args.dtype


def _flag(name: str, value: bool | None) -> list[str]:
    return [] if value is None else [f"--{name}" if value else f"--no-{name}"]


def _option(name: str, value: object) -> list[str]:
    return [] if value is None else [f"{name}={value}"]


def _read_items(path: Path) -> tuple[bytes, str]:
    """What --items names, and how to call it in errors."""
    if str(path) == "-":
        if sys.stdin is None:
            raise UserError("standard input is closed; give --items a file")
        return sys.stdin.buffer.read(), "--items -"
    try:
        return path.read_bytes(), f"--items {path}"
    except OSError as error:
        raise UserError(f"--items {path}: {error.strerror}") from None


def _read_prompts(path: Path, format: str | None) -> tuple[bytes, str, str]:
    """The bytes of a prompt file or standard input, their format, and the name for errors."""
    from artifacts_schema.prompts import FORMATS

    if str(path) == "-":
        if sys.stdin is None:
            raise UserError("standard input is closed; give a prompt file")
        return sys.stdin.buffer.read(), format or "txt", "standard input"
    format = format or path.suffix.lower().removeprefix(".") or "txt"
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; give a prompt file (.txt, .toml or .jsonl)") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a prompt file, or - for standard input") from None
    if format not in FORMATS:
        raise UserError(f"{path} is not a .txt, .toml or .jsonl file; say what it is with --format")
    return data, format, str(path)


def _announce(model: str | None, notice: Callable[[str], None]) -> None:
    from stages.checkpoint import REAL_MODEL_HINT
    from stages.model_name import DEMO, ModelName, default

    if not ModelName.parse(model or "").checkpoint and default() == DEMO:
        notice(f"using the built-in demo model, which knows only flat-coloured shapes; {REAL_MODEL_HINT}")


def _settings(args: argparse.Namespace, seeds: list[int]) -> "Settings":
    from artifacts_schema.manifests import Settings
    from artifacts_schema.prompts import check_settings, parse_size

    width, height = parse_size(args.size) if args.size else (None, None)
    return check_settings(
        Settings(
            seeds=tuple(seeds) or None,
            width=width,
            height=height,
            num_inference_steps=args.steps,
            true_cfg_scale=args.cfg,
            cache_steps=args.cache_steps,
            shift=args.shift,
            sigmas=args.sigmas,
            strength=args.strength,
        )
    )


def _numbers(argument: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in argument.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{argument!r} is not a list of numbers, as in 1,0.9,0.75,0.5") from None


def _text(argument: str) -> str:
    """Bytes that are not UTF-8 reach Python as lone surrogates, which no file could hold."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("not UTF-8") from None
    return argument


def _path(argument: str) -> Path:
    return Path(_text(argument))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _bits(text: str) -> int:
    """0 for none."""
    if text not in ("4", "8", "none", "0"):
        raise argparse.ArgumentTypeError(f"must be 4, 8 or none, not {text}")
    return 0 if text == "none" else int(text)


def _bytes(text: str) -> int:
    from artifacts_schema.cache import parse_bytes

    try:
        return parse_bytes(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
    return value


def _seed(text: str) -> str:
    """ "7", or "+5" for five more."""
    if int(text) < 1 and text.startswith("+"):
        raise ValueError
    return text


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    model_help = "directory of a Qwen-Image checkpoint, or its name on the Hugging Face hub, as in Qwen/Qwen-Image-2512"
    add(
        "--model",
        type=_text,
        metavar="M",
        help=f"{model_help}; default: that of the stage before, or of `models use`, or the built-in demo",
    )
    lora_help = "a LoRA to put into the model, and how strong: a file, or OWNER/NAME/FILE on the hub; may be repeated"

    other_help = "another {} than the model's: a safetensors file, of ComfyUI too, or a directory of them"

    def add_parts(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--lora", type=_text, action="append", metavar="FILE[:SCALE]", help=lora_help)
        for kind in COMPONENTS:
            option, what = f"--{kind.replace('_', '-')}", "VAE" if kind == "vae" else kind.replace("_", " ")
            parser.add_argument(option, type=_text, nargs=1, metavar="PATH", help=other_help.format(what))

    add_parts(common)
    memory_help = "what a stage may use, as in 16GB: it keeps to that or refuses; default: what is free"
    add("--memory", type=_bytes, metavar="SIZE", help=memory_help)
    add("--debug", action="store_true", help="show the traceback of an error")

    loading = argparse.ArgumentParser(add_help=False)
    add = loading.add_argument
    dtypes = ("float32", "bfloat16")
    dtype_help = "number format to compute in; default: bfloat16 on GPUs, float32 on CPUs"
    add("--dtype", choices=dtypes, help=dtype_help)
    stream_help = "read the layers at every pass, two at a time in memory; default: where memory is short"
    add("--stream", action=argparse.BooleanOptionalAction, help=stream_help)
    quantize_help = "the model's weights, as they are read, to so many bits: a smaller model, other pictures"
    add("--quantize", type=_bits, metavar="{4,8,none}", help=quantize_help)

    quantizing_text = argparse.ArgumentParser(add_help=False)
    text_help = "the same for the text encoder"
    quantizing_text.add_argument("--quantize-text", type=_bits, metavar="{4,8,none}", help=text_help)

    writing = argparse.ArgumentParser(add_help=False, parents=[common])
    writing.add_argument("--out", type=_path, metavar="DIR", help="run directory to write into")

    encoding = argparse.ArgumentParser(add_help=False)
    add = encoding.add_argument
    add("--negative-prompt", type=_text, metavar="TEXT", help="for prompts that bring none; default: a space")
    add("--truncate", action="store_true", help="cut prompts off at 1024 tokens")

    denoising = argparse.ArgumentParser(add_help=False)
    add = denoising.add_argument
    add("--size", metavar="WxH", help="in pixels; default: the model's own, or 1024x1024")
    add("--steps", "--num-inference-steps", type=int, metavar="N", help="default: the model's own, or 50")
    cfg_help = "guidance; 1 or less turns it off and halves the time; default: the model's own, or 4.0"
    add("--cfg", "--true-cfg-scale", type=float, metavar="S", help=cfg_help)
    shift_help = "stay longer at strong noise: sigma -> S sigma / (1 + (S - 1) sigma); default: as the model does it"
    add("--shift", type=float, metavar="S", help=shift_help)
    sigmas_help = (
        "the noise levels themselves, separated by commas, as in 1,0.9,0.75,0.5; instead of --steps and --shift"
    )
    add("--sigmas", type=_numbers, metavar="LIST", help=sigmas_help)
    strength_help = "how much an image is to change that a prompt begins with, from 0 to 1; default: 0.6"
    add("--strength", type=float, metavar="S", help=strength_help)
    preset_help = "steps, cfg and shift for checkpoints that need few steps"
    add("--preset", choices=tuple(PRESETS), help=preset_help)
    cache_help = (
        "skip most of a step if its first block adds much the same as at one before; try 0.1; default: 0, never"
    )
    add("--cache-steps", type=float, metavar="THRESHOLD", help=cache_help)
    add("--batch", type=_positive, default=1, metavar="N", help="pictures in one pass; default: 1")
    together_help = "prompt and negative prompt in one pass; default: for small pictures on NVIDIA GPUs"
    add("--batch-guidance", action=argparse.BooleanOptionalAction, help=together_help)
    add("--keep-trajectory", action="store_true", help="keep the latents of every step")

    beginning = argparse.ArgumentParser(add_help=False)
    add = beginning.add_argument
    seed_help = "one picture for each, after the prompts; default: 42"
    add("--seed", type=int, nargs="+", default=[], metavar="N", help=seed_help)
    noise_help = "start from this noise, not from seeds: safetensors, one float32 tensor `noise` [items, C, H/8, W/8]"
    add("--noise", type=_path, metavar="FILE", help=noise_help)

    about = "Text to image with Qwen-Image on MLX, in three processes that exchange files: encode, denoise, decode."
    parser = argparse.ArgumentParser(prog="qwen-stage", description=about)
    parser.add_argument("--version", action="version", version=f"qwen-stage {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        parents=[writing, encoding, beginning, denoising, loading, quantizing_text],
        help="prompts to pictures, all stages",
    )
    run.add_argument("prompts", nargs="*", type=_text, metavar="PROMPT")
    like_help = "a picture of qwen-stage: what is not said otherwise is as it was made"
    image_help = "begin with this picture, not with noise alone"
    run.add_argument("--image", type=_path, metavar="FILE", help=image_help)
    run.add_argument("--like", type=_path, metavar="PNG", help=like_help)
    run.set_defaults(command=_run)

    encode = commands.add_parser("encode", parents=[writing, encoding, loading], help="prompts to embeddings")
    encode.add_argument(
        "prompts", type=_path, metavar="FILE", help=".txt (a prompt a line), .toml, .jsonl; - is standard input"
    )
    encode.add_argument("--format", choices=("txt", "toml", "jsonl"), help="default: by the file's name")
    encode.set_defaults(command=_encode)

    encode_image = commands.add_parser(
        "encode-image", parents=[common], help="the images that prompts begin with to latents, before denoise"
    )
    add = encode_image.add_argument
    add("run", type=_path, metavar="DIR", help="a run or its embeddings/")
    add("--size", metavar="WxH", help="in pixels; default: as the prompts say, or of the image's shape")
    add("--items", type=_path, metavar="FILE", help="only the images of these pictures, as denoise takes them")
    tile_help = "work on squares of so many pixels at a time: less is less memory, and slower; default: what fits"
    add("--tile", type=int, metavar="PIXELS", help=tile_help)
    encode_image.set_defaults(command=_encode_image)

    denoise = commands.add_parser(
        "denoise", parents=[writing, beginning, denoising, loading], help="embeddings to latents"
    )
    denoise.add_argument("--embeddings", type=_path, required=True, metavar="DIR", help="a run or its embeddings/")
    items_help = "make these and no others: JSON lines, as artifacts_schema/prompts.py has them; - is standard input"
    save_help = "whatever that takes; else as often as 1%% of the time allows"
    denoise.add_argument("--save-every-step", action="store_true", help=save_help)
    denoise.add_argument("--items", type=_path, metavar="FILE", help=items_help)
    preview_help = "keep a small WEBP here of how the picture looks by now that is being denoised"
    denoise.add_argument("--preview", type=_path, metavar="FILE", help=preview_help)
    denoise.set_defaults(command=_denoise)

    decode = commands.add_parser("decode", parents=[writing], help="latents to PNG")
    decode.add_argument("latents", type=_path, metavar="DIR", help="a run or its latents/")
    decode_dtype_help = "number format to compute in; default: float16 on NVIDIA GPUs, else float32"
    decode.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help=decode_dtype_help)
    decode.add_argument("--items", type=_path, metavar="FILE", help="only the latents with these keys, one a line")
    decode.add_argument("--tile", type=int, metavar="PIXELS", help=tile_help)
    decode.set_defaults(command=_decode)

    fit_preview = commands.add_parser("fit-preview", parents=[common])  # no help: it is for orchestrators
    fit_preview.set_defaults(command=_fit_preview)

    rerun = commands.add_parser(
        "rerun", parents=[common, denoising, loading], help="repair a run, or make it again otherwise"
    )
    add = rerun.add_argument
    add("run", type=_path, metavar="RUN", help="a run directory")
    from_help = "the first stage to run again; what is there and whole is kept; default: encode"
    add("--from", dest="start", choices=("encode", "denoise", "decode"), default="encode", help=from_help)
    add("--item", type=_positive, nargs="+", metavar="N", help="only these pictures, by the numbers in their names")
    add(
        "--seed", type=_seed, nargs="+", default=[], metavar="N", help="other seeds; +5: five more than each prompt has"
    )
    rerun.set_defaults(command=_rerun)

    watch = commands.add_parser(
        "watch", parents=[common, loading, quantizing_text], help="pictures of every prompt file put into a folder"
    )
    add = watch.add_argument
    add("inbox", type=_path, metavar="INBOX", help="where to put .txt, .toml, .jsonl, or a .png to make again")
    add("--out", type=_path, metavar="OUTBOX", help="where a run is made of each; default: outbox, beside the inbox")
    add("--once", action="store_true", help="end when nothing is left to do")
    add("--poll", action="store_true", help="look every two seconds instead of waiting for events: network folders")
    stages_help = "run only these, separated by commas, on what others leave in the outbox"
    add("--stages", default="encode,denoise,decode", metavar="STAGES", help=stages_help)
    overlap_help = "decode beside denoise, both in memory; default: where there is enough"
    add("--overlap", action=argparse.BooleanOptionalAction, help=overlap_help)
    add("--truncate", action="store_true", help="cut prompts off at 1024 tokens")
    settle_help = "how long a file must not have changed; default: 1"
    add("--settle", type=_seconds, default=1.0, metavar="SECONDS", help=settle_help)
    hang_help = "how long a step or a start may take before it is tried again; default: 900"
    add("--hang", type=_seconds, default=900.0, metavar="SECONDS", help=hang_help)
    free_help = "pause while less of the disk is free; default: 1GB"
    add("--min-free", default="1GB", metavar="SIZE", help=free_help)
    watch.set_defaults(command=_watch)

    submit = commands.add_parser("submit", help="put files into a watched folder, whole at once")
    submit.add_argument("files", type=_path, nargs="+", metavar="FILE")
    submit.add_argument("--to", type=_path, required=True, metavar="INBOX")
    submit.set_defaults(command=_submit, debug=False)

    work = commands.add_parser("work")  # for `watch` alone, therefore without help
    work.add_argument("stage", choices=("encode", "denoise", "decode"))
    work.set_defaults(command=_work, debug=True)

    inspect = commands.add_parser("inspect", help="what a run, an artifact or a picture is, and whether it is whole")
    inspect.add_argument("path", type=_path, metavar="PATH", help="a run, its embeddings/, latents/ or images/, a PNG")
    inspect.add_argument("--json", action="store_true", help="one line of JSON for each artifact")
    inspect.add_argument("--verify", action="store_true", help="read every file and compare it with its manifest")
    inspect.set_defaults(command=_inspect, debug=False)

    gallery = commands.add_parser("gallery", help="a page of a run's or an outbox's pictures, for a browser")
    gallery.add_argument("run", type=_path, metavar="RUN", help="a run, its images/, or an outbox")
    gallery.add_argument("--sheet", type=_path, metavar="PNG", help="instead, all of them in one picture")
    gallery.set_defaults(command=_gallery, debug=False)

    doctor = commands.add_parser(
        "doctor", parents=[common], help="what each stage would do here with a model, and what that needs"
    )
    add = doctor.add_argument
    add("--dtype", choices=dtypes, help=dtype_help)
    add("--size", metavar="WxH", help="in pixels; default: the model's own, or 1024x1024")
    add("--steps", "--num-inference-steps", type=int, metavar="N", help="default: the model's own, or 50")
    add("--cfg", "--true-cfg-scale", type=float, metavar="S", help=cfg_help)
    doctor.set_defaults(command=_doctor, cache_steps=None, shift=None, sigmas=None, strength=None)

    models = commands.add_parser("models", help="checkpoints: those that are here, download one, make a smaller one")
    actions = models.add_subparsers(required=True, metavar="ACTION")
    list_help = "the demo, and what is in the Hugging Face cache"
    actions.add_parser("list", help=list_help).set_defaults(command=_models_list, debug=False)
    show = actions.add_parser("show", help="what a checkpoint's parts are, and whether they are here")
    show.add_argument("name", type=_text, nargs="?", metavar="NAME", help=f"{model_help}; default: that in use")
    show.set_defaults(command=_models_show, debug=False)
    use = actions.add_parser("use", help="the model of all who name none from now on; without NAME, which it is")
    use.add_argument("name", type=_text, nargs="?", metavar="NAME", help=f"{model_help}; demo for the built-in one")
    add_parts(use)
    use.set_defaults(command=_models_use, debug=False)
    pull = actions.add_parser("pull", help="download a checkpoint from the Hugging Face hub, or what is missing of it")
    pull.add_argument("name", type=_text, metavar="NAME", help="as in Qwen/Qwen-Image-2512, or NAME@REVISION")
    stages_help = "only what these stages need; default: all"
    pull.add_argument("--stage", nargs="+", choices=("encode", "denoise", "decode"), metavar="STAGE", help=stages_help)
    pull.set_defaults(command=_models_pull, debug=False)
    convert = actions.add_parser("convert", help="the same checkpoint with quantized weights")
    add = convert.add_argument
    add("source", type=_text, metavar="SRC", help=model_help)
    add("target", type=_path, metavar="DST", help="where to write the whole checkpoint; an interrupted one goes on")
    add("--quantize", type=int, choices=(4, 8), required=True, help="the transformer's blocks to so many bits")
    add("--quantize-text", type=int, choices=(4, 8), help="the text encoder's layers as well")
    gguf_help = "a GGUF file to convert in place of SRC's own transformer"
    add("--transformer", type=_text, nargs=1, metavar="FILE", help=gguf_help)
    add("--debug", action="store_true", help="show the traceback of an error")
    convert.set_defaults(command=_models_convert)

    cache = commands.add_parser("cache", help="the results that all runs share")
    actions = cache.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser("show", help="where it is and how large").set_defaults(command=_cache_show, debug=False)
    actions.add_parser("verify", help="check every entry").set_defaults(command=_cache_verify, debug=False)
    trim = actions.add_parser("trim", help="remove what was not used for longest")
    trim.add_argument("--max-size", required=True, metavar="SIZE", help="what may remain, as in 20GB; 0 empties it")
    trim.set_defaults(command=_cache_trim, debug=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""prompt_embeds -> latents: the second stage. Guidance, seeds, batching, and the Euler loop."""

import io
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec.structs import replace

from artifacts_schema import arrays, cache, keys, store
from artifacts_schema.errors import UserError
from artifacts_schema.manifests import (
    Cost,
    Embedding,
    EmbeddingsManifest,
    File,
    ImageLatentsItem,
    ImageLatentsManifest,
    LatentsItem,
    LatentsManifest,
    Model,
    PromptItem,
    Settings,
    split,
)
from artifacts_schema.prompts import NO_GUIDANCE, Wanted, check_settings, resolve
from artifacts_schema.trajectory import Trajectory, resume
from stages import memory
from stages.backend import prepare_mlx
from stages.checkpoint import Checkpoint, Fetching, default_dtype, has_cuda, open_checkpoint
from stages.measure import Notice, Report, Stopwatch, forget_peak, versions
from stages.model_name import ModelName, following
from stages.modulation import Sigmas, Table, Tables
from stages.preview import Preview
from stages.scheduler import SchedulerConfig

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

    from stages.models.transformer import QwenImageTransformer2DModel, TransformerConfig

CODE_VERSION = 1  # raised whenever the same inputs would give other latents
# image tokens of a pass up to which it is faster to have the negative prompts in it, by a tenth at 512x512, on CUDA
TOGETHER_TOKENS = 2304
# in the names of checkpoints and LoRAs that are made for so many steps
LIGHTNING = re.compile(r"lightning.*?(?<!\d)([48])[-_ ]?steps?", re.IGNORECASE)
CHECKPOINT_SHARE = 0.01  # of the time may go into saving what a kill would lose
FIRST_SAVE_SECONDS = 0.02  # what a save takes, until one was measured: the first comes after two seconds


class Resolved(NamedTuple):
    """Settings with nothing left open."""

    seeds: tuple[int, ...]
    width: int
    height: int
    steps: int
    cfg: float
    cache_steps: float
    shift: float
    sigmas: tuple[float, ...]
    image: str
    strength: float

    @property
    def first_step(self) -> int:
        """Where an image comes in; the steps before, noisier ones, are left out. Rounded as diffusers does it."""
        return min(int(max(self.steps - self.steps * self.strength, 0)), self.steps - 1) if self.image else 0

    @property
    def guided(self) -> bool:
        return self.cfg > NO_GUIDANCE


@dataclass(frozen=True)
class Job:
    """One picture to make: a prompt, a seed or injected noise, and its settings."""

    item: PromptItem
    embeddings_dtype: str
    settings: Resolved
    seed: int | None
    noise: "mx.array | None"
    noise_sha256: str | None
    image: ImageLatentsItem | None  # that it begins with, instead of noise alone
    shape: tuple[int, int, int]  # of the latents, [C, h, w]
    key: str


def denoise(
    embeddings: Path,
    model: str | None,
    out: Path | None,
    overrides: Settings,
    *,
    wanted: list[Wanted] | None = None,
    batch: int = 1,
    batch_guidance: bool | None = None,
    noise: Path | None = None,
    keep_trajectory: bool = False,
    save_every_step: bool = False,
    preview: Path | None = None,
    dtype: str | None = None,
    stream: bool | None = None,
    budget: int | None = None,
    deferring: Callable[[], AbstractContextManager[Callable[[], bool]]] = lambda: nullcontext(lambda: False),
    report: Report,
    notice: Notice,
) -> tuple[Path, list[str]]:
    """Denoises every prompt and seed of an embeddings artifact, or just what is `wanted`, that is not there yet.

    `overrides` come before the prompts' own settings, those before the checkpoint's defaults; what is `wanted` says
    all of that itself. Finished pictures are published one batch at a time and never lost; an unfinished one goes on
    from its last checkpoint and ends as if it had never stopped; with `save_every_step` that is its last step. With
    `stream`, the transformer's blocks are read at every step; None decides by the memory there is, or that `budget`
    allows in bytes. `dtype` may be quantized, as in bfloat16-q4. Within `deferring()`, when what that yields turns
    true, the step is finished and saved, then KeyboardInterrupt raised. `preview` is a file that shows the picture as
    it is being denoised, if something was decoded with the VAE before. Returns the latents directory and what failed,
    a line each.
    """
    prepare_mlx("denoise")
    from stages.models.transformer import QwenImageTransformer2DModel, TransformerConfig
    from stages.weights import Loading, load_model, mlx_dtype

    cache_limit = cache.limit()
    source = store.find(embeddings, EmbeddingsManifest)
    manifest, manifest_id = store.read_manifest(source, EmbeddingsManifest)
    checkpoint = open_checkpoint(following(model, manifest.model.name), Fetching(("denoise",), report, notice))
    checkpoint.check_made_with(manifest.model, ("tokenizer", "text_encoder"), f"the embeddings in {source} were")
    config = checkpoint.config("transformer", TransformerConfig)
    schedule = checkpoint.config("scheduler", SchedulerConfig, "scheduler_config.json")
    dtype = dtype or default_dtype()
    compute, bits = split(dtype)
    own = checkpoint.model("scheduler", "transformer", "vae")
    made_with = replace(own, fingerprints={**manifest.model.fingerprints, **own.fingerprints})
    pictures = (
        _all_pictures(manifest, checkpoint, check_settings(overrides)) if wanted is None else _find(wanted, manifest)
    )
    images = Images.of(store.run_of(source), pictures, checkpoint)
    jobs = _jobs(pictures, manifest, checkpoint, config, noise, images, dtype)

    if any(not job.settings.guided and job.item.negative_prompt.strip() for job in jobs):
        notice("negative prompts are not used where cfg is 1 or less")
    if overrides.strength is not None and not any(job.image for job in jobs):
        notice("no picture begins with an image: strength changes nothing")
    if hint := _lightning_hint(checkpoint.name, jobs):
        notice(hint)

    with store.writing((out or store.run_of(source)) / LatentsManifest.kind) as directory:
        before = store.read_manifest_if_any(directory, LatentsManifest)
        if before:
            checkpoint.check_made_with(before.model, ("transformer",), f"the latents already in {directory} were")
        latents = Latents(directory, before, made_with, manifest_id, jobs, dtype, keep_trajectory)
        todo = latents.todo(notice)
        if len(todo) < len(jobs):
            notice(f"{len(jobs) - len(todo)} of {len(jobs)} pictures are denoised already")
        if not todo:
            return directory, []
        prompts = _load_embeddings(source, manifest, todo, config)
        begin_with = images.read(todo)
        batches = [(_sigmas(schedule, group[0]), group) for group in _batches(todo, batch)]
        loading = Loading(checkpoint, "transformer", QwenImageTransformer2DModel, TransformerConfig, compute, bits)
        together = [_guides_together(group) if batch_guidance is None else batch_guidance for _, group in batches]
        states = [
            _states(group, prompts, config, pair, compute) for (_, group), pair in zip(batches, together, strict=True)
        ]
        weights, within = loading.weights(), memory.budget(budget)
        stream = memory.streams("transformer", weights, max(states), stream, within, notice)
        forget_peak()
        tables = Tables(checkpoint, config, compute, report, notice)
        tables.prepare([sigmas for sigmas, _ in batches], within)
        arrays.begin_to_pack()
        transformer = load_model(loading, stream=stream, report=report)
        live = Preview.of(preview, checkpoint) if preview else None
        failures, begun = [], 0
        for (sigmas, group), own_states, pair in zip(batches, states, together, strict=True):
            watch = Stopwatch(keep_peak=not begun)  # loading may be what takes most
            begun += len(group)
            label = f"denoise {begun}/{len(todo)}"
            first = group[0].settings.first_step
            trajectories = [Trajectory(directory, job.key, job.settings.steps - first, job.shape) for job in group]
            keep = any(job.key in latents.with_steps for job in group)
            bounded = memory.bounded(weights.streamed if stream else weights.whole, own_states, within)
            with bounded, deferring() as interrupted, live or nullcontext():
                results = _denoise_batch(
                    transformer,
                    sigmas[first:],
                    tables.of(sigmas, first),
                    group,
                    begin_with.get(group[0].image.key) if group[0].image else None,
                    prompts,
                    mlx_dtype(compute),
                    pair,
                    Checkpoints(trajectories, keep, save_every_step, interrupted),
                    partial(report, label),
                    partial(_say_resumed, notice, label),
                    live,
                )
            cost = watch.cost(pictures=len(group))
            for job, result, trajectory in zip(group, results, trajectories, strict=True):
                if problem := latents.add(job, result, trajectory if keep else None, cost):
                    failures.append(problem)
            latents.publish(group[-1].key)  # after every batch: an interruption loses no finished picture
            if not keep:
                for trajectory in trajectories:
                    trajectory.remove()
        latents.publish()
    cache.trim(cache_limit)
    return directory, failures


class Images(NamedTuple):
    """What a run holds of images to begin with."""

    directory: Path
    items: dict[tuple[str, int, int], ImageLatentsItem]  # by the image's hash and the size

    @classmethod
    def of(cls, run: Path, pictures: "list[tuple[PromptItem, Resolved, int]]", checkpoint: Checkpoint) -> "Images":
        """Reads no manifest that is not needed."""
        directory = run / ImageLatentsManifest.kind
        manifest = None
        if any(own.image for _, own, _ in pictures):
            manifest = store.read_manifest_if_any(directory, ImageLatentsManifest)
        if manifest:
            checkpoint.check_made_with(manifest.model, ("vae",), f"the image latents in {directory} were")
        items = manifest.items if manifest else ()
        return cls(directory, {(item.image, item.width, item.height): item for item in items})

    def find(self, prompt: str, own: Resolved) -> ImageLatentsItem | None:
        """Those that a picture begins with. UserError if they are not there."""
        if not own.image:
            return None
        size = f"{own.width}x{own.height}"
        if found := self.items.get((own.image, own.width, own.height)):
            return found
        run = store.run_of(self.directory)
        raise UserError(
            f"the image that {prompt!r} begins with is not encoded at {size}; "
            f"run `qwen-stage encode-image {shlex.quote(str(run))} --size {size}` first"
        )

    def read(self, jobs: list[Job]) -> "dict[str, np.ndarray]":
        """Those that the jobs begin with, by their keys: verified before the work."""
        items = {job.image.key: job.image for job in jobs if job.image}
        return {key: store.read_latents(self.directory, item) for key, item in items.items()}


class Latents:
    """What a run's latents directory lists, and what is added to it."""

    def __init__(
        self,
        directory: Path,
        before: LatentsManifest | None,
        made_with: Model,
        made_from: str,
        jobs: list[Job],
        dtype: str,
        keep_trajectory: bool,
    ) -> None:
        self.directory, self.made_with, self.jobs, self.dtype = directory, made_with, jobs, dtype
        self.inputs = tuple(dict.fromkeys((*(before.inputs if before else ()), made_from)))
        self.items = {item.key: item for item in before.items} if before else {}
        self.listed = len(self.items)
        self.order = list(dict.fromkeys([*self.items, *(job.key for job in jobs)]))
        kept = {key for key, item in self.items.items() if item.trajectory}
        self.with_steps = {job.key for job in jobs if keep_trajectory or job.key in kept}

    def todo(self, notice: Notice) -> list[Job]:
        """The jobs whose pictures are neither here, whole, nor in the cache. What the cache has is here afterwards."""
        here = (self.items[job.key] for job in self.jobs if job.key in self.items)
        whole = {item.key for item in here if self._is_whole(item)}
        missing = [job for job in self.jobs if job.key not in whole]
        adoptable = [job for job in missing if job.key not in self.with_steps]
        adopted = [item for job in adoptable if (item := self._adopt(job, notice))]
        self.items |= {item.key: item for item in adopted}
        whole |= {item.key for item in adopted}
        for key in whole:
            self._tidy(self.items[key])
        todo = [job for job in missing if job.key not in whole]
        if adopted:
            self.publish(todo[0].key if todo else None)
        return todo

    def add(self, job: Job, latents: "np.ndarray", trajectory: Trajectory | None, cost: Cost) -> str | None:
        """Publishes a picture's latents [C, h, w], with its steps if they are kept. Returns why not, if not."""
        import numpy as np

        if not np.isfinite(latents).all():
            noise_from = "injected noise" if job.seed is None else f"seed {job.seed}"
            return f"{job.item.prompt!r}, {noise_from}: the latents became NaN or infinite"
        content = arrays.pack(latents)
        before = self.items.get(job.key)
        same = before is None or store.describe(before.directory, content) == before.files
        if before and not same and store.is_whole(self.directory, before.files):  # only its steps were missing
            return f"{job.item.prompt!r} came out otherwise than before; it is kept as it was"
        files = store.publish(self.directory, f"{job.key}.zarr", content)
        item = _latents_item(job, files, trajectory.files() if trajectory else (), cost, self.dtype)
        self.items[job.key] = item
        cache.put(cache.LATENTS, job.key, replace(item, trajectory=()), content)
        return None

    def publish(self, last: str | None = None) -> None:
        """Lists what there is, up to a job: a picture's place, once it is known, never changes."""
        upto = len(self.order) if last is None else max(self.listed, self.order.index(last) + 1)
        items = tuple(self.items[key] for key in self.order[:upto] if key in self.items)
        manifest = LatentsManifest(versions=versions(), model=self.made_with, inputs=self.inputs, items=items)
        store.write_manifest(self.directory, manifest)

    def _is_whole(self, item: LatentsItem) -> bool:
        if item.key in self.with_steps and not item.trajectory:
            return False
        return store.is_whole(self.directory, (*item.files, *item.trajectory))

    def _adopt(self, job: Job, notice: Notice) -> LatentsItem | None:
        """A picture's latents from the cache, published in the run."""
        if cached := cache.find(cache.LATENTS, job.key, notice):
            check = partial(arrays.unpack, shape=job.shape)
            files = cache.adopt(cache.LATENTS, job.key, self.directory, f"{job.key}.zarr", check, notice)
            if files:
                return _latents_item(job, files, (), cached.cost, self.dtype)
        return None

    def _tidy(self, item: LatentsItem) -> None:
        """Clears away what is no part of a whole item: a file browser's notes, and steps that a kill left unlisted."""
        if store.strangers(self.directory, item):
            store.publish(self.directory, item.directory, store.read_array(self.directory, item))
        if not item.trajectory:
            Trajectory(self.directory, item.key, item.num_inference_steps, item.shape).remove()


class Checkpoints:
    """Saves a batch's latents as it goes on: all steps of a kept trajectory, else as often as 1% of time allows.

    Else it is the step to go on from, which is the last, unless steps are cached.
    """

    def __init__(
        self, trajectories: list[Trajectory], keep: bool, every_step: bool, interrupted: Callable[[], bool]
    ) -> None:
        self.trajectories, self.keep, self.interrupted = trajectories, keep, interrupted
        self.share = float("inf") if every_step else CHECKPOINT_SHARE
        self.saved = 0
        self.saved_at = time.monotonic()
        self.saving_took = FIRST_SAVE_SECONDS

    def resume(self) -> "tuple[int, list[np.ndarray]] | None":
        """The step to go on from and the latents [C, h, w] there."""
        found = resume(self.trajectories, whole=self.keep)
        self.saved = found[0] if found else 0
        return found

    def after(self, step: int, last: bool, resumable: int, latents: "Callable[[int], list[np.ndarray]]") -> None:
        """Called after every step (0: before the first). Raises KeyboardInterrupt once saved, if that is wanted.

        `resumable` is the step to go on from after an interruption, `latents` gives those of that step and of this.
        """
        stop = self.interrupted()
        due = time.monotonic() - self.saved_at >= self.saving_took / self.share
        if self.keep:
            self._save(step, latents(step), resumable)
        elif resumable > self.saved and (stop or (due and not last)):
            self._save(resumable, latents(resumable), resumable)
        if stop:
            raise KeyboardInterrupt

    def _save(self, step: int, latents: "list[np.ndarray]", resumable: int) -> None:
        started = time.monotonic()
        for trajectory, each in zip(self.trajectories, latents, strict=True):
            trajectory.write(step, each, resumable)
        if not self.keep:  # only now: the step before is what a kill in between goes back to
            for trajectory in self.trajectories:
                trajectory.forget(trajectory.steps() - {step})
        self.saved, self.saved_at = step, time.monotonic()
        self.saving_took = self.saved_at - started


def _all_pictures(
    manifest: EmbeddingsManifest, checkpoint: Checkpoint, overrides: Settings
) -> list[tuple[PromptItem, Resolved, int]]:
    """Every prompt with each of its seeds."""
    settings = [resolved(overrides, item.settings, checkpoint.defaults) for item in manifest.items]
    return [(item, own, seed) for item, own in zip(manifest.items, settings, strict=True) for seed in own.seeds]


def _find(wanted: list[Wanted], manifest: EmbeddingsManifest) -> list[tuple[PromptItem, Resolved, int]]:
    """What is wanted, with the prompts that it names by their keys."""
    prompts: dict[tuple[str, str | None], PromptItem] = {(item.prompt_key, None): item for item in manifest.items}
    prompts |= {(item.prompt_key, item.negative_key): item for item in manifest.items}
    found = []
    for each in wanted:
        item = prompts.get((each.prompt_key, each.negative_key))
        if item is None:
            raise UserError(f"the run has no prompt {each.prompt_key}, not {each.negative_key}; encode it first")
        found.append((item, resolved(each.settings()), each.seed))
    return found


def _jobs(
    wanted: list[tuple[PromptItem, Resolved, int]],
    manifest: EmbeddingsManifest,
    checkpoint: Checkpoint,
    config: "TransformerConfig",
    noise: Path | None,
    images: "Images",
    dtype: str,
) -> list[Job]:
    injected = _load_noise(noise, len(wanted)) if noise else None
    embeddings = {embedding.key: embedding for embedding in manifest.embeddings}
    factor = checkpoint.vae_scale_factor
    jobs = []
    for index, (item, own, seed) in enumerate(wanted):
        if not {item.prompt_key, item.negative_key} <= embeddings.keys():
            raise UserError(f"the embeddings of {item.prompt!r} are not there; run `qwen-stage encode` again")
        prompt, negative = embeddings[item.prompt_key], embeddings[item.negative_key]
        checkpoint.check_size(own.width, own.height, max(prompt.tokens, negative.tokens))
        shape = (config.in_channels // 4, own.height // factor, own.width // factor)
        array = injected[index] if injected else None
        if array is not None and array.shape != shape:
            raise UserError(f"--noise {noise} gives {array.shape} where {item.prompt!r} needs {shape}")
        noise_sha256 = None if array is None else keys.sha256(memoryview(array))
        determined_by: dict[str, Any] = {
            "prompt_embeds": item.prompt_key,
            "negative": item.negative_key if own.guided else None,
            "noise": noise_sha256 or seed,
            "size": [own.width, own.height],
            "steps": own.steps,
            "cfg": own.cfg,
            "transformer": checkpoint.fingerprint("transformer"),
            "scheduler": checkpoint.fingerprint("scheduler"),
            "dtype": dtype,
            "code": CODE_VERSION,
        }
        unusual: dict[str, Any] = {"cache_steps": own.cache_steps, "shift": own.shift, "sigmas": own.sigmas}
        image = images.find(item.prompt, own)
        if image and image.shape != shape:
            raise UserError(f"the image latents of {item.prompt!r} are {image.shape} where the model needs {shape}")
        if image:
            unusual |= {"image": image.key, "strength": own.strength}
        determined_by |= {name: value for name, value in unusual.items() if value}
        key = keys.key(determined_by)
        jobs.append(
            Job(item, prompt.dtype, own, None if noise_sha256 else seed, array, noise_sha256, image, shape, key)
        )
    return list({job.key: job for job in jobs}.values())  # a prompt written twice is one picture


def resolved(*layers: Settings) -> Resolved:
    return Resolved(*msgspec.structs.astuple(resolve(*layers)))


def _load_noise(path: Path, count: int) -> "list[mx.array]":
    """The rows of `noise` [items, C, h, w], float32, in the order of the manifest's prompts and their seeds."""
    import mlx.core as mx

    if not path.is_file():
        raise UserError(f"--noise {path}: not a readable safetensors file")
    try:
        tensors = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"--noise {path}: not a readable safetensors file ({error})") from None
    if set(tensors) != {"noise"}:
        raise UserError(f"--noise {path} must hold one tensor named noise, not {', '.join(sorted(tensors)) or 'none'}")
    noise = tensors["noise"]
    if noise.dtype != mx.float32 or noise.ndim != 4 or noise.shape[0] != count:
        raise UserError(f"--noise {path} must be float32 [{count}, C, H/8, W/8], not {noise.dtype} {noise.shape}")
    if not mx.isfinite(noise).all().item():
        raise UserError(f"--noise {path} holds NaN or infinite numbers")
    return list(noise)


def _load_embeddings(
    source: Path, manifest: EmbeddingsManifest, jobs: list[Job], config: "TransformerConfig"
) -> "dict[str, mx.array]":
    """prompt_embeds [tokens, dim] by key: verified, finite, and as wide as the transformer wants them."""
    import mlx.core as mx

    listed: dict[str, Embedding] = {embedding.key: embedding for embedding in manifest.embeddings}
    prompts = {}
    for key in {key for job in jobs for key in (job.item.prompt_key, job.item.negative_key)}:
        embedding = listed[key]
        path = source / embedding.file.path
        data = store.read_embeddings(source, embedding)
        prompt_embeds = mx.load(io.BytesIO(data), format="safetensors")["prompt_embeds"]
        if embedding.dim != config.joint_attention_dim:
            raise UserError(f"{path} is {embedding.dim} wide, the transformer wants {config.joint_attention_dim}")
        if not mx.isfinite(prompt_embeds).all().item():
            raise UserError(f"{path} holds NaN or infinite numbers; repair it with `qwen-stage rerun`")
        prompts[key] = prompt_embeds
    return prompts


def _batches(jobs: list[Job], size: int) -> Iterator[list[Job]]:
    """Pictures that can share a pass: neighbours of one size, number of steps and guidance.

    Not where steps are cached: which of them are reused is up to the picture.
    """
    for settings, group in groupby(jobs, key=lambda job: job.settings._replace(seeds=())):
        members, together = list(group), 1 if settings.cache_steps else size
        for start in range(0, len(members), together):
            yield members[start : start + together]


def _states(
    jobs: list[Job], prompts: "dict[str, mx.array]", config: "TransformerConfig", batch_guidance: bool, dtype: str
) -> int:
    """Bytes that a batch takes beside the weights."""
    settings, (_, height, width) = jobs[0].settings, jobs[0].shape
    texts = [sum(len(prompts[job.item.prompt_key]) for job in jobs)]
    if settings.guided:
        texts.append(sum(len(prompts[job.item.negative_key]) for job in jobs))
    passes = [len(jobs) * (height // 2) * (width // 2) + text for text in texts]
    at_work = sum(passes) if batch_guidance else max(passes)
    longest = max(len(prompts[key]) for job in jobs for key in (job.item.prompt_key, job.item.negative_key))
    attended = (height // 2) * (width // 2) + longest
    cached = settings.cache_steps > 0
    return memory.image_states(config, at_work, sum(passes), attended, settings.steps, dtype, cached)


def _lightning_hint(model: str, jobs: list[Job]) -> str | None:
    """What to do, where a checkpoint or a LoRA is by its name made for few steps, and more are to be taken."""
    name = ModelName.parse(model)
    files = [value.rpartition("/")[2] for value in (name.checkpoint, *(value for _, value in name.parts))]
    for found in filter(None, map(LIGHTNING.search, files)):
        steps = int(found[1])
        if any(job.settings.steps != steps or job.settings.guided for job in jobs):
            return f"{found.string} is made for {steps} steps without guidance: --preset lightning-{steps}"
    return None


def _guides_together(jobs: list[Job]) -> bool:
    """Whether prompts and negative prompts had better share a pass."""
    _, height, width = jobs[0].shape
    return has_cuda() and len(jobs) * (height // 2) * (width // 2) <= TOGETHER_TOKENS


def _sigmas(schedule: SchedulerConfig, job: Job) -> Sigmas:
    from stages.models.transformer import PATCH_SIZE

    if job.settings.sigmas:
        return (*job.settings.sigmas, 0.0)
    _, height, width = job.shape
    schedule = schedule.shifted(job.settings.shift) if job.settings.shift else schedule
    return tuple(schedule.sigmas(job.settings.steps, height // PATCH_SIZE * (width // PATCH_SIZE)))


def _denoise_batch(
    transformer: "QwenImageTransformer2DModel",
    sigmas: Sigmas,
    modulations: Table,
    jobs: list[Job],
    image: "np.ndarray | None",
    prompts: "dict[str, mx.array]",
    compute: "mx.Dtype",
    batch_guidance: bool,
    checkpoints: Checkpoints,
    step_done: Callable[[int, int], None],
    resumed_after: Callable[[int], None],
    preview: Preview | None,
) -> "list[np.ndarray]":
    """The final latents [C, h, w] of each job, float32. The jobs share size, steps, guidance and image.

    `sigmas` and `modulations` are those of the steps to take; `image` [C, h, w] is what they begin with, if not noise.
    """
    import mlx.core as mx
    import numpy as np

    from stages.models.step_cache import StepCache
    from stages.models.transformer import pack_latents, unpack_latents

    settings = jobs[0].settings
    _, height, width = jobs[0].shape
    if resumed := checkpoints.resume():
        start, stored = resumed
        latents = pack_latents(mx.array(np.stack(stored)))
        resumed_after(start)
    else:
        begin = mx.stack([_noise(job) for job in jobs])
        if image is not None:
            begin = sigmas[0] * begin + (1 - sigmas[0]) * mx.array(image)
        start, latents = 0, pack_latents(begin)

    reached = {start: latents}  # by the step: the last, and the one to go on from

    def unpacked(step: int) -> "list[np.ndarray]":
        return list(np.array(unpack_latents(reached[step], height, width)))

    prompt_embeds = [[prompts[job.item.prompt_key] for job in jobs]]
    if settings.guided:
        prompt_embeds.append([prompts[job.item.negative_key] for job in jobs])
    if batch_guidance:
        prompt_embeds = [[each for packed in prompt_embeds for each in packed]]
    texts = []
    for packed in prompt_embeds:
        txt_seq_lens = [each.shape[0] for each in packed]
        texts.append(transformer.text(mx.concatenate(packed).astype(compute), txt_seq_lens, height // 2, width // 2))

    steps = len(modulations)
    step_done(start, steps)
    if not start:
        checkpoints.after(0, False, 0, unpacked)
    step_cache = StepCache(settings.cache_steps) if settings.cache_steps else None
    resumable = start
    for i in range(start, steps):
        predictions = transformer(latents.astype(compute), texts, modulations[i], step_cache)
        velocity = mx.concatenate(predictions).astype(mx.float32)
        if settings.guided:
            positive, negative = velocity.split(2)
            velocity = guided(positive, negative, settings.cfg)
        latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity
        mx.eval(latents)
        if step_cache is None:
            resumable = i + 1
        elif not step_cache.reused:  # what follows may reuse what this step computed
            resumable = i
        reached = {step: reached[step] for step in reached if step == resumable} | {i + 1: latents}
        step_done(i + 1, steps)
        checkpoints.after(i + 1, i + 1 == steps, resumable, unpacked)
        if preview and preview.is_due():  # where a straight line from here would end
            final = latents[:1] - sigmas[i + 1] * velocity[:1]
            preview.show(np.array(unpack_latents(final, height, width))[0])
    return unpacked(steps)


def _say_resumed(notice: Notice, label: str, step: int) -> None:
    notice(f"{label} goes on after step {step}")


def _noise(job: Job) -> "mx.array":
    """[C, h, w] float32, from the job's seed alone or as injected."""
    import mlx.core as mx

    return mx.random.normal(job.shape, mx.float32, key=mx.random.key(job.seed)) if job.noise is None else job.noise


def guided(positive: "mx.array", negative: "mx.array", true_cfg_scale: float) -> "mx.array":
    """Classifier-free guidance, each token rescaled to the norm of its positive prediction. All [B, S, C] float32."""
    import mlx.core as mx

    combined = negative + true_cfg_scale * (positive - negative)
    norm, wanted = (mx.linalg.norm(x, axis=-1, keepdims=True) for x in (combined, positive))
    return combined * mx.where(norm > 0, wanted / norm, 0)


def _latents_item(
    job: Job, files: tuple[File, ...], trajectory: tuple[File, ...], cost: Cost, dtype: str
) -> LatentsItem:
    return LatentsItem(
        key=job.key,
        prompt=job.item.prompt,
        negative_prompt=job.item.negative_prompt,
        prompt_key=job.item.prompt_key,
        negative_key=job.item.negative_key if job.settings.guided else None,
        name=job.item.name,
        seed=job.seed,
        noise_sha256=job.noise_sha256,
        width=job.settings.width,
        height=job.settings.height,
        num_inference_steps=job.settings.steps,
        true_cfg_scale=job.settings.cfg,
        cache_steps=job.settings.cache_steps or None,
        shift=job.settings.shift or None,
        sigmas=job.settings.sigmas or None,
        image=job.settings.image or None,
        strength=job.settings.strength if job.settings.image else None,
        embeddings_dtype=job.embeddings_dtype,
        dtype=dtype,
        shape=job.shape,
        files=files,
        trajectory=trajectory,
        cost=cost,
    )

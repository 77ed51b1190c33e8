"""Checkpoints on the Hugging Face hub: what of them is in its cache, and fetching what a stage needs.

`huggingface_hub` does the work, and so its settings count: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
"""

import shutil
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from artifacts_schema.errors import Unavailable, UserError
from stages.measure import Notice, Report, gigabytes
from stages.tensors import shown

COMPONENTS = {"encode": ("tokenizer", "text_encoder"), "denoise": ("scheduler", "transformer"), "decode": ("vae",)}
WITHOUT_WEIGHTS = ("scheduler", "tokenizer")
DESCRIPTIONS = ("model_index.json", "qwen-stage.json")  # of the whole model, where it has them
# what is there of a model that is there: mflux writes no model_index.json
SIGNS = (DESCRIPTIONS[0], *(f"{name}/model.safetensors.index.json" for name in ("transformer", "text_encoder", "vae")))
SUFFIXES = (".json", ".txt", ".safetensors")  # what a component's files end with; others are for other programs
LEFTOVER_SECONDS = 3600  # without a change, and nobody is writing that half of a file any more


class Repository(NamedTuple):
    id: str
    revision: str | None = None  # None: its main branch

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


def repository(name: str) -> Repository | None:
    """ "owner/name" or "owner/name@revision"; None for what no repository is called."""
    id, _, revision = name.partition("@")
    if id.count("/") != 1 or id.startswith((".", "/", "~")) or id.endswith("/") or (not revision and "@" in name):
        return None
    return Repository(id, revision or None)


class RemoteFile(NamedTuple):
    repository: Repository
    name: str

    def __str__(self) -> str:
        revision = f"@{self.repository.revision}" if self.repository.revision else ""
        return f"{self.repository.id}/{self.name}{revision}"


def remote_file(said: str) -> RemoteFile | None:
    """ "owner/name/file.safetensors" or "owner/name/directory/file.safetensors@revision"; None for what is neither."""
    path, _, revision = said.partition("@")
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name and file.endswith(".safetensors")) or owner.startswith((".", "~")):
        return None
    return RemoteFile(Repository(f"{owner}/{name}", revision or None), file)


def cached_file(file: RemoteFile) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(file.repository.id, file.name, revision=file.repository.revision)
    except HFValidationError as error:
        raise Unavailable(f"{str(file)!r} is neither a file here nor one on the hub: {error}") from None
    return Path(found) if isinstance(found, str) else None


def fetch_file(file: RemoteFile, report: Report, notice: Notice) -> Path:
    """Downloads one file, unless the cache has it."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if found := cached_file(file):
        return found
    with _in_plain_words(file.repository):
        info = HfApi().model_info(file.repository.id, revision=file.repository.revision, files_metadata=True)
        sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
        if file.name not in sizes:
            others = [name for name in sizes if name.endswith(".safetensors")]
            there = f"it has {shown(others)}" if others else "nor any other safetensors file"
            raise Unavailable(f"{file.repository} has no {file.name} on the hub; {there}")
        _check_room(file.repository, sizes[file.name])
        notice(f"downloading {gigabytes(sizes[file.name])}: {file}, into {constants.HF_HUB_CACHE}")
        directory = snapshot_download(
            file.repository.id,
            revision=file.repository.revision,
            allow_patterns=[file.name],
            tqdm_class=_progress(report, sizes[file.name]),
        )
    return Path(directory) / file.name


def cached(repository: Repository) -> Path | None:
    """Where the hub's cache has it, or some of it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        for name in SIGNS:
            found = try_to_load_from_cache(repository.id, name, revision=repository.revision)
            if isinstance(found, str):
                return Path(found.removesuffix(name))
    except HFValidationError as error:
        raise Unavailable(f"unknown model {str(repository)!r}: {error}") from None
    return None


def needed(stages: Iterable[str], without: Container[str] = ()) -> tuple[str, ...]:
    """The components that stages need, but for those that come from elsewhere."""
    return tuple(component for stage in stages for component in COMPONENTS[stage] if component not in without)


def has_files(repository: Repository, components: Iterable[str]) -> bool:
    """Whether the cache has all of these components, as far as `huggingface_hub` knows what that is."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [f"{component}/*{end}" for component in components for end in SUFFIXES]
    try:
        snapshot_download(repository.id, revision=repository.revision, allow_patterns=patterns, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True


def fetch(repository: Repository, components: tuple[str, ...], report: Report, notice: Notice) -> Path:
    """Downloads what the cache lacks of these components. Files that have arrived do not come again."""
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache

    with _in_plain_words(repository):
        info = HfApi().model_info(repository.id, revision=repository.revision, files_metadata=True)
        sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
        wanted = {name: size for name, size in sizes.items() if _is_needed(name, components)}
        for component in components:
            if component != "scheduler" and not any(name.startswith(f"{component}/") for name in wanted):
                raise Unavailable(
                    f"{repository} has no {component}/ on the hub; is it a Qwen-Image model for diffusers?"
                )
        missing = {
            name: size
            for name, size in wanted.items()
            if not isinstance(try_to_load_from_cache(repository.id, name, revision=info.sha), str)
        }
        total = sum(missing.values())
        _check_room(repository, total)
        if total:
            what = " and ".join(dict.fromkeys(name.partition("/")[0] for name in missing if "/" in name))
            place = constants.HF_HUB_CACHE
            notice(f"downloading {gigabytes(total)} of {repository}{f': {what}' if what else ''}, into {place}")
        directory = snapshot_download(
            repository.id,
            revision=repository.revision,
            allow_patterns=list(wanted),
            tqdm_class=_progress(report, total),
        )
    _clear_leftovers(Path(directory).parent.parent / "blobs")
    return Path(directory)


def _check_room(repository: Repository, needed: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(_existing(cache)).free
    if needed > free:
        raise UserError(f"{repository} needs {gigabytes(needed)} more, {gigabytes(free)} are free in {cache}")


def _clear_leftovers(blobs: Path) -> None:
    """Removes the halves of files that killed downloads have left: `huggingface_hub` begins such a file anew."""
    for path in blobs.glob("*.incomplete"):
        with suppress(OSError):  # others clear up as well
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


def _is_needed(name: str, components: Container[str]) -> bool:
    directory, _, file = name.rpartition("/")
    if name in DESCRIPTIONS:
        return True
    return file.endswith(SUFFIXES) and directory in components


def _progress(report: Report, total: int) -> Any:
    """What `huggingface_hub` takes for its progress bars: of those that count bytes, the furthest counts."""
    from tqdm.auto import tqdm

    furthest = 0

    class Progress(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts, self.done = kwargs.get("unit") == "B", 0
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest
            self.done += int(n or 0)
            if self.counts and self.done > furthest:
                furthest = self.done
                report("download, MB", min(furthest, total) // 10**6, max(1, total // 10**6))

    return Progress


@contextmanager
def _in_plain_words(repository: Repository) -> Iterator[None]:
    from huggingface_hub import constants, errors

    again = "; files that have arrived are kept: start again"
    try:
        yield
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{repository.id}"
        raise Unavailable(f"{repository.id} is gated: accept its terms at {page}, then `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise Unavailable(
            f"unknown model {str(repository)!r}: no directory here, and the hub has none of that name, "
            "or it is private: `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise Unavailable(f"{repository.id} has no revision {repository.revision!r}") from None
    except errors.HFValidationError as error:
        raise Unavailable(f"unknown model {str(repository)!r}: {error}") from None
    except errors.OfflineModeIsEnabled:
        raise Unavailable(
            f"unknown model {str(repository)!r}: no directory here, not (or not all of it) in the Hugging Face cache, "
            "and HF_HUB_OFFLINE forbids a download"
        ) from None
    except errors.HfHubHTTPError as error:
        answer = error.response.status_code if error.response is not None else error
        raise Unavailable(f"{repository}: the hub at {constants.ENDPOINT} answered {answer}{again}") from None
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # connections break in as many ways as there are layers below
        raise Unavailable(f"{repository} cannot be downloaded from {constants.ENDPOINT}: {error}{again}") from None


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)

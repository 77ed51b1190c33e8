"""The models on this machine: which there are, and what of each."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from artifacts_schema.errors import UserError
from stages import hub
from stages.checkpoint import COMPONENTS, Checkpoint, open_checkpoint, weight_files
from stages.measure import gigabytes
from stages.model_name import DEMO, default
from stages.tensors import tensors_of

CHOSEN = "; used where none is named"
PIPELINE = "QwenImage"  # what the classes begin with that model_index.json may name


def listed() -> Iterator[str]:
    """A line for the demo, and for each Qwen-Image in the Hugging Face cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    chosen = default()
    yield f"{DEMO}: {_stages(open_checkpoint(DEMO))}{CHOSEN if chosen == DEMO else ''}"
    try:
        repositories = sorted(scan_cache_dir().repos, key=lambda each: each.repo_id)
    except CacheNotFound:
        return
    for repository in repositories:
        for revision in sorted(repository.revisions, key=lambda each: each.last_modified, reverse=True):
            if repository.repo_type == "model" and _is_qwen_image(revision.snapshot_path):
                named = "main" in revision.refs
                name = repository.repo_id if named else f"{repository.repo_id}@{revision.commit_hash}"
                size = gigabytes(revision.size_on_disk)
                stages = _stages(Checkpoint(name, revision.snapshot_path))
                yield f"{name}: {stages}, {size}{CHOSEN if chosen == name else ''}"


def shown(model: str | None) -> Iterator[str]:
    """What a checkpoint's components are, and whether they are here, whole."""
    checkpoint = open_checkpoint(model)
    yield f"{checkpoint.name}: {checkpoint.directory}"
    for component in COMPONENTS:
        if not checkpoint.has(component):
            yield f"  {component:12} not here"
        elif component in hub.WITHOUT_WEIGHTS:
            files = sorted(path.name for path in checkpoint.component(component).iterdir())
            yield f"  {component:12} {', '.join(files)}"
        else:
            yield f"  {component:12} {_weights(checkpoint.component(component))}"


def _weights(directory: Path) -> str:
    try:
        files = weight_files(directory)
    except UserError as error:
        return str(error)
    tensors = tensors_of(files).values()
    kinds = Counter[str]()
    for tensor in tensors:
        kinds[tensor.dtype] += tensor.size
    formats = ", ".join(f"{gigabytes(size)} of {kind}" for kind, size in kinds.most_common())
    return f"{formats}, {len(tensors)} tensors in {len(files)} file{'s' if len(files) > 1 else ''}"


def _stages(checkpoint: Checkpoint) -> str:
    whole = [stage for stage, parts in hub.COMPONENTS.items() if all(checkpoint.has(part) for part in parts)]
    missing = [stage for stage in hub.COMPONENTS if stage not in whole]
    return ", ".join([*whole, *(f"not {stage}" for stage in missing)])


def _is_qwen_image(directory: Path) -> bool:
    try:
        return str(json.loads((directory / "model_index.json").read_bytes())["_class_name"]).startswith(PIPELINE)
    except (OSError, ValueError, KeyError, TypeError):
        return False

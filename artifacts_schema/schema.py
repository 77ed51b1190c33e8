"""JSON Schema of what is on disk: `python -m artifacts_schema.schema > artifacts_schema/schema.json`"""

import msgspec

from artifacts_schema.jobs import Ended, Job, Trouble
from artifacts_schema.manifests import (
    EmbeddingsManifest,
    ImageLatentsManifest,
    ImagesManifest,
    LatentsManifest,
    Recipe,
)


def schema() -> bytes:
    kinds = (EmbeddingsManifest, ImageLatentsManifest, LatentsManifest, ImagesManifest, Recipe, Job, Trouble, Ended)
    roots, components = msgspec.json.schema_components(kinds)
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "anyOf": list(roots),
        "$defs": {name: components[name] for name in sorted(components)},
    }
    text = msgspec.json.encode(whole).replace(b"#/components/schemas/", b"#/$defs/")
    return msgspec.json.format(text, indent=1) + b"\n"


if __name__ == "__main__":
    print(schema().decode(), end="")

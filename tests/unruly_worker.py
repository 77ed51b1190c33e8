"""A worker that does as it is told by prompts: what they hold decides whether it dies, hangs or fails.

`python unruly_worker.py STAGE` stands in for `qwen-stage work STAGE`; what is not asked for here is done as always.

    @STAGE:kill        it is killed, every time
    @STAGE:kill-once   it is killed the first time (a file beside the run remembers)
    @STAGE:hang        it stops saying anything
    @STAGE:full-once   the disk is full, the first time
    @STAGE:error       a file cannot be written
    @STAGE:bug         an exception that nobody expected
    @STAGE:flood-once  it logs more than anybody wants to read
    @STAGE:scribble    it writes into the pipe of its answers

`python unruly_worker.py --deaf STAGE` says that it is ready and listens to nothing.
"""

import errno
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from artifacts_schema import store
from artifacts_schema.manifests import EmbeddingsManifest, LatentsManifest
from orchestrator import cli
from orchestrator.progress import Voice
from orchestrator.worker import obey


def prompts_of(args) -> list[str]:
    """The prompts that an order is about."""
    payload = sys.stdin.read()
    sys.stdin.seek(0)
    if args.command is cli._encode:
        return re.findall(r"@\S+", payload)
    run = args.embeddings if args.command is cli._denoise else args.latents
    kind = EmbeddingsManifest if args.command is cli._denoise else LatentsManifest
    manifest, _ = store.read_manifest(store.find(run, kind), kind)
    keys = {item.prompt_key if args.command is cli._denoise else item.key: item.prompt for item in manifest.items}
    return [prompt for key, prompt in keys.items() if key in payload]


def misbehave(what: str, stage: str, run: Path) -> None:
    if what.endswith("-once"):
        mark = run.parent / f".{run.name}-{stage}-{what}"
        if mark.exists():
            return
        mark.touch()
    match what.removesuffix("-once"):
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(600)
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
        case "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO), "somewhere")
        case "flood":
            for _ in range(100_000):
                os.write(2, b"a line that nobody wants to read\n" * 10)
        case "scribble":
            for descriptor in range(3, 64):
                with suppress(OSError):
                    if "pipe" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
                        os.write(descriptor, b"\xffnot an answer\n")
        case "bug":
            raise ZeroDivisionError("nobody thought of that")


def perform(arguments: list[str], voice: Voice) -> int:
    args = cli._parser().parse_args(arguments)
    args.voice = voice
    stage = args.command.__name__.removeprefix("_")
    if stage == "fit_preview":
        return args.command(args)
    run = args.out if stage == "encode" else args.embeddings if stage == "denoise" else args.latents
    for prompt in prompts_of(args):
        if found := re.search(rf"@{stage}:([a-z-]+)", prompt):
            misbehave(found[1], stage, run)
    return args.command(args)


if __name__ == "__main__":
    if "--deaf" in sys.argv:
        os.write(1, b'{"type":"ready"}\n')
        time.sleep(600)
    cli._SIGNALS.install()
    sys.exit(obey(lambda: None, perform))

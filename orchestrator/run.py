"""Starts the stages as processes of their own, one after the other, and passes on how they ended."""

import signal
import subprocess
import sys

from artifacts_schema.manifests import split
from orchestrator import EXIT_INTERRUPTED

# -P: a folder named `stages` where the user happens to be must not be imported instead of ours
COMMAND = [sys.executable, "-P", "-m", "orchestrator.cli"]


def stage(name: str, *arguments: str, stdin: bytes = b"") -> tuple[int, list[str]]:
    """Runs `qwen-stage NAME ARGUMENTS` in a new process. Returns its exit code and the lines it printed on stdout.

    stderr, with progress and errors, goes where the parent's goes. An interruption is handed on and waited for.
    """
    child = subprocess.Popen([*COMMAND, name, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        output, _ = child.communicate(stdin)
    except KeyboardInterrupt:
        # the terminal tells both, whoever signals the parent tells only that; and SIGINT may be ignored, as in scripts
        child.send_signal(signal.SIGTERM)
        child.wait()
        return EXIT_INTERRUPTED, []
    if child.returncode < 0:
        reason = signal.Signals(-child.returncode).name
        hint = " (out of memory?)" if reason == "SIGKILL" else ""
        print(f"qwen-stage: {name} was killed by {reason}{hint}; what was finished is kept", file=sys.stderr)
        return 128 - child.returncode, []
    return child.returncode, output.decode("utf-8", "surrogateescape").split("\n")[:-1]


def precision(recorded: str | None) -> list[str]:
    """What a manifest calls dtype, as options of a stage: bfloat16-q4 -> --dtype=bfloat16 --quantize=4."""
    if recorded is None:
        return []
    dtype, bits = split(recorded)
    return [f"--dtype={dtype}"] if bits is None else [f"--dtype={dtype}", f"--quantize={bits}"]

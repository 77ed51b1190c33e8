"""Starts the stages as processes of their own, one after the other, and passes on how they ended."""

import signal
import subprocess
import sys


def stage(*arguments: str, stdin: bytes | None = None) -> tuple[int, list[str]]:
    """Runs `qwen-stage ARGUMENTS` in a new process. Returns its exit code and the lines it printed on stdout.

    stderr, with progress and errors, goes where the parent's goes. An interruption is handed on, and waited for.
    """
    # -P: a folder named `stages` where the user happens to be must not be imported instead of ours
    command = [sys.executable, "-P", "-m", "orchestrator.cli", *arguments]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        output, _ = child.communicate(stdin or b"")
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)
        child.wait()
        raise
    code = child.returncode
    return (128 - code if code < 0 else code), output.decode().splitlines()

"""Starts the stages as processes of their own, one after the other, and passes on how they ended."""

import signal
import subprocess
import sys


def stage(*arguments: str, stdin: bytes | None = None) -> tuple[int, list[str]]:
    """Runs `qwen-stage ARGUMENTS` in a new process. Returns its exit code and the lines it printed on stdout.

    stderr, with progress and errors, goes where the parent's goes. An interruption is handed on and waited for; a
    second one kills.
    """
    # -P: a folder named `stages` where the user happens to be must not be imported instead of ours
    command = [sys.executable, "-P", "-m", "orchestrator.cli", *arguments]
    # a process group of its own: Ctrl-C reaches it once, from here, and not a second time from the terminal
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
    try:
        output, _ = child.communicate(stdin or b"")
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)
        try:
            child.wait()
        except KeyboardInterrupt:
            child.kill()
        raise
    code = child.returncode
    return (128 - code if code < 0 else code), output.decode().splitlines()

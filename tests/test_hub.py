"""Models from the hub: a real client against a server on loopback that speaks the hub's protocol, and breaks."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import loras
import other_layouts
import pytest
from hub_server import COMMIT, Hub

from stages import hub

NAME = "Qwen/Qwen-Image-Test"


@pytest.fixture
def served(tmp_path, small_model):
    directory = shutil.copytree(small_model, tmp_path / "repository")
    (directory / "README.md").write_text("not needed")
    (directory / "vae" / "readme.bin").write_bytes(b"not needed")
    with Hub(NAME, directory) as server:
        yield server


@pytest.fixture
def client(tmp_path, served):
    """client(arguments): a process of qwen-stage that knows only that hub; `popen` starts it without waiting."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": served.endpoint, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}

    def start(*arguments, **more):
        command = [sys.executable, "-P", "-m", "orchestrator.cli", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment | more, **pipes)

    def run(*arguments, **more):
        process = start(*arguments, **more)
        out, err = process.communicate(timeout=120)
        return process.returncode, out.splitlines(), err

    run.popen = start
    return run


def fetched(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def needed(served: Hub, *stages: str) -> dict[str, bytes]:
    whole = {name: path.read_bytes() for name, path in served.files().items()}
    return {name: data for name, data in whole.items() if hub._is_needed(name, hub.needed(stages))}


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_names():
    assert hub.repository("a/b") == ("a/b", None)
    assert hub.repository("a/b@v1") == ("a/b", "v1")
    assert str(hub.repository("a/b@v1")) == "a/b@v1"
    for name in ("a", "a/b/c", "./a", "/a", "~/a", "../a", "a/", "a/b@", ""):
        assert hub.repository(name) is None


def test_only_what_a_stage_needs(client, served):
    code, (directory,), err = client("models", "pull", NAME, "--stage", "decode")
    assert code == 0, err
    assert f"of {NAME}: vae, into" in err
    assert fetched(Path(directory)) == needed(served, "decode")
    assert not [path for method, path in served.asked if "transformer" in path or "text_encoder" in path]
    assert "vae/readme.bin" not in fetched(Path(directory))
    code, lines, _ = client("models", "list")
    assert any(line.startswith(f"{NAME}: decode, not encode, not denoise, ") for line in lines)
    before = len(served.asked)
    code, (directory,), err = client("models", "pull", NAME)
    assert f"of {NAME}: scheduler and text_encoder and tokenizer and transformer, into" in err
    assert fetched(Path(directory)) == needed(served, *hub.COMPONENTS)
    assert not [path for method, path in served.asked[before:] if method == "GET" and "/vae/" in path]
    code, _, err = client("models", "pull", NAME)
    assert (code, "downloading" in err) == (0, False)


def test_stages_fetch_what_they_need_and_then_no_more(client, served, tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    stages = {
        "encode": ["encode", "p.txt", "--out=run", f"--model={NAME}"],
        "denoise": ["denoise", "--embeddings=run", "--size=32x32", "--steps=1"],
        "decode": ["decode", "run"],
    }
    for stage, command in stages.items():
        served.asked.clear()
        code, lines, err = client(*command)
        assert code == 0, err
        assert "downloading" in err
        got = {path.split("/")[5] for method, path in served.asked if method == "GET" and "/resolve/" in path}
        assert got <= {*hub.COMPONENTS[stage], *hub.DESCRIPTIONS}
    picture = (tmp_path / lines[0]).read_bytes()
    served.asked.clear()
    shutil.rmtree(tmp_path / "run")
    for command in stages.values():
        code, lines, err = client(*command, QWEN_STAGE_CACHE=str(tmp_path / "other"), HF_HUB_OFFLINE="1")
        assert (code, "downloading" in err) == (0, False), err
    assert (tmp_path / lines[0]).read_bytes() == picture
    assert served.asked == []


def test_a_repository_of_mflux(client, tmp_path):
    """It has no configs, no schedule and no model_index.json."""
    original = other_layouts.write(tmp_path / "original", 1)
    with Hub(NAME, other_layouts.write_mflux(original, tmp_path / "mflux", lambda layer: 4)) as hub:
        (tmp_path / "p.txt").write_text("a\n")
        stages = [
            ["encode", "p.txt", "--out=run", f"--model={NAME}"],
            ["denoise", "--embeddings=run", "--size=32x32", "--steps=1"],
            ["decode", "run"],
        ]
        for command in stages:
            code, lines, err = client(*command, HF_ENDPOINT=hub.endpoint)
            assert code == 0, err
        picture = (tmp_path / lines[0]).read_bytes()
        hub.asked.clear()
        shutil.rmtree(tmp_path / "run")
        for command in stages:
            code, lines, err = client(*command, HF_HUB_OFFLINE="1", QWEN_STAGE_CACHE=str(tmp_path / "other"))
            assert code == 0, err
        assert ((tmp_path / lines[0]).read_bytes(), hub.asked) == (picture, [])


def test_a_component_that_comes_from_elsewhere_is_not_fetched(client, served, tmp_path, small_model):
    (tmp_path / "p.txt").write_text("a\n")
    parts = [f"--{part.replace('_', '-')}={small_model / part}" for part in ("text_encoder", "transformer", "vae")]
    assert client("encode", "p.txt", "--out=run", f"--model={NAME}", *parts)[0] == 0
    assert client("denoise", "--embeddings=run", "--size=32x32", "--steps=1")[0] == 0
    code, _, err = client("decode", "run")
    assert code == 0, err
    assert not [path for _, path in served.asked if path.endswith(".safetensors")]


def test_a_lora(client, served, tmp_path, small_model):
    loras.write(served.directory / "few-steps.safetensors", loras.drawn(small_model, 1))
    (tmp_path / "p.txt").write_text("a\n")
    assert client("encode", "p.txt", "--out=run", f"--model={NAME}", f"--lora={NAME}/few-steps.safetensors")[0] == 0
    assert not [path for _, path in served.asked if "few-steps" in path]  # encode needs none
    code, _, err = client("denoise", "--embeddings=run", "--size=32x32", "--steps=1")
    assert code == 0, err
    assert f"downloading 0 MB: {NAME}/few-steps.safetensors, into" in err
    served.asked.clear()
    again = ["denoise", "--embeddings=run", "--size=32x32", "--steps=2"]
    code, _, err = client(*again, HF_HUB_OFFLINE="1")
    assert (code, served.asked) == (0, []), err
    for file, words in ("none.safetensors", "has no none.safetensors on the hub; it has"), ("x.safetensors@v2", "v2"):
        code, _, err = client(*again, f"--lora={NAME}/{file}")
        assert (code, words in one_line(err)) == (2, True), err
    code, _, err = client(*again, f"--lora={NAME}/other.safetensors", HF_HUB_OFFLINE="1")
    assert (code, "HF_HUB_OFFLINE forbids" in one_line(err)) == (2, True), err


def test_a_revision(client, served):
    assert Path(client("models", "pull", f"{NAME}@v1", "--stage=decode")[1][0]).name == COMMIT
    assert client("models", "show", f"{NAME}@v1")[0] == 0
    code, _, err = client("models", "pull", f"{NAME}@v2")
    assert (code, f"{NAME} has no revision 'v2'" in one_line(err)) == (2, True)


def test_killed_at_random_and_resumed(client, served, tmp_path):
    """Files that have arrived do not come again, and halves of others do not stay for ever."""
    weights = served.directory / "transformer" / "diffusion_pytorch_model.safetensors"
    served.bytes_a_second = 2 * weights.stat().st_size
    arrived: set[str] = set()
    draw = random.Random()
    for _ in range(6):
        process = client.popen("models", "pull", NAME)
        before = len(served.asked)
        while process.poll() is None and not any(m == "GET" and "/resolve/" in p for m, p in served.asked[before:]):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.4))
        process.kill()
        process.communicate()
        again = {path for method, path in served.asked[before:] if method == "GET"} & arrived
        assert not again
        snapshot = tmp_path / f"hf/hub/models--Qwen--Qwen-Image-Test/snapshots/{COMMIT}"
        arrived |= {f"/{NAME}/resolve/{COMMIT}/{name}" for name in fetched(snapshot)}
    served.bytes_a_second = None
    for leftover in (tmp_path / "hf").rglob("*.incomplete"):
        os.utime(leftover, (0, 0))
    code, (directory,), err = client("models", "pull", NAME)
    assert code == 0, err
    assert fetched(Path(directory)) == needed(served, *hub.COMPONENTS)
    assert not list((tmp_path / "hf").rglob("*.incomplete"))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            (404, "RepoNotFound"),
            "unknown model 'Qwen/Qwen-Image-Test': no directory here, and the hub has none of that name, or it is",
        ),
        ((401, "RepoNotFound"), "`hf auth login`"),
        ((403, "GatedRepo"), "Qwen/Qwen-Image-Test is gated: accept its terms at http://127.0.0.1"),
        ((503, ""), "answered 503; files that have arrived are kept: start again"),
        ((500, ""), "answered 500"),
    ],
)
def test_answers_in_plain_words(client, served, fault, words):
    served.fault = lambda method, path: fault
    code, _, err = client("models", "pull", NAME)
    assert code == 2
    assert words in one_line(err)
    assert "qwen-stage: error: " in err


def test_a_connection_that_breaks_and_one_that_is_refused(client, served, tmp_path):
    broken = []

    def fault(method, path):
        if method == "GET" and path.endswith("vae/diffusion_pytorch_model.safetensors"):
            broken.append(path)
            return 1000
        return None

    served.fault = fault
    code, _, err = client("models", "pull", NAME, "--stage=decode")
    assert code == 2
    assert "files that have arrived are kept" in one_line(err)
    assert broken
    served.fault = lambda method, path: None
    code, (directory,), err = client("models", "pull", NAME, "--stage=decode")
    assert code == 0
    assert fetched(Path(directory)) == needed(served, "decode")
    code, _, err = client("models", "pull", "other/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert (code, "cannot be downloaded from http://127.0.0.1:9" in one_line(err)) == (2, True)
    code, _, err = client("models", "pull", "other/model", HF_HUB_OFFLINE="1")
    assert (code, "HF_HUB_OFFLINE forbids" in one_line(err)) == (2, True)


def test_a_file_of_the_wrong_size(client, served):
    served.size_said["vae/diffusion_pytorch_model.safetensors"] = 10**6
    code, _, err = client("models", "pull", NAME, "--stage=decode")
    assert code == 2
    one_line(err)
    del served.size_said["vae/diffusion_pytorch_model.safetensors"]


def test_more_than_the_disk_has(client, served):
    served.size_said["transformer/diffusion_pytorch_model.safetensors"] = 10**18
    code, _, err = client("models", "pull", NAME)
    assert code == 2
    assert f"{NAME} needs 1000000000.0 GB more" in one_line(err)
    assert not [path for method, path in served.asked if "/resolve/" in path]


def test_what_is_no_qwen_image(client, served):
    shutil.rmtree(served.directory / "vae")
    code, _, err = client("models", "pull", NAME)
    assert (code, f"{NAME} has no vae/ on the hub" in one_line(err)) == (2, True)
    code, _, err = client("models", "pull", "no-owner")
    assert (code, "those are OWNER/NAME" in one_line(err)) == (2, True)

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts_schema.errors import UserError
from artifacts_schema.manifests import Settings
from artifacts_schema.prompts import Entry, Prompt, check_settings, parse_prompts, parse_size, resolve, to_jsonl


def parse(data: bytes, format: str = "txt") -> list[Prompt]:
    return parse_prompts(data, format, "prompts")


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_txt(bom, newline):
    lines = ["# a comment", "a red circle", "", "  ", "画 # not a comment  ", "# another"]
    data = bom + newline.join(lines).encode()
    assert [prompt.prompt for prompt in parse(data)] == ["a red circle", "画 # not a comment"]


def test_toml_defaults_and_own_settings():
    data = b"""
    negative_prompt = "blurry"
    seeds = [1, 2]
    size = "64x96"
    [[prompts]]
    prompt = "first"
    [[prompts]]
    prompt = "second"
    name = "two"
    seed = 7
    size = "128x64"
    steps = 9
    cfg = 2
    negative_prompt = ""
    """
    first, second = parse(data, "toml")
    assert first == Prompt(
        prompt="first", negative_prompt="blurry", settings=Settings(seeds=(1, 2), width=64, height=96)
    )
    assert second == Prompt(
        prompt="second",
        negative_prompt="",
        name="two",
        settings=Settings(seeds=(7,), width=128, height=64, num_inference_steps=9, true_cfg_scale=2.0),
    )


def test_jsonl():
    data = b'{"prompt": "a"}\r\n\n{"prompt": "b\\nc", "seeds": [3], "cfg": 0}\n'
    first, second = parse(data, "jsonl")
    assert first == Prompt(prompt="a")
    assert second == Prompt(prompt="b\nc", settings=Settings(seeds=(3,), true_cfg_scale=0.0))


@pytest.mark.parametrize(
    ("data", "format", "message"),
    [
        (b"", "txt", "no prompts"),
        (b"# only a comment\n\n", "txt", "no prompts"),
        (b"fine\nalso fine\nbad \xff byte", "txt", "line 3: not UTF-8"),
        (b"fine\nNUL \x00 here", "txt", "line 2: holds a NUL byte"),
        (b'{"prompt": "a"}\n{"promt": "b"}', "jsonl", "line 2: .*promt"),
        (b'{"negative_prompt": "b"}', "jsonl", "line 1: .*prompt"),
        (b'{"prompt": "a", "seed": 1, "seeds": [2]}', "jsonl", "line 1: give either seed or seeds"),
        (b'{"prompt": "a", "seeds": [5, 4, 5]}', "jsonl", "line 1: seed 5 is given twice"),
        (b'{"prompt": "a", "seeds": []}', "jsonl", "line 1: no seeds"),
        (b'{"prompt": "a", "seed": -1}', "jsonl", "line 1: seed -1"),
        (b'{"prompt": "a", "seed": 1.5}', "jsonl", "line 1: "),
        (b'{"prompt": "a", "steps": 0}', "jsonl", "line 1: steps must be at least 1"),
        (b'{"prompt": "a", "size": "64"}', "jsonl", "line 1: size '64' is not WIDTHxHEIGHT"),
        (b'{"prompt": "a", "cfg": NaN}', "jsonl", "line 1: "),
        (b"[" * 100_000, "jsonl", "line 1: "),
        (b'prompt = "a"', "toml", "no .*prompts"),
        (b'prompts = "a"', "toml", r"\[\[prompts\]\] tables"),
        (b'cfg = inf\n[[prompts]]\nprompt = "a"', "toml", "prompt 1: cfg must be a finite number"),
        (b'[[prompts]]\nprompt = "a"\nsizes = "64x64"', "toml", "prompt 1: .*sizes"),
        (b"[[prompts]\n", "toml", "prompts: .*line 1"),
        (b'steps = %s\n[[prompts]]\nprompt = "a"' % (b"9" * 5000), "toml", "prompts: "),
        (b'{"prompt": "a", "steps": 1001}', "jsonl", "line 1: steps must be .* at most 1000"),
        (b"a = " + b"[" * 100_000, "toml", "prompts: "),
    ],
)
def test_bad_files_are_named_in_one_line(data, format, message):
    with pytest.raises(UserError, match=message) as error:
        parse(data, format)
    assert "\n" not in str(error.value)


@given(st.binary(max_size=300), st.sampled_from(["txt", "toml", "jsonl"]))
def test_any_bytes_give_prompts_or_a_user_error(data, format):
    try:
        prompts = parse(data, format)
    except UserError:
        return
    assert prompts


@given(st.lists(st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="#"), min_size=1), min_size=1))
def test_txt_keeps_every_prompt(texts):
    assert [prompt.prompt for prompt in parse("\n".join(texts).encode())] == texts


finite = st.floats(allow_nan=False, allow_infinity=False)
entries = st.builds(
    Entry,
    prompt=st.text(),
    negative_prompt=st.none() | st.text(),
    seeds=st.none() | st.lists(st.integers(0, 2**64 - 1), min_size=1, unique=True),
    size=st.none() | st.just("640x480"),
    steps=st.none() | st.integers(1, 100),
    cfg=st.none() | finite,
    cache_steps=st.none() | st.floats(0, 1),
    shift=st.none() | st.floats(0, 10),
)


@given(st.lists(entries, min_size=1, max_size=4))
def test_jsonl_round_trip(written):
    """What `run` hands to `encode` arrives as it was, whatever the prompt holds."""
    for entry, prompt in zip(written, parse(to_jsonl(written), "jsonl"), strict=True):
        assert (prompt.prompt, prompt.negative_prompt) == (entry.prompt, entry.negative_prompt)
        assert prompt.settings.seeds == (tuple(entry.seeds) if entry.seeds else None)
        assert prompt.settings.true_cfg_scale == entry.cfg
        assert (prompt.settings.cache_steps, prompt.settings.shift) == (entry.cache_steps, entry.shift)


@pytest.mark.parametrize("text", ["1024x768", "1024X768", " 1024×768 "])
def test_size(text):
    assert parse_size(text) == (1024, 768)


@pytest.mark.parametrize("text", ["", "x", "1024", "0x16", "-16x16", "16x16x16", "1e3x16", "9999999x16"])
def test_bad_size(text):
    with pytest.raises(UserError, match="WIDTHxHEIGHT"):
        parse_size(text)


levels = st.lists(st.floats(0.01, 1), min_size=1, max_size=5, unique=True).map(lambda x: tuple(sorted(x, reverse=True)))
layers = st.builds(
    Settings,
    num_inference_steps=st.none() | st.integers(1, 9),
    shift=st.none() | st.floats(0, 5),
    cache_steps=st.none() | st.floats(0, 1),
) | st.builds(Settings, sigmas=st.none() | st.just(()) | levels)
WHOLE = Settings(seeds=(1,), width=16, height=16, num_inference_steps=20, true_cfg_scale=4.0)


@given(st.lists(layers, max_size=3))
def test_noise_levels_are_said_by_the_first_that_speaks_of_them(asked):
    settings = resolve(*asked, WHOLE)
    speaks = [each for each in asked if (each.num_inference_steps, each.shift, each.sigmas) != (None, None, None)]
    if speaks and speaks[0].sigmas:
        assert (settings.sigmas, settings.num_inference_steps) == (speaks[0].sigmas, len(speaks[0].sigmas))
        assert settings.shift == 0
    else:
        assert settings.sigmas == ()
        steps = [each.num_inference_steps for each in [*asked, WHOLE] if each.num_inference_steps is not None]
        assert settings.num_inference_steps == steps[0]
    assert resolve(settings) == settings
    assert msgspec.convert(msgspec.to_builtins(settings), type=Settings) == settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sigmas": (1.0, 1.0)}, "sigmas must go down"),
        ({"sigmas": (0.5, 0.9)}, "sigmas must go down"),
        ({"sigmas": (1.5,)}, "sigmas must go down"),
        ({"sigmas": (1.0, 0.0)}, "the 0 at the end goes without saying"),
        ({"sigmas": (math.nan,)}, "sigmas must go down"),
        ({"sigmas": (1.0, math.nan, 0.5)}, "sigmas must go down"),
        ({"sigmas": (1.0, 0.5), "num_inference_steps": 3}, "leave out the others"),
        ({"sigmas": (1.0, 0.5), "shift": 3.0}, "leave out the others"),
        ({"shift": -1.0}, "shift must be positive"),
        ({"shift": math.nan}, "shift must be positive"),
        ({"shift": math.inf}, "shift must be positive"),
    ],
)
def test_noise_levels_that_mean_nothing(settings, words):
    with pytest.raises(UserError, match=words):
        check_settings(Settings(**settings))


def test_settings_survive_their_own_encoding():
    settings = check_settings(Settings(seeds=(1, 2**64 - 1), width=16, height=32, true_cfg_scale=4.5))
    assert msgspec.json.decode(msgspec.json.encode(settings), type=Settings) == settings

"""Token for token like transformers' Qwen2Tokenizer."""

import importlib.util
import os
from pathlib import Path

import pytest
import random_models

from artifacts_schema.errors import UserError
from stages.encode import TEMPLATE_PREFIX, TEMPLATE_SUFFIX
from stages.tokenizer import load_tokenizer

# Qwen2.5's own vocab.json, merges.txt and tokenizer_config.json, which are not part of this repository
REAL = Path(os.environ.get("QWEN2_5_TOKENIZER", "not set"))
PROMPTS = [
    "",
    " ",
    "a red circle on a white background",
    "\nstarts with a line break",
    "\n\n  two, and spaces",
    "tabs\tand\r\nwindows line ends",
    "一只戴着墨镜的猫，霓虹灯招牌上写着“通义千问”",
    "emoji 🧑‍🚀🇩🇪👍🏽 and math ∫√π",
    "e\u0301 is not composed, \u00e9 is",
    "I'll can't WE'VE numbers 1234567890 3.14",
    "<|im_end|> and <|vision_start|> are special",
    "العربية עברית हिन्दी ไทย",
    "very long " * 2000,
    "\U0010ffff\u200b\ufeff",
]

reference_only = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers not installed")
real_only = pytest.mark.skipif(not REAL.is_dir(), reason="QWEN2_5_TOKENIZER names no folder with the real tokenizer")


@pytest.mark.reference
@reference_only
@pytest.mark.parametrize("directory", [random_models.TINY / "tokenizer", pytest.param(REAL, marks=real_only)])
def test_same_ids_as_transformers(directory):
    from transformers import Qwen2Tokenizer

    theirs = Qwen2Tokenizer.from_pretrained(directory)
    ours = load_tokenizer(directory)
    for prompt in PROMPTS:
        for text in (prompt, TEMPLATE_PREFIX + prompt + TEMPLATE_SUFFIX):
            assert ours.encode(text).ids == theirs(text)["input_ids"], repr(prompt[:50])


@pytest.mark.parametrize("directory", [random_models.TINY / "tokenizer", pytest.param(REAL, marks=real_only)])
def test_the_template_is_34_tokens(directory):
    assert len(load_tokenizer(directory).encode(TEMPLATE_PREFIX).ids) == 34


def test_prompts_survive_decoding():
    tokenizer = load_tokenizer(random_models.TINY / "tokenizer")
    for prompt in PROMPTS[:9]:
        text = tokenizer.decode(tokenizer.encode(prompt).ids, skip_special_tokens=False)
        assert text == tokenizer.normalizer.normalize_str(prompt)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", None, "vocab.json is missing"),
        ("vocab.json", "{", "damaged"),
        ("merges.txt", "one two three\n", "damaged"),
        ("merges.txt", "no such\n", "damaged"),
        ("tokenizer_config.json", "[]", "damaged"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": "x"}}', "damaged"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": {}}}', "damaged"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": {"content": "<|other|>"}}}', "not token 0"),
    ],
)
def test_damaged_files(tmp_path, file, content, message):
    for path in (random_models.TINY / "tokenizer").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)

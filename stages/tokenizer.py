"""Qwen2's byte-level BPE from `vocab.json` and `merges.txt`, token for token like transformers' Qwen2Tokenizer."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from artifacts_schema.errors import UserError

# contractions, words, single digits, punctuation, line breaks, spaces: how Qwen2 splits text before merging bytes
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Builds the tokenizer of a checkpoint's `tokenizer/`. Raises UserError when files are missing or damaged."""
    try:
        if not (directory / "vocab.json").exists() and (directory / "tokenizer.json").exists():
            return Tokenizer.from_file(str(directory / "tokenizer.json"))
        vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
        lines = (directory / "merges.txt").read_text(encoding="utf-8").removeprefix("#version: 0.2").split("\n")
        merges = [(first, second) for first, second in (line.split(" ") for line in lines if line)]
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
        for number, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda pair: int(pair[0])):
            names = ("lstrip", "rstrip", "normalized", "single_word", "special")
            tokenizer.add_tokens([AddedToken(token["content"], **{name: token.get(name, False) for name in names})])
            if tokenizer.token_to_id(token["content"]) != int(number):
                raise ValueError(f"{token['content']} is not token {number}")
    except FileNotFoundError as error:
        raise UserError(f"the tokenizer is incomplete: {error.filename} is missing; download the model again") from None
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"the tokenizer in {directory} is damaged: {error}; download the model again") from None
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

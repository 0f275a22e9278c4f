"""The world's tokenizer: CLIP's byte-pair encoding, trained so that each word of the grammar is one token."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from psd.toybox.grammar import BACKGROUNDS, COLORS, SHAPES

MAX_TOKENS = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """Every word of the grammar and of the backgrounds' names."""
    phrases = " ".join(BACKGROUNDS).split()
    return sorted({*COLORS, *SHAPES, *phrases, "a", "an", "and", "on", "striped", ","})


def build() -> CLIPTokenizer:
    """Knows all bytes, so that no text is an error, and merges up to the grammar's words."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(
        [" ".join(words())], trainers.BpeTrainer(vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>")
    )
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = sorted({left + right for left, right in merges})  # their order differs between processes where counts tie
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *merged, START, END]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n")
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = MAX_TOKENS
    return tokenizer

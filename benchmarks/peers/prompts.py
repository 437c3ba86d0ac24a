"""What the contenders are given: the same token ids for each."""

from pathlib import Path

import numpy as np

from benchmarks.peers.models import Model

QUESTION, ANSWER = "What is the capital of France?", "Paris"
TEXT = Path(__file__).parents[2] / "LICENSE"
_STEP = 61
"""How far one text of a batch begins behind the one before it."""


def prompts(model: Model, tokenizer: Path, batch: int, length: int) -> list[list[int]]:
    """Texts of so many tokens: of a licence, over and over; of a model without a tokenizer, random ids."""
    if not model.has_tokenizer:
        ids = np.random.default_rng(0).integers(0, model.vocabulary, (batch, length)).tolist()
        return ids
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(tokenizer)).encode(TEXT.read_text(encoding="utf-8")).ids
    return [[text[(_STEP * row + place) % len(text)] for place in range(length)] for row in range(batch)]

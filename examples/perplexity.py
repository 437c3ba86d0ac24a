"""Perplexity of a text: how surprised a model is by it, token by token.

The text is scored in windows that overlap, so that every token but the first is predicted from at least half a window
of the text before it (or from all there is), and is counted once.

    python examples/perplexity.py book.txt --window 512
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jllm_core import JLLMError
from jllm_runtime import Model, load_model
from jllm_runtime.evaluation.perplexity import token_ids_of
from script import command_line, read_text, run

TEXT = (
    "The sun is a star. It is the star at the centre of the solar system. The earth and the other planets go around "
    "the sun. It takes the earth one year to go around the sun once, and one day to turn around itself."
)


def windows(count: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Where each window begins and ends, and the first token that is scored in it."""
    start, scored = 0, 1
    while scored < count:
        end = min(start + size, count)
        yield start, end, scored
        start, scored = end - size // 2, end


def losses(model: Model, token_ids: list[int], size: int) -> np.ndarray:
    """``-log p`` of each token after the first, in nats: float32 ``[T - 1]``."""
    found = []
    for start, end, scored in windows(len(token_ids), size):
        # Filled up to one length, so that one program serves all windows: no token sees what comes after it.
        ids = token_ids[start:end] + [token_ids[0]] * (size - (end - start))
        logits = np.asarray(model.logits([ids])[0, scored - start - 1 : end - start - 1])
        biggest = logits.max(axis=-1, keepdims=True)
        log_sum = np.log(np.exp(logits - biggest).sum(axis=-1)) + biggest[:, 0]
        found.append(log_sum - logits[np.arange(end - scored), token_ids[scored:end]])
    return np.concatenate(found)


def main(args: argparse.Namespace) -> None:
    """Score the text, and print its perplexity."""
    text = read_text(args.file) if args.file else TEXT
    model = load_model(args.model)
    if model.tokenizer is None:
        raise JLLMError(f"{args.model} has no tokenizer, so it takes no text")
    if not 2 <= args.window <= model.config.context_length:
        raise JLLMError(f"--window must be 2 to {model.config.context_length} (the context), got {args.window}")
    # The first token is not predicted, and its bytes do not count.
    token_ids, nbytes = token_ids_of(model, text)
    each = losses(model, token_ids, args.window)
    bits = each.sum() / math.log(2) / (nbytes or 1)
    print(f"{len(each)} tokens scored, {nbytes} bytes")
    print(f"perplexity {math.exp(each.mean()):.3f}, {bits:.3f} bits a byte")
    for place in np.argsort(-each)[:3]:
        word = model.tokenizer.decode([token_ids[place + 1]], skip_special_tokens=False)
        print(f"  most surprising: {word!r}, probability {math.exp(-each[place]):.1e}, token {place + 1}")


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="a text file (default: a few sentences)")
    parser.add_argument("--window", type=int, default=256, help="tokens scored at a time (default: %(default)s)")
    run(main, parser)

"""Search a folder of text files by meaning: each paragraph is a vector, and so is the question.

The vectors are kept beside the texts in memory; a larger collection would keep them in a file or an index. How good the
hits are is up to the model: one that was trained for embeddings (Qwen3-Embedding, with --pooling last) finds what a
chat model misses.

    python examples/search.py notes/ "How do plants eat?"
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from jllm_core import JLLMError
from jllm_runtime import embed, load_model
from script import command_line, read_text, run

AT_A_TIME = 64  # paragraphs, between two lines of progress


def paragraphs(folder: Path) -> list[tuple[Path, str]]:
    """The paragraphs of all text files below a folder, each with its file."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in {".txt", ".md"})
    parts = [(path, part.strip()) for path in files for part in read_text(path).split("\n\n")]
    return [(path, part) for path, part in parts if part]


def main(args: argparse.Namespace) -> None:
    """Embed the paragraphs and the question, and print the nearest."""
    if not args.folder.is_dir():
        raise JLLMError(f"{args.folder} is no folder")
    if args.top < 1 or args.max_tokens < 1:
        raise JLLMError("--top and --max-tokens are at least 1")
    found = paragraphs(args.folder)
    if not found:
        raise JLLMError(f"{args.folder} has no text in files that end with .txt or .md")
    model = load_model(args.model)
    if model.tokenizer is None:
        raise JLLMError(f"{args.model} has no tokenizer, so it takes no text")
    # A paragraph that is longer than --max-tokens is searched by its beginning.
    texts = [model.tokenizer.encode(part)[: args.max_tokens] for _, part in found]
    parts = []
    for first in range(0, len(texts), AT_A_TIME):
        parts.append(embed(model, texts[first : first + AT_A_TIME], pooling=args.pooling))
        done = min(first + AT_A_TIME, len(texts))
        print(f"{done} of {len(texts)} paragraphs", file=sys.stderr, flush=True)
    vectors = np.concatenate(parts)  # float32 [paragraphs, D], of length 1
    question = embed(model, args.question, pooling=args.pooling)[0]  # [D]
    # What all texts have in common tells none from another: in chat models it is most of each vector.
    common = vectors.mean(axis=0) if len(found) > 1 else np.zeros_like(question)
    vectors, question = vectors - common, question - common
    lengths = np.linalg.norm(vectors, axis=-1) * np.linalg.norm(question)
    similarity = vectors @ question / np.maximum(lengths, 1e-9)  # cosine, -1 to 1
    for place in np.argsort(-similarity)[: args.top]:
        path, part = found[place]
        print(f"{similarity[place]:6.3f}  {path.relative_to(args.folder)}: {' '.join(part.split())[:80]}")


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, help="its .txt and .md files are searched, subfolders included")
    parser.add_argument("question", help="what to look for")
    parser.add_argument("--top", type=int, default=3, help="hits to show (default: %(default)s)")
    parser.add_argument("--pooling", choices=["mean", "last"], default="mean", help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens of a paragraph (default: %(default)s)")
    run(main, parser)

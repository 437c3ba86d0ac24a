"""Answer a file of prompts, many at a time, and write the answers as JSON lines.

A prompt is a line of the file. The engine computes them side by side: a row that has ended makes room for the next
prompt at once. An answer is the same as if its prompt had been alone.

    python examples/batch.py prompts.txt answers.jsonl
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from jllm_core import JLLMError
from jllm_runtime import Engine, EngineConfig, load_chat_model
from script import command_line, read_text, run


def main(args: argparse.Namespace) -> None:
    """Answer the prompts; the answers stand in OUT only when all are there."""
    prompts = [line.strip() for line in read_text(args.prompts).splitlines() if line.strip()]
    if not prompts:
        raise JLLMError(f"{args.prompts} has no prompts; expected one a line")
    out = args.out.resolve()  # where a link leads
    if out == args.prompts.resolve() or (out.exists() and not out.is_file()):
        raise JLLMError(f"{args.out} is the file of prompts, a folder or a device; expected a file of its own")
    config = EngineConfig(max_batch=args.max_batch)
    model = load_chat_model(args.model)
    params = dataclasses.replace(model.chat_params(), max_tokens=args.max_tokens, seed=args.seed)
    # Written beside OUT and renamed at the end, so that OUT is never half of the answers.
    partial = out.with_name(f"{out.name}.partial")
    try:
        lines = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise JLLMError(f"{partial} cannot be written: {error}") from error
    tokens = 0
    with lines, Engine(model, config) as engine:
        # All are submitted at once and wait in the engine's queue, which by default has no limit.
        requests = [engine.submit(model.encode_chat(prompt), params) for prompt in prompts]
        for number, (prompt, request) in enumerate(zip(prompts, requests, strict=True), 1):
            output = request.result()
            tokens += len(output.token_ids)
            answer = {"prompt": prompt, "text": output.text, "finish_reason": output.finish_reason}
            print(json.dumps(answer, ensure_ascii=False), file=lines, flush=True)
            # On a terminal each line takes the place of the one before.
            end = "\r" if sys.stderr.isatty() and number < len(prompts) else "\n"
            print(f"{number} of {len(prompts)} prompts, {tokens} tokens", end=end, file=sys.stderr, flush=True)
    partial.replace(out)


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("prompts", type=Path, metavar="PROMPTS", help="a text file, a prompt a line")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write, a JSON object a line")
    parser.add_argument("--max-tokens", type=int, default=64, help="most tokens of an answer (default: %(default)s)")
    parser.add_argument("--max-batch", type=int, default=8, help="answers computed at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same answers (default: 0)")
    run(main, parser)

"""Stream several answers at the same time from asyncio.

``async for`` over a request of the Engine gives its pieces as they are made, while the event loop is free for other
tasks. Leaving the loop early cancels the request, and its place in the batch is free for another.

    python examples/stream_async.py
"""

import argparse
import asyncio
import dataclasses
import time

from jllm_runtime import ChatModel, Engine, SamplingParams, load_chat_model
from script import command_line, run

QUESTIONS = ["What is the capital of France?", "Name three colours.", "What is 2 + 2?"]


async def answer(
    engine: Engine, model: ChatModel, number: int, question: str, params: SamplingParams, start: float
) -> str:
    """Print the pieces of one answer as they come, with the seconds since ``start``, and return the whole."""
    pieces = []
    async for piece in engine.submit(model.encode_chat(question), params):
        pieces.append(piece.text)
        if piece.text:
            print(f"{time.perf_counter() - start:6.2f} s  {number}: {piece.text!r}", flush=True)
    return "".join(pieces)


async def answer_all(model: ChatModel, questions: list[str], params: SamplingParams) -> None:
    """Ask all questions at the same time."""
    async with Engine(model) as engine:
        start = time.perf_counter()
        tasks = [answer(engine, model, number, question, params, start) for number, question in enumerate(questions, 1)]
        answers = await asyncio.gather(*tasks)
    for question, text in zip(questions, answers, strict=True):
        print(f"\n{question}\n{text}")


def main(args: argparse.Namespace) -> None:
    """Load the model, and run the event loop."""
    model = load_chat_model(args.model)
    params = dataclasses.replace(model.chat_params(), max_tokens=args.max_tokens)
    asyncio.run(answer_all(model, args.questions or QUESTIONS, params))


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="asked at the same time (default: three)")
    parser.add_argument("--max-tokens", type=int, default=48, help="most tokens of an answer (default: %(default)s)")
    run(main, parser)

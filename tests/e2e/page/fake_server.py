"""A server that has the page and, in place of a model, answers that are written down."""

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from jllm_runtime.server.endpoints.web_page import page_router

STATS = {
    **{"waiting": 1, "running": 3, "max_batch": 16, "pages": 512, "pages_in_use": 96, "pages_idle": 41},
    **{"requests": 47, "finished": 40, "cancelled": 2, "failed": 1, "prompt_tokens": 8120, "reused_tokens": 5034},
    **{"generated_tokens": 12345, "preemptions": 1, "tokens_per_second": 84.25},
    "draining": None,
}


def timeline_row(
    number: int, *phases: tuple[str, float, float], ended: str | None = None, **earlier: float
) -> dict[str, Any]:
    """A sequence in the timeline: its phases with their starts and ends, in seconds before now.

    Phases that are no longer shown have their seconds only, ``earlier``.
    """
    times = dict(earlier)
    for phase, start, end in phases:
        times[phase] = times.get(phase, 0) + start - end
    spans = [{"phase": phase, "start": start, "end": end} for phase, start, end in phases]
    numbers = {"prompt_tokens": 100 + number, "reused_tokens": 64, "generated_tokens": 10 * number}
    return {"number": number, **numbers, "ended": ended, "spans": spans, "times": times}


TIMELINE = {
    "seconds": 30.0,
    "rows": [
        timeline_row(5, ("waiting", 29.5, 29.4), ("prefill", 29.4, 28), ("decode", 28, 11.5), ended="stop"),
        timeline_row(6, ("decode", 45, 0), waiting=0.5, prefill=12.25),
        timeline_row(
            7, ("waiting", 20, 18), ("prefill", 18, 17), ("decode", 17, 9), ("preempted", 9, 4), ("prefill", 4, 0)
        ),
        timeline_row(8, ("waiting", 3.25, 0)),
    ],
    "left_out": 2,
}


GREEDY = {
    **{"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0},
    **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "max_tokens": 2048, "max_tokens_without_thinking": 2048},
    "source": None,
}
PUBLISHED = {
    **{**GREEDY, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_tokens": 16384},
    "source": "generation_config.json",
}


@dataclass(frozen=True)
class Piece:
    """One chunk of an answer: its text, its tokens' probabilities, and how long it takes to come."""

    text: str = ""
    reasoning: str = ""
    tokens: tuple[dict[str, Any], ...] = ()
    wait: float = 0.0
    error: str = ""
    cut: bool = False  # the connection ends here
    finish: str = ""  # the answer ends after it, for another reason than "stop"


@dataclass
class FakeServer:
    """``answer`` says what comes for a message; ``requests`` is what has been asked."""

    answer: Callable[[str], list[Piece]]
    url: str = ""
    key: str | None = None
    models: list[str] = field(default_factory=lambda: ["tiny-model"])
    defaults: dict[str, dict[str, Any]] = field(default_factory=lambda: {"tiny-model": PUBLISHED})  # else GREEDY
    stats: dict[str, Any] = field(default_factory=lambda: dict(STATS))
    timeline: dict[str, Any] = field(default_factory=lambda: dict(TIMELINE))
    requests: list[dict[str, Any]] = field(default_factory=list)
    looks: int = 0  # how often the figures were asked for
    stopped: threading.Event = field(default_factory=threading.Event)

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(page_router())
        app.add_api_route("/v1/models", self._models)
        app.add_api_route("/stats", self._stats)
        app.add_api_route("/timeline", self._timeline)
        app.add_api_route("/v1/chat/completions", self._complete, methods=["POST"])
        return app

    def _refusal(self, request: Request) -> JSONResponse | None:
        if self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return problem(401, "There is no such key.")

    async def _models(self, request: Request) -> JSONResponse:
        switches = {"tiny-model": ["enable_thinking"]}
        data = [
            {
                "id": name,
                "abilities": {"chat_template_kwargs": switches.get(name, [])},
                "default_sampling": self.defaults.get(name, GREEDY),
            }
            for name in self.models
        ]
        return self._refusal(request) or JSONResponse({"object": "list", "data": data})

    async def _stats(self, request: Request) -> JSONResponse:
        self.looks += 1
        return self._refusal(request) or JSONResponse(self.stats)

    async def _timeline(self, request: Request) -> JSONResponse:
        return self._refusal(request) or JSONResponse(self.timeline)

    async def _complete(self, request: Request) -> Any:
        body = await request.json()
        self.requests.append({**body, "authorization": request.headers.get("Authorization")})
        if refusal := self._refusal(request):
            return refusal
        said = body["messages"][-1]["content"]
        if said == "refuse":
            return problem(400, "max_tokens must be a whole number, 1 or above, got 0")
        return StreamingResponse(self._stream(body, self.answer(said)), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any], pieces: list[Piece]) -> AsyncIterator[str]:
        base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": body["model"]}

        def chunk(delta: dict[str, Any], finish: str | None = None, tokens: tuple[dict[str, Any], ...] = ()) -> str:
            choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": finish}
            if body.get("logprobs"):
                choice["logprobs"] = {"content": list(tokens)}
            return event({**base, "choices": [choice]})

        try:
            yield ": a comment\n\n" + chunk({"role": "assistant", "content": ""})
            for piece in pieces:
                await asyncio.sleep(piece.wait)
                if piece.cut:
                    return
                if piece.error:
                    yield event(
                        {"error": {"message": piece.error, "type": "server_error", "param": None, "code": None}}
                    )
                    return
                kind = "reasoning_content" if piece.reasoning else "content"
                yield chunk({kind: piece.reasoning or piece.text}, None, piece.tokens)
            yield chunk({}, next((piece.finish for piece in pieces if piece.finish), "stop"))
            count = sum(max(1, len(piece.tokens)) for piece in pieces)
            usage = {"prompt_tokens": 9, "completion_tokens": count, "total_tokens": 9 + count}
            if body.get("stream_options", {}).get("include_usage"):
                yield event({**base, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.stopped.set()
            raise


def event(value: object) -> str:
    return f"data: {json.dumps(value)}\n\n"


def problem(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid", "param": None, "code": None}}, status)


def token(text: str | bytes, share: float, **others: float) -> dict[str, Any]:
    """An entry of ``logprobs.content``: a token, its probability, and those of other tokens."""
    raw = text if isinstance(text, bytes) else text.encode()
    own = {"token": raw.decode(errors="replace"), "logprob": math.log(share), "bytes": list(raw)}
    rest = [{"token": name, "logprob": math.log(value), "bytes": list(name.encode())} for name, value in others.items()]
    top = sorted([own, *rest], key=lambda one: -one["logprob"])
    return {**own, "top_logprobs": top}


def words(text: str, wait: float = 0.0) -> list[Piece]:
    """A text word by word, each word one token."""
    parts = [part for line in text.splitlines(keepends=True) for part in _split(line)]
    shares = [0.99, 0.97, 0.62, 0.9, 0.35, 0.98, 0.12, 0.85, 0.03]
    return [
        Piece(part, tokens=(token(part, share, **{" other": (1 - share) / 2, " more": (1 - share) / 4}),), wait=wait)
        for part, share in ((part, shares[i % len(shares)]) for i, part in enumerate(parts))
    ]


def _split(line: str) -> list[str]:
    first, *others = line.split(" ")
    return [part for part in [first, *(f" {word}" for word in others)] if part]


def scripted(said: str) -> list[Piece]:
    """The answer to a message, by its first word."""
    match said.split()[0]:
        case "slow":
            return words("It goes on and on, word by word, " * 40, wait=0.05)
        case "think":
            thoughts = [Piece(reasoning=part, tokens=(token(part, 0.7),)) for part in ("Let me ", "*see*", ".")]
            return [*thoughts, *words("It is so.")]
        case "fail":
            return [*words("It begins well"), Piece(error="The step ran out of memory.")]
        case "cut":
            return [*words("It begins well"), Piece(cut=True)]
        case "bytes":
            return [
                Piece("Yes", tokens=(token("Yes", 0.9, No=0.1),)),
                Piece("", tokens=(token(b" \xf0\x9f", 0.5),)),
                Piece("", tokens=(token(b"\x98", 0.7),)),
                Piece(" \N{GRINNING FACE}", tokens=(token(b"\x80", 0.9),)),
                Piece("\n!", tokens=(token("\n!", 0.2),)),
            ]
        case "cut-off":
            return [*words("It would go on"), Piece(finish="length")]
        case "long":
            return words("\n\n".join(f"Paragraph {i} of many." for i in range(60)), wait=0.01)
        case _:
            return words(f"You said **{said}**.")

"""Continuous batching with llama.cpp, through its batches: what its own server does, without HTTP.

Each call of the model takes the newest token of every text that is under way, and prompts of those that have just come
to a place, up to 512 tokens in all.
"""

import ctypes
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import llama_cpp
import numpy as np

BATCH = 512
LONGEST = 1024


@dataclass
class Text:
    """One text under way."""

    prompt: Sequence[int]
    limit: int
    fed: int = 0
    made: list[int] = field(default_factory=list)

    def next_rows(self, room: int) -> list[tuple[int, int]]:
        """Tokens to feed and their positions."""
        if self.fed < len(self.prompt):
            piece = self.prompt[self.fed : self.fed + room]
            return [(token, self.fed + number) for number, token in enumerate(piece)]
        return [(self.made[-1], self.fed)] if room else []


class LlamaLoop:
    """A GGUF file in llama.cpp, and a context for so many texts at a time.

    Args:
        gguf: the model.
        places: most texts at a time.
        threads: of llama.cpp.
    """

    def __init__(self, gguf: Path, places: int, threads: int) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = places * LONGEST, BATCH, places
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._model or not self._context:
            raise SystemExit(f"llama.cpp cannot load {gguf}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def run(self, work: Sequence[tuple[Sequence[int], int]], clients: int) -> tuple[float, list[list[int]]]:
        """Answer all (prompt, number of tokens), at most so many at a time; greedy, whatever ends a text.

        Returns:
            Seconds, and the tokens of each.
        """
        texts = [Text(prompt, limit) for prompt, limit in work]
        waiting: deque[Text] = deque(texts)
        places: dict[int, Text | None] = dict.fromkeys(range(clients))
        began = time.perf_counter()
        while waiting or any(places.values()):
            for place, text in places.items():
                if text is None and waiting:
                    places[place] = waiting.popleft()
            self._step(places)
        return time.perf_counter() - began, [text.made for text in texts]

    def _step(self, places: dict[int, Text | None]) -> None:
        batch, count, wanted = self._batch, 0, []
        # Those that only need their next token go first.
        running = sorted((item for item in places.items() if item[1]), key=lambda item: not item[1].made)
        for place, text in running:
            rows = text.next_rows(BATCH - count)
            for token, position in rows:
                batch.token[count], batch.pos[count] = token, position
                batch.n_seq_id[count], batch.seq_id[count][0], batch.logits[count] = 1, place, False
                count += 1
            text.fed += len(rows)
            if rows and text.fed >= len(text.prompt):
                batch.logits[count - 1] = True
                wanted.append((place, text, count - 1))
        batch.n_tokens = count
        if status := llama_cpp.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode failed with {status}")
        for place, text, row in wanted:
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, row), (self._vocabulary,))
            text.made.append(int(np.argmax(logits)))
            if len(text.made) == text.limit:
                llama_cpp.llama_memory_seq_rm(self._memory, place, -1, -1)
                places[place] = None


@llama_cpp.llama_log_callback
def _silent(*_: object) -> None:
    """In place of what llama.cpp tells of its inner workings."""

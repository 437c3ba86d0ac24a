"""What is run, and by whom."""

from collections.abc import Sequence
from dataclasses import dataclass

LIMITS = "limits"
JLLM, LLAMA, TRANSFORMERS = "jllm", "llama.cpp", "transformers"

JLLM_PRECISIONS = ("float32", "bfloat16", "int8", "int4")
"""How ``jllm-convert convert`` stores the weights; after a hyphen, the type of all that is not quantised."""
LLAMA_PRECISIONS = ("F32", "F16", "Q8_0", "Q4_0")
TRANSFORMERS_PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Contender:
    """Who runs a case: a peer, with its weights in one of its precisions. ``limits`` measures the machine."""

    peer: str
    precision: str = ""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.peer} {self.precision}".strip()

    @property
    def is_exact(self) -> bool:
        """Whether it must say what the reference says, token for token: all of it is float32. (llama.cpp keeps keys
        and values in float16 by default, whatever the weights are.)"""
        return self.peer in (JLLM, TRANSFORMERS) and self.precision == "float32"


ALL = tuple(
    Contender(peer, precision)
    for peer, precisions in (
        (JLLM, JLLM_PRECISIONS),
        (LLAMA, LLAMA_PRECISIONS),
        (TRANSFORMERS, TRANSFORMERS_PRECISIONS),
    )
    for precision in precisions
)


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        name: how it is asked for.
        kind: ``prefill`` (from the prompts to their first tokens), ``decode`` (tokens after that) or ``start`` (from
            the start of a process to its first word).
        prompt: tokens of each prompt; when decoding, the context of the first step.
        tokens: timed decode steps.
        batch: texts side by side.
        repeats: timed repetitions within a process; 1 for transformers, which takes in the prompt again for each.
        contenders: who runs it.
    """

    name: str
    kind: str
    prompt: int = 0
    tokens: int = 0
    batch: int = 1
    repeats: int = 3
    contenders: tuple[Contender, ...] = ALL

    @property
    def work(self) -> int:
        """Tokens that a repetition stands for."""
        return self.batch * (self.prompt if self.kind == "prefill" else self.tokens)


def _by(*names: str) -> tuple[Contender, ...]:
    return tuple(contender for contender in ALL if contender.name in names)


_FEW = {"repeats": 2, "contenders": _by("jllm float32", "jllm int8", *(f"llama.cpp {p}" for p in LLAMA_PRECISIONS))}

QUICK = (
    Case(
        "decode-512",
        "decode",
        prompt=512,
        tokens=32,
        contenders=tuple(c for c in ALL if c.name != "transformers bfloat16"),
    ),
    Case("decode-128-b16", "decode", prompt=128, tokens=32, batch=16, **_FEW),
    Case("prefill-512", "prefill", prompt=512, contenders=tuple(c for c in ALL if "int4" not in c.name)),
    Case(
        "start",
        "start",
        contenders=_by("jllm float32", "jllm int8", "llama.cpp F32", "llama.cpp Q8_0", "transformers float32"),
    ),
)
"""What the targets are about."""

FULL = (
    *QUICK,
    *(Case(f"prefill-{n}", "prefill", prompt=n) for n in (32, 2048)),
    *(Case(f"decode-{n}", "decode", prompt=n, tokens=32) for n in (128, 1024, 4096)),
    *(Case(f"decode-{n}-b{b}", "decode", prompt=n, tokens=32, batch=b) for n, b in ((128, 4), (512, 4), (512, 16))),
)


def find_cases(names: Sequence[str] | None, cases: Sequence[Case]) -> list[Case]:
    """The cases of these names, all when None.

    Raises:
        SystemExit: there is no such case.
    """
    known = {case.name: case for case in cases}
    if unknown := [name for name in names or () if name not in known]:
        raise SystemExit(f"unknown case {unknown[0]!r}; known: {', '.join(known)}")
    return [known[name] for name in names or known]

"""Sampling parameters in one line of words, as the commands show them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jllm_runtime.sampling import DRAWING, PENALTIES, SamplingParams, published

if TYPE_CHECKING:
    from jllm_runtime.model import Model


def describe(params: SamplingParams, model: "Model") -> str:
    """How tokens are chosen, and by whose word: ``temperature 0.6, top-k 20, top-p 0.95 (the publisher's)``.

    Fields that are off are left out, and so are filters that greedy choice makes useless.
    """
    filters = DRAWING if params.temperature else ()
    shown = [name for name in (*filters, *PENALTIES) if getattr(params, name) != getattr(SamplingParams(), name)]
    recommended = published(model)
    theirs = [name for name in shown if recommended.get(name) == getattr(params, name)]
    own = [name for name in shown if name not in theirs]

    def words(names: Sequence[str]) -> str:
        return ", ".join(f"{_spoken(name)} {getattr(params, name):g}" for name in names)

    parts = ["" if params.temperature else "greedy", words(own), f"{words(theirs)} (the publisher's)" if theirs else ""]
    return "; ".join(part for part in parts if part)


def _spoken(name: str) -> str:
    # As the options are spelt: top-k; but a penalty is two words.
    return name.replace("_", " " if name in PENALTIES else "-")

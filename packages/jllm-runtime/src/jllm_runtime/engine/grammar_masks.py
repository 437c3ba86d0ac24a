"""Structured output: grammars as masks over the vocabulary, by llguidance."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jllm_runtime.errors import RequestError
from jllm_runtime.grammar import Grammar
from jllm_runtime.model import Model


class GrammarCompiler:
    """Compiler of grammars for one model. What llguidance knows of the tokenizer is read once and kept.

    Args:
        model: with a tokenizer.

    Raises:
        RequestError: llguidance is not installed, or the model has no tokenizer or no end of text.
    """

    def __init__(self, model: Model) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise RequestError(
                "grammars need llguidance, which is not installed: pip install 'jllm-runtime[structured]'"
            ) from error
        if model.tokenizer is None:
            raise RequestError("grammars need a tokenizer, and the model has none")
        if not model.eos_ids:
            raise RequestError("grammars need an end-of-text id, and the model has none")
        self._library = llguidance
        self._vocab_size = model.config.vocab_size
        # Either may be the larger: models pad their vocabulary, and tokenizers have special tokens that no model uses.
        known = min(model.tokenizer.vocab_size, model.config.vocab_size)
        try:
            self._tokenizer = llguidance.LLTokenizer(
                model.tokenizer.to_json(), n_vocab=known, eos_token=list(model.eos_ids)
            )
        except Exception as error:  # llguidance raises ValueError and its own kinds
            raise RequestError(f"llguidance cannot read the model's tokenizer: {error}") from error

    def matcher(self, grammar: Grammar) -> "Matcher":
        """Make a matcher, at the beginning of an answer.

        Raises:
            RequestError: the grammar cannot be read, or has something that llguidance does not know.
        """
        library = self._library

        def from_schema(schema: str) -> str:
            # White space without end is valid JSON, and small models fall into it.
            grammar: str = library.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
            return grammar

        make = {
            "json_schema": from_schema,
            "regex": library.LLMatcher.grammar_from_regex,
            "lark": library.LLMatcher.grammar_from_lark,
        }[grammar.kind]
        try:
            matcher = library.LLMatcher(self._tokenizer, make(grammar.text))
        except Exception as error:
            raise RequestError(f"the grammar ({grammar.kind}) cannot be used: {error}") from error
        # Some errors are raised, others are only a state of the matcher.
        if matcher.is_error():
            raise RequestError(f"the grammar ({grammar.kind}) cannot be used: {_cause(matcher)}")
        return Matcher(matcher, self._vocab_size)


class Matcher:
    """State of one answer in its grammar.

    Every error of the grammar is raised here and by ``accept``, where it concerns one answer alone.

    Raises:
        RequestError: the grammar is too large for its first token to be found.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        # What lies behind llguidance's words, the padding of the model's vocabulary, stays forbidden.
        self._mask = np.zeros(mask_words(vocab_size), np.int32)
        self._find_allowed()

    def allowed(self) -> np.ndarray:
        """Mask of the tokens that may come next: int32 ``[W]``, a bit each, lowest first."""
        return self._mask

    def accept(self, token_ids: Sequence[int]) -> None:
        """Advance by these tokens, which must have been allowed.

        Raises:
            RequestError: the grammar has outgrown a limit, or failed in another way.
        """
        self._matcher.consume_tokens(list(token_ids))
        self._check()
        # The next mask already now: a grammar may outgrow its limits in finding it, which must not be in the middle of
        # a step that other answers take part in.
        if not self.ended:
            self._find_allowed()

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def _find_allowed(self) -> None:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: len(self._mask)]
        self._check()
        self._mask[: len(bits)] = bits

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the grammar failed: {_cause(self._matcher)}; try a simpler one, or a smaller schema")


def _cause(matcher: Any) -> str:
    """The reason of a matcher's failure, without the dump of its state that llguidance adds."""
    text = str(matcher.get_error()).partition("\n<state>")[0]
    return "no text can follow here" if text.startswith("NoExtension") else text


def mask_words(vocab_size: int) -> int:
    """Number of 32-bit words in a mask over a vocabulary."""
    return -(-vocab_size // 32)

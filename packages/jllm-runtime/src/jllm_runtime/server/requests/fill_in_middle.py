"""Fill-in-the-middle prompts: the texts before and behind a gap, between a model's own tokens (arXiv:2207.14255)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jllm_runtime.sampling import SamplingParams
from jllm_runtime.server.errors import ApiError
from jllm_runtime.tokenizer import Tokenizer

MARKERS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, Qwen3, Granite
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # CodeLlama
    ("<PRE>", "<SUF>", "<MID>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),  # DeepSeek-Coder
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
)
"""Names of the tokens before the prefix, the suffix and the middle."""

ENDS = (
    *("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    *("<fim_pad>", "<fim-pad>", "<repo_name>", "<file_sep>", "<filename>"),
    *("\u2581<EOT>", "<EOT>"),
)
"""Names of tokens that end a middle, beside the markers and the model's end-of-text ids: a chat model has others."""


@dataclass(frozen=True)
class FillInMiddle:
    """A model's tokens for filling in the middle.

    Attributes:
        prefix, suffix, middle: ids of the markers.
        ends: ids of the tokens that end the middle.
    """

    prefix: int
    suffix: int
    middle: int
    ends: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int) -> "FillInMiddle":
        """Those of a model, by the names that its tokenizer has.

        Args:
            tokenizer: the model's.
            vocab_size: ids that the model knows; a tokenizer may have more.

        Raises:
            ApiError: it has none.
        """

        def known(names: Sequence[str]) -> list[int]:
            return [one for one in map(tokenizer.token_id, names) if one is not None and one < vocab_size]

        for names in MARKERS:
            if len(ids := known(names)) == len(names):
                prefix, suffix, middle = ids
                return cls(prefix, suffix, middle, ends=(*ids, *known(ENDS)))
        message = (
            "suffix needs a model that fills in the middle, and the tokenizer of this one has no tokens for it "
            f"(such as {MARKERS[0][0]}); leave suffix out"
        )
        raise ApiError(400, message, "invalid_value", "suffix")

    def prompt(self, tokenizer: Tokenizer, before: str | list[int], behind: str) -> list[int]:
        """Token ids of a prompt in the order prefix, suffix, middle, which all these models were trained on.

        Args:
            tokenizer: the model's.
            before: the text before the gap, or its token ids.
            behind: the text behind it.
        """
        around = tokenizer.encode("")  # BOS, where the model wants it
        ids = tokenizer.encode(before, add_special_tokens=False) if isinstance(before, str) else before
        return [*around, self.prefix, *ids, self.suffix, *_going_on(tokenizer, behind), self.middle]

    def ended(self, params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
        """The parameters, with the ends of a middle as stops."""
        if params.ignore_eos:
            return params
        # As texts, too: not all tokenizers count them among the special tokens, whose text is not shown.
        texts = [tokenizer.token_bytes(one).decode(errors="replace") for one in self.ends]
        return replace(params, stop=(*params.stop, *texts), stop_token_ids=(*params.stop_token_ids, *self.ends))


def _going_on(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that another one precedes, so that SentencePiece puts no space before it."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if b"".join(map(tokenizer.token_bytes, ids)) == text.encode():
        return ids
    head = tokenizer.encode("\n", add_special_tokens=False)
    whole = tokenizer.encode(f"\n{text}", add_special_tokens=False)
    return whole[len(head) :] if whole[: len(head)] == head else ids

"""Echo of a prompt: its text, and where in it each token begins."""

from dataclasses import dataclass
from typing import Self

from jllm_runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class PromptEcho:
    """A prompt that comes before its output.

    Attributes:
        text: as it is shown.
        token_ids: its tokens, those that the tokenizer puts around a text included.
        offsets: the character of the text at which each token begins.
    """

    text: str
    token_ids: list[int]
    offsets: list[int]

    @classmethod
    def of(
        cls,
        prompt: str | list[int],
        token_ids: list[int],
        tokenizer: Tokenizer,
        *,
        prompt_only: bool = False,
        skip_special_tokens: bool = True,
    ) -> Self:
        """The echo of a text, or of token ids, which is their text.

        A character that token ids only begin is a part of the output, unless nothing but the prompt is asked for. With
        special tokens, a text's echo is that of its token ids, too, which alone have BOS.
        """
        if isinstance(prompt, str) and skip_special_tokens:
            return cls(prompt, token_ids, token_offsets(tokenizer, prompt))
        detokenizer = tokenizer.detokenizer(hidden=None if skip_special_tokens else ())
        text, offsets = "", list[int]()
        for token_id in token_ids:
            offsets.append(len(text))
            text += detokenizer.add(token_id)
        return cls(text + detokenizer.finish() if prompt_only else text, token_ids, offsets)


def token_offsets(tokenizer: Tokenizer, text: str) -> list[int]:
    """The character of a text at which each token of ``encode`` begins."""
    offsets, end = list[int](), 0
    found = tokenizer.encoding(text)
    for (start, stop), around in zip(found.offsets, found.special_tokens_mask, strict=True):
        # A space that the tokenizer counts to no token is the later one's. Those that `encode` puts around a text (BOS)
        # have none of it.
        offsets.append(end if around or text[end:start].isspace() else start)
        end = max(end, stop)
    return offsets

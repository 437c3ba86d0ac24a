"""Where in an echoed prompt its tokens begin."""

import pytest
from jllm_runtime import Tokenizer
from jllm_runtime.server.responses.prompt_echo import PromptEcho, token_offsets
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import normalizers, pre_tokenizers, processors


@pytest.fixture
def raw(tiny) -> RawTokenizer:
    return RawTokenizer.from_str(tiny.tokenizer.to_json())


@pytest.mark.parametrize(
    ("text", "offsets"),
    [
        ("the é at", [0, 3, 4, 4, 5, 6, 7]),  # half a character begins where the character does
        ("a<|im_end|>\nthe", [0, 1, 11, 12]),  # the text shows special tokens
        ("\N{GRINNING FACE}!", [0, 0, 0, 0, 1]),
        ("", []),
    ],
)
@pytest.mark.parametrize("around", [False, True])
def test_where_in_a_text_each_token_begins(text: str, offsets: list[int], around: bool, raw: RawTokenizer) -> None:
    if around:
        special = [("<|bos|>", 258), ("<|end|>", 259)]
        raw.post_processor = processors.TemplateProcessing(single="<|bos|> $A <|end|>", special_tokens=special)
        offsets = [0, *offsets, len(text)]
    tokenizer = Tokenizer(raw, {}, None)
    assert token_offsets(tokenizer, text) == offsets
    assert len(tokenizer.encode(text)) == len(offsets)


def test_where_the_tokens_of_a_text_begin_that_the_tokenizer_changes(raw: RawTokenizer) -> None:
    """Qwen's normalizer makes one character of two; other post-processors leave spaces out of the tokens' places."""
    raw.normalizer = normalizers.NFC()
    assert token_offsets(Tokenizer(raw, {}, None), "e\u0301x") == [0, 0, 2]
    raw.normalizer = None
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    assert token_offsets(Tokenizer(raw, {}, None), "a  b c") == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "shown", "offsets"),
    [
        ("the é", "the é", [0, 3, 4, 4]),
        ("<|im_start|>the<|im_end|>", "<|im_start|>the<|im_end|>", [0, 12, 15]),
        ("a<|im_end|>\n", "a<|im_end|>\n", [0, 1, 11]),
        ("", "", []),
    ],
)
@pytest.mark.parametrize("around", [False, True])
def test_text_and_token_ids_have_one_echo_with_special_tokens(
    text: str, shown: str, offsets: list[int], around: bool, raw: RawTokenizer
) -> None:
    if around:
        special = [("<|bos|>", raw.token_to_id("<|im_start|>")), ("<|end|>", raw.token_to_id("<|im_end|>"))]
        raw.post_processor = processors.TemplateProcessing(single="<|bos|> $A <|end|>", special_tokens=special)
        shown = f"<|im_start|>{shown}<|im_end|>"
        offsets = [0, *(12 + at for at in offsets), 12 + len(text)]
    tokenizer = Tokenizer(raw, {}, None)
    token_ids = tokenizer.encode(text)
    for prompt in (text, token_ids):
        echo = PromptEcho.of(prompt, token_ids, tokenizer, skip_special_tokens=False)
        assert (echo.text, echo.offsets, echo.token_ids) == (shown, offsets, token_ids)


def test_the_echo_of_token_ids_leaves_special_tokens_out(raw: RawTokenizer) -> None:
    tokenizer = Tokenizer(raw, {}, None)
    token_ids = tokenizer.encode("<|im_start|>the<|im_end|>")
    echo = PromptEcho.of(token_ids, token_ids, tokenizer)
    assert (echo.text, echo.offsets) == ("the", [0, 0, 3])

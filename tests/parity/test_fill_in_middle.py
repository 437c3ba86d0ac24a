"""Fill-in-the-middle prompts beside transformers' tokenizer of CodeLlama: SentencePiece adds spaces of its own."""

from pathlib import Path

import pytest
from jllm_runtime import Tokenizer
from jllm_runtime.server.requests.fill_in_middle import FillInMiddle
from transformers import CodeLlamaTokenizer

PIECES = ["\u2581", "d", "e", "f", "(", ")", ":", "x", "\u2581x", "de", "\u2581de", "\u2581\u2581", ",", "1"]
MERGES = [("\u2581", "x"), ("d", "e"), ("\u2581", "de"), ("\u2581", "\u2581")]


@pytest.fixture(scope="module")
def reference() -> CodeLlamaTokenizer:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    made = CodeLlamaTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=MERGES)
    # As in the published files: the normalizer alone adds the space, and not before a suffix. transformers 5 makes a
    # Metaspace of its own beside it, which adds one there, too, unlike its documentation and Meta's code.
    made.backend_tokenizer.pre_tokenizer = None
    made.set_infilling_processor(reset=True)
    return made


@pytest.mark.parametrize("suffix", ["x)", " x", "  de", "\nx", "\n\n", "é", "▁x"])
@pytest.mark.parametrize("prefix", ["def(", "x", " x", "  x", "de\n"])
def test_the_ids_are_those_of_code_llama(prefix: str, suffix: str, reference: CodeLlamaTokenizer, tmp_path: Path):
    reference.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    found = FillInMiddle.of(tokenizer, len(reference))
    assert found.prompt(tokenizer, prefix, suffix) == reference(prefix, suffix=suffix)["input_ids"]
    assert reference.eot_id in found.ends

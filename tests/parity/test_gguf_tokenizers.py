"""Splits of GGUF tokenizers: ids beside transformers' own tokenizer classes, with one real vocabulary (SmolLM2's)."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from jllm_convert.sources.gguf.source import GGUFSource
from jllm_convert.sources.gguf.tokenizer import tokenizer_files
from tokenizers import Tokenizer

# llama.cpp's name -> the class by which transformers splits the texts of that model.
CLASSES = {
    "qwen2": transformers.Qwen2Tokenizer,
    "deepseek-r1-qwen": transformers.Qwen2Tokenizer,
    "f2llmv2": transformers.Qwen2Tokenizer,
    "qwen35": transformers.Qwen3_5Tokenizer,
    "gpt-2": transformers.GPT2Tokenizer,
    "phi-2": transformers.GPT2Tokenizer,
    "mpt": transformers.GPTNeoXTokenizer,
    "olmo": transformers.GPTNeoXTokenizer,
    "command-r": transformers.CohereTokenizer,
}
TEXTS = [
    "Numbers 1 12 123 1234 12345678 3.14 1,000,000 v2.0.1 ½ Ⅷ ٣٤ x1y22z333",
    "I've been 'told he's there, 'RE you sure? 'M not sure I'LL make it, We'Ve DON'TALK a'lL l'été",
    "中文字符 日本語テスト、한국어 我想在apple工作1314151天",
    "हिन्दी की ภาษาไทยที่ e\u0301 A\u030a x\u0301\u0302",
    "👍🏽 👩‍👩‍👧 🇩🇪 😶‍🌫️ ✅ 🚀 (normal)",
    "  two   three    four\t\ttabs \t \n mixed\u00a0nbsp\u3000wide\u2003em\u200bzero   ",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \r\n\r\nend\n",
    "def f(x):\n    return x**2  # ------======= ````'''\"\"\"......!!!!!!??????\n\n\n",
]


@pytest.fixture(scope="module")
def metadata(smollm2_gguf: Path) -> dict[str, Any]:
    return dict(GGUFSource(smollm2_gguf).metadata)


@pytest.mark.parametrize("pre", CLASSES)
def test_a_split_gives_the_ids_of_transformers(pre: str, metadata: dict[str, Any]) -> None:
    files = tokenizer_files({**metadata, "tokenizer.ggml.pre": pre})
    assert files is not None
    ours = Tokenizer.from_str(files["tokenizer.json"])
    theirs: Any = CLASSES[pre](
        vocab={token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])},
        merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
    )
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False), text

"""Tokenizers of GGUF files: ids and text beside transformers, with one real vocabulary (SmolLM2's)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from jllm_convert.sources.gguf.source import GGUFSource
from jllm_convert.sources.gguf.tokenizer import tokenizer_files
from jllm_runtime import Tokenizer
from tokenizers import Tokenizer as RawTokenizer

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
    ours = RawTokenizer.from_str(files["tokenizer.json"])
    theirs: Any = CLASSES[pre](
        vocab={token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])},
        merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
    )
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "smollm"])
def test_tokens_one_by_one_give_the_text_of_transformers(pre: str, metadata: dict[str, Any], tmp_path: Path) -> None:
    """Random ids, which begin and end within characters, and special tokens."""
    files = tokenizer_files({**metadata, "tokenizer.ggml.pre": pre})
    assert files is not None
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    ours, theirs = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours is not None
    for seed in range(200):
        ids = np.random.default_rng(seed).integers(0, 1000 if seed % 2 else ours.vocab_size, 30).tolist()
        for skip in (True, False):
            detokenizer = ours.detokenizer(hidden=None if skip else ())
            text = "".join([*map(detokenizer.add, ids), detokenizer.finish()])
            assert text == theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)

"""Tokens beyond the embedding are told at conversion."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jllm_convert import convert
from jllm_convert.files.tokenizer_ids import ids_beyond

BPE = {"type": "BPE", "vocab": {chr(97 + i): i for i in range(11)}, "merges": []}
UNIGRAM = {"type": "Unigram", "vocab": [[chr(97 + i), -1.0] for i in range(13)]}


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ({"model": BPE}, None),
        ({"model": BPE, "added_tokens": [{"id": 10, "content": "<a>"}]}, None),
        (
            {"model": BPE, "added_tokens": [{"id": 11, "content": "<a>"}]},
            "has 1 token beyond the embedding's 11 rows (id 11",
        ),
        (
            {"model": BPE, "added_tokens": [{"id": 11 + i, "content": f"<{i}>"} for i in range(3)]},
            "has 3 tokens beyond the embedding's 11 rows (ids 11 to 13, such as '<0>')",
        ),
        ({"model": UNIGRAM}, "has 2 tokens beyond the embedding's 11 rows (ids 11 to 12, such as 'l')"),
        ({"version": "1.0"}, None),
        ({"model": {"vocab": [1, 2]}}, None),
        ({"model": {"vocab": {"a": "b"}}}, None),
    ],
    ids=range(8),
)
def test_what_is_told(
    tmp_path: Path,
    write_hf: Callable[..., Path],
    tiny_config: Callable[..., dict[str, Any]],
    hf_tensors: Callable[..., dict[str, np.ndarray]],
    tokenizer: dict[str, Any],
    words: str | None,
) -> None:
    source = write_hf(tmp_path / "source", tiny_config(), hf_tensors(tiny_config()), tokenizer=tokenizer)
    warnings = convert(source, tmp_path / "out").warnings
    assert len(warnings) == (words is not None)
    assert words is None or (words in warnings[0] and "a text with one of them will be refused" in warnings[0])


def test_a_folder_without_a_tokenizer_and_one_that_is_no_json_say_nothing(tmp_path: Path) -> None:
    assert ids_beyond(tmp_path, 1) is None
    (tmp_path / "tokenizer.json").write_text("{")
    assert ids_beyond(tmp_path, 1) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": BPE}))
    assert ids_beyond(tmp_path, 1) is not None

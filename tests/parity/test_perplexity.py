"""Perplexity beside transformers: the loss that it gives for labels."""

from typing import Any

import pytest
import torch
from jllm_runtime import perplexity

TEXT = "The lighthouse keeper climbed the stairs every evening and lit the lamp. Ships far out at sea saw it. " * 6


def reference(model: Any, ids: list[int], context: int, stride: int) -> float:
    """Window by window as https://huggingface.co/docs/transformers/perplexity does it: what a window before has
    predicted is masked by -100."""
    total, counted, end_before = 0.0, 0, 0
    for begin in range(0, len(ids) - 1, stride):
        end = min(begin + context + 1, len(ids))
        labels = torch.tensor([ids[begin:end]])
        labels[:, : max(end_before - begin, 0)] = -100
        with torch.no_grad():
            loss = model(torch.tensor([ids[begin:end]]), labels=labels).loss
        count = int((labels[:, 1:] != -100).sum())
        total, counted, end_before = total + float(loss) * count, counted + count, end
        if end == len(ids):
            break
    assert counted == len(ids) - 1
    return total / counted


@pytest.mark.parametrize(("context", "stride"), [(512, 512), (48, 48), (48, 16)])
def test_real_weights(context: int, stride: int, smollm2: Any) -> None:
    ids = smollm2.model.tokenizer.encode(TEXT)
    found = perplexity(smollm2.model, TEXT, context, stride)
    assert found.tokens == len(ids) - 1
    assert found.loss == pytest.approx(reference(smollm2.reference, ids, context, stride), abs=1e-4)

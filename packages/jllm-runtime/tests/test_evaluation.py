"""Perplexity: each token predicted once, from the window that the arguments say; and ``jllm eval``."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core.config import RopeScaling
from jllm_runtime import Model, RequestError, perplexity
from jllm_runtime.cli import main
from jllm_runtime.errors import NonfiniteError
from jllm_runtime.evaluation import perplexity as module
from jllm_runtime.evaluation.perplexity import Perplexity
from jllm_runtime.tokenizer import Tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors


def plain(model: Model, ids: list[int], context: int, stride: int) -> float:
    """The mean loss by the plain model, window by window: each token from the most that any window gives."""
    losses: dict[int, float] = {}
    for start in range(0, len(ids) - 1, stride):
        given = ids[start : start + context + 1]
        # Filled up, so that one program serves all lengths: no token sees what comes after it.
        filled = given[:-1] + [0] * (context - len(given) + 1)
        logprobs = np.asarray(jax.nn.log_softmax(model.logits([filled])))[0]
        for place, token in enumerate(given[1:]):
            losses.setdefault(start + place + 1, -float(logprobs[place, token]))
    assert len(losses) == len(ids) - 1
    return float(np.mean(list(losses.values())))


@pytest.mark.parametrize(
    ("length", "context", "stride"), [(150, 64, 64), (150, 64, 20), (65, 64, 64), (66, 64, 1), (2, 64, 64), (30, 7, 3)]
)
def test_every_token_counts_once_from_its_window(length: int, context: int, stride: int, tiny, prompt) -> None:
    model, ids = tiny.plain, prompt(length)
    found = perplexity(model, ids, context, stride)
    assert (found.tokens, found.nbytes, found.bits_per_byte) == (length - 1, None, None)
    assert found.loss == pytest.approx(plain(model, ids, context, stride), abs=2e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


@pytest.mark.parametrize("family", ["hybrid", "dynamic"])
def test_models_with_states_and_with_rope_by_length(family: str, tiny, prompt) -> None:
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_context_length=32)
    dynamic = dataclasses.replace(tiny.config, rope_scaling=scaling)
    model, ids = tiny.random(tiny.hybrid if family == "hybrid" else dynamic), prompt(100)
    # Windows that are full: the length of a text counts for dynamic scaling, and ``plain`` fills up.
    ids = ids[:97]
    assert perplexity(model, ids, 48).loss == pytest.approx(plain(model, ids, 48, 48), abs=5e-5)


@pytest.mark.parametrize("rows", [2, 8])
def test_windows_side_by_side_as_on_accelerators(rows: int, tiny, prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, done = tiny.plain, prompt(150), []
    expected = perplexity(model, ids, 32, 32)
    monkeypatch.setattr(module, "_rows", lambda *_: rows)
    found = perplexity(model, ids, 32, on_progress=lambda *counts: done.append(counts))
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
    assert (found.windows, done[-1]) == (5, (5, 5))


def test_few_logits_are_made_at_a_time(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._chunk(tiny.plain, 2, 256) == 128
    monkeypatch.setattr(module, "MAX_LOGITS", 40 * tiny.config.vocab_size)
    assert module._chunk(tiny.plain, 2, 256) == 16


def test_bytes_are_those_of_the_tokens_that_count(tiny) -> None:
    model = tiny.random(tiny.config, tokenizer=tiny.tokenizer)
    text = "äbc the cat"
    found = perplexity(model, text)
    ids = tiny.tokenizer.encode(text)
    # The first token is half of a letter, so that its other half is predicted.
    assert (found.tokens, found.nbytes) == (len(ids) - 1, len(text.encode()) - 1)
    bits = found.loss * found.tokens / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits / found.nbytes)
    assert found.loss == pytest.approx(perplexity(model, ids).loss)


@pytest.mark.parametrize("trims", [True, False])
@pytest.mark.parametrize(("text", "count"), [("def f():    ", 11), ("éa", 2)])
def test_spaces_at_the_end_and_parts_of_characters_count(text: str, count: int, trims: bool, tiny) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate([*letters, "<b>", "<e>"])}, merges=[])
    )
    raw.add_special_tokens(["<b>", "<e>"])
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    # Llama 3's: the places of spaces are trimmed to nothing.
    byte_level = processors.ByteLevel(trim_offsets=trims)
    raw.post_processor = byte_level
    model = SimpleNamespace(tokenizer=Tokenizer(raw, {}, None), config=tiny.config, path=None)
    ids, nbytes = module.token_ids_of(model, text)
    assert (len(ids), nbytes) == (len(text.encode()), count)
    around = processors.TemplateProcessing("<b> $A <e>", special_tokens=[("<b>", 256), ("<e>", 257)])
    raw.post_processor = processors.Sequence([byte_level, around])
    assert module.token_ids_of(model, text) == ([256, *ids], len(text.encode()))


def test_the_space_of_sentencepiece_is_no_byte_of_the_text(tiny) -> None:
    raw = RawTokenizer(models.BPE(vocab={"▁": 0, "a": 1, "▁a": 2}, merges=[("▁", "a")]))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    model = SimpleNamespace(tokenizer=Tokenizer(raw, {}, None), config=tiny.config, path=None)
    assert module.token_ids_of(model, "aaa") == ([2, 1, 1], 2)


def test_only_the_windows_of_a_step_are_in_memory(tiny, prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    made, original = [], module._windows
    monkeypatch.setattr(module, "_windows", lambda *given: made.append(original(*given)) or made[-1])
    assert perplexity(tiny.plain, prompt(65), 32, 8).windows == len(made) - 1 == 5
    assert all(len(tokens) == 1 for tokens, _, _ in made)


def test_a_model_that_is_sure_has_a_perplexity_of_one(tiny) -> None:
    found = perplexity(tiny.saying("Hi, you!"), "Hi, you!")
    assert found.perplexity == pytest.approx(1, abs=1e-3)
    assert perplexity(tiny.saying("Hi, you!"), "Hi, uoy!").perplexity > 10


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ([], {}, "at least two tokens is needed, to predict the second; got 0"),
        ([1], {}, "got 1"),
        ([1, 99999], {}, "token id 99999 is outside the vocabulary"),
        ([1, 2], {"context": 0}, "the context must be 1 to"),
        ([1, 2], {"context": 10**6}, "the context must be 1 to"),
        ([1, 2], {"context": 8, "stride": 9}, "the stride must be 1 to 8 tokens, which is the context, got 9"),
        ([1, 2], {"stride": 0}, "the stride must be 1 to"),
        ([1, 2.7, 3], {}, "a list of token ids \\(whole numbers\\)"),
        ([1, "a"], {}, "a list of token ids"),
        ([1, 2], {"context": 1.5}, "the context is a whole number of tokens, got 1.5"),
        ([1, 2], {"context": True}, "the context is a whole number of tokens, got True"),
        ([1, 2], {"stride": "8"}, "the stride is a whole number of tokens, got '8'"),
        ("text", {}, "has no tokenizer, so it takes token ids only"),
    ],
    ids=str,
)
def test_impossible_requests(text: Any, options: dict[str, int], message: str, tiny) -> None:
    with pytest.raises(RequestError, match=message):
        perplexity(tiny.plain, text, **options)


def test_damaged_weights_are_an_error(tiny, prompt) -> None:
    model = tiny.plain
    gamma = model.weights.gamma_final.at[0].set(jnp.nan)
    broken = dataclasses.replace(model, weights=dataclasses.replace(model.weights, gamma_final=gamma))
    with pytest.raises(NonfiniteError, match="the log-probabilities of the text are NaN or infinite"):
        perplexity(broken, prompt(20))


def test_the_sentence_and_the_json_say_the_same() -> None:
    result = Perplexity(100, 400, 2.0, 64, 32, 3, 0.5)
    assert str(result) == (
        "perplexity 7.389 (loss 2.0000, 0.7213 bits a byte) of 100 tokens in 3 windows of 64, 32 tokens apart; "
        "200 tokens/s"
    )
    fields = result.as_dict()
    assert (fields["tokens"], fields["bytes"], fields["windows"], fields["tokens_per_s"]) == (100, 400, 3, 200)


@pytest.fixture
def jllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["jllm", "eval", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return run


def test_the_command_prints_a_sentence_or_json(jllm, friendly_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"Hi, you!\r\nHi!")
    code, out, err = jllm(friendly_checkpoint, "--text", file, "--no-compile-cache")
    assert (code, out[:11]) == (0, "perplexity ")
    assert "on 1 x cpu" in err
    options = ("--text", file, "--json", "--context", 8, "--stride", 4, "--no-compile-cache")
    code, out, _ = jllm(friendly_checkpoint, *options)
    fields = json.loads(out)
    # Each byte is a token here, and the first is not predicted.
    assert (code, fields["tokens"], fields["bytes"], fields["stride"]) == (0, 12, 12, 4)
    assert fields["loss"] > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"", "is empty"), (b"a\xff", "cannot be read"), (b"a", "at least two tokens")],
)
def test_bad_texts_end_with_2(
    content: bytes | None, message: str, jllm, friendly_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    code, out, err = jllm(friendly_checkpoint, "--text", file, "--no-compile-cache")
    assert (code, out) == (2, "")
    assert message in err

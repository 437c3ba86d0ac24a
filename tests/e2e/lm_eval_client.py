"""The real model, through lm-eval's own client: scores and answers are those of the library.

lm-eval brings some sixty packages, so this runs in an environment of its own: ``hatch run clients:test``. The name
keeps it out of the ordinary suite, where ``packages/jllm-runtime/tests/server/test_lm_eval.py`` has the same requests.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jllm_runtime import Model, SamplingParams, generate, load_model
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

# Its own libraries warn.
pytestmark = pytest.mark.filterwarnings("default")
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " a potato"),
    ("Two and two make", " four, and three and three make six."),
    ("", "Once upon a time"),
]
QUESTIONS = ["What is the capital of France?", "Count from one to five.", "Say hello."]


@pytest.fixture(scope="module")
def url(smollm2_folder: Path, serving: Callable[..., AbstractContextManager[str]]) -> Iterator[str]:
    with serving(smollm2_folder, "--pages", 256) as found:
        yield found


@pytest.fixture(scope="module")
def model(smollm2_folder: Path) -> Model:
    return load_model(smollm2_folder)


@pytest.fixture
def completions(url: str, smollm2_folder: Path) -> Callable[..., LocalCompletionsAPI]:
    def make(**options: Any) -> LocalCompletionsAPI:
        usual = {"model": "smollm2", "tokenizer": str(smollm2_folder), "tokenizer_backend": "huggingface"}
        return LocalCompletionsAPI(base_url=f"{url}/v1/completions", **{**usual, "max_retries": 1, **options})

    return make


def instances(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def score(model: Model, ids: list[int], begin: int) -> tuple[float, bool]:
    """The log-probability of the tokens from ``begin`` on, and whether each of them is the likeliest."""
    # Filled up, so that one program serves all lengths.
    logits = np.asarray(model.logits([ids + [0] * (128 - len(ids))]), np.float32)[0, : len(ids)]
    logprobs = np.asarray(jax.nn.log_softmax(logits))[begin - 1 : -1]
    chosen = np.array(ids[begin:])
    return float(logprobs[np.arange(len(chosen)), chosen].sum()), bool((logprobs.argmax(1) == chosen).all())


def chat_prompt(model: Model, question: str) -> list[int]:
    assert model.tokenizer is not None
    return model.tokenizer.encode_chat([{"role": "user", "content": question}])


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 4}, {"num_concurrent": 3}, {"tokenized_requests": False}], ids=str
)
def test_the_scores_of_continuations(options: dict[str, Any], completions, model: Model) -> None:
    client = completions(**options)
    assert model.tokenizer is not None
    # After the last one the model would end: what it makes then has an entry, or the last token goes without a score.
    [answer] = generate(model, [chat_prompt(model, QUESTIONS[2])], SamplingParams(max_tokens=60))
    assert answer.finish_reason == "stop"
    ended = (model.tokenizer.decode(answer.prompt_token_ids, False), answer.text)
    pairs = [*PAIRS, ended]
    found = client.loglikelihood(instances("loglikelihood", pairs))
    for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
        if context:
            before, ids = client._encode_pair(context, continuation)
        else:
            before, ids = [client.prefix_token_id], client.tok_encode(continuation)
        expected = score(model, before + ids, len(before))
        assert logprob == pytest.approx(expected[0], abs=2e-3)
        assert is_greedy == expected[1]
    assert found[-1][1]


def test_the_scores_of_whole_texts(completions, model: Model) -> None:
    client = completions(max_length=40)
    text = "The lighthouse keeper climbed the stairs every evening and lit the lamp. " * 5
    [found] = client.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    ids = client.tok_encode(text)
    assert len(ids) > 39
    assert np.isfinite(found)
    # The first window holds what begins the text.
    first, _ = score(model, [client.prefix_token_id, *ids[:37]], 1)
    assert found < first


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 2}, {"num_concurrent": 2}, {"tokenized_requests": False}], ids=str
)
def test_texts_go_on_until_a_stop(options: dict[str, Any], completions, model: Model) -> None:
    """The client adds the tokenizer's EOS, a special token, to each task's stops."""
    client = completions(**options)
    assert client.eos_string == "<|im_end|>"
    assert model.tokenizer is not None
    contexts = [model.tokenizer.decode(chat_prompt(model, question), False) for question in QUESTIONS]
    for until in ([], ["\n\n", "e"]):
        settings = {"until": list(until), "max_gen_toks": 24, "do_sample": False}
        found = client.generate_until(instances("generate_until", [(context, settings) for context in contexts]))
        params = SamplingParams(max_tokens=24, stop=[*until, "<|im_end|>"])
        ids = [model.tokenizer.encode(context, add_special_tokens=False) for context in contexts]
        assert found == [output.text for output in generate(model, ids, params)]


def test_chats_go_on_until_a_stop(url: str, model: Model) -> None:
    for eos in (None, "<|im_end|>"):
        client = LocalChatCompletion(
            base_url=f"{url}/v1/chat/completions",
            model="smollm2",
            max_retries=1,
            eos_string=eos,
            tokenizer_backend=None,
        )
        prompts = [chat_prompt(model, question) for question in QUESTIONS]
        contexts = [client.apply_chat_template([{"role": "user", "content": question}]) for question in QUESTIONS]
        for until in ([], ["<|im_start|>user", "e"]):
            settings = {"until": list(until), "max_gen_toks": 24}
            found = client.generate_until(instances("generate_until", [(context, settings) for context in contexts]))
            params = SamplingParams(max_tokens=24, stop=until)
            expected = [output.text for output in generate(model, prompts, params)]
            assert found == expected

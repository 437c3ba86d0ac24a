"""A model as its user meets it: a conversation in one call, and what a notebook shows."""

import dataclasses
from pathlib import Path

import jax
import pytest
from jllm_core import init_adapter, with_adapter
from jllm_runtime import ChatModel, Engine, Model, RequestError, SamplingParams, load_chat_model, load_model
from jllm_runtime.errors import ModelError

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def friendly(friendly_checkpoint: Path) -> Model:
    return load_model(friendly_checkpoint)


# ---- Conversations.


def test_a_text_is_one_message_of_the_user(friendly: Model) -> None:
    assert friendly.tokenizer is not None
    assert friendly.encode_chat("Hello") == friendly.encode_chat(MESSAGES) == friendly.tokenizer.encode_chat(MESSAGES)
    output = friendly.chat("Hello")
    assert (output.text, output.finish_reason) == ("Hi, you!", "stop")
    assert friendly.chat(MESSAGES, SamplingParams(max_tokens=2)).text == "Hi"
    with Engine(friendly) as engine:
        assert engine.chat("Hello").text == "Hi, you!"
        assert engine.chat(MESSAGES, SamplingParams(max_tokens=2)).text == "Hi"


def test_an_answer_goes_on_from_the_last_message(friendly: Model) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "Hi, "}]
    assert friendly.chat(begun, continue_final_message=True).text == "you!"
    assert friendly.chat(begun).text == "Hi, you!"
    with Engine(friendly) as engine:
        assert engine.chat(begun, continue_final_message=True).text == "you!"


def test_variables_reach_the_template(tiny, friendly: Model) -> None:
    template = "{{ messages[0].content }}{% if enable_thinking %}-{% endif %}"
    model = dataclasses.replace(friendly, tokenizer=type(tiny.tokenizer)(tiny.tokenizer._raw, {}, template))
    assert model.encode_chat("a", enable_thinking=True) == list(b"a-")
    assert model.encode_chat("a", enable_thinking=False) == list(b"a")
    one = SamplingParams(max_tokens=1)
    assert model.chat("a", one, enable_thinking=True).prompt_token_ids == list(b"a-")
    with Engine(model) as engine:
        assert engine.chat("a", one, enable_thinking=True).prompt_token_ids == list(b"a-")


def test_the_publishers_settings_are_the_default(tiny, friendly: Model) -> None:
    impossible = dataclasses.replace(friendly, generation_config={"temperature": -1})
    with pytest.raises(ModelError, match="temperature must be 0 or above"):
        impossible.chat("Hello")
    # A model that says one letter again and again, and a penalty on that.
    model = tiny.saying("\nab", generation_config={"presence_penalty": 1e4})
    assert model.chat("Hello", SamplingParams(max_tokens=9)).text == "abbbbbbbb"
    assert model.chat_params() == SamplingParams(presence_penalty=1e4, max_tokens=2048)
    short = dataclasses.replace(model.chat_params(), max_tokens=100)
    answer = model.chat("Hello", short).token_ids
    assert len(set(answer)) == len(answer) == 100
    with Engine(model) as engine:
        assert engine.chat("Hello", short).token_ids == answer
        assert engine.chat("Hello").token_ids == model.chat("Hello").token_ids


def test_a_model_without_a_tokenizer_says_so(tiny) -> None:
    with pytest.raises(RequestError, match="the model has no tokenizer, so it takes token ids only: use generate"):
        tiny.plain.chat("Hello")
    with Engine(tiny.plain) as engine, pytest.raises(RequestError, match="no tokenizer"):
        engine.chat("Hello")


def test_a_chat_model_is_sure_to_have_conversations(friendly_checkpoint: Path, write_checkpoint) -> None:
    model = load_chat_model(friendly_checkpoint)
    assert isinstance(model, ChatModel)
    assert model.tokenizer.chat_template is not None
    assert model.chat("Hello").text == "Hi, you!"
    for missing, options in (("no tokenizer", {"tokenizer": False}), ("no chat template", {"chat_template": None})):
        folder = write_checkpoint(**options)
        with pytest.raises(ModelError, match=rf"{folder} has {missing}, .* load it with load_model"):
            load_chat_model(folder)
        assert isinstance(load_model(folder), Model)


# ---- What a notebook shows.


def test_a_model_is_shown_in_one_line(friendly: Model) -> None:
    assert repr(friendly) == (
        f"Model(qwen3, 2 layers, 66k parameters, float32, 1 x cpu, {friendly.backend.name}, {friendly.path})"
    )
    assert len(repr(dataclasses.replace(friendly, path=None))) < 150


@pytest.mark.parametrize(
    ("layers", "width", "shown"), [(1, 8, "6.3k"), (2, 64, "66k"), (2, 4096, "4.2M"), (2, 40960, "42M")]
)
def test_parameters_are_rounded(tiny, layers: int, width: int, shown: str) -> None:
    config = dataclasses.replace(tiny.config, num_layers=layers, hidden_size=width)
    assert f", {shown} parameters, " in repr(dataclasses.replace(tiny.plain, config=config))


def test_a_model_with_an_adapter_beside_its_weights_says_so(tiny) -> None:
    model = tiny.plain
    adapter = init_adapter(model.config, jax.random.key(0))
    assert ", adapted, " in repr(dataclasses.replace(model, weights=with_adapter(model.weights, adapter)))
    assert "adapted" not in repr(model)

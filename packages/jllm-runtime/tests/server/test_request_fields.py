"""Fields of other servers and clients: ignored and named, renamed, or refused with what to do instead."""

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from jllm_runtime.sampling import SamplingParams
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.requests.field_rules import INNER, REQUESTS, TOOL
from jllm_runtime.server.requests.ignored_fields import HEADER, MAX_HEADER, IgnoredFields, as_sent, take_out
from jllm_runtime.server.schemas.base import NoEffectFields
from jllm_runtime.server.schemas.chat import ChatCompletionRequest
from jllm_runtime.server.schemas.completions import CompletionRequest
from jllm_runtime.server.schemas.embeddings import EmbeddingRequest
from jllm_runtime.server.schemas.tokens import DetokenizeRequest, TokenizeRequest

CHAT, COMPLETIONS, EMBEDDINGS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"
SAMPLING = {"temperature": 1, "seed": 5, "max_tokens": 8}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **SAMPLING},
    COMPLETIONS: {"model": "tiny", "prompt": "hello", **SAMPLING},
    EMBEDDINGS: {"model": "tiny", "input": "hello"},
    TOKENIZE: {"model": "tiny", "prompt": "hello"},
    "/detokenize": {"model": "tiny", "tokens": [1, 2]},
}
SCHEMAS = {
    CHAT: ChatCompletionRequest,
    COMPLETIONS: CompletionRequest,
    EMBEDDINGS: EmbeddingRequest,
    TOKENIZE: TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
# Of several types, as clients differ in them.
VALUES = [1, {"a": "b"}]


def answer(reply: httpx.Response) -> Any:
    """What a response says, without its id and time."""
    assert reply.is_success, reply.text
    return {name: value for name, value in reply.json().items() if name not in ("id", "created")}


@pytest.fixture(scope="module")
def plain(babbling) -> dict[str, Any]:
    """The answers to the requests as they are."""
    replies = {path: babbling.post(path, body) for path, body in BODIES.items()}
    assert not any(HEADER in reply.headers for reply in replies.values())
    return {path: answer(reply) for path, reply in replies.items()}


def ignored_of(path: str) -> list[str]:
    return [name for names in REQUESTS[path].ignored.values() for name in names]


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in (CHAT, EMBEDDINGS) for name in ignored_of(path)])
def test_an_ignored_field_changes_nothing_and_is_named(path: str, name: str, babbling, plain: dict[str, Any]) -> None:
    for value in VALUES:
        reply = babbling.post(path, BODIES[path] | {name: value})
        assert answer(reply) == plain[path]
        assert reply.headers[HEADER] == name


@pytest.mark.parametrize("path", REQUESTS)
def test_ignored_fields_change_nothing_together(path: str, babbling, plain: dict[str, Any]) -> None:
    for value in VALUES:
        reply = babbling.post(path, BODIES[path] | dict.fromkeys(ignored_of(path), value))
        assert answer(reply) == plain[path]
        assert reply.headers[HEADER].split(", ") == ignored_of(path)


@pytest.mark.parametrize("path", REQUESTS)
def test_fields_that_ask_for_what_happens_anyway_are_taken(path: str, babbling, plain: dict[str, Any]) -> None:
    for turn in range(2):
        fields = {
            name: rule.values[turn % len(rule.values)] for name, rule in REQUESTS[path].only.items() if rule.values
        }
        reply = babbling.post(path, BODIES[path] | fields)
        assert answer(reply) == plain[path]
        assert HEADER not in reply.headers


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, rules in REQUESTS.items() for name in rules.only])
def test_a_field_that_asks_for_something_else_is_refused_with_what_to_do(path: str, name: str) -> None:
    rule = REQUESTS[path].only[name]
    with pytest.raises(ApiError) as caught:
        take_out({name: "something else", **dict.fromkeys(rule.matters_with, 0.5)}, path, IgnoredFields())
    assert (caught.value.status_code, caught.value.param) == (400, name)
    assert name in caught.value.message
    assert caught.value.message.endswith(rule.instead)


@pytest.mark.parametrize("path", REQUESTS)
def test_a_field_has_one_rule(path: str) -> None:
    rules, schema = REQUESTS[path], set(SCHEMAS[path].model_fields)
    ignored = {name for names in rules.ignored.values() for name in names}
    assert ignored.isdisjoint(rules.only)
    assert rules.renamed.keys().isdisjoint(ignored | set(rules.only) | schema)
    assert {*rules.renamed.values(), *rules.renamed_texts.values()} <= schema
    assert rules.renamed_texts.keys() <= rules.renamed.keys()
    # A field that the schema has is honoured, but for those that have no effect with --strict either.
    assert schema & (ignored | set(rules.only)) <= set(NoEffectFields.model_fields)


def test_true_is_no_number() -> None:
    with pytest.raises(ApiError, match="best_of: should be 1, got True"):
        take_out({"best_of": True}, CHAT, IgnoredFields())


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_a_window_of_penalties_matters_where_one_is_on(penalty: str, babbling, plain: dict[str, Any]) -> None:
    """llama.cpp's page and SillyTavern send all of their settings: a window of penalties without a penalty."""
    off = SamplingParams().__dict__[penalty]
    reply = babbling.post(CHAT, BODIES[CHAT] | {"repeat_last_n": 64, penalty: off})
    assert answer(reply) == plain[CHAT]
    assert reply.headers[HEADER] == "repeat_last_n"
    reply = babbling.post(CHAT, BODIES[CHAT] | {"repeat_last_n": 64, penalty: 1.1})
    assert reply.json()["error"]["param"] == "repeat_last_n"
    reply = babbling.post(CHAT, BODIES[CHAT] | {"repeat_last_n": -1, penalty: 1.1})
    assert answer(reply) == answer(babbling.post(CHAT, BODIES[CHAT] | {penalty: 1.1}))


def test_spaces_between_special_tokens_matter_where_these_are_shown(babbling, plain: dict[str, Any]) -> None:
    """vLLM's switch of the text, which is on by default."""
    for fields in ({}, {"skip_special_tokens": True}):
        reply = babbling.post(CHAT, BODIES[CHAT] | {"spaces_between_special_tokens": False} | fields)
        assert answer(reply) == plain[CHAT]
        assert reply.headers[HEADER] == "spaces_between_special_tokens"
    shown = BODIES[CHAT] | {"skip_special_tokens": False}
    reply = babbling.post(CHAT, shown | {"spaces_between_special_tokens": True})
    assert answer(reply) == answer(babbling.post(CHAT, shown))
    error = babbling.post(CHAT, shown | {"spaces_between_special_tokens": False}).json()["error"]
    assert error["param"] == "spaces_between_special_tokens"


@pytest.mark.parametrize("value", [16, 10**6])
def test_a_context_of_the_client_s_cuts_nothing(value: int, babbling) -> None:
    """Ollama cuts a conversation to num_ctx. Here it is answered whole, or refused."""
    body = BODIES[COMPLETIONS] | {"num_ctx": value, "n_keep": 4}
    long = babbling.post(COMPLETIONS, body | {"prompt": "the é at " * 10})
    assert long.json()["usage"]["prompt_tokens"] > 16
    assert long.headers[HEADER] == "num_ctx, n_keep"
    too_long = babbling.post(COMPLETIONS, body | {"prompt": "x" * 10_000})
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("name", "published", "given"),
    [
        ("repeat_last_n", {"repetition_penalty": 1.1}, {"repeat_penalty": 1}),
        ("repeat_last_n", {"presence_penalty": 0.5}, {"presence_penalty": 0.0}),
        ("min_keep", {"top_p": 0.9}, {"top_p": 1}),
        ("min_keep", {"min_p": 0.1}, {"min_p": 0}),
    ],
)
def test_what_the_publisher_sets_matters_too(name: str, published: dict[str, Any], given: dict[str, Any]) -> None:
    defaults = SamplingParams(**published)
    with pytest.raises(ApiError, match=name):
        take_out({name: 64}, CHAT, IgnoredFields(), defaults)
    ignored = IgnoredFields()
    for body in ({name: 64, **given}, {**given, name: 64}):
        take_out(body, CHAT, ignored, defaults)
        assert name not in body
    assert ignored.header() == name


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"repeat_penalty": 1.0}, {"repetition_penalty": 1}),
        ({"repeat_penalty": 1, "repetition_penalty": 1.0}, {"repetition_penalty": 1}),
        ({"repeat_last_n": 0}, {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}),
    ],
)
def test_values_that_say_what_a_parameter_says(
    fields: dict[str, Any], same: dict[str, Any], babbler, serve, plain: dict[str, Any]
) -> None:
    """A publisher's penalty is off where the request says so."""
    published = {"do_sample": True, "repetition_penalty": 100.0, "presence_penalty": 2.0}
    body = BODIES[CHAT] | {"max_tokens": 24, "presence_penalty": 0}
    with serve(dataclasses.replace(babbler, generation_config=published)) as server:
        reply = server.post(CHAT, body | fields)
        assert answer(reply) == answer(server.post(CHAT, body | same))
        assert answer(reply) != answer(server.post(CHAT, body))
        assert HEADER not in reply.headers


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"repeat_penalty": 1, "repetition_penalty": 1.2}, "repeat_penalty"),
        ({"repeat_last_n": 0, "presence_penalty": 0.5}, "repeat_last_n"),
        ({"repeat_last_n": 0, "frequency_penalty": 1}, "repeat_last_n"),
    ],
)
def test_values_that_contradict_a_parameter(fields: dict[str, Any], param: str, babbling) -> None:
    error = babbling.post(CHAT, BODIES[CHAT] | fields).json()["error"]
    assert error["param"] == param
    assert all(f"{name}: {value}" in error["message"] for name, value in fields.items())


@pytest.mark.parametrize("name", ["best", "temprature", "max_token", "seed_", "x-y"])
def test_a_field_that_nobody_knows_is_refused(name: str, babbling) -> None:
    """It may be a slip of the pen in one that matters."""
    for path, body in BODIES.items():
        error = babbling.post(path, body | {name: 1}).json()["error"]
        assert (error["code"], error["message"]) == ("unknown_parameter", f"there is no parameter {name}")


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("n_predict", 3, {"max_tokens": 3}),
        ("num_predict", 3, {"max_tokens": 3}),
        ("max_new_tokens", 3, {"max_tokens": 3}),
        ("max_output_tokens", 3, {"max_tokens": 3}),
        ("stop_sequences", ["e", "a", "i"], {"stop": ["e", "a", "i"]}),
        ("random_seed", 9, {"seed": 9}),
        ("n_cmpl", 2, {"n": 2}),
        ("json_schema", {"enum": [True]}, {"guided_json": {"enum": [True]}}),
        ("ebnf", 'root ::= "x"', {"grammar": 'start: "x"'}),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_another_name_of_a_field(path: str, name: str, value: Any, ours: dict[str, Any], babbling) -> None:
    body = {key: one for key, one in BODIES[path].items() if key not in ours}
    assert answer(babbling.post(path, body | {name: value})) == answer(babbling.post(path, body | ours))
    [other] = ours
    error = babbling.post(path, body | ours | {name: value}).json()["error"]
    assert (error["param"], error["message"]) == (
        name,
        f"{name} and {other} are two names of one thing; give one of them",
    )


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        (CHAT, {"n_predict": -2}, "n_predict: should be greater than or equal to -1, got -2"),
        (CHAT, {"num_predict": 0}, "num_predict must be 1 or above, or -1 (no limit), got 0"),
        (CHAT, {"max_new_tokens": "many"}, "max_new_tokens: should be a valid integer, got 'many'"),
        (CHAT, {"think": "somewhat"}, "think: should be 'none', "),
        (CHAT, {"think": 3}, "think: should be a valid boolean, got 3"),
        (CHAT, {"think": "low", "reasoning": {"effort": "high"}}, "think and reasoning.effort are two names"),
        (CHAT, {"think": True, "thinking": {"type": "disabled"}}, "think and thinking are two names"),
        (CHAT, {"n_cmpl": 1000}, "n_cmpl: should be less than or equal to 128, got 1000"),
        (CHAT, {"random_seed": 2**64}, "random_seed: should be from "),
        (CHAT, {"n_predict": 3, "num_predict": 3}, "num_predict and n_predict are two names of one thing"),
        (COMPLETIONS, {"n_predict": 3, "min_tokens": 4}, "min_tokens must be at most n_predict (3), got 4"),
        (COMPLETIONS, {"stop_sequences": ["a", 1]}, "stop_sequences[1]: should be a valid string, got 1"),
        (COMPLETIONS, {"json_schema": "{"}, "json_schema: "),
        (COMPLETIONS, {"regex": "a", "ebnf": "b"}, "regex and ebnf exclude each other"),
        (COMPLETIONS, {"n_predict": 0}, "n_predict: 0 needs echo: true"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_has_the_name_that_was_sent(
    path: str, fields: dict[str, Any], message: str, stream: bool, babbling
) -> None:
    body = {name: value for name, value in BODIES[path].items() if name not in ("max_tokens", "seed")}
    error = babbling.post(path, body | fields | {"stream": stream}).json()["error"]
    assert error["message"].startswith(message)
    assert error["param"].split("[")[0] in message


@pytest.mark.parametrize("value", [True, False, "low", "medium", "high", "none"])
def test_ollama_s_think(value: bool | str, thinking) -> None:
    """Its values are booleans and efforts (docs.ollama.com/capabilities/thinking)."""
    name = "reasoning_effort" if isinstance(value, str) else "enable_thinking"
    body = BODIES[CHAT] | {"max_tokens": 20}
    reply, same = thinking.post(CHAT, body | {"think": value}), thinking.post(CHAT, body | {name: value})
    assert reply.json()["choices"][0]["message"]["content"] == same.json()["choices"][0]["message"]["content"]
    assert reply.json()["usage"] == same.json()["usage"]
    assert reply.headers.get(HEADER, "").replace("think", name) == same.headers.get(HEADER, "")
    # Its template only turns thinking on and off.
    assert (HEADER in reply.headers) == (value in ("low", "high"))


def test_the_header_has_the_name_that_was_sent(babbling) -> None:
    reply = babbling.post(CHAT, BODIES[CHAT] | {"think": False})
    assert reply.headers[HEADER] == "think"
    error = babbling.post(CHAT, BODIES[CHAT] | {"think": "low"}).json()["error"]
    assert error["param"] == "think"
    assert error["message"].startswith("think: the model's chat template reads neither reasoning_effort nor enable_th")


def test_an_error_in_a_stream_has_the_name_that_was_sent() -> None:
    ignored = IgnoredFields()
    take_out({"ebnf": "a"}, CHAT, ignored)
    error = as_sent(ApiError(400, "grammar is too large", "x", "grammar"), {"state": {"ignored": ignored}})
    assert (error.message, error.param, error.code) == ("ebnf is too large", "ebnf", "x")


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"do_sample": False}, {"temperature": 0}),
        ({"do_sample": False, "temperature": 1.5, "top_p": 0.9}, {"temperature": 0}),
        ({"do_sample": True}, {"temperature": 1}),
        ({"do_sample": True, "temperature": 1.5}, {"temperature": 1.5}),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_do_sample_is_transformers_own(path: str, fields: dict[str, Any], same: dict[str, Any], babbling) -> None:
    """Its ``generate`` warns of a temperature beside ``do_sample=False``, and does not use it."""
    body = {name: value for name, value in BODIES[path].items() if name != "temperature"}
    assert answer(babbling.post(path, body | fields)) == answer(babbling.post(path, body | same))


@pytest.mark.parametrize(
    ("published", "given", "temperature"),
    [
        ({}, {"do_sample": True}, 1.0),
        ({}, {}, 0.0),
        ({"temperature": 0.6}, {"do_sample": True}, 0.6),
        ({"temperature": 0.6}, {"do_sample": False}, 0.0),
        ({"temperature": 0.6}, {"do_sample": False, "temperature": 0.7}, 0.0),
        ({"temperature": 0.6}, {"do_sample": True, "temperature": 0.7}, 0.7),
    ],
)
def test_do_sample_beside_the_publisher_s_temperature(
    published: dict[str, Any], given: dict[str, Any], temperature: float
) -> None:
    body = CompletionRequest(model="tiny", prompt="a", **given)
    assert body.params(SamplingParams(**published), 1).temperature == temperature


def test_do_sample_contradicts_temperature_0(babbling) -> None:
    error = babbling.post(CHAT, BODIES[CHAT] | {"do_sample": True, "temperature": 0}).json()["error"]
    assert error["param"] == "do_sample"
    assert error["message"] == "do_sample: true and temperature: 0 contradict each other; leave one of them out"


def test_the_full_text_of_tgi_is_an_echo(babbling) -> None:
    body = BODIES[COMPLETIONS]
    reply = answer(babbling.post(COMPLETIONS, body | {"return_full_text": True}))
    assert reply == answer(babbling.post(COMPLETIONS, body | {"echo": True}))
    assert reply["choices"][0]["text"].startswith("hello")


def test_fields_inside_of_others(thinking) -> None:
    function = {"name": "f", "parameters": {}, "cache_control": {"type": "ephemeral"}}
    tool = {"type": "function", "function": function, "cache_control": {"type": "ephemeral"}, "defer_loading": False}
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": True}
    body = BODIES[CHAT] | {"tools": [tool], "stream": True, "stream_options": options}
    reply = thinking.post(CHAT, body)
    assert reply.status_code == 200
    assert reply.headers[HEADER].split(", ") == [
        "stream_options.continuous_usage_stats",
        "stream_options.include_obfuscation",
        "tools[0].cache_control",
        "tools[0].function.cache_control",
    ]
    bare = {"type": "function", "function": {"name": "f", "parameters": {}}}
    other = thinking.post(CHAT, body | {"tools": [bare], "stream_options": {"include_usage": True}})

    def said(text: str) -> list[Any]:
        # The ids of calls are drawn.
        text = re.sub(r"call_\w+", "", text)
        chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line[6:7] == "{"]
        return [(chunk["choices"], chunk.get("usage")) for chunk in chunks]

    assert said(reply.text) == said(other.text)
    for name, value in (("defer_loading", True), ("x", 1)):
        reply = thinking.post(CHAT, body | {"tools": [tool, tool | {name: value}]})
        assert reply.json()["error"]["param"] == f"tools[1].{name}"


def test_structured_outputs_of_vllm(babbling) -> None:
    wanted = {"regex": "ab?c", "disable_any_whitespace": True, "disable_fallback": True}
    reply = babbling.post(CHAT, BODIES[CHAT] | {"structured_outputs": wanted})
    assert reply.json()["choices"][0]["message"]["content"] in ("ac", "abc")
    assert reply.headers[HEADER] == "structured_outputs.disable_any_whitespace"
    wanted["whitespace_pattern"] = " *"
    reply = babbling.post(CHAT, BODIES[CHAT] | {"structured_outputs": wanted})
    assert reply.json()["error"]["param"] == "structured_outputs.whitespace_pattern"


def test_null_is_no_field(babbling, plain: dict[str, Any]) -> None:
    reply = babbling.post(CHAT, BODIES[CHAT] | dict.fromkeys([*ignored_of(CHAT), *REQUESTS[CHAT].only]))
    assert answer(reply) == plain[CHAT]
    assert HEADER not in reply.headers


# ---- --strict.


def test_a_strict_server_refuses_what_it_would_ignore(serve, babbler) -> None:
    with serve(babbler, strict=True) as server:
        for path in (CHAT, EMBEDDINGS):
            for name in ("keep_alive", "litellm_call_id", "truncation_side", "request_id"):
                error = server.post(path, BODIES[path] | {name: 1}).json()["error"]
                assert (error["code"], error["message"]) == ("unknown_parameter", f"there is no parameter {name}")
        for name in ("best_of", "n_predict", "use_beam_search"):
            error = server.post(CHAT, BODIES[CHAT] | {name: 1}).json()["error"]
            assert error["message"] == f"there is no parameter {name}"
        fields = {"user": "ann", "store": False, "metadata": {"a": "b"}, "service_tier": "auto"}
        reply = server.post(CHAT, BODIES[CHAT] | fields)
        assert reply.is_success
        assert HEADER not in reply.headers
        error = server.post(CHAT, BODIES[CHAT] | {"chat_template_kwargs": {"x": 1}}).json()["error"]
        assert "has no variable 'x'" in error["message"]
        assert server.post(CHAT, BODIES[CHAT] | {"max_tokens": 4.0, "top_p": 0, "seed": -1}).is_success


# ---- Clients.


def test_the_fields_of_clients_through_openai_s_own(babbling) -> None:
    """Open WebUI's and llama.cpp's page's, LiteLLM's, and vLLM's users'."""
    clients: list[dict[str, Any]] = [
        {"chat_id": "1", "session_id": "2", "metadata": {"x": 1}, "stream_options": None, "keep_alive": "5m"},
        {"litellm_call_id": "1", "num_retries": 2, "timeout": 30, "cache": {"no-cache": True}},
        {"best_of": 1, "use_beam_search": False, "skip_special_tokens": True, "length_penalty": 1.0, "priority": 3},
        {"cache_prompt": True, "id_slot": -1, "repeat_penalty": 1.0, "repeat_last_n": 64, "mirostat": 0, "min_keep": 0},
        {"dry_multiplier": 0.0, "dry_base": 1.75, "xtc_probability": 0.0, "xtc_threshold": 0.1, "typical_p": 1.0},
    ]
    with babbling.openai() as client:
        for fields in clients:
            given = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
            raw = client.chat.completions.with_raw_response.create(**given, extra_body=fields)
            assert raw.parse().choices[0].finish_reason
            ignored = set(raw.headers[HEADER].split(", "))
            assert ignored == {name for name in fields if name in (*ignored_of(CHAT), "repeat_last_n")}
        with pytest.raises(
            openai.BadRequestError, match=r"repeat_penalty: should be 1, got 1\.1; use repetition_penalty"
        ):
            client.chat.completions.create(**given, extra_body={"repeat_penalty": 1.1})


def test_the_header_is_text_and_not_too_long(babbling) -> None:
    given = {"größe, x\r\n": 1} | {f"variable_{number}": 1 for number in range(400)}
    reply = babbling.post(CHAT, BODIES[CHAT] | {"chat_template_kwargs": given})
    names = reply.headers[HEADER].split(", ")
    assert names[:2] == ["chat_template_kwargs.gr%C3%B6%C3%9Fe%2C%20x%0D%0A", "chat_template_kwargs.variable_0"]
    assert names[-1] == "..."
    assert MAX_HEADER - 100 < len(reply.headers[HEADER]) <= MAX_HEADER + 5


def test_web_pages_may_read_the_header(serve, babbler) -> None:
    with serve(babbler, cors_origins=("https://a.example",)) as server:
        reply = server.post(CHAT, BODIES[CHAT] | {"user": "x"}, headers={"Origin": "https://a.example"})
        assert HEADER in reply.headers["access-control-expose-headers"]


def test_the_document_lists_all_fields() -> None:
    text = (Path(__file__).parents[4] / "docs/request-fields.md").read_text()
    for rules in (*REQUESTS.values(), *INNER.values(), TOOL):
        for reason, names in rules.ignored.items():
            assert reason in text
            assert not [name for name in names if f"`{name}`" not in text]
        for name, rule in rules.only.items():
            assert f"`{name}`" in text
            assert rule.instead in text
        assert not [name for name in (*rules.renamed, *rules.renamed_texts) if f"`{name}`" not in text]


# ---- Whole numbers.


@pytest.mark.parametrize(
    ("path", "fields", "same"),
    [
        (COMPLETIONS, {"prompt": [104.0]}, {"prompt": [104]}),
        (COMPLETIONS, {"prompt": [104, 105.0]}, {"prompt": [104, 105]}),
        (COMPLETIONS, {"prompt": [[104.0], [105, 106.0]]}, {"prompt": [[104], [105, 106]]}),
        (COMPLETIONS, {"stop_token_ids": [104.0], "n": 2.0}, {"stop_token_ids": [104], "n": 2}),
        (EMBEDDINGS, {"input": [1.0, 2.0]}, {"input": [1, 2]}),
        (EMBEDDINGS, {"input": [[1.0, 2.0], [3.0]]}, {"input": [[1, 2], [3]]}),
        ("/detokenize", {"tokens": [28.0, 104]}, {"tokens": [28, 104]}),
    ],
)
def test_a_token_id_may_have_a_point(path: str, fields: dict[str, Any], same: dict[str, Any], babbling) -> None:
    reply = babbling.post(path, BODIES[path] | fields)
    assert answer(reply) == answer(babbling.post(path, BODIES[path] | same))


@pytest.mark.parametrize("value", [1.5, True, "1", 1e300, -1.0])
@pytest.mark.parametrize(("path", "name"), [(COMPLETIONS, "prompt"), (EMBEDDINGS, "input"), ("/detokenize", "tokens")])
def test_what_is_no_token_id_is_refused(path: str, name: str, value: Any, babbling) -> None:
    for given in ([104, value], [104.0, value], [[104.0, 1], [1, value]])[: 2 if path == "/detokenize" else 3]:
        error = babbling.post(path, BODIES[path] | {name: given}).json()["error"]
        assert error["code"] == "invalid_value"
        assert error["message"].startswith(name) or "is outside" in error["message"]


def test_long_lists_of_token_ids_are_read_fast() -> None:
    began = time.thread_time()
    for ids in ([7] * 100_000, [7] * 99_999 + [7.0]):
        assert set(CompletionRequest(model="tiny", prompt=ids).prompt) == {7}
    assert time.thread_time() - began < 1

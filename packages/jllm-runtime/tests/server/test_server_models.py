"""Endpoints /v1/models, /tokenize, /detokenize, /health, /stats and /metrics."""

import dataclasses
import json
import re
from typing import Any

import openai
import pytest
from jllm_runtime import Engine, EngineConfig, RequestError
from jllm_runtime.errors import ModelError
from jllm_runtime.server.app import create_app
from jllm_runtime.server.config import ServerConfig
from jllm_runtime.server.metrics import Rate
from prometheus_client.parser import text_string_to_metric_families

HELLO = [{"role": "user", "content": "hello"}]


# ---- Models.


def test_the_model_has_names(serve, talker) -> None:
    with serve(talker, names=("org/model", "alias")) as server, server.openai() as client:
        assert [model.id for model in client.models.list()] == ["org/model", "alias"]
        model = client.models.retrieve("org/model")
        assert (model.id, model.object, model.owned_by) == ("org/model", "model", "jllm")
        assert client.completions.create(model="alias", prompt="Hi").model == "alias"
        with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
            client.models.retrieve("other")
        assert server.get("/v1/models/..%2F..%2Fetc%2Fpasswd").status_code == 404


def test_without_a_name_it_is_that_of_its_folder(serve, friendly_checkpoint) -> None:
    from jllm_runtime import load_model

    with serve(load_model(friendly_checkpoint), names=()) as server:
        assert server.get("/v1/models").json()["data"][0]["id"] == friendly_checkpoint.name


def test_what_the_models_can_do(server, thinking) -> None:
    plain, thinks = (each.get("/v1/models").json()["data"][0] for each in (server, thinking))
    assert plain["context_length"] == 300
    assert plain["abilities"] == {"chat": True, "tools": False, "thinking": False, "chat_template_kwargs": []}
    assert thinks["abilities"]["chat_template_kwargs"] == ["enable_thinking"]
    assert (thinks["abilities"]["tools"], thinks["abilities"]["thinking"]) == (True, True)


OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0} | dict.fromkeys(
    ("presence_penalty", "frequency_penalty"), 0.0
)
QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


def default_sampling(server) -> dict[str, Any]:
    return server.get("/v1/models").json()["data"][0]["default_sampling"]


def test_the_defaults_are_the_publisher_s(serve, server, talker) -> None:
    # The context of 300 tokens is less than any default.
    limits = {"max_tokens": 300, "max_tokens_without_thinking": 300}
    assert default_sampling(server) == {"temperature": 0.0, **OFF, **limits, "source": None}
    with serve(dataclasses.replace(talker, generation_config=QWEN3), max_tokens=50) as drawing:
        drawn = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_tokens": 50, "max_tokens_without_thinking": 50}
        assert default_sampling(drawing) == OFF | drawn | {"source": "generation_config.json"}


def test_a_model_that_thinks_may_say_more(serve, thinker) -> None:
    config = dataclasses.replace(thinker.config, context_length=20_000)
    model, sizes = dataclasses.replace(thinker, config=config), EngineConfig(pages=400)
    for template_vars, most in (({}, 16384), ({"enable_thinking": False}, 2048)):
        with serve(model, sizes, template_vars=template_vars) as server:
            told = default_sampling(server)
            assert (told["max_tokens"], told["max_tokens_without_thinking"]) == (most, 2048)


def test_an_impossible_recommendation_ends_the_start(talker) -> None:
    broken = dataclasses.replace(talker, generation_config={"top_p": 7})
    with (
        Engine(broken, EngineConfig(pages=64)) as engine,
        pytest.raises(ModelError, match=r"top_p must be from 0 to 1"),
    ):
        create_app(engine)
    with Engine(talker, EngineConfig(pages=64)) as engine, pytest.raises(RequestError, match=r"no variable 'tone'"):
        create_app(engine, ServerConfig(template_vars={"tone": "kind"}))


# ---- Tokens.


def test_texts_to_tokens_and_back(server, tiny) -> None:
    reply = server.post("/tokenize", {"prompt": "the é<|end|>", "model": "tiny"}).json()
    assert reply["tokens"] == tiny.tokenizer.encode("the é<|end|>")
    assert reply["token_strs"] == ["the", " ", "\\xc3", "\\xa9", "<|end|>"]
    assert (reply["count"], reply["max_model_len"]) == (5, 300)
    assert server.post("/detokenize", {"tokens": reply["tokens"]}).json() == {"prompt": "the é<|end|>"}
    assert server.post("/tokenize", {"prompt": ""}).json()["tokens"] == []
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_a_conversation_to_tokens(server, tiny) -> None:
    reply = server.post("/tokenize", {"messages": HELLO}).json()
    assert reply["tokens"] == tiny.tokenizer.encode_chat(HELLO)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "give prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "give prompt or messages"),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs is for messages"),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message is for messages"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt is for messages"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": False}, "add_special_tokens is for a prompt"),
        ("/tokenize", {"prompt": 5}, "prompt: should be a valid string, got 5"),
        ("/detokenize", {"tokens": [272]}, "token id 272 is outside"),
        ("/detokenize", {"tokens": [-1]}, "token id -1 is outside"),
        ("/detokenize", {"tokens": "a"}, "tokens: should be a valid list"),
    ],
)
def test_what_is_no_text_and_no_token(path: str, body: dict[str, Any], message: str, server) -> None:
    reply = server.post(path, body)
    assert (reply.status_code, message in reply.json()["error"]["message"]) == (400, True), reply.text
    assert server.post(path, {**body, "model": "other"}).status_code in (400, 404)


# ---- How the server is.


def test_health(serve, talker) -> None:
    with serve(talker) as server:
        assert server.get("/health").json() == server.get("/ready").json() == {"status": "ok"}
        server.engine.close()
        for path in ("/health", "/ready"):
            reply = server.get(path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_stopped")
        reply = server.post("/v1/completions", {"model": "tiny", "prompt": "Hi"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_stopped")


def test_stats(serve, talker) -> None:
    with serve(talker) as server:
        for _ in range(2):
            server.post("/v1/completions", {"model": "tiny", "prompt": "Hi" * 40})
        stats = server.get("/stats").json()
        assert (stats["finished"], stats["running"], stats["max_batch"]) == (2, 0, 16)
        assert (stats["generated_tokens"], stats["reused_tokens"]) == (14, 64)
        assert stats["tokens_per_second"] == pytest.approx(14 / 5)


def test_timeline(serve, talker) -> None:
    with serve(talker) as server:
        assert server.get("/timeline").json() == {"seconds": 30, "rows": [], "left_out": 0}
        server.post("/v1/completions", {"model": "tiny", "prompt": "Hi" * 40, "n": 2})
        shown = server.get("/timeline").json()
        listeners = server.engine.recorder._listeners
    assert [(row["number"], row["ended"], row["generated_tokens"]) for row in shown["rows"]] == [
        (1, "stop", 7),
        (2, "stop", 7),
    ]
    assert [span["phase"] for span in shown["rows"][0]["spans"]] == ["waiting", "prefill", "decode"]
    assert "Hi" not in json.dumps(shown)
    # An engine may be served again.
    assert (len(listeners), server.engine.recorder._listeners) == (1, ())


def test_tokens_per_second() -> None:
    now = 100.0
    rate = Rate(window=2.0, clock=lambda: now)
    assert rate.value() == 0
    rate.add(6)
    now = 101.0
    rate.add(2)
    assert rate.value() == 4
    now = 102.5
    assert rate.value() == 1
    now = 200.0
    assert rate.value() == 0


def test_metrics(serve, talker) -> None:
    with serve(talker) as server:
        for _ in range(2):
            assert server.post("/v1/completions", {"model": "tiny", "prompt": "Hi" * 40, "n": 2}).is_success
        server.post("/v1/completions", {"model": "other", "prompt": "Hi"})
        server.get("/v1/models/a-name-of-somebody-s-own")
        server.get("/nowhere")
        reply = server.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }
    assert samples["jllm_http_requests_total", "/v1/completions", "200"] == 2
    assert samples["jllm_http_requests_total", "/v1/completions", "404"] == 1
    assert samples["jllm_generated_tokens_total",] == 28
    assert samples["jllm_reused_tokens_total",] > 0
    assert samples["jllm_requests_ended_total", "finished"] == 2
    assert samples["jllm_time_to_first_token_seconds_count",] == 2
    assert samples["jllm_inter_token_seconds_count",] > 8
    assert samples["jllm_request_seconds_count",] == 2
    for name in ("running", "waiting", "under_way"):
        assert samples[f"jllm_answers_{name}",] == 0
    assert (samples["jllm_pages",], samples["jllm_pages_in_use",], samples["jllm_max_batch",]) == (64, 0, 16)
    assert (samples["jllm_states",], samples["jllm_states_in_use",]) == (0, 0)  # it has no delta nets
    # What somebody makes up is no label: there would be no end of them.
    assert not re.search("somebody|nowhere", reply.text)


def test_a_model_with_states_is_served_and_its_states_are_counted(serve, tiny) -> None:
    model = tiny.random(tiny.hybrid, tokenizer=tiny.tokenizer)
    asked = {"model": "tiny", "prompt": "Hi" * 40, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    with serve(model, EngineConfig(pages=16, max_batch=4)) as server:
        first, second = (server.post("/v1/completions", asked).json() for _ in range(2))
        assert first["choices"][0]["text"] == second["choices"][0]["text"]
        assert first["usage"]["completion_tokens"] == 6
        stats = server.get("/stats").json()
        metrics = server.get("/metrics").text
    assert (stats["states"], stats["states_in_use"], stats["pages_idle"], stats["reused_tokens"]) == (4, 0, 1, 64)
    assert (stats["snapshots"], stats["snapshots_in_use"]) == (4, 1)
    for line in ("states 4.0", "states_in_use 0.0", "snapshots 4.0", "snapshots_in_use 1.0"):
        assert f"jllm_{line}" in metrics

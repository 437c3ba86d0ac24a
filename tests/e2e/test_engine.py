"""The engine with real weights: the answers of `generate`, whoever else asks, and JSON where JSON is asked for."""

import json
from pathlib import Path

from jllm_runtime import Engine, EngineConfig, Grammar, SamplingParams, generate, load_model

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "degrees": {"type": "integer", "maximum": 50}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}


def test_the_same_answers_alone_in_a_crowd_and_after_giving_way(smollm2_folder: Path) -> None:
    model = load_model(smollm2_folder)
    assert model.tokenizer is not None
    question = model.tokenizer.encode_chat(QUESTION)
    # Ends in its third page, so that it must ask for one more on the way.
    story = model.tokenizer.encode("The lighthouse stood at the end of the pier. " * 11)[:110]
    greedy = SamplingParams(max_tokens=24)
    seeded = SamplingParams(temperature=0.8, top_p=0.95, seed=5, max_tokens=40)
    as_json = SamplingParams(max_tokens=60, grammar=Grammar.json_schema(WEATHER))
    [expected] = generate(model, [question], greedy)
    assert expected.text == "The capital of France is Paris."

    with Engine(model, EngineConfig(pages=20, max_batch=8)) as engine:
        assert engine.submit(question, greedy).result().token_ids == expected.token_ids
        alone = engine.submit(story, seeded).result()
        warm = engine.submit(story, seeded).result()
        assert (warm.token_ids, warm.reused_tokens) == (alone.token_ids, 64)

        # Eight texts that begin differently want three pages each: more than there are.
        with engine._changed:
            crowd = [engine.submit([number, *story[1:]], seeded) for number in range(10, 17)]
            last = engine.submit(story, seeded)
            structured = engine.submit(model.tokenizer.encode_chat(QUESTION), as_json)
        assert last.result().token_ids == alone.token_ids
        assert [len(request.result().token_ids) for request in crowd] == [40] * 7
        assert set(json.loads(structured.result().text)) == {"city", "degrees"}
        stats = engine.stats()
    assert stats.preemptions > 0
    assert (stats.pages_in_use, stats.running, stats.waiting) == (0, 0, 0)

"""The engine with real weights: the answers of `generate`, whoever else asks, and JSON where JSON is asked for."""

import json
from pathlib import Path

from jllm_runtime import Engine, EngineConfig, Grammar, SamplingParams, generate, load_model

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STORY = """\
The keeper climbed the stairs every evening and lit the lamp. Ships passed far out, on their way to harbours whose names
he knew from letters. In the autumn a boy came over from the village with bread and oil, and asked how the light could
turn when nobody pushed it. The keeper showed him the clockwork, the weights on their chains, and the log in which each
night had a line: wind, weather, sails in sight. Then one morning the log had a line that neither of them had written.
It said that"""
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


def test_fifteen_others_change_no_token(smollm2_folder: Path) -> None:
    """Greedy and seeded: alone, with a warm and a cold prefix cache among others of unequal length, and preempted."""
    model = load_model(smollm2_folder)
    assert model.tokenizer is not None
    # Ends in its second page, and its answer in the third.
    prompt = model.tokenizer.encode(STORY)
    assert 100 < len(prompt) < 128 < len(prompt) + 30
    asked = [
        SamplingParams(max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=30, ignore_eos=True),
    ]
    others = [prompt[number : number + 3 + 5 * number] for number in range(1, 16)]

    def noise(number: int) -> SamplingParams:
        return SamplingParams(temperature=1.2, seed=number, max_tokens=20 + number, ignore_eos=True)

    alone = []
    for params in asked:
        with Engine(model, EngineConfig(pages=64)) as engine:
            alone.append(engine.submit(prompt, params).result())
            warm = engine.submit(prompt, params).result()
        assert (warm.token_ids, warm.reused_tokens) == (alone[-1].token_ids, 64)
    assert alone[0].token_ids != alone[1].token_ids

    for params, expected in zip(asked, alone, strict=True):
        for warm in (False, True):
            with Engine(model, EngineConfig(pages=64)) as engine:
                if warm:
                    engine.submit(prompt, SamplingParams(max_tokens=1)).result()
                with engine._changed:  # all of them before the first step
                    crowd = [engine.submit(other, noise(number)) for number, other in enumerate(others)]
                    request = engine.submit(prompt, params)
                found = request.result()
                assert (found.token_ids, found.reused_tokens) == (expected.token_ids, 64 * warm)
                assert [len(one.result().token_ids) for one in crowd] == [20 + number for number in range(15)]
                assert engine.stats().preemptions == 0

    # Six run, and soon want three pages each; the youngest gives way.
    long = SamplingParams(max_tokens=60, ignore_eos=True)
    for params, expected in zip(asked, alone, strict=True):
        with Engine(model, EngineConfig(pages=17)) as engine:
            with engine._changed:
                crowd = [engine.submit([number, *prompt[1:]], long) for number in range(5)]
                request = engine.submit(prompt, params)
            assert request.result().token_ids == expected.token_ids
            assert [len(one.result().token_ids) for one in crowd] == [60] * 5
            assert engine.stats().preemptions > 0

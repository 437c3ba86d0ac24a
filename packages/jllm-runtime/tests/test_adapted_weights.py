"""Models with an adapter beside their weights: the same answers and scores as with the adapter merged."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core.adapters import Adapter, LowRank, abstract_adapter, merge_adapter, with_adapter
from jllm_runtime import Model, SamplingParams, generate, perplexity


@pytest.fixture(scope="module")
def models(tiny) -> tuple[Model, Model, Model]:
    """The same model plain, with an adapter beside it, and with it merged."""
    plain, random = tiny.plain, np.random.default_rng(0)
    described = abstract_adapter(plain.config, 2, 4.0, ["q", "o", "w_down"])
    factors = {
        name: LowRank(*(jnp.asarray(random.normal(0, 0.2, each.shape), jnp.float32) for each in (part.a, part.b)))
        for name, part in described.factors.items()
    }
    adapter = Adapter(factors, 4.0)
    beside, merged = (
        dataclasses.replace(plain, weights=way(plain.weights, adapter)) for way in (with_adapter, merge_adapter)
    )
    return plain, beside, merged


def test_scores(models: tuple[Model, Model, Model], prompt) -> None:
    plain, beside, merged = (perplexity(model, prompt(40)).loss for model in models)
    assert beside == pytest.approx(merged, abs=1e-4)
    assert abs(beside - plain) > 1e-3


def test_answers(models: tuple[Model, Model, Model], prompt) -> None:
    params = SamplingParams(max_tokens=8)
    plain, beside, merged = (generate(model, prompt(20), params)[0].token_ids for model in models)
    assert beside == merged
    assert beside != plain


def test_it_is_told_in_a_line(models: tuple[Model, Model, Model]) -> None:
    assert "AdaptedMatrix" in repr(models[1].weights)
    assert "float32" in repr(models[1])

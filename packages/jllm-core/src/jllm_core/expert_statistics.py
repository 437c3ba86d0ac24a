"""Expert statistics: how evenly the experts of a mixture are used, for training, pruning and placing them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jllm_core.backends.base import XLA
from jllm_core.config import ModelConfig
from jllm_core.kv_cache import NoCache
from jllm_core.model import Capture, Captured, hidden_states
from jllm_core.sharding import Placement
from jllm_core.weights import Weights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertLoad:
    """Use of the experts in each layer that has them, in the layers' order (L of them).

    Attributes:
        tokens: how many tokens went to each expert, ``[L, E]``; each token counts once for each of its experts.
        balance: the load-balancing loss of Switch Transformer (arXiv:2101.03961, equation 4), ``[L]``: the number of
            experts times the sum over them of (share of the tokens) x (mean probability). 1 is perfectly even; E is all
            tokens to one expert. Differentiable.
    """

    tokens: Int[Array, "L E"]
    balance: Float[Array, " L"]


def expert_load(
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    weights: Weights,
    config: ModelConfig,
    lengths: Int[Array, " B"] | None = None,
    placement: Placement | None = None,
) -> ExpertLoad:
    """Run the model without a cache and count which experts its tokens go to.

    Args:
        tokens: token ids.
        positions: where in its text each token stands.
        weights: the model's arrays.
        config: its architecture.
        lengths: tokens in each row's text; those at later positions only fill the row up, and are not counted. None
            counts all.
        placement: the mesh that the weights live on.

    Raises:
        ValueError: the model has no mixture of experts.
    """
    if config.moe is None:
        raise ValueError("the model has no mixture of experts: config.moe is None")
    counted = jnp.ones(tokens.size, bool) if lengths is None else (positions < lengths[:, None]).reshape(-1)
    captured = Captured()
    hidden_states(
        tokens, positions, weights, config, NoCache(), XLA(placement), lengths, Capture(routing=True), captured
    )
    counts, balances = [], []
    for routing in captured.routing.values():
        # Tokens that only fill a row up go to an expert beyond the last, which bincount leaves out.
        chosen = jnp.where(counted[:, None], routing.experts, config.moe.num_experts)
        count = jnp.bincount(chosen.reshape(-1), length=config.moe.num_experts)
        probability = jnp.mean(routing.probabilities, axis=0, where=counted[:, None])
        counts.append(count)
        balances.append(config.moe.num_experts * jnp.sum(count / jnp.sum(count) * probability))
    return ExpertLoad(jnp.stack(counts), jnp.stack(balances))

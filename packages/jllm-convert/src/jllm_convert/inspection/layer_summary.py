"""A model's tensors summed up layer by layer, with what the config says of each layer."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from jllm_core.config import ModelConfig

from jllm_convert.inspection.stored_tensors import StoredTensor

# How models of all kinds call their layers: model.layers.0.mlp..., blk.0.ffn_up..., transformer.h.0.attn...
_LAYER = re.compile(r"(?P<stack>(?:.*?\.)?(?:layers|layer|blocks|block|blk|h))\.(?P<number>[0-9]{1,9})\.")


@dataclass(frozen=True)
class Attention:
    """How a layer attends: its heads, and how many earlier positions a query sees (``window``; None for all)."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    rope: bool


@dataclass(frozen=True)
class FeedForward:
    """A layer's feed-forward part: an ``mlp``, or a ``moe`` whose ``width`` is that of one expert."""

    kind: str
    width: int
    experts: int | None = None
    experts_per_token: int | None = None


@dataclass(frozen=True)
class LayerSummary:
    """The tensors of one layer, or of all that is in none.

    Attributes:
        stack: what the names of its tensors begin with, such as ``model.layers``; empty for what is in no layer.
        layer: its number in the stack; None for what is in no layer.
        tensors: how many tensors it has.
        parameters: how many numbers.
        nbytes: their bytes on disk.
        attention: how it attends; None where no config says.
        ffw: its feed-forward part; None where no config says.
    """

    stack: str
    layer: int | None
    tensors: int
    parameters: int
    nbytes: int
    attention: Attention | None = None
    ffw: FeedForward | None = None


def summarise(
    tensors: Iterable[StoredTensor], config: ModelConfig | None, stack: str
) -> tuple[tuple[LayerSummary, ...], LayerSummary]:
    """Sum the tensors up by layer.

    Args:
        tensors: all of them, in any order.
        config: the architecture, where it is known.
        stack: what the names of its layers' tensors begin with in this kind of source.

    Returns:
        The layers, by stack and number, and what is in no layer.
    """
    groups: dict[tuple[str, int], list[StoredTensor]] = {}
    outside: list[StoredTensor] = []
    for tensor in tensors:
        found = _LAYER.match(tensor.name)
        place = outside if found is None else groups.setdefault((found["stack"], int(found["number"])), [])
        place.append(tensor)
    layers = []
    for (own, number), group in sorted(groups.items(), key=lambda each: each[0]):
        known = config is not None and own == stack and number < config.num_layers
        attention, ffw = _described(config, number) if config is not None and known else (None, None)
        layers.append(LayerSummary(own, number, *_sums(group), attention, ffw))
    return tuple(layers), LayerSummary("", None, *_sums(outside))


def _sums(tensors: list[StoredTensor]) -> tuple[int, int, int]:
    return len(tensors), sum(each.parameters for each in tensors), sum(each.nbytes for each in tensors)


def _described(config: ModelConfig, number: int) -> tuple[Attention, FeedForward]:
    attention = Attention(
        config.num_heads, config.num_kv_heads, config.head_dim, config.window(number), config.rotates(number)
    )
    if config.moe is None or not config.is_moe(number):
        return attention, FeedForward("mlp", config.intermediate_size)
    moe = config.moe
    return attention, FeedForward("moe", moe.intermediate_size, moe.num_experts, moe.experts_per_token)

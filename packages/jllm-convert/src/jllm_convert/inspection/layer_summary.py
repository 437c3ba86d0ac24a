"""Layer summaries: totals of the tensors of each layer, with its attention and feed-forward part by the config."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from jllm_core.config import ModelConfig

from jllm_convert.inspection.stored_tensors import StoredTensor

# The names of layers in models of all kinds: model.layers.0.mlp..., blk.0.ffn_up..., transformer.h.0.attn...
_LAYER = re.compile(r"(?P<stack>(?:.*?\.)?(?:layers|layer|blocks|block|blk|h))\.(?P<number>[0-9]{1,9})\.")


@dataclass(frozen=True)
class Attention:
    """Attention of a layer: heads, and the positions that a query sees (``window``; None for all)."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    rope: bool


@dataclass(frozen=True)
class DeltaNet:
    """Gated delta net of a layer: heads of keys and values, and their widths."""

    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int


@dataclass(frozen=True)
class FeedForward:
    """Feed-forward part of a layer: an ``mlp``, or a ``moe`` whose ``width`` is that of one expert.

    ``shared`` is the width of the expert that all tokens go through.
    """

    kind: str
    width: int
    experts: int | None = None
    experts_per_token: int | None = None
    shared: int | None = None


@dataclass(frozen=True)
class LayerSummary:
    """Totals of the tensors of one layer, or of those in no layer.

    Attributes:
        stack: the prefix of its tensors' names, such as ``model.layers``; empty for tensors in no layer.
        layer: its number in the stack; None for tensors in no layer.
        tensors: the number of tensors.
        parameters: the number of values in them.
        nbytes: their bytes on disk.
        attention: its attention, or the delta net in its place; None without a config.
        ffw: its feed-forward part; None without a config.
    """

    stack: str
    layer: int | None
    tensors: int
    parameters: int
    nbytes: int
    attention: Attention | DeltaNet | None = None
    ffw: FeedForward | None = None


def summarise(
    tensors: Iterable[StoredTensor], config: ModelConfig | None, stacks: Collection[str]
) -> tuple[tuple[LayerSummary, ...], LayerSummary]:
    """Sum up the tensors by layer.

    Args:
        tensors: all tensors, in any order.
        config: the architecture, where it is known.
        stacks: the prefixes that names of layers' tensors may have in this kind of source.

    Returns:
        The layers by stack and number, and the tensors in no layer.
    """
    groups: dict[tuple[str, int], list[StoredTensor]] = {}
    outside: list[StoredTensor] = []
    for tensor in tensors:
        found = _LAYER.match(tensor.name)
        group = outside if found is None else groups.setdefault((found["stack"], int(found["number"])), [])
        group.append(tensor)
    layers = []
    for (own, number), group in sorted(groups.items(), key=lambda each: each[0]):
        # A model may have other stacks, such as a vision tower, of which the config says nothing.
        known = config is not None and own in stacks and number < config.num_layers
        attention, ffw = _described(config, number) if config is not None and known else (None, None)
        layers.append(LayerSummary(own, number, *_sums(group), attention, ffw))
    return tuple(layers), LayerSummary("", None, *_sums(outside))


def _sums(tensors: list[StoredTensor]) -> tuple[int, int, int]:
    return len(tensors), sum(each.parameters for each in tensors), sum(each.nbytes for each in tensors)


def _described(config: ModelConfig, number: int) -> tuple[Attention | DeltaNet, FeedForward]:
    return _mixer(config, number), _feed_forward(config, number)


def _mixer(config: ModelConfig, number: int) -> Attention | DeltaNet:
    net = config.delta_net
    if net is not None and config.mixer(number) == "delta_net":
        return DeltaNet(net.num_key_heads, net.num_value_heads, net.key_head_dim, net.value_head_dim)
    # The rotary embedding and the window may differ from layer to layer; the heads do not.
    return Attention(
        config.num_heads, config.num_kv_heads, config.head_dim, config.window(number), config.rotates(number)
    )


def _feed_forward(config: ModelConfig, number: int) -> FeedForward:
    moe = config.moe
    if moe is None or not config.is_moe(number):
        return FeedForward("mlp", config.intermediate_size)
    return FeedForward("moe", moe.intermediate_size, moe.num_experts, moe.experts_per_token, moe.shared_size)

"""Types of the fields of config.json that are read: checked before anything is made of them."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeGuard

from jllm_core.config import ConfigError, is_number

from jllm_convert.families.table import Family


def is_whole(value: object, smallest: int = 1) -> TypeGuard[int]:
    """Whether a value of JSON is a whole number, and at least ``smallest``."""
    return type(value) is int and value >= smallest


# By what is expected: whether a value is that, and the fields that must be.
_TYPES: dict[str, tuple[Callable[[object], bool], tuple[str, ...]]] = {
    "a whole number of at least 1": (
        is_whole,
        (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "max_position_embeddings"),
        ),
    ),
    "a whole number of at least 0": (lambda value: is_whole(value, 0), ("num_experts", "num_local_experts")),
    "a number above 0": (lambda value: is_number(value) and value > 0, ("rms_norm_eps", "rope_theta")),
    "true or false": (
        lambda value: isinstance(value, bool),
        ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "norm_topk_prob"),
    ),
}


def type_problems(fields: Mapping[str, Any], read: Collection[str], where: str) -> Iterator[str]:
    """A problem for each field that is read and of another type than it must be. Null stands for "left out".

    Args:
        fields: the parsed config.json, or an object in it.
        read: the fields that are read.
        where: the file's name, for messages.
    """
    for expected, (fits, names) in _TYPES.items():
        for name in names:
            if name in read and fields.get(name) is not None and not fits(fields[name]):
                yield f"{where}: {name} must be {expected}, got {fields[name]!r}"


def whole_field(fields: Mapping[str, Any], family: Family, name: str, smallest: int = 1) -> int:
    """A whole number, the family's default where it is left out or null.

    Raises:
        ConfigError: it is something else.
    """
    value = fields.get(name)
    value = family.defaults[name] if value is None else value
    if not is_whole(value, smallest):
        raise ConfigError(f"{name} must be a whole number of at least {smallest}, got {value!r}")
    return value

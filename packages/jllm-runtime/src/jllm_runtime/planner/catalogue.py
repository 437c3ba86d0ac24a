"""Catalogue of published models, with the values of their config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jllm_core.config import ModelConfig, MoEConfig, RopeScaling


@dataclass(frozen=True)
class PublishedModel:
    """A model on the Hugging Face hub.

    Attributes:
        name: organisation and name, as on the hub.
        config: its architecture.
        parameters: number in the published files, a tied embedding counted once.
    """

    name: str
    config: ModelConfig
    parameters: int


def _qwen3(
    name: str, d: int, f: int, layers: int, heads: int, parameters: int, kv_heads: int = 8, **more: Any
) -> PublishedModel:
    config = ModelConfig(
        model_type="qwen3_moe" if "moe" in more else "qwen3",
        vocab_size=151936,
        hidden_size=d,
        intermediate_size=f,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        context_length=40960,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000,
        qk_norm=True,
        **more,
    )
    return PublishedModel(f"Qwen/Qwen3-{name}", config, parameters)


def _llama3(
    name: str, d: int, f: int, layers: int, heads: int, parameters: int, factor: float, head_dim: int = 128, **more: Any
) -> PublishedModel:
    scaling = RopeScaling(
        kind="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192
    )
    config = ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=d,
        intermediate_size=f,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        context_length=131072,
        rms_norm_eps=1e-5,
        rope_theta=500_000,
        rope_scaling=scaling,
        **more,
    )
    return PublishedModel(f"meta-llama/Llama-{name}", config, parameters)


def _experts(width: int) -> MoEConfig:
    return MoEConfig(num_experts=128, experts_per_token=8, intermediate_size=width)


# Name, D, F, layers, N, parameters.
_PUBLISHED = (
    _qwen3("0.6B", 1024, 3072, 28, 16, 596_049_920, tie_embeddings=True),
    _qwen3("1.7B", 2048, 6144, 28, 16, 1_720_574_976, tie_embeddings=True),
    _qwen3("4B", 2560, 9728, 36, 32, 4_022_468_096, tie_embeddings=True),
    _qwen3("8B", 4096, 12288, 36, 32, 8_190_735_360),
    _qwen3("14B", 5120, 17408, 40, 40, 14_768_307_200),
    _qwen3("32B", 5120, 25600, 64, 64, 32_762_123_264),
    _qwen3("30B-A3B", 2048, 6144, 48, 32, 30_532_122_624, kv_heads=4, moe=_experts(768)),
    _qwen3("235B-A22B", 4096, 12288, 94, 64, 235_093_634_560, kv_heads=4, moe=_experts(1536)),
    _llama3("3.2-1B", 2048, 8192, 16, 32, 1_235_814_400, 32.0, head_dim=64, tie_embeddings=True),
    _llama3("3.2-3B", 3072, 8192, 28, 24, 3_212_749_824, 32.0, tie_embeddings=True),
    _llama3("3.1-8B", 4096, 14336, 32, 32, 8_030_261_248, 8.0),
    _llama3("3.1-70B", 8192, 28672, 80, 64, 70_553_706_496, 8.0),
)

PUBLISHED: Mapping[str, PublishedModel] = MappingProxyType({model.name: model for model in _PUBLISHED})


def find_published(name: str) -> PublishedModel | None:
    """The published model of this name, in any case, with or without its organisation; None where there is none."""
    wanted = name.lower()
    for full, model in PUBLISHED.items():
        # "Qwen3-14B" means the same as "Qwen/Qwen3-14B".
        if wanted in (full.lower(), full.split("/")[1].lower()):
            return model
    return None

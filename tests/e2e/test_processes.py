"""One model over several processes on this machine: the tokens of one process, and a clear end when one is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

QUESTION = "What is the capital of France?"


def start(
    index: int, folder: Path, cache: Path, address: str, output: Path, *options: object
) -> subprocess.Popen[bytes]:
    """Process ``index`` of two, with two devices, its output and errors in files."""
    named = ("--coordinator", address, "--num-processes", 2, "--process-id", index)
    command = ("generate", folder, "--mesh", "data=2,tensor=2", *named, *options)
    environment = {
        **os.environ,
        "JLLM_CACHE": str(cache),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    with output.with_suffix(".out").open("wb") as out, output.with_suffix(".err").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "jllm_runtime.cli", *map(str, command)], stdout=out, stderr=err, env=environment
        )


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_two_processes_give_the_tokens_of_one(run, smollm2_folder, cache_folder, tmp_path):
    options = ("--prompt", QUESTION, "--json")
    address = free_address()
    processes = [start(i, smollm2_folder, cache_folder, address, tmp_path / str(i), *options) for i in (1, 0)]
    errors = (tmp_path / "0.err").read_text
    assert [process.wait(timeout=240) for process in processes] == [0, 0], errors()
    together = json.loads((tmp_path / "0.out").read_text())
    assert (tmp_path / "1.out").read_text() == ""
    alone = json.loads(run("jllm", "generate", smollm2_folder, *options).stdout)
    assert together["token_ids"] == alone["token_ids"]
    assert together["text"] == "The capital of France is Paris."


def test_when_a_process_is_killed_the_other_ends_and_says_so(smollm2_folder, cache_folder, tmp_path):
    options = ("--prompt", "Write a very long story about a dragon.", "--max-tokens", 3000)
    address = free_address()
    second, first = (start(i, smollm2_folder, cache_folder, address, tmp_path / str(i), *options) for i in (1, 0))
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "0.out").read_bytes():
            assert time.monotonic() < deadline, (tmp_path / "0.err").read_text()
            assert first.poll() is None, (tmp_path / "0.err").read_text()
            time.sleep(0.2)
        second.send_signal(signal.SIGKILL)
        assert first.wait(timeout=15) == 1
        message = (tmp_path / "0.err").read_text()
        assert "Error: process 0 of 2 cannot go on, process 1 was lost or failed" in message
        assert "Traceback" not in message
    finally:
        first.kill()
        second.kill()
        second.wait()


BYTES_READ = """
import json, os, sys
import jax
from jllm_runtime import load_model, make_mesh
from jllm_runtime.distributed.processes import Processes, join

weights = os.path.join(sys.argv[1], "weights")
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
peers = join(Processes(sys.argv[2], 2, int(sys.argv[3])))
model = load_model(sys.argv[1], make_mesh({"tensor": 4}))
read = sum(os.path.getsize(path) for path in opened if path.startswith(weights))  # chunks are read whole
held = 0
for array in jax.tree.leaves(model.weights):
    held += sum({str(shard.index): shard.data.nbytes for shard in array.addressable_shards}.values())
print(json.dumps({"read": read, "held": held}))
peers.farewell()
"""


def test_each_process_reads_no_more_than_its_devices_hold(smollm2_folder, tmp_path):
    """Two processes of two devices; each part of an array is read once for all the devices that hold it."""
    address, script = free_address(), tmp_path / "script.py"
    script.write_text(BYTES_READ)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, smollm2_folder, address, str(index)], stdout=subprocess.PIPE, env=environment
        )
        for index in (1, 0)
    ]
    reports = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    whole = sum(path.stat().st_size for path in (smollm2_folder / "weights").rglob("*") if path.is_file())
    for report in reports:
        assert report["held"] <= report["read"] < 1.1 * report["held"]
        assert report["held"] < 0.7 * whole  # the heads are whole in both: 9 and 3 are not divided by 4

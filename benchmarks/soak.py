"""A server under clients that behave badly, for thousands of requests, and one that is killed.

    hatch run oracle:python benchmarks/soak.py [--requests 2000] [--few-pages] [--json FILE]

SmolLM2-135M in a server process, or a random model of no size. Each request carries a word of its own, which a grammar
makes the answer begin and end with, so that answers which were mixed up would show. Of the requests, 20% are cancelled
midway, 5% are malformed, 10% too long, and 3% come from clients that stall: they send half of a head or of a body,
or ask for much and read nothing.

At the end no page may be in use, the memory must not have grown by more than 5% in the second half, and every request
must have been answered or refused as it should be. With --few-pages answers must have given way to each other, too, and
been made anew. Then a server is killed with clients waiting, and started again.
"""

import argparse
import asyncio
import json
import random
import socket
import statistics
import string
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent))
from serving import Reply, Server, ask, random_small_model, using_cache
from smollm2 import converted

SHARES = {"cancelled": 0.2, "malformed": 0.05, "too long": 0.1, "half sent": 0.02, "unread": 0.01}
CLIENTS, QUEUE = 50, 32
PAGES = ("--pages", "24")
"""So few that answers wait for them."""
FEW_PAGES = ("--pages", "56", "--page-size", "8")
"""So few, and so small, that answers outgrow what was left for them when they began. Any one of them fits alone."""
WORDS, MORE_WORDS = 8, 40
"""Most words of an answer between the first and the last, and where pages are few."""
STALL_TIMEOUT = 3
QUIET_S = 60
"""Seconds in which all must have come to rest at the end."""
MALFORMED: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"\xff\xfe", 400),
    (b'{"model": "smollm2"}', 400),
    (b'{"model": "smollm2", "messages": []}', 400),
    (b'{"model": "smollm2", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"}', 400),
    (b'{"model": "smollm2", "messages": [{"role": "user", "content": "x"}], "no_such_thing": 1}', 400),
    (b'{"model": "smollm2", "messages": [{"role": "user", "content": "x"}], "regex": "("}', 400),
    (b'{"model": "another", "messages": [{"role": "user", "content": "x"}]}', 404),
]


class Soak:
    """The requests, one after another for each client.

    Attributes:
        outcomes: how many ended in which way.
        wrong: what should not have been.
        rss: bytes of the server's memory, as the requests go by.
    """

    def __init__(self, server: Server, words: int, seed: int) -> None:
        self._server = server
        self._words = words
        self._random = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.rss: list[int] = []

    async def run(self, count: int) -> None:
        """All of them."""
        kinds = iter(self._random.choices([*SHARES, "plain"], [*SHARES.values(), 1 - sum(SHARES.values())], k=count))
        done = 0

        async def client() -> None:
            nonlocal done
            for kind in kinds:
                await getattr(self, "_" + kind.replace(" ", "_"))()
                done += 1
                if done % max(1, count // 100) == 0:
                    self.rss.append(self._server.rss())

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def _plain(self) -> None:
        word = self._word()
        stream = self._random.random() < 0.7
        reply = await self._ask({**self._body(word, self._random.randint(1, self._words)), "stream": stream})
        if await self._refused(reply, "plain"):
            return
        words = reply.text.split(" ")
        if reply.error or words[0] != word or words[-1] != word or reply.finish_reason != "stop":
            self.wrong.append(f"plain: {reply.status} {reply.error} {reply.finish_reason} {word!r} -> {reply.text!r}")
        self.outcomes["answered"] += 1

    async def _cancelled(self) -> None:
        word, pieces = self._word(), self._random.randint(0, 12)

        def leave(reply: Reply) -> None:
            if not word.startswith(reply.text[: len(word)]):
                self.wrong.append(f"cancelled: {word!r} -> {reply.text!r}")
            if len(reply.times) > pieces:
                raise EOFError("enough")

        body = {**self._body(word, 40), "stream": True}
        reply = await ask(self._server.url, body, on_text=leave)
        if not await self._refused(reply, "cancelled"):
            self.outcomes["cancelled" if reply.error == "EOFError: enough" else "ended before it was cancelled"] += 1

    async def _malformed(self) -> None:
        content, status = self._random.choice(MALFORMED)
        await self._expect(await ask(self._server.url, content), status, "malformed")

    async def _too_long(self) -> None:
        if self._random.random() < 0.5:
            body: dict[str, Any] = {"model": "smollm2", "prompt": [1] * 9000, "max_tokens": 4}
            reply = await ask(self._server.url, body, "/v1/completions")
        else:
            chat = [{"role": "user", "content": "All work and no play. " * 2000}]
            reply = await ask(self._server.url, {"model": "smollm2", "messages": chat})
        await self._expect(reply, 400, "too long")

    async def _half_sent(self) -> None:
        address = urlsplit(self._server.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        request = f'{head}Content-Length: 500\r\n\r\n{{"model": '.encode()
        writer.write(request[: self._random.choice([20, len(head) // 2, len(head), len(request)])])
        try:
            line = await asyncio.wait_for(reader.readline(), 5 * STALL_TIMEOUT)
        except (TimeoutError, OSError) as error:
            line = repr(error).encode()
        if b" 408 " not in line:
            self.wrong.append(f"half sent: {line!r}")
        self.outcomes["refused: half sent"] += 1
        writer.close()

    async def _unread(self) -> None:
        address = urlsplit(self._server.url)
        body = {**self._body(self._word(), 60), "logprobs": True, "top_logprobs": 20, "stream": True}
        content = json.dumps(body).encode()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, (address.hostname, address.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        await asyncio.get_running_loop().sock_sendall(
            client, f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
        )
        await asyncio.sleep(3 * STALL_TIMEOUT)
        client.close()
        self.outcomes["read nothing"] += 1

    async def _ask(self, body: dict[str, Any]) -> Reply:
        """As ``ask``, also for answers that come whole."""
        reply = await ask(self._server.url, body)
        if reply.message:
            choice = reply.message["choices"][0]
            reply.text, reply.finish_reason = choice["message"]["content"], choice["finish_reason"]
        return reply

    def _body(self, word: str, words: int) -> dict[str, Any]:
        chat = [{"role": "user", "content": f"Say {word}, then {words} other words, then {word} again."}]
        body = {"model": "smollm2", "messages": chat, "max_tokens": 400, "temperature": 1.0}
        return {**body, "regex": f"{word}( [a-z]{{1,7}}){{{words}}} {word}"}

    def _word(self) -> str:
        return "".join(self._random.choices(string.ascii_uppercase + string.digits, k=8))

    async def _refused(self, reply: Reply, kind: str) -> bool:
        """Whether the server was full, and said so. The client comes back a little later, with something else."""
        if reply.status == 429 and reply.error:
            self.outcomes["refused: the queue is full"] += 1
            await asyncio.sleep(self._random.random())
            return True
        if reply.status != 200:
            self.wrong.append(f"{kind}: {reply.status} {reply.error}")
        return reply.status != 200

    async def _expect(self, reply: Reply, status: int, kind: str) -> None:
        if reply.status == 429 and await self._refused(reply, kind):
            return
        self.outcomes[f"refused: {kind}"] += 1
        if reply.status != status or not reply.error:
            self.wrong.append(f"{kind}: expected {status}, got {reply.status} {reply.error}")


def soak(model: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run it, wait for rest, and look."""
    # Few pages, beside which memory that leaks would show.
    serve = ["--served-model-name", "smollm2", "--max-queue", str(QUEUE), "--stall-timeout", str(STALL_TIMEOUT)]
    serve += ["--receive-timeout", str(2 * STALL_TIMEOUT)]
    serve += FEW_PAGES if options.few_pages else PAGES
    with Server(model, *serve, log=work / "soak.log") as server:
        run = Soak(server, MORE_WORDS if options.few_pages else WORDS, options.seed)
        began = time.perf_counter()
        asyncio.run(run.run(options.requests))
        seconds = time.perf_counter() - began
        stats = server.get("/stats")
        deadline = time.perf_counter() + QUIET_S
        while (stats["running"] or stats["waiting"]) and time.perf_counter() < deadline:
            time.sleep(0.1)
            stats = server.get("/stats")
    half = run.rss[len(run.rss) // 2 :]
    tenth = max(1, len(half) // 5)
    log = (work / "soak.log").read_text(errors="replace")
    return {
        "requests": options.requests,
        "few_pages": options.few_pages,
        "seconds": seconds,
        "outcomes": dict(run.outcomes),
        "wrong": run.wrong,
        "stats": stats,
        "rss_bytes": run.rss,
        # Of a few measurements each: a long request is in memory while it is read.
        "rss_second_half": statistics.median(half[-tenth:]) / statistics.median(half[:tenth]) - 1,
        "rss_second_half_spread": max(half) / min(half) - 1,
        "tracebacks": log.count("Traceback"),
    }


def kill(model: Path, work: Path) -> dict[str, Any]:
    """Kill a server that answers sixteen clients, and start another at its place."""
    first = Server(model, "--served-model-name", "smollm2", log=work / "kill-1.log")
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me a long story."}], "max_tokens": 2000}
    fell = 0.0

    async def load() -> list[Reply]:
        nonlocal fell
        tasks = [
            asyncio.create_task(ask(first.url, {**body, "stream": n % 2 == 0, "ignore_eos": True})) for n in range(16)
        ]
        await asyncio.sleep(4)
        first.kill()
        fell = time.perf_counter()
        return await asyncio.wait_for(asyncio.gather(*tasks), 10)

    replies = asyncio.run(load())
    second = Server(
        model, "--served-model-name", "smollm2", log=work / "kill-2.log", port=urlsplit(first.url).port or 0
    )
    with second:
        again = asyncio.run(ask(second.url, {**body, "max_tokens": 5, "stream": True}))
    return {
        "clients": len(replies),
        "clean_errors": sum(reply.error is not None for reply in replies),
        "errors": dict(Counter(reply.error for reply in replies)),
        "slowest_error_s": max(reply.ended for reply in replies) - fell,
        "load_s": second.load_s,
        "ready_s": second.ready_s,
        "answers_again": again.error is None and again.status == 200,
    }


def verdicts(found: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Each promise, what was found, and whether it is kept."""
    lines = []
    if "soak" in found:
        soaked = found["soak"]
        stats, rss = soaked["stats"], soaked["rss_bytes"]
        ended = stats["finished"] + stats["cancelled"] + stats["failed"]
        lines = [
            ("requests that went wrong", str(len(soaked["wrong"])), not soaked["wrong"]),
            ("pages in use at the end", str(stats["pages_in_use"]), stats["pages_in_use"] == 0),
            (
                "still running or waiting",
                f"{stats['running']} + {stats['waiting']}",
                not stats["running"] + stats["waiting"],
            ),
            (
                "the engine's requests, and those that ended",
                f"{stats['requests']} / {ended}",
                stats["requests"] == ended,
            ),
            ("the engine's failures", str(stats["failed"]), stats["failed"] == 0),
            (
                "answers that gave way to others",
                str(stats["preemptions"]),
                stats["preemptions"] > 0 or not soaked["few_pages"],
            ),
            (
                "memory, growth in the second half",
                f"{soaked['rss_second_half']:.1%}",
                soaked["rss_second_half"] <= 0.05,
            ),
            ("memory, most over least there", f"{soaked['rss_second_half_spread']:.1%}", True),
            ("memory, MiB, first and last", f"{rss[0] >> 20} / {rss[-1] >> 20}", True),
            ("tracebacks in the log", str(soaked["tracebacks"]), soaked["tracebacks"] == 0),
        ]
    if "kill" in found:
        killed = found["kill"]
        lines += [
            (
                "killed: clients with an error",
                f"{killed['clean_errors']} of {killed['clients']}",
                killed["clean_errors"] == killed["clients"],
            ),
            ("killed: seconds until the last knew", f"{killed['slowest_error_s']:.2f}", killed["slowest_error_s"] < 2),
            (
                "again ready after s, of which loading",
                f"{killed['ready_s']:.2f} / {killed['load_s']:.2f}",
                killed["ready_s"] <= killed["load_s"] + 2,
            ),
            ("answers again", str(killed["answers_again"]), killed["answers_again"]),
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--small", action="store_true", help="a random model that costs little, for a short soak")
    parser.add_argument("--few-pages", action="store_true", help="so few that answers must give way to each other")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", nargs="+", choices=("soak", "kill"), default=["soak", "kill"])
    parser.add_argument("--work", type=Path, help="where models and programs are kept; a temporary folder if not given")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        model = random_small_model(work) if options.small else converted("float32", work)
        with using_cache(work / "cache"):
            if "soak" in options.phases:
                found["soak"] = soak(model, work, options)
            if "kill" in options.phases:
                found["kill"] = kill(model, work)
    if "soak" in found:
        print(f"{found['soak']['requests']} requests in {found['soak']['seconds']:.0f} s: {found['soak']['outcomes']}")
        print(*found["soak"]["wrong"][:10], sep="\n")
    lines = verdicts(found)
    for promise, value, kept in lines:
        print(f"{promise:45} {value:>20}  {'kept' if kept else 'BROKEN'}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(kept for *_, kept in lines) else 1)


if __name__ == "__main__":
    main()

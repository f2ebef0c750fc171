"""A server under load: many clients at once beside one at a time, every answer compared.

    python benchmarks/serving.py MODEL [result.json] [--clients 200] [--seconds 60] [--questions 600]

One question about each of so many test pictures of easy-VQA. First one client asks them one after another; then, on a
fresh server, all clients ask at once, each the next question as soon as it has an answer, and again when it is told to
come later (429). Every answer is compared with that of the single client. Memory is the server's resident memory.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from harness import finish

from eyespot.data import sources

PORT, NAME, MAX_TOKENS = 8765, "model", 16
SERVER = (sys.executable, "-m", "eyespot", "serve", "--port", str(PORT), "--name", NAME, "--no-page")


def questions(number: int) -> list[dict[str, Any]]:
    """One question about each picture, of its ten or so another one each time."""
    samples, _ = sources.load("easy_vqa", split="test")
    groups: dict[str, list[Any]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    chosen = [group[i % len(group)] for i, group in enumerate(list(groups.values())[:number])]
    return [body(sample) for sample in chosen]


def body(sample: Any) -> dict[str, Any]:
    picture = base64.b64encode(Path(sample.images[0]).read_bytes()).decode()
    words = next(part["text"] for part in sample.messages[0]["content"] if part["type"] == "text")
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": words},
    ]
    return {"model": NAME, "messages": [{"role": "user", "content": parts}], "max_tokens": MAX_TOKENS}


@contextmanager
def server(model: str) -> Iterator[int]:
    """A fresh server; its process id."""
    process = subprocess.Popen([*SERVER, model])
    try:
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{PORT}/health").raise_for_status()
                break
            except httpx.TransportError:
                if process.poll() is not None:
                    raise SystemExit("the server did not start") from None
                time.sleep(0.5)
        yield process.pid
        if process.poll() is not None:
            raise SystemExit("the server has died")
    finally:
        process.terminate()
        process.wait()


class Load:
    """What clients saw."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, str]] = []
        self.statuses: Counter[int] = Counter()
        self.seconds: list[float] = []
        self.memory_mb: list[float] = []

    async def ask(self, client: httpx.AsyncClient, number: int, question: dict[str, Any]) -> None:
        """Until there is an answer; come again when told to."""
        while True:
            start = time.perf_counter()
            response = await client.post("/v1/chat/completions", json=question)
            self.statuses[response.status_code] += 1
            if response.status_code != 429:
                break
            await asyncio.sleep(float(response.headers["Retry-After"]))
        if response.status_code == 200:
            self.seconds.append(time.perf_counter() - start)
            self.answers.append((number, response.json()["choices"][0]["message"]["content"]))

    async def watch(self, pid: int) -> None:
        while True:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
            self.memory_mb.append(int(status.split("VmRSS:")[1].split()[0]) / 1000)
            await asyncio.sleep(1)


async def run(pid: int, asked: list[dict[str, Any]], clients: int, seconds: float | None) -> tuple[Load, float]:
    """So many clients for so many seconds, or through all questions once; what they saw, and how long it took."""
    load, numbers = Load(), itertools.count()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=300, limits=limits) as client:
        start = time.perf_counter()

        async def one() -> None:
            for number in numbers:
                if number >= len(asked) if seconds is None else time.perf_counter() - start > seconds:
                    return
                await load.ask(client, number % len(asked), asked[number % len(asked)])

        watcher = asyncio.create_task(load.watch(pid))
        await asyncio.gather(*(one() for _ in range(clients)))
        watcher.cancel()
        return load, time.perf_counter() - start


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("model")
    words.add_argument("result", nargs="?")
    words.add_argument("--clients", type=int, default=200)
    words.add_argument("--seconds", type=float, default=60)
    words.add_argument("--questions", type=int, default=600)
    options = words.parse_args()
    asked = questions(options.questions)
    with server(options.model) as pid:
        alone, alone_s = asyncio.run(run(pid, asked, 1, None))
    expected = dict(alone.answers)
    with server(options.model) as pid:
        together, together_s = asyncio.run(run(pid, asked, options.clients, options.seconds))
    wrong = sum(text != expected[number] for number, text in together.answers)
    rates = [len(load.answers) / s for load, s in ((alone, alone_s), (together, together_s))]
    row = {
        "name": f"{options.clients} clients for {options.seconds:.0f} s beside one, {MAX_TOKENS} tokens at most",
        "questions": len(asked), "threads": os.environ.get("OMP_NUM_THREADS"),
        "alone": {"seconds": alone_s, "answers_per_s": rates[0], **seen(alone)},
        "together": {"seconds": together_s, "answers_per_s": rates[1], "wrong": wrong, **seen(together)},
        "ratio": rates[1] / rates[0],
    }  # fmt: skip
    print(row)
    sys.argv[1:] = [options.result] if options.result else []
    finish([row])
    if wrong or set(together.statuses) - {200, 429}:
        raise SystemExit(f"{wrong} wrong answers, statuses {dict(together.statuses)}")


def seen(load: Load) -> dict[str, Any]:
    """Statuses, latencies of answered requests, memory."""
    ordered = sorted(load.seconds)
    return {
        "answers": len(load.answers),
        "statuses": {str(status): count for status, count in sorted(load.statuses.items())},
        "median_s": statistics.median(ordered), "p95_s": ordered[int(0.95 * (len(ordered) - 1))], "max_s": ordered[-1],
        "memory_mb": {"first": load.memory_mb[0], "largest": max(load.memory_mb), "last": load.memory_mb[-1]},
    }  # fmt: skip


if __name__ == "__main__":
    main()

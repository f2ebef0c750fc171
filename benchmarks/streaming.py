"""Memory of many samples: all in memory, and streamed (read once, then drawn from the disk).

    python benchmarks/streaming.py [result.json]

Questions of about 60 words about 10,000 pictures; by how much the resident size of a process grows until it has drawn
its first 20 steps, each figure from a process of its own. "read once" is the process that reads the stream, "streamed"
every later one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import finish

NUMBERS = (10_000, 100_000, 1_000_000)
KINDS = ("memory", "read once", "streamed")
NUM_PICTURES = 10_000


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def write_questions(folder: Path, number: int) -> None:
    words = "what stands to the left of the small green thing near the middle? " * 5
    with (folder / "questions.jsonl").open("w") as file:
        for n in range(number):
            picture = f"{n // 3 % NUM_PICTURES}.png"
            row = {"id": str(n), "image": picture, "question": f"{n} {words}", "answer": "a red disc"}
            file.write(json.dumps(row) + "\n")


def grown_mb(folder: Path, kind: str) -> float:
    from eyespot.config import DataSettings
    from eyespot.data.datamodule import Units, WindowSampler
    from eyespot.training.run import load_data

    settings = DataSettings(
        {"format": "vqa", "path": str(folder / "questions.jsonl")}, validation_share=0.0, streaming=kind != "memory"
    )
    before = resident_mb()
    samples, _, _ = load_data(settings, 0)
    units = Units(samples, 8, 0)
    steps = iter(WindowSampler(len(units), 1, 24, 0))
    drawn = [len(units[visit]) for _ in range(20) for visit in next(steps)]
    assert sum(drawn) > 20
    return resident_mb() - before


def main() -> None:
    if len(sys.argv) == 4:
        print(grown_mb(Path(sys.argv[2]), sys.argv[3]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for picture in range(NUM_PICTURES):
            (Path(name) / f"{picture}.png").touch()
        for number in NUMBERS:
            write_questions(Path(name), number)
            environment = {**os.environ, "EYESPOT_CACHE": f"{name}/cache"}
            for kind in KINDS:
                command = [sys.executable, __file__, "measure", name, kind]
                said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
                print(f"{number:9,} {kind:9}: {float(said.splitlines()[-1]):8.1f} MB", flush=True)
                rows.append({"samples": number, "kind": kind, "mb": float(said.splitlines()[-1])})
    finish(rows)


if __name__ == "__main__":
    main()

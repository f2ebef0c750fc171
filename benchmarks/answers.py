"""Ten questions about each picture: behind one image prefix, beside transformers' generate in batches and one by one.

    python benchmarks/answers.py [result.json]

The parts of the quickstart, untrained (so answers run to their limit), on easy-VQA's test pictures.
"""

from __future__ import annotations

from harness import compare, finish

from eyespot.compose import build_from_settings
from eyespot.data import sources
from eyespot.inference import Assistant
from eyespot.training.run import compose_settings

PICTURES, NEW_TOKENS = 6, 3


def main() -> None:
    assistant = Assistant(*build_from_settings(compose_settings(["recipe=quickstart"]).model), "cpu")
    samples, _ = sources.load("easy_vqa", split="test")
    groups: dict[str, list[tuple[tuple[object, ...], object]]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append((sample.images, sample.messages[:-1]))
    asked = [pair for group in list(groups.values())[:PICTURES] for pair in group]

    def shared() -> list[str]:
        assistant.forget()
        return assistant.answer_batch(asked, NEW_TOKENS)

    def batch() -> list[str]:
        assistant.forget()
        return assistant.generate_text(asked, max_new_tokens=NEW_TOKENS)

    def one_by_one() -> list[str]:
        answers = []
        for pair in asked:
            assistant.forget()  # a plain loop encodes the picture for every question
            answers += assistant.generate_text([pair], max_new_tokens=NEW_TOKENS)
        return answers

    if not shared() == batch() == one_by_one():
        raise SystemExit("the answers differ")
    label = f"{len(asked)} questions on {PICTURES} pictures, {NEW_TOKENS} tokens each"
    rows = [
        compare(f"{label}: one batch", batch, shared, repeats=3),
        compare(f"{label}: one by one", one_by_one, shared, repeats=3),
    ]
    finish(rows)


if __name__ == "__main__":
    main()

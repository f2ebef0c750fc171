"""An evaluation with its controls, beside a plain loop that asks one question at a time through transformers' generate.

    python benchmarks/evaluation.py MODEL [result.json]

MODEL is a trained model of recipe quickstart; the questions are those of easy-VQA about the first pictures of its test
set, with their picture, with another one and with none. Both sides must give the same answers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from harness import compare, finish

from eyespot.data import sources
from eyespot.data.sample import Sample
from eyespot.evaluation.controls import blind, shuffled
from eyespot.evaluation.runner import evaluate
from eyespot.inference import load

PICTURES, NEW_TOKENS, BATCH_SIZE = 6, 16, 128


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    assistant = load(sys.argv.pop(1), "cpu")
    samples, _ = sources.load("easy_vqa", split="test")
    pictures = list(dict.fromkeys(sample.group for sample in samples))[:PICTURES]
    samples = [sample for sample in samples if sample.group in set(pictures)]

    def ours(controls: Sequence[str]) -> list[str | None]:
        assistant.forget()
        with assistant.folded():
            found = evaluate(
                assistant, samples, name="easy-VQA", batch_size=BATCH_SIZE, max_new_tokens=NEW_TOKENS,
                controls=controls, progress=False,
            ).predictions  # fmt: skip
        answers: list[str | None] = [row.prediction for row in found]
        if controls:
            answers += [row.blind_prediction for row in found] + [row.shuffled_prediction for row in found]
        return answers

    def plain(asked: Sequence[Sample]) -> list[str]:
        answers = []
        with assistant.folded():  # the same weights on both sides
            for sample in asked:
                batch = assistant.processor.prompt_batch([(sample.images, sample.messages[:-1])])
                ids = assistant.model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
                answers += assistant.processor.decode_answers(ids, batch["input_ids"].shape[1])
        return answers

    everything = [*samples, *map(blind, samples), *shuffled(samples, 0)]
    rows = []
    for label, asked, controls in (
        ("with their pictures", samples, ()),
        ("with two controls", everything, ("blind", "shuffled")),
    ):
        ways: list[Callable[[], object]] = [lambda a=asked: plain(a), lambda c=controls: ours(c)]  # type: ignore[misc]
        if ways[0]() != ways[1]():
            raise SystemExit("the answers differ")
        rows.append(compare(f"{len(samples)} questions about {PICTURES} pictures, {label}", *ways, repeats=1))
    finish(rows)


if __name__ == "__main__":
    main()

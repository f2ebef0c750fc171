from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eyespot.data.sample import Sample
from eyespot.evaluation.asking import Journal
from eyespot.evaluation.benchmarks.base import Questions, Scored, make_benchmark
from eyespot.evaluation.controls import blind, shuffled
from eyespot.evaluation.results import Calibration, Evaluation, write_atomically
from eyespot.evaluation.runner import evaluate, rescore
from eyespot.inference import Answer, AnswerScore


def key(conversation: Any) -> str:
    return repr((list(conversation[0]), list(conversation[1])))


def test_a_model_that_reads_the_picture_sees(fakes: SimpleNamespace, samples: list[Any]) -> None:
    result = evaluate(fakes.Seeing(), samples, name="colours")
    assert result.accuracy == 1.0
    assert result.verdict.startswith("sees: +")
    assert result.verdict.endswith("over blind")
    assert result.sees
    assert result.difference is not None
    assert result.difference.difference == pytest.approx(1.0 - result.controls["blind"].accuracy)
    # Without a picture it says red and yes: right for one picture in four.
    assert result.controls["blind"].accuracy == pytest.approx(0.25)
    assert result.controls["majority"].accuracy == pytest.approx((0.25 + 0.75) / 2)


def test_a_model_that_reads_the_words_only_does_not_see(fakes: SimpleNamespace, samples: list[Any]) -> None:
    result = evaluate(fakes.Blind(), samples, name="colours")
    assert result.accuracy == pytest.approx(0.5)
    assert result.verdict == "does not see: +0.0 points [0.0, 0.0] over blind"
    assert not result.sees


def test_a_model_that_is_lost_without_a_picture_does_not_see_either(fakes: SimpleNamespace, samples: list[Any]) -> None:
    result = evaluate(fakes.Lost(), samples, name="colours")
    assert result.difference is not None
    assert result.difference.low > 0
    assert result.verdict == "does not see: +0.0 points [0.0, 0.0] over shuffled"


def test_without_controls_nothing_is_claimed(fakes: SimpleNamespace, samples: list[Any]) -> None:
    result = evaluate(fakes.Seeing(), samples, name="colours", controls=())
    assert result.verdict.startswith("not checked")
    assert result.difference is None
    assert not result.sees
    assert result.predictions[0].blind_prediction is None


def test_each_distinct_input_is_asked_once_with_the_result_of_asking_all(
    fakes: SimpleNamespace, samples: list[Any]
) -> None:
    twins = samples + [replace(sample, id=f"twin {sample.id}") for sample in samples]
    model = fakes.Seeing()
    result = evaluate(model, twins, name="colours", batch_size=7, seed=3)
    asked = [key(conversation) for batch in model.batches for conversation in batch]
    everything = [*twins, *map(blind, twins), *shuffled(twins, 3)]
    assert sorted(asked) == sorted({key((sample.images, sample.messages[:-1])) for sample in everything})
    assert len(asked) == result.settings["num_asked"] < len(everything)

    def naive(chosen: list[Any]) -> list[str]:
        return [fakes.Seeing().answer_batch([(s.images, s.messages[:-1])], 16)[0] for s in chosen]

    assert [row.prediction for row in result.predictions] == naive(twins)
    assert [row.blind_prediction for row in result.predictions] == naive([blind(sample) for sample in twins])
    assert [row.shuffled_prediction for row in result.predictions] == naive(shuffled(twins, 3))
    assert [row.id for row in result.predictions] == [sample.id for sample in twins]


def test_batches_are_full_and_sorted_by_length(fakes: SimpleNamespace, samples: list[Any]) -> None:
    model = fakes.Seeing()
    evaluate(model, samples, name="colours", batch_size=32, controls=())
    assert [len(batch) for batch in model.batches] == [32, 32, 16]
    lengths = [len(messages[-1]["content"][-1]["text"]) for batch in model.batches for _, messages in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_the_answer_is_not_shown(fakes: SimpleNamespace, samples: list[Any]) -> None:
    model = fakes.Seeing()
    evaluate(model, samples, name="colours")
    assert {messages[-1]["role"] for batch in model.batches for _, messages in batch} == {"user"}


def test_breakdown_and_confusions(fakes: SimpleNamespace, samples: list[Any]) -> None:
    result = evaluate(fakes.Blind(), samples, name="colours")
    yes_no, other = result.by_type["yes/no"], result.by_type["other"]
    assert (yes_no.num_questions, other.num_questions) == (40, 40)
    assert yes_no.accuracy == pytest.approx(0.75)
    assert other.accuracy == pytest.approx(0.25)
    assert (yes_no.yes_rate, yes_no.neither_rate, yes_no.always_yes, yes_no.always_no) == (0.0, 0.0, 0.25, 0.75)
    assert other.yes_rate is None
    pairs = [(row.truth, row.prediction, row.count) for row in result.confusions]
    assert pairs == [("blue", "green", 10), ("red", "green", 10), ("teal", "green", 10), ("yes", "no", 10)]


def test_breakdown_by_kind_where_the_data_tell_it(fakes: SimpleNamespace, samples: list[Any]) -> None:
    colours = [replace(one, kind="colour" if one.answers[0] not in ("yes", "no") else "presence") for one in samples]
    result = evaluate(fakes.Blind(), colours, name="colours")
    assert list(result.by_type) == ["presence", "colour"] or list(result.by_type) == ["colour", "presence"]
    assert result.by_type["presence"].always_no == 0.75 and result.by_type["colour"].yes_rate is None


def test_written_and_read_again_is_the_same(fakes: SimpleNamespace, samples: list[Any], tmp_path: Path) -> None:
    result = evaluate(fakes.Seeing(), samples, name="colours")
    path = result.write(tmp_path / "new" / "folder")
    assert Evaluation.read(path.parent) == result
    assert json.loads(path.read_text())["verdict"] == result.verdict
    first = json.loads((path.parent / "predictions.jsonl").read_text().splitlines()[0])
    assert first["question"] == "what color is it?"
    assert first["answers"] == ["red"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["metrics.json", "predictions.jsonl", "report.json"]
    figures = json.loads((path.parent / "metrics.json").read_text())
    assert (figures["accuracy"], figures["blind"]) == (result.accuracy, result.controls["blind"].accuracy)
    assert figures["above_blind"] == pytest.approx(figures["accuracy"] - figures["blind"])
    assert figures["above_blind"] > 0


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_atomically(tmp_path / "a.txt", "old")

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shown", [True, False, None])
def test_progress_goes_to_stderr_only_if_wanted(
    fakes: SimpleNamespace, samples: list[Any], shown: bool | None, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate(fakes.Seeing(), samples, name="colours", progress=shown)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("80/80" in err) is bool(shown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": []}, "0 samples"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"controls": ("blnd",)}, "did you mean 'blind'"),
    ],
)
def test_wrong_settings_are_refused_before_asking(
    fakes: SimpleNamespace, samples: list[Any], change: dict[str, Any], message: str
) -> None:
    model = fakes.Seeing()
    with pytest.raises(ValueError, match=message):
        evaluate(model, **{"samples": samples, "name": "colours", **change})
    assert model.batches == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": ()}, "'0-a' has 0 answers"),
        ({"messages": ({"role": "user", "content": "what?"},)}, "must end with user, assistant"),
        ({"id": "0-b"}, "first is '0-b'"),
    ],
)
def test_wrong_samples_are_refused_by_id(
    fakes: SimpleNamespace, samples: list[Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(fakes.Seeing(), [replace(samples[0], **change), *samples[1:]], name="colours")


def test_a_missing_answer_is_an_error(samples: list[Any]) -> None:
    class Short:
        def answer_batch(self, conversations: Any, max_new_tokens: int) -> list[str]:
            return ["red"] * (len(conversations) - 1)

    with pytest.raises(ValueError, match="64 conversations and gave 63"):
        evaluate(Short(), samples, name="colours")


def test_questions_about_one_picture_are_asked_side_by_side(fakes: SimpleNamespace, samples: list[Any]) -> None:
    model = fakes.Seeing()
    random.Random(0).shuffle(samples)
    evaluate(model, samples, name="colours", controls=(), batch_size=1000)
    pictures = [tuple(images) for images, _ in model.batches[0]]
    assert len(pictures) > len(set(pictures)) > 1
    changes = sum(a != b for a, b in itertools.pairwise(pictures))
    assert changes == len(set(pictures)) - 1


def test_one_picture_never_counts_as_seeing(fakes: SimpleNamespace, samples: list[Any]) -> None:
    result = evaluate(fakes.Seeing(), samples[2:4], name="one", controls=("blind",))
    assert result.verdict == "does not see: +100.0 points [-100.0, 100.0] over blind"


def test_yes_no_benchmarks_have_fixed_answers_as_controls(fakes: SimpleNamespace, samples: list[Any]) -> None:
    asked = [sample for sample in samples if sample.id.endswith("-b")]
    result = evaluate(fakes.Seeing(), asked, name="red?")
    assert result.controls["always no"].accuracy == 0.75 and result.controls["always yes"].accuracy == 0.25
    assert result.differences["always no"].difference == pytest.approx(0.25)
    assert "always no" not in evaluate(fakes.Seeing(), samples, name="mixed").controls


class Doubting:
    """Sees, and says how probable it finds its answers; compares options by their length."""

    def __init__(self, fakes: SimpleNamespace, fail_after: int = 10**6) -> None:
        self.seeing, self.fail_after = fakes.Seeing(), fail_after

    def answer_scored(self, conversations: Any, max_new_tokens: int) -> list[Answer]:
        if len(self.seeing.batches) == self.fail_after:
            raise KeyboardInterrupt
        texts = self.seeing.answer_batch(conversations, max_new_tokens)
        return [Answer(text, math.log(0.95 if text == "Yes." else 0.65)) for text in texts]

    def score_answers(self, conversations: Any) -> list[AnswerScore]:
        said = [messages[-1]["content"][0]["text"] for _, messages in conversations]
        return [AnswerScore(-len(text) / 2, False) for text in said]


def test_probabilities_are_kept_and_compared_with_the_share_of_right_answers(
    fakes: SimpleNamespace, samples: list[Any]
) -> None:
    result = evaluate(Doubting(fakes), samples, name="colours")
    assert sorted({row.probability or 0 for row in result.predictions}) == pytest.approx([0.65, 0.95])
    overall = result.calibration["all"]
    assert overall.number == (70, 10) and overall.accuracy == (1.0, 1.0)
    assert overall.probability == (pytest.approx(0.65), pytest.approx(0.95))
    assert overall.error == pytest.approx((70 * 0.35 + 10 * 0.05) / 80)
    assert sum(result.calibration["yes/no"].number) == 40
    assert evaluate(fakes.Seeing(), samples, name="colours").calibration == {}


def test_calibration_by_hand() -> None:
    found = Calibration.of([0.95, 1.0, 0.91, 0.05, 0.1], [1, 0, 1, 0, 1])
    assert found.number == (1, 1, 3) and found.accuracy == pytest.approx((0, 1, 2 / 3))
    assert found.probability == pytest.approx((0.05, 0.1, 2.86 / 3))
    assert found.error == pytest.approx((0.05 + 0.9 + 3 * (2.86 / 3 - 2 / 3)) / 5)


class Options(Questions):
    by = "option"


def test_the_likeliest_option_is_taken(fakes: SimpleNamespace, samples: list[Any]) -> None:
    asked = [replace(sample, options=("magenta", "teal", "reddish")) for sample in samples if sample.id.endswith("-a")]
    result = evaluate(Doubting(fakes), asked, name="colours", benchmark=Options())
    assert {row.prediction for row in result.predictions} == {"teal"} and result.accuracy == 0.25
    shares = [math.exp(-length / 2) for length in (7, 4, 7)]
    assert result.predictions[0].probability == pytest.approx(shares[1] / sum(shares))
    letters = Options()
    letters.by = "letter"
    assert {row.prediction for row in evaluate(Doubting(fakes), asked, name="c", benchmark=letters).predictions} == {
        "A"
    }
    with pytest.raises(ValueError, match="Seeing has no score_answers to compare options; ask by text"):
        evaluate(fakes.Seeing(), asked, name="colours", benchmark=Options())


def test_a_stopped_evaluation_goes_on(fakes: SimpleNamespace, tmp_path: Path) -> None:
    samples = [
        Sample.question(f"{n}-{kind}", bytes([n]), question, answer, group=str(n))
        for n in range(12)
        for kind, question, answer in (("a", "what color is it?", "red"), ("b", "is the shape red?", "yes"))
    ]

    class Reading(Doubting):
        def answer_scored(self, conversations: Any, max_new_tokens: int) -> list[Answer]:
            named = [([f"{'red' if i[0][0] % 2 else 'teal'}-0"] if i else [], m) for i, m in conversations]
            return super().answer_scored(named, max_new_tokens)

    def run(model: Doubting, folder: str, identity: str = "m") -> Any:
        journal = Journal(tmp_path / folder / "answers.jsonl", {"model": identity})
        return evaluate(model, samples, name="c", batch_size=4, journal=journal)

    whole, stopped, rest = Reading(fakes), Reading(fakes, fail_after=3), Reading(fakes)
    expected = run(whole, "whole")
    with pytest.raises(KeyboardInterrupt):
        run(stopped, "cut")
    with (tmp_path / "cut/answers.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    found = run(rest, "cut")
    assert found.predictions == expected.predictions
    assert len(rest.seeing.batches) + 3 == len(whole.seeing.batches)
    assert found.settings["num_asked"] + 12 == expected.settings["num_asked"]
    again = Reading(fakes)
    assert run(again, "cut").predictions == expected.predictions and again.seeing.batches == []
    other = Reading(fakes)
    run(other, "cut", "another model")
    assert len(other.seeing.batches) == len(whole.seeing.batches)


def test_scores_are_computed_anew_from_the_folder(fakes: SimpleNamespace, samples: list[Any], tmp_path: Path) -> None:
    result = evaluate(Doubting(fakes), samples, name="colours", benchmark=make_benchmark({"format": "vqa"}))
    result.write(tmp_path)
    assert rescore(tmp_path) == result

    class Strict(Questions):
        def score(self, texts: Sequence[str], references: Sequence[Any]) -> Scored:
            exact = [float(text in each.answers) for text, each in zip(texts, references, strict=True)]
            return Scored(exact, {"dots": float(sum(text.endswith(".") for text in texts))})

    strict = rescore(tmp_path, Strict())
    assert strict.accuracy == 0.5 and strict.figures["pictures"] == {"dots": 40.0}
    assert strict.by_type["yes/no"].figures == {"dots": 40.0}
    report = json.loads((tmp_path / "report.json").read_text())
    del report["measure"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"another version of eyespot wrote \(.*\); evaluate again"):
        rescore(tmp_path)


def test_scores_beyond_one_keep_their_size(fakes: SimpleNamespace, samples: list[Any]) -> None:
    class Tenfold(Questions):
        measure, limit = "points", 10.0

        def score(self, texts: Sequence[str], references: Sequence[Any]) -> Scored:
            return Scored([10 * share for share in super().score(texts, references).samples])

    result = evaluate(fakes.Blind(), samples, name="c", benchmark=Tenfold())
    plain = evaluate(fakes.Blind(), samples, name="c")
    assert result.accuracy == pytest.approx(10 * plain.accuracy)
    assert result.interval == pytest.approx([10 * end for end in plain.interval])
    assert result.differences["shuffled"] == pytest.approx([10 * value for value in plain.differences["shuffled"]])
    assert (result.measure, result.limit, result.calibration) == ("points", 10.0, {})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"benchmark": "popes"}, "unknown benchmark 'popes'; did you mean 'pope'?"),
        ({"benchmark": "pope"}, "benchmark 'pope' needs path; add path=..."),
        ({"benchmark": "pope", "path": "x", "spilt": "test"}, "has no option 'spilt'; did you mean 'split'?"),
    ],
)
def test_wrong_sources(source: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_benchmark(source)

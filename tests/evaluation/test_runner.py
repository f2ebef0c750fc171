from __future__ import annotations

import itertools
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eyespot.evaluation.controls import blind, shuffled
from eyespot.evaluation.results import Evaluation, write_atomically
from eyespot.evaluation.runner import evaluate


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
    assert sorted(file.name for file in path.parent.iterdir()) == ["predictions.jsonl", "report.json"]


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

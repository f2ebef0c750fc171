from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import eyespot
from eyespot.data.formats.records import BadRecord
from eyespot.data.sample import Sample
from eyespot.evaluation.benchmarks.base import Benchmark, load_questions, make_benchmark
from eyespot.evaluation.benchmarks.choice import read_letter, read_option
from eyespot.evaluation.benchmarks.options import right_option, split_question
from eyespot.evaluation.runner import evaluate, question_text, rescore
from eyespot.inference import AnswerScore, Assistant
from eyespot.processing.processor import IGNORE_INDEX

COLORS = ("red", "green", "blue")
OWN = [
    {"image": "red.png", "question": "Which color?", "options": ["blue", "red"], "answer": "B", "category": "color"},
    {
        "image": "green.png",
        "question": "Which color?",
        "options": ["a lime", "green"],
        "answer": 1,
        "category": "color",
    },
    {"image": "blue.png", "question": "What is it?", "options": ["blue sky", "sea", "ink"], "answer": "blue sky"},
]
SUITCASE = (
    "Which option describe the object relationship in the image correctly?\nOptions: A: The suitcase is on the book., "
    "B: The suitcase is beneath the cat., C: The suitcase is beneath the bed., D: The suitcase is beneath the book."
)
MATHVISTA = (
    "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
    "Question: Is it Hepatitis A, B: or none?\nChoices:\n(A) Yes\n(B) No"
)


def save_pictures(folder: Path) -> None:
    for color in COLORS:
        Image.new("RGB", (8, 6), color).save(folder / f"{color}.png")


def write(folder: Path, rows: Sequence[Any] = OWN, **options: Any) -> Benchmark:
    save_pictures(folder)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return make_benchmark({"benchmark": "choice", "path": str(folder / "rows.jsonl"), **options})


class Seeing:
    """Finds an option the more likely the more of its letters are in the name of the picture's colour, or, if it must
    choose a letter, the one whose option in the question names it; says what it is told to say."""

    def __init__(self, said: str = "") -> None:
        self.said = said

    def answer_batch(self, conversations: Sequence[tuple[Any, Any]], max_new_tokens: int) -> list[str]:
        return [self.said for _ in conversations]

    def score_answers(self, conversations: Sequence[tuple[Any, Any]]) -> list[AnswerScore]:
        return [AnswerScore(self.log_prob(*each), False) for each in conversations]

    def log_prob(self, images: Sequence[str], messages: Sequence[Any]) -> float:
        color = Path(images[0]).stem if images else "ink"
        asked, answer = (message["content"][-1]["text"] for message in messages)
        if answer in string.ascii_uppercase:
            answer = f"{answer}: {color}" if f"{answer}: {color}" in asked else "none"
        return -0.5 if color in answer else -2.0


def test_own_rows_are_read(tmp_path: Path) -> None:
    samples, report = load_questions(write(tmp_path))
    assert not report.rejected
    assert [sample.answers for sample in samples] == [("red",), ("green",), ("blue sky",)]
    assert [sample.options for sample in samples] == [("blue", "red"), ("a lime", "green"), ("blue sky", "sea", "ink")]
    assert [sample.kind for sample in samples] == ["color", "color", ""]


def test_options_are_shown_unless_their_words_are_compared(tmp_path: Path) -> None:
    shown = {by: question_text(load_questions(write(tmp_path, by=by))[0][0]) for by in ("option", "letter", "text")}
    assert shown["option"] == "Which color?"
    assert shown["letter"] == shown["text"] == "Which color?\nOptions: A: blue, B: red"
    asked = question_text(load_questions(write(tmp_path, by="text", prompt="The letter, please."))[0][0])
    assert asked == "Which color?\nOptions: A: blue, B: red\nThe letter, please."


def test_rows_of_mmstar(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    save_pictures(tmp_path)
    rows = [
        {"index": 0, "question": SUITCASE, "answer": "A", "category": "coarse perception"},
        {"index": 7, "question": MATHVISTA, "answer": "B", "category": "math"},
        {"index": 6, "question": "Which?\nOptions: A: B, B: A", "answer": "B", "category": "math"},
        {"index": 8, "question": "What is it?", "answer": "B", "category": "math"},
        {"index": 9, "question": SUITCASE, "answer": "E", "category": "math"},
    ]
    image = {"bytes": (tmp_path / "red.png").read_bytes(), "path": "0.jpg"}
    parquet.write_table(pyarrow.Table.from_pylist([{**row, "image": image} for row in rows]), tmp_path / "m.parquet")
    for by in ("option", "text"):
        source = {"benchmark": "choice", "path": str(tmp_path / "m.parquet"), "by": by}
        samples, report = load_questions(make_benchmark(source))
        assert [(sample.id, sample.kind) for sample in samples] == [
            ("0", "coarse perception"),
            ("7", "math"),
            ("6", "math"),
        ]
        assert [sample.answers for sample in samples] == [("The suitcase is on the book.",), ("No",), ("A",)]
        assert samples[0].images == (image["bytes"],)
        words = [question_text(sample) for sample in samples]
        if by == "text":
            assert words[:2] == [SUITCASE, MATHVISTA]
        else:
            assert words == [SUITCASE.split("\n")[0], "Is it Hepatitis A, B: or none?", "Which?"]
        assert [(each.id, each.reason) for each in report.rejected] == [
            ("8", "question has no options"),
            ("9", "answer is no option"),
        ]


@pytest.mark.parametrize(
    ("listed", "options"),
    [
        ("Options: A: a dog, small, B: a cat", ("a dog, small", "a cat")),
        ("Options: A: Plan B: go, B: X: 3, Y: 4, C: Vitamin C", ("Plan B: go", "X: 3, Y: 4", "Vitamin C")),
        ("Options: A: 1:2, B: 1:3\n", ("1:2", "1:3")),
        ("Options:\nA. one\nB. two\nC. three", ("one", "two", "three")),
        ("Choices:\n(A) f(A)\n(B) (x, B)\n(C)3", ("f(A)", "(x, B)", "3")),
        ("Options: Yes or no?\nOptions: A: Yes, B: No", ("Yes", "No")),
        ("Options: A: D, B: C, C: B, D: A", ("D", "C", "B", "A")),
        ("Choices: A: wood, B: tin, are on its sign.\nOptions: A: Yes, B: No", ("Yes", "No")),
    ],
)
def test_options_within_the_question(listed: str, options: tuple[str, ...]) -> None:
    question, found = split_question(f"Which one?\n{listed}")
    assert found == options
    assert question.startswith("Which one?") and options[-1] not in question


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Which one?", "question has no options"),
        ("Which one?\nOptions: yes, no", "question has no options"),
        ("Which one?\nOptions: A: only one", "options are not a list"),
        ("Which one?\nOptions: A: , B: x", "option is not a text"),
        ("Options: A: x, B: y", "question is not a text"),
        ("Which one?\nOptions: A: x, C: y", "options are not a list"),
    ],
)
def test_questions_without_options_are_rejected(text: str, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        split_question(text)


@pytest.mark.parametrize(
    ("answer", "options", "right"),
    [
        ("B", ["x", "y"], 1),
        (" b ", ["x", "y"], 1),
        (0, ["x", "y"], 0),
        ("y", ["x", "y"], 1),
        ("1", ["1", "2"], 0),  # the words, not the place
        ("B", ["A", "B"], 1),
        ("B", ["B", "A"], "answer means two options"),
        ("C", ["x", "y"], "answer is no option"),
        ("AB", ["x", "y"], "answer is no option"),
        ("", ["x", "y"], "answer is no option"),
        (2, ["x", "y"], "answer is no option"),
        (-1, ["x", "y"], "answer is no option"),
        (True, ["x", "y"], "answer is no option"),
        (None, ["x", "y"], "answer is no option"),
        ("A", ["x", "x"], "right option stands there twice"),
        ("A", ["x", "y", "y"], 0),
    ],
)
def test_right_option(answer: Any, options: list[str], right: int | str) -> None:
    if isinstance(right, int):
        assert right_option(answer, options) == right
        return
    with pytest.raises(BadRecord, match=right):
        right_option(answer, options)


def test_letters_of_mmstar_are_never_words() -> None:
    assert right_option("B", ["B", "A"], by_words=False) == 1


@pytest.mark.parametrize(("by", "said"), [("option", "red"), ("letter", "B")])
def test_likeliest_option_or_letter_and_rescoring_gives_the_same(by: str, said: str, tmp_path: Path) -> None:
    benchmark = write(tmp_path, by=by)
    samples, _ = load_questions(benchmark)
    result = evaluate(Seeing(), samples, name="choice", benchmark=benchmark)
    assert result.predictions[0].prediction == said and result.accuracy == 1.0
    assert result.figures["pictures"] == pytest.approx({"chance": (0.5 + 0.5 + 1 / 3) / 3, "unparsed": 0.0})
    assert result.controls["blind"].accuracy == 0.0  # ink, or the first one of equals
    # Majority says the words of an option, without capitals and periods.
    assert result.controls["majority"].accuracy == pytest.approx(2 / 3 if by == "option" else 1.0)
    assert set(result.by_type) == {"color", "other"}
    result.write(tmp_path / "out")
    assert rescore(tmp_path / "out") == result


def test_options_that_are_letters_in_another_order(tmp_path: Path) -> None:
    """Read as free text the likeliest option's words, "B", would be the letter of another one."""
    question = "Which color?\nOptions: A: blue B, B: A, C: B"
    rows = [
        {"index": n, "image": f"{color}.png", "question": question, "answer": "C"} for n, color in enumerate(COLORS)
    ]
    benchmark = write(tmp_path, rows)
    samples, _ = load_questions(benchmark)
    assert benchmark.score(["B", "A", "b."], samples).samples == (1.0, 0.0, 1.0)
    assert make_benchmark({**benchmark.source, "by": "letter"}).score(["B", "C", "c"], samples).samples == (0, 1, 0)
    assert read_option("nothing", ("x", "y")) is None and read_letter("D", ("x", "y")) is None
    assert read_letter("", ("x", "y")) is None


@pytest.mark.parametrize(
    ("said", "published", "samples", "unparsed"),
    [
        ("The answer is B.", False, (1, 1, 0), 0.0),
        ("Because of the light", False, (0, 0, 0), 1.0),
        ("Because of the light", True, (1, 1, 0), 0.0),  # B
        ("green", False, (0, 1, 0), 2 / 3),
    ],
)
def test_what_is_said_is_read(
    said: str, published: bool, samples: tuple[int, ...], unparsed: float, tmp_path: Path
) -> None:
    benchmark = write(tmp_path, by="text", published=published)
    asked, _ = load_questions(benchmark)
    result = evaluate(Seeing(said), asked, name="choice", benchmark=benchmark)
    assert tuple(row.score for row in result.predictions) == samples
    assert result.figures["pictures"]["unparsed"] == pytest.approx(unparsed)
    result.write(tmp_path / "out")
    assert rescore(tmp_path / "out") == result


def test_broken_rows_are_counted_by_their_reason(tmp_path: Path) -> None:
    row = {"image": "red.png", "question": "Which?", "options": ["x", "y"], "answer": "A"}
    rows = [
        {**row, "image": "gone.png"},
        {**row, "question": None},
        {**row, "options": ["x"]},
        {**row, "options": "x, y"},
        {**row, "options": ["x", 3]},
        {**row, "options": [str(number) for number in range(27)]},
        {**row, "answer": "z"},
        {"image": "red.png", "question": "Which?"},
        "broken",
        row,
    ]
    samples, report = load_questions(write(tmp_path, rows))
    assert len(samples) == 1
    assert [each.reason for each in report.rejected] == [
        "image file is missing",
        "question is not a text",
        "options are not a list of 2 to 26 texts",
        "options are not a list of 2 to 26 texts",
        "option is not a text",
        "options are not a list of 2 to 26 texts",
        "answer is no option",
        "question has no options",
        "line is not a JSON object",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "words"}, "by is 'words'; choices: text, option, letter"),
        ({"published": True}, "published has no effect where by='option'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_benchmark({"benchmark": "choice", "path": "rows.jsonl", **options})
    with pytest.raises(ValueError, match="does not exist; check the path"):
        list(make_benchmark({"benchmark": "choice", "path": "gone.jsonl"}).read())


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **sizes}, "train": "full"}
    language = {
        "name": "gpt",
        "args": {"max_position_embeddings": 128, **sizes},
        "tokenizer": f"char:{string.ascii_letters}{string.punctuation} \n",
        "train": "full",
    }
    model, processor = eyespot.build(vision, {"name": "mlp"}, language)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.35)  # so that other pictures get other answers
    return Assistant(model, processor, "cpu")


@torch.inference_mode()
def plain_log_prob(assistant: Assistant, sample: Sample, answer: str) -> float:
    """Of one answer to one question: a row of its own, all logits, the log-probabilities of the labels."""
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    encoded = assistant.processor.encode_conversation([*sample.messages[:-1], said])
    pixels = assistant.processor.pixel_values(list(sample.images))
    logits = assistant.model(input_ids=torch.tensor([encoded.input_ids]), pixel_values=pixels).logits[0]
    log_probs = logits.float().log_softmax(-1)
    learned = [place for place, label in enumerate(encoded.labels) if label != IGNORE_INDEX]
    return sum(log_probs[place - 1, encoded.labels[place]].item() for place in learned)


@pytest.mark.parametrize("by", ["option", "letter"])
def test_a_real_model_chooses_as_a_plain_loop_does(by: str, assistant: Assistant, tmp_path: Path) -> None:
    texts = (["b", "aa", "c"], ["cc", "b", "a"], ["d", "e", "f"])
    rows = [
        {"image": f"{color}.png", "question": question, "options": options, "answer": 0}
        for color in COLORS
        for question, options in zip(("which?", "what is it?", "e?"), texts, strict=True)
    ]
    benchmark = write(tmp_path, rows, by=by)
    samples, _ = load_questions(benchmark)
    result = evaluate(assistant, samples, name="choice", benchmark=benchmark, batch_size=4)
    for sample, row in zip(samples, result.predictions, strict=True):
        options = sample.options if by == "option" else tuple("ABC")
        log_probs = torch.tensor([plain_log_prob(assistant, sample, option) for option in options])
        assert row.prediction == options[int(log_probs.argmax())]
        assert row.probability == pytest.approx(float(log_probs.softmax(0).max()), abs=1e-4)
        assert row.score == float(log_probs.argmax() == 0)
    assert len({row.prediction for row in result.predictions}) > 1

"""The comparison that every export must pass: it sees a wrong logit, a wrong word, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from eyespot import cli
from eyespot.export import parity
from eyespot.export.parity import ParityError, Reply, check, compare, drawn_pictures, export_model, reply
from eyespot.inference import Assistant, user_turn
from eyespot.registry import EXPORTS, Registry

LOGITS = np.float32([[0.5, 3.0, -1.0, -np.inf], [2.0, 0.0, 1.0, -np.inf]])
OURS = Reply("ba", [1, 0], LOGITS)


@pytest.fixture(scope="module")
def assistant(assistant_of: Callable[..., Assistant]) -> Assistant:
    return assistant_of("vit", "gpt")


class Lying:
    """Ours, but for one picture."""

    tolerance = parity.TOLERANCE

    def __init__(self, assistant: Assistant, wrong: int, by: float) -> None:
        self.assistant, self.wrong, self.by, self.asked = assistant, wrong, by, 0

    def answer(self, picture: PIL.Image.Image, question: str, max_new_tokens: int) -> Reply:
        said = reply(self.assistant, picture, question, max_new_tokens)
        self.asked += 1
        return said._replace(logits=said.logits + np.float32(self.by)) if self.asked == self.wrong else said


def test_rounding_passes_and_the_placeholder_is_no_word() -> None:
    theirs = OURS._replace(logits=LOGITS[:, :3] + np.float32(5e-5))
    found = compare("p", OURS, theirs, 1e-4)
    assert found.num_tokens == 2 and 4e-5 < found.largest_difference < 6e-5


@pytest.mark.parametrize(
    "theirs",
    [
        OURS._replace(logits=LOGITS[:, :3] + np.float32([[0, 0, 0], [0, 0, 9e-4]])),
        OURS._replace(logits=LOGITS[:, :3] * np.float32([[1, 1, 1], [1, 1, np.nan]])),
        OURS._replace(text="bc"),
        Reply("b", [1], LOGITS[:1, :3]),
        Reply("aa", [0, 0], LOGITS[:, :3]),
    ],
)
def test_differences_are_found(theirs: Reply) -> None:
    with pytest.raises(ParityError, match="about the sky where ours answers 'ba'"):
        compare("the sky", OURS, theirs, 1e-4)


def test_ten_drawn_pictures() -> None:
    drawn = drawn_pictures()
    assert len({picture.tobytes() for _, picture in drawn}) == 10 and len({name for name, _ in drawn}) == 10
    assert [p.tobytes() for _, p in drawn] == [p.tobytes() for _, p in drawn_pictures()]
    assert all(len(picture.getcolors()) == 2 for _, picture in drawn)


def test_the_picture_is_named(assistant: Assistant) -> None:
    with pytest.raises(ParityError, match=r"about drawn picture 3 .* differ by up to 1\.0e-02"):
        check(assistant, Lying(assistant, 4, 1e-2), "x")
    assert check(assistant, Lying(assistant, 4, 1e-5), "x").largest_difference > 0


def test_empty_answers_prove_nothing(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that tells no logits of a token that ends an answer at once."""

    class Silent:
        tolerance = parity.TOLERANCE

        def answer(self, picture: PIL.Image.Image, question: str, max_new_tokens: int) -> Reply:
            return Reply("", [], np.zeros((0, 4), np.float32))

    monkeypatch.setattr(parity, "reply", lambda *_: Reply("", [2], LOGITS[:1]))
    with pytest.raises(ParityError, match="all 10 answers ended before a logit could be compared"):
        check(assistant, Silent(), "x")


def test_nothing_is_left_of_a_failure(assistant: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(assistant: Assistant, folder: Path) -> Lying:
        (folder / "weights").write_text("w")
        return Lying(assistant, wrong, 1)

    monkeypatch.setattr(parity, "EXPORTS", Registry("export format", {"x": write}))
    wrong = 2
    with pytest.raises(ParityError):
        export_model(assistant, "x", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    wrong = 0
    export_model(assistant, "x", tmp_path / "out", [PIL.Image.new("RGB", (30, 20), "red")])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["parity.json", "weights"]
    written = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert written["largest_difference"] == 0 and [p["picture"] for p in written["pictures"]] == ["picture 0"]
    with pytest.raises(ValueError, match="out' exists already; give a new folder"):
        export_model(assistant, "x", tmp_path / "out")


def test_short_models_answer_as_far_as_they_can(assistant_of: Callable[..., Assistant]) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    tight = assistant_of("vit", "gpt", language={"args": sizes})
    prompt = tight.processor.encode_prompt(user_turn([None], "q")).input_ids
    found = check(tight, Lying(tight, 0, 0), "x", question="q" * (61 - len(prompt)))
    assert max(row.num_tokens for row in found.pictures) == 4


def test_only_float32_is_compared(assistant_of: Callable[..., Assistant], tmp_path: Path) -> None:
    model = assistant_of("vit", "gpt")
    model.model.bfloat16()
    with pytest.raises(ValueError, match=r"is bfloat16 on cpu; .* load it with device='cpu', dtype='float32'"):
        export_model(model, "merged", tmp_path / "out")


def test_command(assistant: Assistant, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import eyespot

    model, out, picture = tmp_path / "model", tmp_path / "out", tmp_path / "p.png"
    eyespot.save(assistant.model, assistant.processor, model)
    drawn_pictures(1)[0][1].save(picture)
    assert cli.main(["export", str(model), "mergd", "--out", str(out)]) == 2
    assert "unknown export format 'mergd'; did you mean 'merged'?" in capsys.readouterr().err
    assert cli.main(["export", str(model), "merged", "--out", str(out), "--pictures", str(picture)]) == 0
    assert "merged: 1 questions, greedy answers equal" in capsys.readouterr().out
    assert json.loads((out / "parity.json").read_text())["pictures"][0]["picture"] == str(picture)


def test_formats() -> None:
    assert {"merged", "llava", "onnx", "torch_export"} <= set(EXPORTS)

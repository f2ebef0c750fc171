"""The assistant: one path for asking, streaming, evaluating."""

from __future__ import annotations

import io
import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import eyespot
from eyespot.devices import BFLOAT16, choose_device, has_fast_bfloat16
from eyespot.inference import Assistant, user_turn

VISION = {"name": "vit", "args": {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1,
                                  "num_attention_heads": 2}, "train": "full"}  # fmt: skip
LANGUAGE = {
    "name": "gpt",
    "args": {"max_position_embeddings": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "tokenizer": f"char:{string.ascii_letters}{string.punctuation} \n",
    "train": "full",
}


@pytest.fixture
def assistant() -> Assistant:
    torch.manual_seed(0)
    model, processor = eyespot.build(VISION, {"name": "mlp"}, LANGUAGE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.35)  # so that other pictures get other answers
    return Assistant(model, processor, "cpu")


def picture(color: str) -> Image.Image:
    return Image.new("RGB", (20, 16), color)


@pytest.fixture
def counted(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of pictures that reached the encoder."""
    seen: list[int] = []
    encode = assistant.model.encode_images

    def count(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(assistant.model, "encode_images", count)
    return seen


def test_an_answer_depends_on_the_picture_and_the_question(assistant: Assistant) -> None:
    for first, second in (
        ((picture("red"), "a?"), (picture("blue"), "a?")),
        ((picture("red"), "a?"), (picture("red"), "!")),
    ):
        assert assistant.ask(*first, max_new_tokens=8) != assistant.ask(*second, max_new_tokens=8)


def test_a_batch_answers_like_one_at_a_time(assistant: Assistant) -> None:
    pictures = [[picture("red")], [], [picture("blue"), picture("green")], [picture("blue")]]
    questions = ["what?", "and now a longer question without a picture?", "both?", "?"]
    conversations = [(p, user_turn(p, q)) for p, q in zip(pictures, questions, strict=True)]
    together = assistant.answer_batch(conversations, max_new_tokens=8)
    assert together == [assistant.answer_batch([c], max_new_tokens=8)[0] for c in conversations]
    assert together == assistant.generate_text(conversations, max_new_tokens=8)


def test_several_questions_are_answered_as_if_asked_alone(assistant: Assistant, counted: list[int]) -> None:
    questions = ["what?", "and a longer question?", "a?"]
    alone = [assistant.ask(picture("red"), question, max_new_tokens=8) for question in questions]
    assistant.forget()
    counted.clear()
    assert assistant.ask(picture("red"), questions, max_new_tokens=8) == alone
    assert counted == [1]
    assert assistant.ask(picture("red"), questions, max_new_tokens=8, num_beams=1) == alone
    assert assistant.ask(picture("red"), []) == []
    assert assistant.ask([], questions[:1], max_new_tokens=8) == [assistant.ask([], "what?", max_new_tokens=8)]


def test_streaming_equals_the_whole_answer(assistant: Assistant) -> None:
    whole = assistant.ask(picture("red"), "what?", max_new_tokens=12)
    assert "".join(assistant.stream(picture("red"), "what?", max_new_tokens=12)).strip() == whole


def test_a_picture_is_encoded_once(assistant: Assistant, counted: list[int], tmp_path: Path) -> None:
    picture("red").save(tmp_path / "red.png")
    path, data = str(tmp_path / "red.png"), (tmp_path / "red.png").read_bytes()
    for source in (path, path, data, data, picture("red"), picture("red")):
        assistant.ask(source, "what?", max_new_tokens=2)
    assert counted == [1, 1]  # the file and its bytes are one picture
    assistant.ask([path, picture("blue"), path], "what?", max_new_tokens=2)
    assert counted == [1, 1, 1]
    assistant.forget()
    assistant.ask(path, "what?", max_new_tokens=2)
    assert counted[-1] == 1 and len(counted) == 4


def test_a_file_that_changed_is_encoded_again(assistant: Assistant, counted: list[int], tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    picture("red").save(file)
    first = assistant.ask(str(file), "what?", max_new_tokens=8)
    Image.new("RGB", (33, 21), "blue").save(file)
    assert assistant.ask(str(file), "what?", max_new_tokens=8) != first
    assert counted == [1, 1]


def test_memory_of_pictures_is_bounded(
    assistant: Assistant, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant.forget()
    one = assistant.features([picture("red")])
    monkeypatch.setattr("eyespot.inference.FEATURE_BYTES", 2 * one.nbytes)
    for color in ("green", "blue", "white"):
        assistant.features([picture(color)])
    assert len(assistant._features) == 2
    assistant.features([picture("red")])
    assert len(counted) == 5


def test_the_prefix_of_a_picture_is_computed_once(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = ["what?", "who is it?", "why"]
    alone = []
    for question in questions:
        assistant.forget()
        alone.append(assistant.ask(picture("red"), question, max_new_tokens=9))
    lengths: list[int] = []
    prefill = assistant.model.prefill

    def count(input_ids: torch.Tensor, features: torch.Tensor) -> object:
        lengths.append(input_ids.shape[1])
        return prefill(input_ids, features)

    monkeypatch.setattr(assistant.model, "prefill", count)
    assistant.forget()
    assert [assistant.ask(picture("red"), q, max_new_tokens=9) for q in questions] == alone
    assert len(set(alone)) == 3 and len(lengths) == 1
    beams = assistant.ask(picture("red"), "what?", max_new_tokens=9, num_beams=2)
    assert beams and len(lengths) == 1  # beams multiply the rows: they start anew
    assistant.ask(picture("blue"), "what?", max_new_tokens=2)
    assert len(lengths) == 2
    monkeypatch.setattr("eyespot.inference.PREFIX_BYTES", 1)
    assistant.ask(picture("green"), "what?", max_new_tokens=2)
    assert len(assistant._prefixes) == 1


def test_errors_of_the_streaming_thread_arrive(assistant: Assistant) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        list(assistant.stream("nowhere.png", "what?"))


def test_a_picture_from_bytes(assistant: Assistant) -> None:
    buffer = io.BytesIO()
    picture("red").save(buffer, "PNG")
    asked = [assistant.ask(p, "q?", max_new_tokens=6) for p in (buffer.getvalue(), picture("red"))]
    assert asked[0] == asked[1]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "processor_config.json"])
def test_loading_runs_no_code_of_a_folder(
    assistant: Assistant, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it ask whether it may."""
    eyespot.save(assistant.model, assistant.processor, tmp_path / "model")
    file, trace = tmp_path / "model" / name, tmp_path / "trace"
    (tmp_path / "model" / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    evil = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoProcessor": "evil.Evil"}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **evil}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    loaded = eyespot.load(tmp_path / "model", "cpu")
    assert not trace.exists()
    assert loaded.ask(picture("red"), "hm?", max_new_tokens=4) == assistant.ask(picture("red"), "hm?", max_new_tokens=4)


def test_load_keeps_answers_and_checks_devices(assistant: Assistant, tmp_path: Path) -> None:
    eyespot.save(assistant.model, assistant.processor, tmp_path / "m")
    loaded = eyespot.load(tmp_path / "m", device="cpu")
    assert loaded.ask(picture("red"), "q?") == assistant.ask(picture("red"), "q?")
    with pytest.raises(ValueError, match="device 'tpu' is not available on this machine; available: "):
        eyespot.load(tmp_path / "m", device="tpu")
    assert eyespot.load(tmp_path / "m", device="cpu", dtype="bfloat16").model.compute_dtype == torch.bfloat16


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    assert has_fast_bfloat16(torch.device("mps")) is False
    for said in (True, False):
        monkeypatch.setenv(BFLOAT16, f"{said:d}")
        assert has_fast_bfloat16(torch.device("cpu")) is said
    monkeypatch.setenv(BFLOAT16, "yes")
    with pytest.raises(ValueError, match="EYESPOT_CPU_BFLOAT16 is 'yes'; set it to 0 or 1, or not at all"):
        has_fast_bfloat16(torch.device("cpu"))
    monkeypatch.delenv(BFLOAT16)
    assert has_fast_bfloat16(torch.device("cpu")) in (True, False)


def test_public_names() -> None:
    assert {"load", "build", "save", "train", "evaluate", "VLM", "Processor", "Sample"} <= set(dir(eyespot))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        eyespot.laod  # noqa: B018


@pytest.mark.parametrize("branches", [True, False])
def test_answers_are_as_likely_as_their_tokens(
    assistant: Assistant, branches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eyespot.inference.can_branch", lambda model: branches)
    conversations = [([picture("red")], "what?"), ([picture("red")], "?"), ([], "a?"), ([picture("blue")], "what?")]
    asked = [(images, user_turn(images, question)) for images, question in conversations]
    answers = assistant.answer_scored(asked, max_new_tokens=6)
    for answer, (images, messages) in zip(answers, asked, strict=True):
        batch = assistant.processor.prompt_batch([(images, messages)])
        total = 0.0
        for _ in range(6):
            logits = assistant.model(**batch).logits[0, -1].log_softmax(-1)
            total += logits.max().item()
            if logits.argmax() in assistant._end_ids():
                break
            batch["input_ids"] = torch.cat([batch["input_ids"], logits.argmax().view(1, 1)], dim=1)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        assert answer.log_prob == pytest.approx(total, abs=1e-4)
        said = assistant.processor.decode_answer(batch["input_ids"][0][-6:].tolist())
        assert said.endswith(answer.text)


@pytest.mark.parametrize("branches", [True, False])
def test_given_answers_are_scored_together_as_alone(
    assistant: Assistant, branches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eyespot.inference.can_branch", lambda model: branches)
    pictures: list[list[Any]] = [[picture("red")], [picture("red")], [], [picture("blue"), picture("green")]]
    said = ["yes", "no, it is not", "a", "two of them"]
    conversations = [
        (images, [*user_turn(images, "what?"), {"role": "assistant", "content": [{"type": "text", "text": text}]}])
        for images, text in zip(pictures, said, strict=True)
    ]
    scores = assistant.score_answers(conversations)
    for score, (images, messages) in zip(scores, conversations, strict=True):
        encoded = assistant.processor.encode_conversation(messages)
        ids = torch.tensor([encoded.input_ids])
        pixels = assistant.processor.pixel_values(images) if images else None
        logits = assistant.model(input_ids=ids, pixel_values=pixels).logits[0, :-1].log_softmax(-1)
        wanted = torch.tensor(encoded.labels[1:])
        own = [logits[i, token] for i, token in enumerate(wanted) if token != -100]
        assert score.log_prob == pytest.approx(sum(own).item(), abs=1e-4)
        assert score.is_greedy == all(logits[i].argmax() == token for i, token in enumerate(wanted) if token != -100)
    assert assistant.score_answers([]) == []

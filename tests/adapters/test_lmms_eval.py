"""The adapter for lmms-eval, with its real base class where it is installed and always with a stand-in.

The stand-in has the names and signatures of version 0.7.3 that the adapter touches, as read in its source;
``test_the_stand_in_is_like_lmms_eval`` compares both where it can.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import inspect
import json
import logging
import os
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import eyespot
from eyespot.adapters.requests import conversation, cut, options
from eyespot.data.sample import image_part, text_part
from eyespot.inference import Assistant, user_turn

ADAPTER = "eyespot.adapters.lmms_eval"
GREEDY = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "num_beams": 1, "top_p": None}


class Lmms(abc.ABC):
    is_simple: bool = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    @property
    def rank(self) -> int:
        return self._rank

    def clean(self) -> None:
        self.is_clean = True


@dataclasses.dataclass
class GenerationResult:
    text: Any
    token_counts: Any = None


@dataclasses.dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


def unwrap_generation_output(output: Any) -> tuple[Any, Any]:
    """What the evaluator makes of a result: the rules for the kinds that the adapter returns."""
    if isinstance(output, GenerationResult):
        return output.text, output.token_counts
    whole = isinstance(output, str) or (isinstance(output, list) and all(isinstance(text, str) for text in output))
    return output if whole else str(output), None


STAND_IN = {
    "lmms_eval": {},
    "lmms_eval.api": {},
    "lmms_eval.api.instance": {
        "GenerationResult": GenerationResult,
        "unwrap_generation_output": unwrap_generation_output,
    },
    "lmms_eval.api.model": {"lmms": Lmms},
    "lmms_eval.models": {},
    "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
}


def real(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("lmms_eval")
        return importlib.import_module(name)


@pytest.fixture(params=["stand-in", "real"])
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The adapter's module, over the stand-in or over the package."""
    if request.param == "real":
        real("lmms_eval.api.model")
    else:
        for name, content in STAND_IN.items():
            module = ModuleType(name)
            module.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    yield importlib.import_module(ADAPTER)
    sys.modules.pop(ADAPTER, None)


@pytest.fixture
def docs(pictures: dict[str, str]) -> list[dict[str, Any]]:
    red, blue = pictures["red"], pictures["blue"]
    return [
        {"pictures": [red], "question": "what color?", "answer": "red"},
        {"pictures": [], "question": "a longer question without a picture?", "answer": "no"},
        {"pictures": [blue], "question": "what color?", "answer": "blue"},
        {"pictures": [red, blue], "question": "both? <image> and <image>", "answer": "red"},
        {"pictures": [blue], "question": "is it red?", "answer": "red"},
    ]


def see(doc: dict[str, Any]) -> list[Image.Image] | None:
    return [Image.open(path).convert("RGB") for path in doc["pictures"]] or None


@pytest.fixture
def make(adapter: ModuleType, folder: Path, docs: list[dict[str, Any]]) -> Callable[..., Any]:
    def make(**arguments: Any) -> Any:
        model = adapter.Eyespot(pretrained=str(folder), device="cpu", **arguments)
        model.task_dict["colors"] = {"test": docs}
        return model

    return make


def asked(*args: Any) -> SimpleNamespace:
    """What lmms-eval calls an Instance, as far as a model reads it."""
    return SimpleNamespace(args=args)


def where(number: int) -> tuple[int, str, str]:
    return number, "colors", "test"


def signature(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_stand_in_is_like_lmms_eval() -> None:
    model, instance = real("lmms_eval.api.model"), real("lmms_eval.api.instance")
    registry = real("lmms_eval.models.registry_v2")
    assert Lmms.__abstractmethods__ == model.lmms.__abstractmethods__
    for name in (*Lmms.__abstractmethods__, "__init__", "clean"):
        assert signature(getattr(Lmms, name)) == signature(getattr(model.lmms, name)), name
    for ours, theirs in (
        (GenerationResult, instance.GenerationResult),
        (ModelManifest, registry.ModelManifest),
    ):
        assert [field.name for field in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]
    for output in ("red", ["red", "blue"], (-1.0, True)):
        assert unwrap_generation_output(output) == instance.unwrap_generation_output(output)


def test_the_entry_point_leads_to_the_class(adapter: ModuleType) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["entry-points"]["lmms_eval.models"]["eyespot"].partition(":")
    manifest = getattr(importlib.import_module(module), function)()
    assert manifest.model_id == "eyespot"
    path, _, name = manifest.simple_class_path.rpartition(".")
    assert getattr(importlib.import_module(path), name) is adapter.Eyespot
    assert issubclass(adapter.Eyespot, sys.modules["lmms_eval.api.model"].lmms) and adapter.Eyespot.is_simple
    assert not adapter.Eyespot.__abstractmethods__


def test_answers_come_in_the_order_of_the_requests(
    make: Callable[..., Any], assistant: Assistant, docs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(batch_size="2")
    sizes: list[tuple[int, int]] = []
    answer_batch = model.assistant.answer_batch

    def record(conversations: Sequence[Any], max_new_tokens: int) -> list[str]:
        sizes.append((len(conversations), max_new_tokens))
        return answer_batch(conversations, max_new_tokens)

    monkeypatch.setattr(model.assistant, "answer_batch", record)
    settings = [GREEDY, {"max_new_tokens": 3, "until": "e"}, GREEDY, GREEDY, {"until": "e", "max_new_tokens": 3}]
    requests = [
        asked(doc["question"], s, see, *where(i)) for i, (doc, s) in enumerate(zip(docs, settings, strict=True))
    ]
    alone = [
        assistant.generate_text([conversation(see(doc), doc["question"])], max_new_tokens=s["max_new_tokens"])[0]
        for doc, s in zip(docs, settings, strict=True)
    ]
    alone = [text.split("e")[0] if "until" in s else text for text, s in zip(alone, settings, strict=True)]
    assert model.generate_until(requests) == alone
    assert alone[0] == "red" and alone[2] == "blue"
    assert sizes == [(2, 8), (1, 8), (2, 3)]


def test_settings_reach_the_model(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, seen = make(), []

    def answer_batch(conversations: Sequence[Any], max_new_tokens: int) -> list[str]:
        seen.append(max_new_tokens)
        return ["one\n\ntwo"]

    def generate_text(conversations: Sequence[Any], **told: Any) -> list[str]:
        seen.append(told)
        return ["one Q: two"]

    monkeypatch.setattr(model.assistant, "answer_batch", answer_batch)
    monkeypatch.setattr(model.assistant, "generate_text", generate_text)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            settings: dict[str, Any] = {"until": ["\n\n"], "image_aspect_ratio": "pad"}
            assert model.generate_until([asked("what?", settings, see, *where(0))]) == ["one"]
    warned = [record.getMessage() for record in caplog.records]
    assert warned == ["eyespot does not read image_aspect_ratio in generation_kwargs"]
    settings = {"until": ["Q:", ""], "num_beams": 3, "max_new_tokens": 5}
    assert model.generate_until([asked("what?", settings, see, *where(0))]) == ["one "]
    assert seen == [128, 128, {"max_new_tokens": 5, "num_beams": 3}]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, {}),
        ({"temperature": 0, "do_sample": True, "top_p": 0.9}, {}),
        ({"temperature": 0.7, "do_sample": False, "top_p": 0.9}, {}),
        ({"temperature": 0.7, "top_k": 5, "top_p": None}, {"temperature": 0.7, "top_k": 5}),
        ({"do_sample": True, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"num_beams": 1, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
    ],
)
def test_when_an_answer_is_sampled(settings: dict[str, Any], told: dict[str, Any]) -> None:
    assert options(settings) == told


def test_an_answer_ends_before_the_first_end() -> None:
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", None) == cut("one", []) == cut("one", "") == "one"


def content(pictures: list[str] | None, context: str) -> Any:
    images, messages = conversation(pictures, context)
    assert images == (pictures or []) and [message["role"] for message in messages] == ["user"]
    return messages[0]["content"]


def test_pictures_stand_where_the_context_says() -> None:
    image = image_part()
    between = [text_part("first "), image, text_part(" then "), image, text_part("?")]
    assert content(["a", "b"], "first <image> then <image>?") == between
    assert content(["a"], "<image>\nwhat?") == [image, text_part("\nwhat?")]
    assert content(["a", "b"], "what?") == user_turn(["a", "b"], "what?")[0]["content"]
    assert content(["a"], "<image> and <image>?") == [image, text_part(" and ?")]  # not one for each: before the words
    assert content(None, "what?") == [text_part("what?")]


def naive(assistant: Assistant, doc: dict[str, Any], answer: str) -> tuple[float, bool]:
    """Sum over the tokens of the answer and its end, one row and one forward pass."""
    images, messages = conversation(see(doc), doc["question"])
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    row = assistant.processor.encode_conversation([*messages, said])
    pixels = {"pixel_values": assistant.processor.pixel_values(images)} if images else {}
    with torch.no_grad():
        log_probs = assistant.model(torch.tensor([row.input_ids]), **pixels).logits[0].log_softmax(-1)
    places = [i for i, label in enumerate(row.labels) if label != -100]
    total = sum(float(log_probs[i - 1, row.labels[i]]) for i in places)
    return total, all(int(log_probs[i - 1].argmax()) == row.labels[i] for i in places)


def test_likelihoods_are_those_of_a_naive_loop(
    make: Callable[..., Any], assistant: Assistant, docs: list[dict[str, Any]]
) -> None:
    choices = ("red", "blue", "no idea")
    requests = [asked(doc["question"], f" {c}", see, *where(i)) for i, doc in enumerate(docs) for c in choices]
    found = make(batch_size=4).loglikelihood(requests)
    expected = [naive(assistant, doc, choice) for doc in docs for choice in choices]
    assert [value for value, _ in found] == pytest.approx([-value for value, _ in expected], rel=1e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    values = [value for value, _ in found]
    assert min(range(3), key=values[:3].__getitem__) == 0 and found[0][1]  # the rule of 0.7.3: the least is chosen
    assert min(range(3), key=values[6:9].__getitem__) == 1 and found[7][1]


def test_a_task_of_likelihoods_gets_log_probabilities(
    make: Callable[..., Any], assistant: Assistant, docs: list[dict[str, Any]]
) -> None:
    requests = [asked(doc["question"], lambda doc: doc["answer"], see, *where(i)) for i, doc in enumerate(docs)]
    found = make(batch_size=2).loglikelihood(requests)
    expected = [naive(assistant, doc, doc["answer"]) for doc in docs]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]


def test_the_evaluator_keeps_likelihoods(adapter: ModuleType) -> None:
    unwrap = sys.modules["lmms_eval.api.instance"].unwrap_generation_output
    assert unwrap(adapter.Likelihood((-1.5, True)))[0] == (-1.5, True)
    assert unwrap((-1.5, True))[0] != (-1.5, True), "lmms-eval keeps pairs now; Likelihood has become needless"


def test_rounds_go_on_until_the_task_ends_them(
    make: Callable[..., Any], assistant: Assistant, docs: list[dict[str, Any]], pictures: dict[str, str]
) -> None:
    calls = []

    def ask(doc: Any, previous_output: list[str], round_idx: int, previous_round_info: Any) -> tuple[Any, ...]:
        calls.append((list(previous_output), round_idx, previous_round_info))
        if round_idx == 2:
            return None, None, True, previous_output, None
        return [Image.open(pictures["blue"]).convert("RGB")], "what color?", False, previous_output, {"seen": round_idx}

    request = asked("what color?", GREEDY, see, ask, *where(0))
    answers = make().generate_until_multi_round([request, request])
    assert answers == [["red", "blue"]] * 2
    assert calls[:2] == [(["red"], 1, None), (["red", "blue"], 2, {"seen": 1})] and len(calls) == 4


def test_arguments(make: Callable[..., Any], adapter: ModuleType, tmp_path: Path) -> None:
    for size in ("auto", 0, "-1"):
        with pytest.raises(ValueError, match=r"batch_size is .*; give a number of 1 or more"):
            make(batch_size=size)
    with pytest.raises(ValueError, match=tmp_path.name):
        adapter.Eyespot(pretrained=str(tmp_path), device="cpu")
    with pytest.raises(TypeError, match="image_size"):
        make(image_size=3)


def test_a_judge_finds_the_memory_free(make: Callable[..., Any]) -> None:
    model = make()
    model.clean()
    assert not hasattr(model, "assistant")


def test_without_lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval.api.instance", None)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    with pytest.raises(ImportError, match=r'pip install "eyespot\[harness\]"'):
        importlib.import_module(ADAPTER)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: {kind}
doc_to_visual: !function see.see
doc_to_text: question
doc_to_target: {target}
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""


def test_the_command_of_lmms_eval(folder: Path, pictures: dict[str, str], tmp_path: Path) -> None:
    """Two tasks of four local questions through the real command line; the entry point lies in a folder of its own."""
    real("lmms_eval")
    rows = [
        {"picture": path, "question": "what color?", "answer": color, "choices": choices, "gold": choices.index(color)}
        for color, path in pictures.items()
        for choices in (["red", "blue"], ["blue", "green", "red"])
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "see.py").write_text(
        "from PIL import Image\n\n\ndef see(doc):\n    return [Image.open(doc['picture']).convert('RGB')]\n"
    )
    values = {"rows": tmp_path / "rows.jsonl"}
    say = TASK.format(name="say", kind="generate_until", target="answer", more="", metric="exact_match", **values)
    choose = TASK.format(
        name="choose", kind="multiple_choice", target="gold", more="doc_to_choice: choices", metric="acc", **values
    )
    (tasks / "say.yaml").write_text(say)
    (tasks / "choose.yaml").write_text(choose)
    points = tmp_path / "installed" / "eyespot_here-0.dist-info"
    points.mkdir(parents=True)
    (points / "METADATA").write_text("Metadata-Version: 2.1\nName: eyespot-here\nVersion: 0\n")
    (points / "entry_points.txt").write_text("[lmms_eval.models]\neyespot = eyespot.adapters:lmms_eval_models\n")
    source = str(Path(eyespot.__file__).parents[1])
    paths = [str(points.parent), source, *(path for path in sys.path if path)]
    command = [sys.executable, "-W", "ignore", "-m", "lmms_eval", "--model", "eyespot", "--batch_size", "2"]
    command += ["--model_args", f"pretrained={folder},device=cpu", "--tasks", "say,choose"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("*_results.json")
    scores = json.loads(written.read_text())["results"]
    assert scores["say"]["exact_match,none"] == scores["choose"]["acc,none"] == 1.0

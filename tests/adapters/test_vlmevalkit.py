"""The adapter for VLMEvalKit, over its real base class where it can be imported and always over a stand-in.

The stand-in has what the adapter and VLMEvalKit's loops touch of vlmeval/vlm/base.py, as read in ms-vlmeval 0.0.20
(VLMEvalKit 0.2rc1); ``test_the_stand_in_is_like_vlmevalkit`` compares the signatures where it can.
"""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import eyespot
from eyespot.data.sample import image_part, text_part

ADAPTER = "eyespot.adapters.vlmevalkit"


class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]

    def __init__(self) -> None:
        self.dump_image_func = None

    def use_custom_prompt(self, dataset: Any) -> bool:
        return False

    def set_dump_image(self, dump_image_func: Any) -> None:
        self.dump_image_func = dump_image_func

    def generate_inner(self, message: Any, dataset: Any = None) -> str:
        raise NotImplementedError

    def generate(self, message: Any, dataset: Any = None) -> str:
        assert all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)

    def chat(self, messages: Any, dataset: Any = None) -> str:
        for turn in messages:
            if isinstance(turn["content"], str):
                turn["content"] = [{"type": "text", "value": turn["content"]}]
        return self.chat_inner(messages, dataset=dataset)  # type: ignore[attr-defined]


def real(name: str) -> ModuleType:
    with warnings.catch_warnings(), torch.enable_grad():  # vlmeval switches gradients off for the whole process
        warnings.simplefilter("ignore")
        pytest.importorskip("vlmeval.vlm", exc_type=ImportError)
        return importlib.import_module(name)


@pytest.fixture(params=["stand-in", "real"])
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The adapter's module, over the stand-in or over the package."""
    if request.param == "real":
        real("vlmeval.config")
    else:
        content: dict[str, dict[str, Any]] = {
            "vlmeval": {"__file__": str(tmp_path / "vlmeval" / "__init__.py")},
            "vlmeval.config": {"supported_VLM": {}},
            "vlmeval.vlm": {},
            "vlmeval.vlm.base": {"BaseModel": BaseModel},
        }
        for name, names in content.items():
            module = ModuleType(name)
            module.__dict__.update(names)
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    yield importlib.import_module(ADAPTER)
    sys.modules.pop(ADAPTER, None)


@pytest.fixture
def model(adapter: ModuleType, folder: Path) -> Any:
    return adapter.Eyespot(str(folder), device="cpu", max_new_tokens=8)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "value": words}


def image(path: str) -> dict[str, str]:
    return {"type": "image", "value": path}


def test_the_stand_in_is_like_vlmevalkit() -> None:
    theirs = real("vlmeval.vlm.base").BaseModel
    for name in ("__init__", "use_custom_prompt", "set_dump_image", "generate_inner", "generate", "chat"):
        ours = inspect.signature(getattr(BaseModel, name)).parameters
        assert list(ours) == list(inspect.signature(getattr(theirs, name)).parameters), name
    assert theirs.INTERLEAVE == BaseModel.INTERLEAVE and theirs.allowed_types == BaseModel.allowed_types


def test_the_adapter_takes_the_place_of_the_base_class(adapter: ModuleType) -> None:
    base = sys.modules["vlmeval.vlm.base"].BaseModel
    assert issubclass(adapter.Eyespot, base) and adapter.Eyespot.INTERLEAVE
    for ours in (adapter.Eyespot.generate_inner, adapter.Eyespot.chat_inner):
        assert list(inspect.signature(ours).parameters) == ["self", "message", "dataset"]


def test_an_answer(model: Any, pictures: dict[str, str]) -> None:
    for color, path in pictures.items():
        assert model.generate([image(path), text("what color?")], dataset="Colors") == color
    assert model.use_custom_prompt("Colors") is False


@pytest.fixture
def seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Conversations that reached the model, and its answers."""
    reached: list[Any] = []
    generate_text = model.assistant.generate_text

    def record(conversations: Any, **options: Any) -> list[str]:
        answers = generate_text(conversations, **options)
        reached.extend(zip(conversations, answers, strict=True))
        return answers

    monkeypatch.setattr(model.assistant, "generate_text", record)
    return reached


def test_pictures_and_texts_keep_their_order(model: Any, seen: list[Any], pictures: dict[str, str]) -> None:
    red, blue = pictures.values()
    answer = model.generate([text("is "), image(blue), text(" like "), image(red), text("?")])
    content = [text_part("is "), image_part(), text_part(" like "), image_part(), text_part("?")]
    assert seen == [(([blue, red], [{"role": "user", "content": content}]), answer)]


def test_a_conversation_of_several_turns(model: Any, seen: list[Any], pictures: dict[str, str]) -> None:
    red, blue = pictures.values()
    turns = [
        {"role": "user", "content": [image(red), text("what color?")]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [text("and "), image(blue), text("?")]},
    ]
    answer = model.chat(turns, dataset="Colors")
    messages = [
        {"role": "user", "content": [image_part(), text_part("what color?")]},
        {"role": "assistant", "content": [text_part("red")]},
        {"role": "user", "content": [text_part("and "), image_part(), text_part("?")]},
    ]
    assert seen == [(([red, blue], messages), answer)]


def test_options_reach_the_model(
    adapter: ModuleType, folder: Path, pictures: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    question = [image(pictures["blue"]), text("what color?")]
    assert adapter.Eyespot(str(folder), device="cpu", max_new_tokens=3).generate(question) == "bl"
    beams = adapter.Eyespot(str(folder), device="cpu", max_new_tokens=3, num_beams=2)
    monkeypatch.setattr(beams.assistant, "generate_text", lambda conversations, **options: [options])
    assert beams.generate(question) == {"max_new_tokens": 3, "num_beams": 2}


def test_videos_are_refused(model: Any) -> None:
    with pytest.raises(AssertionError):
        model.generate([{"type": "video", "value": "film.mp4"}])


def test_a_registered_model_is_loaded_when_it_is_asked(
    adapter: ModuleType, folder: Path, pictures: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known: dict[str, partial[Any]] = sys.modules["vlmeval.config"].supported_VLM
    monkeypatch.setitem(known, "other", partial(dict))
    adapter.register(str(tmp_path), "lost", device="cpu")
    adapter.register(str(folder), device="cpu", max_new_tokens=3)
    built = known["eyespot"]()
    assert built.generate([image(pictures["red"]), text("what color?")]) == "re"
    with pytest.raises(ValueError, match=tmp_path.name):
        known["lost"]()
    for name in ("eyespot", "lost"):
        monkeypatch.delitem(known, name)


@pytest.mark.parametrize("place", ["vlmeval/run.py", "run.py"])
def test_the_command_hands_over_to_run_py(
    place: str, adapter: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """run.py lies in the package of ms-vlmeval, and beside the package in a clone."""
    (tmp_path / "vlmeval").mkdir()
    (tmp_path / place).write_text(
        "import sys\nfrom vlmeval.config import supported_VLM\n"
        "print(sys.argv[1:], supported_VLM['mine'].args, supported_VLM['mine'].keywords, __name__)\n"
    )
    monkeypatch.setattr(sys.modules["vlmeval"], "__file__", str(tmp_path / "vlmeval" / "__init__.py"))
    options = ["--data", "POPE", "MME", "--mode", "infer"]
    monkeypatch.setattr(sys, "argv", ["vlmevalkit", "runs/a", "--model", "mine", "--max-new-tokens", "9", *options])
    adapter.main()
    assert capsys.readouterr().out.split("\n")[-2] == (
        "['--model', 'mine', '--data', 'POPE', 'MME', '--mode', 'infer'] ('runs/a',) {'max_new_tokens': 9} __main__"
    )
    sys.modules["vlmeval.config"].supported_VLM.pop("mine")


def test_without_vlmevalkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vlmeval", None)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    with pytest.raises(ImportError, match=r"pip install ms-vlmeval==0\.0\.20"):
        importlib.import_module(ADAPTER)


def test_the_command_of_vlmevalkit(folder: Path, pictures: dict[str, str], tmp_path: Path) -> None:
    """Four local questions through the real run.py."""
    real("vlmeval")
    rows = ["index\timage\tquestion\tanswer"]
    for number, color in enumerate([*pictures, *pictures]):
        picture = base64.b64encode(Path(pictures[color]).read_bytes()).decode()
        rows.append(f"{number}\t{picture}\twhat color?\t{color}")
    (tmp_path / "Colors.tsv").write_text("\n".join(rows) + "\n")
    source = str(Path(eyespot.__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([source, *(path for path in sys.path if path)]),
        "LMUData": str(tmp_path),
        "PRED_FORMAT": "json",
    }
    command = [sys.executable, "-W", "ignore", "-m", ADAPTER, str(folder), "--max-new-tokens", "8"]
    command += ["--data", "Colors", "--mode", "infer", "--work-dir", str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    written = json.loads((tmp_path / "out" / "eyespot" / "eyespot_Colors.json").read_text())
    assert [row["prediction"] for row in written] == [row["answer"] for row in written] == [*pictures, *pictures]

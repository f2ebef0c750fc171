"""The command line as a user meets it: verbs, wrong input, exit codes."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from eyespot.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished smoke run, made by the command itself."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", "recipe=smoke", f"output_dir={folder}", "evaluation.limit=12"]) == 0
    return folder / "smoke"


@pytest.fixture(scope="module")
def model(run_folder: Path) -> str:
    return str(run_folder / "model")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "teal.png")
    return str(tmp_path / "teal.png")


def test_train_writes_model_report_and_page(run_folder: Path) -> None:
    report = json.loads((run_folder / "report.json").read_text())
    assert report["num_questions"] == 12
    assert set(report["controls"]) == {"blind", "shuffled", "majority"}
    page = (run_folder / "report.html").read_text()
    assert page.count("data:image/") >= 4
    assert "eyespot train recipe=smoke" in page
    assert len((run_folder / "before" / "predictions.jsonl").read_text().splitlines()) == 4


def test_a_finished_run_is_not_overwritten(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe=smoke", f"output_dir={run_folder.parent}", "evaluation.limit=12"]) == 2
    assert "holds a finished run; choose another name=..., or add --fresh" in capsys.readouterr().err


def test_a_run_killed_before_its_report_only_writes_the_report(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (run_folder / "report.html").read_text()
    weights = (run_folder / "model" / "model.safetensors").stat().st_mtime_ns
    (run_folder / "report.html").unlink()
    assert main(["train", "recipe=smoke", f"output_dir={run_folder.parent}", "evaluation.limit=12"]) == 0
    assert "on 12 questions" in capsys.readouterr().out
    assert (run_folder / "report.html").read_text().count("data:image/") == page.count("data:image/")
    assert (run_folder / "model" / "model.safetensors").stat().st_mtime_ns == weights


def test_fresh_may_stand_anywhere_and_words_are_quoted(tmp_path: Path) -> None:
    words = [
        "train",
        "--fresh",
        "recipe=smoke",
        f"output_dir={tmp_path / 'a b'}",
        "trainer.max_steps=1",
        "evaluation.limit=4",
    ]
    assert main(words) == 0
    assert main([words[0], words[2], "--fresh", *words[3:]]) == 0
    assert "&#x27;output_dir=" in (tmp_path / "a b" / "smoke" / "report.html").read_text()


def test_ask_streams_and_json_is_the_same_answer(model: str, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", model, picture, "what is it?", "--max-new-tokens", "6"]) == 0
    streamed = capsys.readouterr().out.strip()
    assert main(["ask", model, picture, "what is it?", "--max-new-tokens", "6", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == {"images": [picture], "question": "what is it?", "answer": streamed}


def test_ask_several_pictures_none_and_options(model: str, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--max-new-tokens", "3"]
    assert main(["ask", model, picture, picture, "same?", *few]) == 0
    assert main(["ask", model, "hello", *few]) == 0
    assert main(["ask", model, picture, "q", "--num-beams", "2", *few]) == 0
    sampled = ["--temperature", "1.5", "--top-p", "0.9", "--top-k", "20", "--repetition-penalty", "1.2", "--json"]
    outputs = set()
    for seed in ("1", "1", "2"):
        capsys.readouterr()
        assert main(["ask", model, picture, "q", *sampled, "--seed", seed, "--max-new-tokens", "12"]) == 0
        outputs.add(json.loads(capsys.readouterr().out)["answer"])
    assert len(outputs) == 2


def test_ask_reads_stdin(model: str, picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(Path(picture).read_bytes())

    monkeypatch.setattr(sys, "stdin", Stdin())
    assert main(["ask", model, "-", "what?", "--max-new-tokens", "2"]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is this?\n"))
    assert main(["ask", model, picture, "-", "--max-new-tokens", "2"]) == 0


def test_caption_is_batched_and_resumable(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "captions.jsonl"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "sub/c.png"):
        Image.new("RGB", (20, 20), "red").save(folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    command = ["caption", model, str(folder), "--out", str(out), "--batch-size", "2", "--max-new-tokens", "3"]
    assert main(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["image"] for row in rows] == ["a.png", "b.jpg", "broken.png", "sub/c.png"]
    assert [("caption" in row, "error" in row) for row in rows] == [
        (True, False),
        (True, False),
        (False, True),
        (True, False),
    ]
    whole = out.read_text()
    # interrupted in the middle of the third line: the first two are kept, the rest is made again
    out.write_text("".join(line + "\n" for line in whole.splitlines()[:2]) + '{"image": "bro')
    capsys.readouterr()
    assert main(command) == 0
    assert "1 captions and 1 unreadable" in capsys.readouterr().out
    assert out.read_text() == whole


def test_evaluate_uses_the_test_set_of_the_run_or_any_file(
    model: str, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", model, "--limit", "8", "--out", str(tmp_path / "e"), "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "on 8 questions" in out and "blind:" in out and "shuffled:" in out
    assert (tmp_path / "e" / "report.html").is_file()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    rows = [{"image": name, "question": "q", "answer": "a"} for name in ("teal.png", "red.png")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["evaluate", model, "format=vqa", f"path={tmp_path / 'q.jsonl'}", "--max-new-tokens", "2"]) == 0
    assert "on 2 questions" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["spatial", "counting", "grounding"])
def test_evaluate_on_drawn_scenes(name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("emoji")
    words = ["evaluate", model, f"benchmark={name}", "num_scenes=12", "image_size=32", "objects=shapes", "--limit", "4"]
    assert main([*words, "--relevance", "0", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "on 4 questions" in out and "unparsed: " in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["benchmark"] == name and report["settings"]["source"]["objects"] == "shapes"


def test_compare_untrained_with_trained(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run_folder / "before"), str(run_folder), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "accuracy of 4 questions about" in out and "8 questions only B was asked" in out
    assert (tmp_path / "comparison.html").is_file() and (tmp_path / "comparison.json").is_file()


def test_inspect_data_marks_what_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    assert main(["inspect", "data", "recipe=smoke", "-n", "2", "--out", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert "<image x 16>" in out and "Human: what is the blue shape?" in out and "Assistant: rectangle<eos>" in out
    assert "11 supervised" in out  # " rectangle" and the end of turn
    assert Image.open(sheet).size[0] > 400


def test_inspect_batch_and_model_give_shapes(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "batch", "recipe=smoke", "-n", "2"]) == 0
    batch = capsys.readouterr().out
    for line in (
        "pixel_values       [2, 3, 32, 32] float32",
        "image features     [2, 16, 32]",
        "image embeddings   [2, 16, 32]",
    ):
        assert line in batch
    assert main(["inspect", "model", model]) == 0
    shown = capsys.readouterr().out
    assert "EyespotViTModel" in shown and "parameters" in shown and "46,720" in shown
    assert main(["inspect", "model", "recipe=smoke"]) == 0
    assert capsys.readouterr().out.splitlines()[:8] == shown.splitlines()[:8]


WRONG = {
    "missing picture": (["ask", "MODEL", "nowhere.png", "q"], "nowhere.png"),
    "wrongly named": (["ask", "MODEL", "text.png", "q"], "not a picture"),
    "truncated": (["ask", "MODEL", "cut.png", "q"], "cut.png"),
    "huge": (["ask", "MODEL", "bomb.png", "q"], "pixels"),
    "folder as picture": (["ask", "MODEL", ".", "q"], "folder"),
    "missing model": (["ask", "no/such/model", "q"], "no/such/model"),
    "pickle": (["ask", "model.pt", "q"], "pickle"),
    "pickle folder": (["ask", "pickled", "q"], "safetensors"),
    "not a model": (["ask", "empty", "q"], "config.json"),
    "no recipe": (["train", "trainer.seed=1"], "no recipe was given; add recipe=NAME with one of: gemma270m_llava"),
    "unknown recipe": (["train", "recipe=quikstart"], "did you mean 'quickstart'?"),
    "unknown key": (["train", "recipe=smoke", "trainer.batchsize=3"], "did you mean 'batch_size'?"),
    "unknown part": (["train", "recipe=smoke", "model.vision.name=vitt"], "did you mean 'vit'?"),
    "unknown argument": (["train", "recipe=smoke", "model.vision.args.patchsize=3"], "patch_size"),
    "wrong type": (["train", "recipe=smoke", "trainer.batch_size=many"], "trainer.batch_size is 'many'"),
    "no value": (["train", "recipe=smoke", "trainer.batch_size"], "write key=value"),
    "broken override": (["train", "recipe=smoke", "data.train={format: vqa"], "data.train"),
    "missing data": (["train", "recipe=smoke", "data.train={format: vqa, path: none.jsonl}"], "none.jsonl"),
    "malformed JSON": (["train", "recipe=smoke", "data.train={format: llava, path: bad.json}"], "bad.json"),
    "two placeholders": (
        ["train", "recipe=smoke", "data.train={format: llava, path: two.json}"],
        "no usable training sample",
    ),
    "bad device": (["ask", "MODEL", "q", "--device", "tpu"], "not available on this machine"),
    "negative temperature": (["ask", "MODEL", "q", "--temperature", "-1"], "temperature is -1.0"),
    "caption nothing": (["caption", "MODEL", "empty", "--out", "c.jsonl"], "no picture"),
    "evaluate unknown": (["evaluate", "MODEL", "format=vqqa"], "did you mean 'vqa'?"),
    "evaluate no test": (["evaluate", "empty"], "add benchmark=NAME or format=NAME"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input_is_one_clear_line_and_exit_code_2(
    case: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("I am a text")
    Image.new("RGB", (64, 64), "red").save("whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-40])
    Image.new("1", (12_000, 12_000)).save("bomb.png")
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text('{"model_type": "eyespot_vlm"}')
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "bad.json").write_text('[{"id": "a", ')
    turns = [{"from": "human", "value": "<image>\n<image>\nwhat?"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "two.json").write_text(json.dumps([{"id": "a", "image": "whole.png", "conversations": turns}]))
    arguments, words = WRONG[case]
    before = sorted(path.name for path in tmp_path.iterdir())
    code = main([model if word == "MODEL" else word for word in arguments])
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("eyespot ")]
    assert code == 2, error
    assert len(lines) == 1 and words in lines[0], error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # nothing half-written


def test_help_loads_nothing_heavy() -> None:
    script = "import sys; from eyespot.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\nprint(sorted(m for m in ('torch', 'transformers', 'PIL', 'numpy', 'rich') if m in sys.modules))"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert "eyespot train recipe=quickstart" in done.stdout


def test_version_no_verb_and_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("eyespot 0.") and "usage: eyespot" in out
    done = subprocess.run([sys.executable, "-m", "eyespot", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("eyespot 0.")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "EYESPOT_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown recipe"):
        main(["train", "recipe=nope"])


def test_divergence_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["train", "recipe=smoke", f"output_dir={tmp_path}", "evaluation.run=false",
                 "trainer.lr={vision: 1e9, connector: 1e9, language: 1e9}",
                 "trainer.clip=1e9", "trainer.epochs=20", "trainer.warmup_share=0.0"])  # fmt: skip
    assert code == 1
    assert "last good checkpoint" in capsys.readouterr().err

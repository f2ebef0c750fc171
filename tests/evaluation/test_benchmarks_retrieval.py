"""Retrieval as a benchmark: its source, its table, its report, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import eyespot
from drawn import draw_captions
from eyespot.cli import main
from eyespot.config import ConfigError
from eyespot.evaluation.benchmarks.base import load_questions, make_benchmark
from eyespot.evaluation.benchmarks.retrieval import RetrievalBenchmark, show
from eyespot.evaluation.finish import BeforeAndAfter
from eyespot.evaluation.retrieval import Recall, Retrieval, evaluate_retrieval
from eyespot.evaluation.runner import evaluate
from eyespot.training.run import compose_settings
from tiny import randomise

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **SIZES}}
GPT = {"name": "gpt", "args": {"max_position_embeddings": 64, **SIZES}}


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(draw_captions(tmp_path_factory.mktemp("drawn"), 14))


def saved(folder: Path, **parts: Any) -> str:
    torch.manual_seed(0)
    model, processor = eyespot.build(VISION, {"name": "mlp"}, GPT, **parts)
    randomise(model)
    eyespot.save(model, processor, folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model"), alignment={"dim": 8, "max_text": 24})


def test_the_command_prints_and_writes_what_the_function_finds(
    model: str, captions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", model, "benchmark=retrieval", f"path={captions}", "rerank=3", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    samples, _ = load_questions(make_benchmark({"benchmark": "retrieval", "path": captions}))
    found = evaluate_retrieval(model, samples, rerank=3, device="cpu")
    assert "among 14 pictures and 24 texts, 3 candidates reranked" in printed
    recall = found.text_to_image[5]
    row = next(line for line in printed.splitlines() if line.startswith("picture of a text") and "recall@5" in line)
    assert f"{recall.recall:.1%}" in row and f"{100 * recall.chance:.2g}%" in row
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.json"]
    assert report["settings"]["source"] == {"benchmark": "retrieval", "path": captions, "rerank": 3}
    assert (report["name"], report["benchmark"], report["reranked"]) == (model, "retrieval", 3)
    assert report["image_to_text"]["recall@1"]["recall"] == found.image_to_text[1].recall


def test_a_limit_makes_the_gallery_smaller(model: str, captions: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", model, "benchmark=retrieval", f"path={captions}", "--limit", "5", "--device", "cpu"]) == 0
    assert "among 5 pictures" in capsys.readouterr().out


def test_any_format_of_pictures_with_texts(captions: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(captions).read_text().splitlines()[:3]]
    lines = [{"image": row["image"], "question": "What is it?", "answer": row["captions"][0]} for row in rows]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"benchmark": "retrieval", "format": "vqa", "path": str(tmp_path / "q.jsonl")}
    samples, report = load_questions(make_benchmark({**source, "image_folder": str(Path(captions).parent)}))
    assert [sample.answers for sample in samples] == [(row["captions"][0],) for row in rows] and not report.rejected
    with pytest.raises(ValueError, match="data format 'vqa' has no option 'prompt'"):
        load_questions(make_benchmark({**source, "prompt": "What?"}))
    with pytest.raises(ValueError, match="data format 'captions' needs the option 'path'"):
        load_questions(make_benchmark({"benchmark": "retrieval"}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ray", "2"], "--ray is 2, but benchmark=retrieval asks nothing; drop it"),
        (["--max-new-tokens", "4"], "--max-new-tokens is 4, but benchmark=retrieval asks nothing"),
        (["rerank=-1"], "rerank is -1; give 0 or more candidates"),
        (["reranked=1"], "has no option 'reranked'; did you mean 'rerank'?"),
    ],
)
def test_unusable_options_are_one_line(
    model: str, captions: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", model, "benchmark=retrieval", f"path={captions}", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_alignment_head(captions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = saved(tmp_path / "plain")
    capsys.readouterr()
    command = ["evaluate", plain, "benchmark=retrieval", f"path={captions}", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "eyespot evaluate: the model has no alignment head; train one with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_is_no_test_of_a_training(captions: str, tmp_path: Path) -> None:
    settings = compose_settings(["recipe=smoke", f"output_dir={tmp_path}"])
    settings.data.test = {"benchmark": "retrieval", "path": captions}
    with pytest.raises(ConfigError, match=r"asks no questions; set evaluation\.run=false"):
        BeforeAndAfter(settings)


def test_it_scores_no_answers(captions: str) -> None:
    benchmark = make_benchmark({"benchmark": "retrieval", "path": captions})
    assert isinstance(benchmark, RetrievalBenchmark)

    class Mute:
        def answer_batch(self, conversations: Any, max_new_tokens: int) -> list[str]:
            return ["" for _ in conversations]

    samples, _ = load_questions(benchmark, 3)
    with pytest.raises(ValueError, match="retrieval scores no answers"):
        evaluate(Mute(), samples, name="r", benchmark=benchmark, controls=())


def test_the_table_fits_a_terminal() -> None:
    recalls = {at: Recall(at / 10, (at / 20, 1.0), at / 25_000) for at in (1, 5, 10)}
    text = io.StringIO()
    show(Retrieval(1000, 25_000, 0, recalls, recalls), Console(file=text, width=80))
    assert "retrieval among 1,000 pictures and 25,000 texts\n" in text.getvalue()
    assert "recall@10  100.0%  50.0% to 100.0%   0.04%" in text.getvalue()
    assert max(map(len, text.getvalue().splitlines())) <= 80

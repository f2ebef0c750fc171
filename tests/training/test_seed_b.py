"""The captioner's run, shrunk, as its user meets it: stopped by Ctrl+C, gone on with, and looked at."""

from __future__ import annotations

import csv
import json
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import eyespot
from eyespot.cli import main
from eyespot.config import TrainSettings, from_dict
from eyespot.data.sources import load
from eyespot.evaluation.pictures import Pictures, different, draw_grid, draw_patches, first_turn, patch_lengths
from eyespot.training.run import Run, finished_run
from started import interpreter

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("before_after.png", "loss.png", "patches.png")
COLORS = ("red", "green", "blue", "orange", "purple", "black")


@pytest.fixture(scope="module")
def flickr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photographs of a kind, five captions each, in the columns of Flickr8k."""
    folder = tmp_path_factory.mktemp("flickr")
    rows = []
    for number in range(12):
        color = COLORS[number % len(COLORS)]
        image = Image.new("RGB", (60 + number, 50), "white")
        ImageDraw.Draw(image).ellipse((10, 10, 30 + number, 40), fill=color)
        image.save(folder / f"{number}.jpg")
        rows.append([f"{number}.jpg", *(f"{article} {color} spot" for article in ("a", "one", "the", "some", "this"))])
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", *(f"caption_{i}" for i in range(5))], *rows])
    return folder


def command(folder: Path, flickr: Path) -> list[str]:
    source = f"{{format: captions, path: {flickr / 'captions.csv'}, prompt: This image shows}}"
    return ["train", "recipe=smollm360m_flickr8k", "+shrink=true", "name=b", f"output_dir={folder}",
            f"data.train={source}", "data.validation=null", "data.validation_share=0.2", "evaluation.run=false",
            "trainer.max_steps=8", "trainer.epochs=9", "trainer.validate_every=8"]  # fmt: skip


@pytest.fixture(scope="module")
def stopped_and_resumed(flickr: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that was stopped after step 3 and then finished by the words it said; and those words."""
    folder = tmp_path_factory.mktemp("runs")
    process = interpreter(*command(folder, flickr))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 3/8"):
            process.send_signal(signal.SIGINT)
            break
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert not (folder / "b" / "model").exists() and not (folder / "b" / "loss.png").exists()
    again = interpreter(*shlex.split(said.split("to go on: eyespot ")[1].splitlines()[0]))
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    return folder / "b", said


def record(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "model" / "training.json").read_text())
    return found


def test_ctrl_c_says_how_to_go_on_and_the_losses_are_the_same(
    stopped_and_resumed: tuple[Path, str], flickr: Path, tmp_path: Path
) -> None:
    folder, said = stopped_and_resumed
    assert said.startswith("stopped by SIGINT at step ") and "saved; to go on: eyespot train" in said
    whole = interpreter(*command(tmp_path, flickr))
    whole.communicate(timeout=300)
    assert whole.returncode == 0
    resumed, uninterrupted = record(folder), record(tmp_path / "b")
    assert resumed["curve"] == uninterrupted["curve"] and resumed["validation"] == uninterrupted["validation"]
    assert len(resumed["curve"]) == 8  # type: ignore[arg-type]
    one, other = ((path / "model" / "model.safetensors").read_bytes() for path in (folder, tmp_path / "b"))
    assert one == other


def test_three_pictures_are_written(stopped_and_resumed: tuple[Path, str]) -> None:
    folder, _ = stopped_and_resumed
    for name in NAMES:
        picture = Image.open(folder / name).convert("RGB")
        assert min(picture.size) > 300 and len(picture.getcolors(1 << 24) or []) > 20, name


def test_answers_before_training_survive_the_stop(stopped_and_resumed: tuple[Path, str]) -> None:
    folder, _ = stopped_and_resumed
    before = json.loads((folder / "before.json").read_text())
    assert len(before) == 8 and all(isinstance(answer, str) for answer in before)


def test_the_grid_shows_what_the_model_says_now(stopped_and_resumed: tuple[Path, str]) -> None:
    """Asked again, the trained model gives the answers of the grid: drawing anew changes no pixel."""
    folder, _ = stopped_and_resumed
    settings: TrainSettings = from_dict(TrainSettings, json.loads((folder / "settings.json").read_text()))
    run = finished_run(settings)
    assert run is not None
    drawn = (folder / "before_after.png").read_bytes()
    Pictures(run.settings).write(run)
    assert (folder / "before_after.png").read_bytes() == drawn


def test_grid_of_any_length_and_any_letters(flickr: Path, tmp_path: Path) -> None:
    samples = load("captions", path=str(flickr / "captions.csv"), prompt="This image shows")[0]
    for count in (1, 5):
        shown = [first_turn(sample) for sample in different(samples, count)]
        assert len({one.image for one in shown}) == count and shown[0].question == "This image shows"
        answers = ["\x00\x07 嘿 $x_1$ " + "w" * 300 for _ in shown]
        draw_grid(shown, answers, answers, tmp_path / f"{count}.png")
        assert Image.open(tmp_path / f"{count}.png").width > 300


def test_heat_map_is_the_length_of_each_patch(
    stopped_and_resumed: tuple[Path, str], flickr: Path, tmp_path: Path
) -> None:
    assistant = eyespot.load(stopped_and_resumed[0] / "model", device="cpu")
    picture, lengths = patch_lengths(assistant, str(flickr / "3.jpg"))
    assert picture.shape == (32, 32, 3) and picture.min() >= 0 and picture.max() <= 1 and lengths.shape == (4, 4)
    np.testing.assert_allclose(picture[0, -1], 1, atol=0.02)
    np.testing.assert_allclose(picture[16, 11], (1, 165 / 255, 0), atol=0.1)  # inside the orange spot
    features = assistant.model.encode_images(assistant.processor.pixel_values([str(flickr / "3.jpg")]))
    assert features.shape[1] == 17  # CLS is kept and is no patch
    expected = features[0, 1:].square().sum(-1).sqrt().view(4, 4).detach().numpy()
    np.testing.assert_allclose(lengths, expected, rtol=1e-5)
    draw_patches(assistant, [str(flickr / "3.jpg")], tmp_path / "one.png")
    words = ["inspect", "patches", str(stopped_and_resumed[0] / "model"), str(flickr / "3.jpg")]
    assert main([*words, "--out", str(tmp_path / "new" / "same.png")]) == 0 and main(words) == 2
    assert (tmp_path / "new" / "same.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_without_matplotlib_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write = Pictures.write

    def without(self: Pictures, run: Run) -> list[Path]:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # not before, because torchmetrics imports it
        return write(self, run)

    monkeypatch.setattr(Pictures, "write", without)
    words = ["train", "recipe=smoke", f"output_dir={tmp_path}", "data.limit=20", "evaluation.run=false"]
    assert main(words) == 0
    errors = [line for line in capsys.readouterr().err.splitlines() if "matplotlib" in line]
    assert errors == ['nothing is drawn: pictures of a run need matplotlib; pip install "eyespot[pictures]"']
    assert (tmp_path / "smoke" / "model").is_dir()

"""I9: kill at any step and resume: the same weights, losses and data order, bit for bit."""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from eyespot.config import ConfigError
from eyespot.training.run import Run
from started import Started

pytestmark = pytest.mark.filterwarnings("ignore")

LORA = [
    "model.language.train=lora",
    "model.language.lora={r: 2, alpha: 4, targets: [q_proj, o_proj, up_proj, down_proj], dropout: 0.1}",
]
PROJECTOR_ONLY = ["model.language.train=frozen", "model.vision.train=frozen"]
MIXED_AND_AUGMENTED = [
    "data.train={a: {format: easy_vqa, split: train, weight: 3}, b: {format: easy_vqa, split: test, weight: 1}}",
    "data.augment={crop: {}, flip: {}, color: {}}",
    "data.filters={duplicate_images: {}}",
]
COMMON = ["recipe=smoke", "data.limit=40", "data.validation_share=0.2", "trainer.checkpoint_every=2"]
COMMON += ["trainer.log_every=1", "trainer.epochs=3"]


def kill_at(step: int, number: int, *words: str) -> int:
    process = Started("train", *COMMON, *words)
    for line in process.stderr:
        if line.startswith(f"step {step}/"):
            process.send_signal(number)
            break
    process.communicate(timeout=300)
    assert process.returncode is not None
    return process.returncode


@pytest.mark.parametrize(
    ("overrides", "step", "number"),
    [
        pytest.param([], 3, signal.SIGKILL, id="full"),
        pytest.param([], 1, signal.SIGKILL, id="before-the-first-checkpoint"),
        pytest.param([], 2, signal.SIGINT, id="ctrl-c"),
        pytest.param(LORA, 3, signal.SIGKILL, id="lora-with-dropout"),
        pytest.param(PROJECTOR_ONLY, 3, signal.SIGKILL, id="projector-only"),
        pytest.param(MIXED_AND_AUGMENTED, 3, signal.SIGKILL, id="mixed-and-augmented"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    run: Callable[..., Run], tmp_path: Path, overrides: list[str], step: int, number: int
) -> None:
    code = kill_at(step, number, "name=killed", f"output_dir={tmp_path}", *overrides)
    assert code == (-number if number == signal.SIGKILL else 130)
    assert not (tmp_path / "killed" / "model").exists()
    assert bool(list((tmp_path / "killed").glob("checkpoints/step-*"))) == (step > 1)
    resumed, whole = run("killed", *COMMON, *overrides), run("whole", *COMMON, *overrides)
    one, other = (load_file(result.model_folder / "model.safetensors") for result in (resumed, whole))
    assert one.keys() == other.keys()
    assert [name for name in one if not (one[name] == other[name]).all()] == []
    assert resumed.curve == whole.curve
    assert resumed.validation == whole.validation
    with (resumed.folder / "logs" / "csv" / "metrics.csv").open(newline="") as file:
        logged = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    assert logged == pytest.approx(dict(whole.curve), rel=1e-6)


def test_an_interrupted_run_with_other_settings_is_not_continued(run: Callable[..., Run]) -> None:
    run("a", before_training=None)
    with pytest.raises(ConfigError, match="holds a finished run"):
        run("a")
    assert run("a", fresh=True).finished


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_is_no_run_is_never_deleted(run: Callable[..., Run], tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("words")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        run("precious", fresh=fresh)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "words"


def test_settings_of_an_interrupted_run_must_match(run: Callable[..., Run], tmp_path: Path) -> None:
    import shutil

    run("a")
    shutil.rmtree(tmp_path / "a" / "model")
    with pytest.raises(ConfigError, match=r"trainer\.batch_size \(8, now 4\)"):
        run("a", "trainer.batch_size=4")


def test_checkpoints_keep_best_and_last_and_no_partial_ones(run: Callable[..., Run]) -> None:
    folder = run("a", "trainer.checkpoint_every=1", "trainer.validate_every=1", "trainer.keep_best=1").folder
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert 1 <= len(names) <= 2
    assert all(name.startswith("step-") for name in names)


def test_a_checkpoint_is_small_and_loads_like_the_final_model(run: Callable[..., Run]) -> None:
    import torch

    import eyespot

    result = run("a", *PROJECTOR_ONLY)
    last = sorted((result.folder / "checkpoints").iterdir())[-1]
    assert set(load_file(last / "trained.safetensors")) == {"connector.proj.weight", "connector.proj.bias"}
    final, checkpoint = (eyespot.load(path, device="cpu").model for path in (result.model_folder, last))
    for (name, a), b in zip(final.state_dict().items(), checkpoint.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_whose_frozen_parts_changed_is_refused(run: Callable[..., Run]) -> None:
    import json

    import eyespot

    last = sorted((run("a", *PROJECTOR_ONLY).folder / "checkpoints").iterdir())[-1]
    record = json.loads((last / "checkpoint.json").read_text())
    (last / "checkpoint.json").write_text(json.dumps({**record, "frozen_sha256": "0" * 64}))
    with pytest.raises(ValueError, match=r"frozen parts of checkpoint .* have changed"):
        eyespot.load(last, device="cpu")

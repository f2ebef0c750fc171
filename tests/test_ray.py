"""Two local Ray workers do what one process does, and give the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from eyespot.cli import main
from eyespot.compose import build, save
from eyespot.data.features import features_root, stored
from eyespot.data.sample import Sample
from eyespot.evaluation.runner import evaluate
from eyespot.inference import load
from tiny import randomise

ray = pytest.importorskip("ray", reason='Ray is not installed; pip install "eyespot[ray]"')
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """One small Ray for all tests; eyespot uses it because it is there."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local", num_cpus=2, object_store_memory=80_000_000, include_dashboard=False, logging_level="ERROR",
        log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model in ``model`` and 23 pictures, one of them broken, in ``photos``."""
    folder = tmp_path_factory.mktemp("ray")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, processor = build(
        {"name": "vit", "args": {"image_size": 16, "patch_size": 8, **sizes}},
        {"name": "mlp"},
        {
            "name": "gpt",
            "tokenizer": "char:abcdefghijklmnopqrstuvwxyz ?",
            "args": {"max_position_embeddings": 128, **sizes},
        },
    )
    randomise(model)
    model.config.image_scale = 9.0
    save(model, processor, folder / "model")
    (folder / "photos").mkdir()
    for number in range(22):
        Image.new("RGB", (9, 9), (11 * number, 255 - 11 * number, 40)).save(folder / "photos" / f"{number:02}.png")
    (folder / "photos" / "broken.png").write_bytes(b"\x89PNG no")
    return folder


class Adding:
    """A worker that dies of its fourth job when it first meets it."""

    def __init__(self, number: int, mark: Path) -> None:
        self.number, self.mark = number, mark

    def __call__(self, job: int) -> tuple[int, int]:
        if job == 4 and not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        if job == 99:
            raise ValueError("99 is too many")
        if job == 66:
            os._exit(1)
        return job + self.number, os.getpid()


def test_results_come_in_order_from_both_workers_though_one_dies(tmp_path: Path) -> None:
    from eyespot.ray_jobs import over_workers

    results = list(over_workers(range(20), Adding, (100, tmp_path / "died"), num_workers=2))
    assert [value for value, _ in results] == list(range(100, 120))
    assert (tmp_path / "died").exists() and len({pid for _, pid in results}) >= 2


def test_an_error_in_a_worker_is_an_error_here(tmp_path: Path) -> None:
    from eyespot.ray_jobs import over_workers

    with pytest.raises(ValueError, match="a worker failed: ValueError: 99 is too many"):
        list(over_workers([99], Adding, (0, tmp_path / "died"), num_workers=1))
    with pytest.raises(ValueError, match="a worker was ended 3 times"):
        list(over_workers([66], Adding, (0, tmp_path / "died"), num_workers=1))
    with pytest.raises(ValueError, match="--ray is 0; it must be at least 1 worker"):
        list(over_workers([1], Adding, (0, tmp_path / "died"), num_workers=0))


def test_captions_are_the_same_and_go_on_after_an_interruption(folder: Path, tmp_path: Path) -> None:
    words = ["caption", str(folder / "model"), str(folder / "photos"), "--batch-size", "4", "--max-new-tokens", "6"]
    plain, spread = tmp_path / "plain.jsonl", tmp_path / "spread.jsonl"
    assert main([*words, "--device", "cpu", "--out", str(plain)]) == 0
    spread.write_text("".join(plain.read_text().splitlines(keepends=True)[:4]))
    assert main([*words, "--device", "cpu", "--out", str(spread), "--ray", "2"]) == 0
    assert spread.read_text() == plain.read_text() and plain.read_text().count("\n") == 23
    assert len({json.loads(line).get("caption") for line in plain.read_text().splitlines()}) > 3


def test_drawn_captions_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["caption", str(folder / "model"), str(folder / "photos"), "--out", str(tmp_path / "o.jsonl")]
    assert main([*words, "--temperature", "0.5", "--ray", "2"]) == 2
    assert "temperature is 0.5; with --ray captions are greedy" in capsys.readouterr().err


def test_evaluations_are_the_same(folder: Path) -> None:
    from eyespot.ray_jobs import evaluate_with_ray

    pictures = sorted((folder / "photos").glob("[0-9]*.png"))
    samples = [
        Sample.question(f"{p.stem}-{q}", str(p), f"what is {q}?", "red", group=p.stem) for p in pictures for q in (1, 2)
    ]
    options: dict[str, Any] = {"name": "x", "batch_size": 6, "max_new_tokens": 5}
    plain = evaluate(load(folder / "model", "cpu"), samples, **options)
    spread = evaluate_with_ray((str(folder / "model"), "cpu"), samples, 2, **options)
    assert spread.predictions == plain.predictions and spread.controls == plain.controls
    assert len({p.prediction for p in plain.predictions}) > 3 and spread.seconds > 0


def test_the_cache_holds_the_same_features(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import eyespot.ray_jobs as jobs

    monkeypatch.setattr(jobs, "ENCODED_AT_ONCE", 4)  # the workers import the module anew and keep its own numbers
    monkeypatch.setattr(jobs, "PICTURES_IN_A_JOB", 8)
    words = ["cache", "fill", "recipe=smoke", "model.vision.train=frozen", "trainer.device=cpu", "data.limit=300"]
    kept = []
    for place, more in (("plain", []), ("spread", ["--ray", "2"])):
        monkeypatch.setenv("EYESPOT_CACHE", str(tmp_path / place))
        assert main([*words, *more]) == 0, capsys.readouterr().err
        [row] = stored(features_root())
        features: dict[bytes, torch.Tensor] = {}
        for file in (features_root() / row.key).glob("*.safetensors"):
            tensors = load_file(file)
            features.update(zip([k.numpy().tobytes() for k in tensors["keys"]], tensors["features"], strict=True))
        kept.append((row.key, row.num_pictures, features))
    assert kept[0][:2] == kept[1][:2] and kept[0][2].keys() == kept[1][2].keys() and kept[0][1] > 20
    for digest, wanted in kept[0][2].items():
        torch.testing.assert_close(kept[1][2][digest], wanted, rtol=1e-5, atol=1e-6)
    assert len(list((tmp_path / "spread" / "features" / row.key).glob("*.safetensors"))) > 2, "several wrote"


def test_a_worker_that_would_encode_differently_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eyespot.ray_jobs import Encoding
    from eyespot.training.run import compose_settings

    monkeypatch.setenv("EYESPOT_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="this machine would encode differently"):
        Encoding(compose_settings(["recipe=smoke", "model.vision.train=frozen"]), "another key")


def test_ray_is_only_for_filling(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "show", "--ray", "2"]) == 2
    assert "--ray is for fill" in capsys.readouterr().err

"""A stage that learns what is where: it learns it, tells how well, and is refused where tokens have no place."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from eyespot.compose import load_parts
from eyespot.config import ConfigError
from eyespot.data.boxes import Box, iou
from eyespot.data.formats.scenes import read_scenes
from eyespot.data.objects import ObjectCollator
from eyespot.data.sample import Sample
from eyespot.models.detection import Objects, name_targets, name_vectors
from eyespot.training.run import Run, compose_settings, train

pytestmark = pytest.mark.filterwarnings("ignore")

DATA = "{format: scenes, num_scenes: 12, objects: shapes, image_size: 32, questions: [detect]}"
LOOK = "train: {vision: full, connector: full, detection: full}"
TALK = (
    f"{{name: talk, kind: instruct, train: {{connector: full}}, trainer: {{max_steps: 2}}, data: {{train: "
    f"{DATA.replace('detect', 'presence_random')}}}}}"
)
COMMON = ["recipe=smoke", "data.test=null", "data.limit=null", "evaluation.run=false", "model.vision.positions=4",
          "trainer.batch_size=12", "trainer.log_every=50", "trainer.checkpoint_every=80", "trainer.validate_every=80",
          "trainer.lr={vision: 4e-3, connector: 4e-3, detection: 1e-2}", f"data.train={DATA}"]  # fmt: skip


def run(folder: Path, name: str, stages: str, *words: str) -> Run:
    settings = compose_settings([*COMMON, f"stages=[{stages}]", f"name={name}", f"output_dir={folder}", *words])
    with Path(os.devnull).open("w") as nowhere:
        return train(settings, console=Console(file=nowhere))


def stage(kind: str = "detect", learns: str = LOOK, more: str = "") -> str:
    return f"{{name: look, kind: {kind}, {learns}, data: {{validation: {DATA}}}{more}}}"


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    # the validation shows the training's own scenes: whether it learns is asked here, not whether it generalises
    stages = stage(more=", trainer: {epochs: 160}") + ", " + TALK
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eyespot.data.sources.check_disjoint", lambda *_: None)
        return run(tmp_path_factory.mktemp("runs"), "look", stages)


def test_it_learns_what_is_where(learned: Run) -> None:
    record = json.loads((learned.folder / "model" / "training.json").read_text())["stages"][0]
    assert record["losses"] == dict.fromkeys(("names", "words", "boxes", "counts"), 1.0) and record["steps"] == 160
    assert set(record["measured"]) == {"names", "words", "boxes", "counts", "found", "right", "iou"}
    assert record["curve"][-1][1] < 0.2 * record["curve"][0][1]
    assert record["measured"]["found"] > 0.8 and record["measured"]["right"] > 0.8 and record["measured"]["iou"] > 0.5


def test_what_it_tells_is_what_the_model_finds(learned: Run) -> None:
    """Counted by hand with the model of the stage's end."""
    folder = learned.folder / "stages" / "0-look"
    model, processor = load_parts(sorted((folder / "checkpoints").iterdir())[-1])
    measured = json.loads((folder / "training.json").read_text())["measured"]
    scenes = list(read_scenes(12, objects="shapes", image_size=32, questions=["detect"]))
    (batch,) = ObjectCollator(processor)([[one] for one in scenes if isinstance(one, Sample)]).batches
    with torch.no_grad():
        tokens = model.embed_images(batch["pixel_values"])
        logits = model.detection.name_logits(tokens, name_vectors(model.get_input_embeddings(), batch["name_ids"]))
        objects = Objects(batch["object_image"], batch["object_name"], batch["object_box"])
        found = model.detection.boxes(tokens[objects.image, objects.cells(tokens.shape[1])])
    said, true = logits > 0, name_targets(objects, logits.shape) == 1
    assert measured["found"] == pytest.approx(int((said & true).sum()) / int(true.sum()))
    assert measured["right"] == pytest.approx(int((said & true).sum()) / int(said.sum()))
    pairs = zip(found.tolist(), objects.box.tolist(), strict=True)
    ious = [iou(Box(*one), Box(*other)) for one, other in pairs]
    assert measured["iou"] == pytest.approx(sum(ious) / len(ious), abs=1e-5)


def test_a_signal_between_two_stages_is_not_swallowed(tmp_path: Path) -> None:
    """The training of a stage answers signals in its own way, and only as long as it runs."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    run(tmp_path, "short", f"{{name: look, kind: detect, {LOOK}, trainer: {{max_steps: 2}}}}")
    assert [signal.getsignal(number) for number in numbers] == before


def test_the_language_model_goes_on_with_it(learned: Run) -> None:
    """Image embeddings are brought to the size of words when words first meet them, after the stage."""
    assert learned.assistant is not None and learned.assistant.model.config.image_scale != 1.0
    assert learned.assistant.model.config.detection


@pytest.mark.parametrize(
    ("stages", "words", "message"),
    [
        (stage(), ["connector=perceiver", "model.connector.args={num_queries: 4, depth: 1, heads: 2, head_dim: 8}"],
         "stage 'look': connector 'perceiver' gives tokens that have no place in the picture, which kind detect"),
        (stage(learns="train: {connector: full}"), [], "train.detection is frozen, but it is what finds objects"),
        (stage(learns="train: {connector: full, detection: full, language: full}"), [], "train.language is full"),
        (stage("align", "train: {connector: full, detection: full}"), [], "align trains the connector only"),
        (stage("instruct", "train: {connector: full, detection: full}"), [], "looks for no objects"),
        (stage(more=", losses: {matching: 1}"), [], "kind 'detect' cannot compute the loss 'matching'"),
        (stage(more=", trainer: {accumulate: 2}"), [], "trainer.accumulate is 2"),
        (stage(), ["trainer.strategy=fsdp"], "trainer.strategy is fsdp, but objects"),
        (stage(), ["model.vision.positions=17"], "model.vision.positions is 17"),
        (stage(), ["data.train.questions=[count]"], "looks for objects; none of .* is usable: .* no object in"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_it_starts(tmp_path: Path, stages: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, "refused", stages, *words)

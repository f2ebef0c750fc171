"""Stages that cannot work are refused before anything is loaded, in one line that says what to do."""

from __future__ import annotations

import re

import pytest

from eyespot.config import ConfigError, StageSettings, from_dict, stage_losses, stage_settings, stages_model
from eyespot.training.run import compose_settings

pytestmark = pytest.mark.filterwarnings("ignore")

HEAD = ["connector=qformer", "model.alignment={tokenizer: byte}"]
ALIGN = "{name: align, kind: align, train: {connector: full}}"
JOINT = "{name: joint, kind: joint, train: {alignment: full}}"
WORDS = "{name: words, kind: caption, train: {language: full}}"


def stage(kind: str, train: str, more: str = "") -> str:
    """A stage named a."""
    return f"{{name: a, kind: {kind}, train: {{{train}}}{more and ', ' + more}}}"


def compose(overrides: list[str], *stages: str) -> None:
    compose_settings(
        ["recipe=smoke", "data.test=null", "evaluation.run=false", *overrides, f"stages=[{', '.join(stages)}]"]
    )


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([], "stages are named []; give at least one"),
        ([ALIGN, ALIGN], "each with a name of its own"),
        (["{name: a/b, kind: align, train: {connector: full}}"], "stages[0].name is 'a/b'; use letters, digits"),
        ([stage("aling", "connector: full")], "stages[0].kind is 'aling'; choose one of: contrastive, matching"),
        ([stage("align", "conector: full")], "unknown key 'stages[0].train.conector'; did you mean 'connector'?"),
        ([stage("align", "connector: lora")], "stages[0].train.connector is 'lora'"),
        ([stage("caption", "")], "stage 'a': every part is frozen; set train to"),
        ([stage("align", "connector: full, language: lora")], "align trains the connector only; use kind instruct"),
        ([stage("align", "connector: full", "losses: {caption: 1}")], "kind 'align' has one loss and no pairs"),
        ([stage("caption", "alignment: full")], "train.alignment is full, but kind 'caption' compares no pairs"),
        ([JOINT], "model.alignment is missing; set it, for example to {dim: 256}"),
        ([stage("align", "connector: full", "trainer: {seed: 1}")], "trainer.seed is the same in all stages"),
        (
            [stage("align", "connector: full", "trainer: {batchsize: 1}")],
            "unknown key 'trainer.batchsize'; did you mean",
        ),
        ([stage("align", "connector: full", "trainer: {lr: {vison: 1}}")], "unknown key 'trainer.lr.vison'"),
        ([stage("align", "connector: full", "data: {train: {format: caption}}")], "did you mean 'captions'?"),
        ([stage("preference", "language: full")], "number 1 of 1; kind preference is the last of several stages"),
        ([stage("preference", "language: full"), ALIGN], "number 1 of 2; kind preference is the last"),
        ([ALIGN, stage("preference", "language: full")], "'data.path' is missing"),
        ([ALIGN, stage("preference", "connector: full")], "preferences train {language: full} here"),
        ([ALIGN, stage("preference", "language: full", "data: {path: x}, trainer: {bta: 1}")], "did you mean 'beta'?"),
    ],
)
def test_stages(stages: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        compose([], *stages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "stages", "words"),
    [
        ([], [stage("joint", "alignment: full", "losses: {captions: 1}")], "did you mean 'caption'?"),
        ([], [stage("matching", "alignment: full", "losses: {matching: -1}")], "losses.matching is -1"),
        ([], [stage("joint", "alignment: full", "losses: {caption: 0}")], "all losses are 0; give one of contrastive"),
        ([], [stage("joint", "connector: full")], "train.alignment is frozen, but it is what compares pairs"),
        ([], [stage("joint", "alignment: full, language: full")], "the connector's text side reads the texts here"),
        ([], [ALIGN], "model.alignment is set but no stage trains it; add one of kind contrastive, matching, joint"),
        (["trainer.batch_size=1"], [JOINT], "trainer.batch_size is 1 on one device"),
        (["trainer.accumulate=2"], [JOINT], "pairs of different micro-batches are never compared; use 1"),
        (["trainer.strategy=fsdp"], [JOINT], "pairs are compared by whole models; use ddp"),
        (["model.alignment.dim=0"], [JOINT], "model.alignment.dim is 0; it must be at least 1"),
        (["model.alignment.max_text=2"], [JOINT], "model.alignment.max_text is 2; it must be at least 3"),
        (["model.connector.args.max_text=9"], [JOINT], "model.connector.args.max_text comes from model.alignment"),
        (["connector=mlp"], [JOINT], "connector 'mlp' reads no texts; drop it, and the language model will"),
    ],
)
def test_a_head_for_pairs(overrides: list[str], stages: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        compose([*HEAD, *overrides], *stages)
    assert "\n" not in str(caught.value)


def test_a_loss_of_another_kind_is_named_with_its_own() -> None:
    words = (
        "stage 'a': kind 'contrastive' cannot compute the loss 'caption'; it takes contrastive, sigmoid "
        "(caption belongs to: joint)"
    )
    with pytest.raises(ConfigError, match=re.escape(words)):
        compose(HEAD, stage("contrastive", "alignment: full", "losses: {caption: 1.0}"))


def test_a_head_without_stages_is_refused() -> None:
    with pytest.raises(ConfigError, match="there are no stages to train it"):
        compose_settings(["recipe=smoke", *HEAD])


def test_weights_in_bfloat16_do_not_learn_though_adapters_over_them_may() -> None:
    adapters = stage("instruct", "language: lora")
    compose(["model.language.dtype=bfloat16"], adapters)
    with pytest.raises(ConfigError, match=r"train.language is full but model\.language\.dtype is bfloat16"):
        compose(["model.language.dtype=bfloat16"], adapters, WORDS)


def test_stages_differ_from_the_run_where_they_say_so() -> None:
    more = "trainer: {epochs: 3, lr: {connector: 0.5}}, data: {limit: 7}"
    settings = compose_settings(
        ["recipe=smoke", "name=run", f"stages=[{ALIGN}, {stage('caption', 'language: lora', more)}]"]
    )
    first, second = stage_settings(settings, 0), stage_settings(settings, 1)
    assert first.trainer == settings.trainer and first.data == settings.data
    assert (second.trainer.epochs, second.trainer.lr.connector, second.data.limit) == (3, 0.5, 7)
    assert second.trainer.lr.language == settings.trainer.lr.language and second.data.train == settings.data.train
    assert (first.name, second.name) == ("run/stages/0-align", "run/stages/1-a") and second.stages is None
    model = stages_model(settings)
    assert first.model == second.model == model
    assert (model.vision.train, model.connector.train, model.language.train) == ("frozen", "full", "lora")


def test_each_kind_has_its_losses() -> None:
    def losses(kind: str, given: dict[str, float] | None = None) -> dict[str, float]:
        return stage_losses(from_dict(StageSettings, {"name": "a", "kind": kind, "train": {}, "losses": given}))

    assert losses("contrastive") == {"contrastive": 1.0} and losses("matching") == {"matching": 1.0}
    assert losses("joint") == {"contrastive": 1.0, "matching": 1.0, "caption": 1.0}
    assert losses("joint", {"sigmoid": 0.5, "caption": 0}) == {"sigmoid": 0.5}
    assert losses("instruct") == {}

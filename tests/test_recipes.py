"""The source systems as recipes: exact numbers of parameters at full size, the figures of the page about them, and a
whole run of each, shrunk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from estimates import PAGE, SAMPLES, estimate, rows_of_page
from eyespot.cli import main
from eyespot.config import ConfigError, ModelSettings, TrainSettings, stage_losses, to_dict
from eyespot.models.parameters import count_parameters
from eyespot.models.published import PUBLISHED, published_config
from eyespot.models.vision.pretrained import token_counts
from eyespot.models.vlm import VLM, VLMConfig
from eyespot.registry import LANGUAGES, VISION
from eyespot.training.run import choices, compose_settings

pytestmark = pytest.mark.filterwarnings("ignore")

SOURCES = ("gemma270m_llava", "smollm360m_flickr8k", "scratch_222m", "qformer_two_stage", "nanovlm_222m")
SEED_A_WITH_ATTENTION_ONLY = ["model.language.lora.targets=attention", "model.connector.args={depth: 2, dropout: 0.1}"]
BERT_VOCABULARY, BERT_MASK = 30_522, 103


def on_meta(settings: ModelSettings) -> VLM:
    """The model of a recipe without memory, downloads or tokenizers."""
    parts = {}
    for kind, registry in (("vision", VISION), ("language", LANGUAGES)):
        part = getattr(settings, kind)
        with torch.device("meta"):
            own = None if part.name == "pretrained" else registry[part.name](**part.args)
        parts[kind] = published_config(part.args["source"]) if own is None else own.config
    text_side = {}
    if settings.alignment is not None:
        text_side = {"text_vocab_size": BERT_VOCABULARY, "max_text": settings.alignment.max_text}
    config = VLMConfig(
        vision_config=parts["vision"],
        text_config=parts["language"],
        connector={"name": settings.connector.name, **settings.connector.args, **text_side},
        keep_cls=settings.vision.keep_cls,
        lora={"language": to_dict(settings.language.lora)} if settings.language.lora else None,
        alignment={"dim": settings.alignment.dim, "decode_id": BERT_MASK} if settings.alignment else None,
        tie_word_embeddings=bool(parts["language"].tie_word_embeddings),
    )
    with torch.device("meta"):
        model = VLM(config)
    modes = {kind: getattr(settings, kind).train for kind in ("vision", "connector", "language")}
    model.set_trainable(**modes, alignment="frozen")  # a stage may train it
    return model


def counts(model: VLM) -> dict[str, tuple[int, int]]:
    """Part to (all parameters, those that learn)."""
    return {row.part: (row.total, row.trainable) for row in count_parameters(model)}


@pytest.mark.parametrize(
    ("recipe", "options", "vision", "connector", "language", "trainable"),
    [
        ("gemma270m_llava", [], 303_179_776, 3_410_560, 268_098_176 + 15_187_968, 18_598_528),
        ("gemma270m_llava", SEED_A_WITH_ATTENTION_ONLY, 303_179_776, 2_131_840, 268_098_176 + 5_898_240, 8_030_080),
        ("smollm360m_flickr8k", [], 303_301_632, 1_908_480, 361_821_120, 363_729_600),
        ("scratch_222m", [], 85_797_120, 2_361_600, 124_046_592, 212_205_312),
        ("nanovlm_222m", [], 85_797_120, 1_769_472, 134_515_008, 222_081_600),
        ("qformer_two_stage", [], 303_179_776, None, 8_030_261_248 + 167_772_160, None),
        ("qformer_two_stage", ["language=mistral_7b"], 303_179_776, None, 7_241_732_096 + 167_772_160, None),
    ],
)
def test_parameters_at_full_size(
    recipe: str, options: list[str], vision: int, connector: int | None, language: int, trainable: int | None
) -> None:
    found = counts(on_meta(compose_settings([f"recipe={recipe}", *options]).model))
    assert found["vision"][0] == vision and found["language"][0] == language
    if connector is not None:
        assert found["connector"][0] == connector and found["model"][1] == trainable


def test_parameters_of_the_q_former() -> None:
    """BERT base without its second segment, its pooler and the 480 positions that no text reaches; a cross-attention in
    every second layer, feed-forwards for the queries, 32 queries, and the projection to Llama's width."""
    settings = compose_settings(["recipe=qformer_two_stage"]).model
    found = counts(on_meta(settings))
    h, e, d = 768, 1024, 4096
    attention, norm, mlp = 4 * (h * h + h), 2 * h, 2 * 4 * h * h + 5 * h
    cross = 2 * (h * h + h) + 2 * (e * h + h) + norm
    layers = 12 * (attention + norm + 2 * (mlp + norm)) + 6 * cross
    text = BERT_VOCABULARY * h + 32 * h + (h * h + h) + norm + BERT_VOCABULARY
    assert found["connector"][0] == layers + text + 32 * h + norm + (h * d + d)
    assert found["alignment"][0] == 2 * (h * 256 + 256) + (h * 2 + 2) + 3


def test_image_tokens_of_the_sources() -> None:
    """256 and 197 tokens in the two sources that name them (the first also says 196, which is wrong), 49 in nanoVLM."""
    assert token_counts(published_config("openai/clip-vit-large-patch14")) == (1, 256)
    assert sum(token_counts(published_config("google/vit-large-patch16-224"))) == 197
    patches = token_counts(published_config("google/siglip-base-patch16-224"))
    assert patches == (0, 196)
    connector: Any = on_meta(compose_settings(["recipe=nanovlm_222m"]).model).connector
    assert connector.num_tokens(196) == 49


def test_seed_a() -> None:
    s = compose_settings(["recipe=gemma270m_llava"])
    assert to_dict(s.model.language.lora) == {"r": 64, "alpha": 128, "dropout": 0.1, "targets": "all", "bias": "none"}
    assert (s.model.vision.train, s.model.vision.dtype, s.model.vision.keep_cls) == ("frozen", "bfloat16", False)
    assert s.model.connector.args == {"depth": 2, "hidden_dim": 2048, "dropout": 0.1}
    t = s.trainer
    assert (t.lr.connector, t.lr.language, t.weight_decay, t.eps) == (1e-3, 2e-4, 0.01, 1e-8)
    assert (t.epochs, t.batch_size, t.accumulate, t.clip, t.seed) == (3, 20, 2, 1.0, 42)
    assert (t.warmup_share, t.decay, t.precision, t.keep_best, t.patience) == (0.03, "linear", "bf16", 2, 3)
    assert s.data.validation_share == 0.02 and s.data.train["format"] == "llava"
    assert s.model.language.template == "plain"
    assert compose_settings(["recipe=gemma270m_llava", "data.limit=50000"]).data.limit == 50_000


def test_seed_b() -> None:
    s = compose_settings(["recipe=smollm360m_flickr8k"])
    assert (s.model.vision.keep_cls, s.model.vision.train, s.model.language.train) == (True, "frozen", "full")
    assert s.model.connector.args == {"depth": 2, "hidden_dim": 960, "norm": True} and s.model.image_mode == "prefix"
    t = s.trainer
    assert (t.epochs, t.batch_size, t.clip, t.lr.connector, t.lr.language) == (6, 4, 1.0, 2e-4, 2e-4)
    assert s.data.max_length == 197 + 64
    sources = [source for source in (s.data.train, s.data.validation, s.data.test) if source is not None]
    assert [source["split"] for source in sources] == ["train", "validation", "test"]
    assert {source["prompt"] for source in sources} == {"This image shows"}


def test_seed_c() -> None:
    s = compose_settings(["recipe=scratch_222m"])
    assert s.model.image_mode == "prefix" and {s.model.vision.train, s.model.language.train} == {"full"}
    gpt = on_meta(s.model).config.text_config
    assert (gpt.vocab_size, gpt.max_position_embeddings) == (50_257, 512)
    assert (gpt.hidden_size, gpt.num_hidden_layers) == (768, 12)
    assert set(to_dict(s.trainer.lr).values()) - {1e-3, 2e-3} == {3e-4}  # those are of heads that are not there


def test_seed_d() -> None:
    s = compose_settings(["recipe=qformer_two_stage"])
    assert s.stages is not None and [stage.kind for stage in s.stages] == ["joint", "instruct"]
    first, second = s.stages
    assert stage_losses(first) == {"contrastive": 1.0, "matching": 1.0, "caption": 1.0}
    assert (first.train.connector, first.train.alignment, first.train.language) == ("full", "full", "frozen")
    assert (second.train.language, second.train.vision) == ("lora", "frozen")
    sigmoid = "stages.0.losses={sigmoid: 1.0, matching: 1.0, caption: 1.0}"
    assert compose_settings(["recipe=qformer_two_stage", sigmoid]).stages
    four_bits = compose_settings(["recipe=qformer_two_stage", "model.language.quantize=nf4"])
    assert four_bits.model.language.quantize == "nf4"


def test_every_recipe_and_group_composes() -> None:
    assert set(SOURCES) <= set(choices("recipe"))
    for recipe in choices("recipe"):
        compose_settings([f"recipe={recipe}"])
    for group in ("vision", "connector", "language", "data"):
        for name in choices(group):
            if name != "qformer":  # as the one of a smaller recipe
                compose_settings(["recipe=nanovlm_222m", f"{group}={name}"])


@pytest.mark.parametrize("source", list(PUBLISHED))
def test_published_configurations_are_whole(source: str) -> None:
    config = published_config(source)
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"configuration of .* cannot be read .* one of: openai/clip"):
        published_config(str(tmp_path))


# --- the page ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", SOURCES)
def test_time_and_memory_of_the_page(recipe: str) -> None:
    """What docs/recipes.md states is what its formula gives."""
    settings = compose_settings([f"recipe={recipe}"])
    assert rows_of_page()[recipe] == estimate(recipe, settings, on_meta(settings.model))


def test_the_page_names_every_recipe_and_its_data() -> None:
    page = PAGE.read_text()
    for recipe in SOURCES:
        section = re.split(r"^## ", page.split(f"## {recipe}\n")[1], flags=re.MULTILINE)[0]
        assert f"eyespot train recipe={recipe}" in section
        assert "hf download" in section or "downloaded when it is first used" in section
        assert f"{SAMPLES[recipe]:,}" in section


# --- shrunk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", SOURCES)
def test_a_whole_run_shrunk(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["train", f"recipe={recipe}", "+shrink=true", f"output_dir={tmp_path}"]) == 0
    folder = tmp_path / f"{recipe}_shrunk"
    record = json.loads((folder / "model" / "training.json").read_text())
    assert all(loss == loss and loss >= 0 for _, loss in record["curve"]) and record["validation"]
    assert load_file(folder / "model" / "model.safetensors")
    assert {"before_after.png", "loss.png", "patches.png"} <= {path.name for path in folder.iterdir()}
    capsys.readouterr()
    picture = next(Path(record["settings"]["data"]["train"]["path"]).parent.glob("*.png"))
    assert main(["ask", str(folder / "model"), str(picture), "what?", "--max-new-tokens", "3"]) == 0


def test_scenes_shrunk(tmp_path: Path) -> None:
    """What is where, then reading it off, then comparing."""
    pytest.importorskip("emoji")
    words = ["recipe=scenes", "+shrink=true", f"output_dir={tmp_path}"]
    assert main(["train", *words]) == 0
    folder = tmp_path / "scenes_shrunk"
    stages = json.loads((folder / "model" / "training.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["detect", "point", "look"]
    assert set(stages[0]["measured"]) >= {"found", "iou"} and stages[2]["validation"]
    report = json.loads((folder / "report.json").read_text())
    assert set(report["by_type"]) <= {"presence_random", "presence_adversarial", "side", "count", "where"}


@pytest.mark.parametrize("recipe", [*SOURCES, "quickstart", "scratch_tiny", "scenes", "smoke"])
def test_shrinking_keeps_what_a_recipe_is_made_of(recipe: str) -> None:
    whole, small = (compose_settings([f"recipe={recipe}", *more]) for more in ([], ["+shrink=true"]))
    assert small.name == f"{recipe}_shrunk"
    assert structure(small) == structure(whole)


def structure(settings: TrainSettings) -> dict[str, Any]:
    """What learns how, from which losses, on which kinds of data, in which words."""
    model, lora = settings.model, settings.model.language.lora
    return {
        "modes": [part.train for part in (model.vision, model.connector, model.language)],
        "connector": (model.connector.name, sorted(key for key in model.connector.args if key in ("norm", "factor"))),
        "own": [p.name for p in (model.vision, model.language) if p.name not in ("pretrained", "gguf")],
        "words": (model.language.template, model.image_mode, model.vision.keep_cls, model.connector.calibrate),
        "lora": lora and (lora.targets, lora.alpha / lora.r),
        "formats": [source and source["format"] for source in (settings.data.train, settings.data.test)],
        "stages": [(s.kind, to_dict(s.train), s.losses and to_dict(s.losses)) for s in settings.stages or []],
        "schedule": (settings.trainer.decay, settings.trainer.warmup_share, to_dict(settings.trainer.lr)),
        "epochs": settings.trainer.epochs,
    }


@pytest.mark.parametrize(
    ("recipe", "vision", "language"),
    [
        ("gemma270m_llava", "clip_vision_model", "gemma3_text"),
        ("smollm360m_flickr8k", "vit", "llama"),
        ("nanovlm_222m", "siglip_vision_model", "llama"),
        ("qformer_two_stage", "clip_vision_model", "llama"),
        ("quickstart", None, "gemma3_text"),
    ],
)
def test_stand_ins_are_of_the_same_architecture(recipe: str, vision: str | None, language: str) -> None:
    model = compose_settings([f"recipe={recipe}", "shrink=true"]).model
    kinds = [json.loads((Path(part.args["source"]) / "config.json").read_text())["model_type"]
             for part in (model.vision, model.language) if "source" in part.args]  # fmt: skip
    assert kinds == [kind for kind in (vision, language) if kind]


def test_data_that_is_there_is_kept_and_values_may_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("image,caption\n")
    source = f"{{format: captions, path: {tmp_path / 'own.csv'}}}"
    s = compose_settings(
        ["recipe=smollm360m_flickr8k", "+shrink=true", f"data.train={source}", "trainer.max_steps=2", "name=mine"]
    )
    assert s.data.train["path"] == str(tmp_path / "own.csv") and s.trainer.max_steps == 2 and s.name == "mine"
    assert compose_settings(["recipe=smoke", "shrink=false"]) == compose_settings(["recipe=smoke"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["recipe=smoke", "+shrink=yes"], "shrink is 'yes'"),
        (["recipe=nanovlm_222m", "+shrink=true", "data=easy_vqa", "data.train={format: vqa, path: no.jsonl}"], None),
    ],
)
def test_what_shrink_takes(overrides: list[str], words: str | None) -> None:
    if words is None:
        assert compose_settings(overrides).data.train["path"] == "no.jsonl"
        return
    with pytest.raises(ConfigError, match=words):
        compose_settings(overrides)

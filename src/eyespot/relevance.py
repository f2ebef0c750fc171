"""Look inside a trained model: which places of a picture each word of an answer depended on.

Three measures that fail in different ways, so they are shown side by side:

- attention roll-out (`rollout`): which image tokens a word's state came from, if every layer did nothing but pass on
  what it attends to;
- gradient times input (`gradient_relevance`): how the word's log-probability would change with the features of a patch,
  as far as a straight line tells;
- occlusion (`occlusion_map`): how much less probable the answer is when a part of the picture is covered.

`pointing_game` says of any of them how often it points at the thing that a question about a drawn scene asks for.

Shape letters are those of eyespot.models.vlm; S tokens of an answer, W words of it, G cells to a side of a picture.
"""

from __future__ import annotations

import base64
import dataclasses
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from eyespot.data import wording
from eyespot.data.boxes import Box
from eyespot.data.formats.scenes import draw_scene
from eyespot.data.sample import Message, Sample, text_part
from eyespot.data.scenes.cast import COUNTING, Cast, HeldOut
from eyespot.data.scenes.drawing import ScenePicture
from eyespot.data.scenes.things import things
from eyespot.evaluation.cards import Dependence, choose_shown
from eyespot.evaluation.metrics import cluster_bootstrap
from eyespot.evaluation.page import section, whole_page
from eyespot.evaluation.pictures import Array, as_read, patch_lengths
from eyespot.evaluation.results import Evaluation
from eyespot.inference import Assistant, user_turn
from eyespot.models.attention import kernels
from eyespot.models.int8 import Int8Linear
from eyespot.models.merge import placeholder_mask
from eyespot.models.parameters import count_parameters
from eyespot.models.stages import stages
from eyespot.models.vision.positions import grid_side
from eyespot.models.vlm import VLM
from eyespot.processing.processor import IGNORE_INDEX, Encoded

MAX_NEW_TOKENS = 64
CELLS = 8  # to a side, covered one after another
BATCH_SIZE = 16  # covered pictures at once
MOST_WORDS, COLUMNS = 12, 6  # in a figure
LETTERS = 18  # of a word above its panel
WIDTH, LARGE, SMALL = 11.0, 2.7, 1.5  # inches: the figure, panels of the picture, panels of words
MARGIN, GAP, LABEL, HEADING, BAR = 0.2, 0.15, 0.4, 0.3, 0.1
Measure = Literal["relevance", "rollout", "occlusion"]


# --- an answer, word by word -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """A question about one picture with its answer, as the language model reads them.

    input_ids: int64 [1, T]. image_features: float [1, P, E]. places: int64 [S], of the answer's tokens in the row.
    words: W texts. word_of: int64 [S], the number of the word that each token belongs to.
    """

    input_ids: Tensor
    image_features: Tensor
    places: Tensor
    words: tuple[str, ...]
    word_of: Tensor

    def sums(self, values: Tensor) -> Tensor:
        """Values of the tokens float [S, ...] -> of the words float [W, ...]."""
        return values.new_zeros(len(self.words), *values.shape[1:]).index_add_(0, self.word_of, values)

    def first(self, num_words: int) -> Answered:
        """The same row, of which only the first words are looked at."""
        kept = self.word_of < num_words
        return dataclasses.replace(
            self, places=self.places[kept], words=self.words[:num_words], word_of=self.word_of[kept]
        )

    def whole(self) -> Answered:
        """The same row, with the whole answer as one word."""
        return dataclasses.replace(self, words=(" ".join(self.words),), word_of=torch.zeros_like(self.word_of))


def read_answer(assistant: Assistant, images: Sequence[Any], messages: Sequence[Mapping[str, Any]]) -> Answered:
    """A conversation and its last answer, encoded as in training; the token that ends the turn is no word.

    Raises:
        ValueError: there is not exactly one picture, or the answer has no word.
    """
    if len(images) != 1:
        raise ValueError(f"{len(images)} pictures were given, but words are traced back to exactly 1; give one picture")
    encoded = assistant.processor.encode_conversation(messages)
    learned = [label != IGNORE_INDEX for label in encoded.labels]
    end = len(learned) - 1 - learned[::-1].index(True)
    places = range(end - learned[end::-1].index(False) + 1, end)
    ids = [encoded.input_ids[place] for place in places]
    words = assistant.processor.decode_answer(ids).split()
    if not words:
        raise ValueError("the answer is empty, so no word of it depends on anything; ask something else")
    # a token begins a new word where the text up to it has one more than before; some letters take several tokens
    counts = [len(assistant.processor.decode_answer(ids[: i + 1]).split()) for i in range(len(ids))]
    return Answered(
        torch.tensor([encoded.input_ids[:-1]], device=assistant.device),
        assistant.features(images).clone(),  # what inference mode made cannot be differentiated
        torch.tensor(places, device=assistant.device),
        tuple(words),
        torch.tensor([min(max(count, 1), len(words)) - 1 for count in counts], device=assistant.device),
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """While it lasts, nothing is dropped; afterwards every module is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eager_attention(language: PreTrainedModel) -> Iterator[None]:
    """While it lasts, attention is computed step by step: only so its weights can be read."""
    before = kernels(language.config)
    try:
        language.set_attn_implementation("eager")
        yield
    finally:
        language.set_attn_implementation(before)


def word_scores(model: VLM, answered: Answered, image_features: Tensor) -> Tensor:
    """Log-probability of each word behind those before it, for the features of N pictures.

    float [N, P, E] -> float32 [N, W].

    Written as the logarithm of the sigmoid of the word's odds, because the logarithm of a softmax and its gradient are
    nothing but rounding where a model is sure.
    """
    ids = answered.input_ids.expand(len(image_features), -1)
    output = model(ids, image_features=image_features, logits_to_keep=answered.places - 1, use_cache=False)
    logits, targets = output.logits.float(), ids[:, answered.places].unsqueeze(-1)  # [N, S, V], [N, S, 1]
    rivals = logits.scatter(-1, targets, float("-inf")).logsumexp(-1)
    found = F.logsigmoid(logits.gather(-1, targets).squeeze(-1) - rivals)  # [N, S]
    return answered.sums(found.t()).t()


# --- three measures ----------------------------------------------------------------------------------------------


@torch.no_grad()
def rollout(model: VLM, answered: Answered) -> Tensor:
    """Attention roll-out of the language model, float32 [W, K]: the share of each word's state that came from each
    image token, if a layer's output is half its input and half what its heads, on average, attend to.

    A word of several tokens gets their mean. What is missing to a sum of 1 came from words.

    Source: Abnar and Zuidema, arXiv 2005.00928, section 3.

    Raises:
        ValueError: there is no picture, or a layer has no attention weights.
    """
    is_image = placeholder_mask(answered.input_ids[0], model.config.image_token_id)
    if not bool(is_image.any()):
        raise ValueError("the row has 0 image tokens, so no word can depend on them; ask about a picture")
    with evaluation_mode(model), eager_attention(model.language):
        output = model(
            answered.input_ids, image_features=answered.image_features, output_attentions=True, use_cache=False,
            skip_logits=True,
        )  # fmt: skip
    layers, num_layers = output.attentions or (), model.language.config.get_text_config().num_hidden_layers
    if len(layers) != num_layers:
        raise ValueError(
            f"{len(layers)} of {num_layers} layers of {type(model.language).__name__} give attention weights, but "
            "roll-out goes through all of them; use gradient_relevance or occlusion_map"
        )
    rows = F.one_hot(answered.places - 1, answered.input_ids.shape[1]).float()  # [S, T], the states that predict
    with torch.autocast(rows.device.type, enabled=False):
        for weights in reversed(layers):
            rows = (rows + rows @ weights[0].float().mean(0)) / 2
    found = rows[:, is_image]
    return answered.sums(found) / answered.sums(torch.ones_like(found))


def gradient_relevance(model: VLM, answered: Answered) -> Tensor:
    """Gradient times input, float32 [W, P]: how much each word's log-probability rests on the features of each patch,
    to first order; the products are summed over the width with their signs, and the sum counts without its own.

    It is taken where the connector reads the encoder's features, because there every patch has a place in the picture,
    also before connectors whose tokens have none.

    Source: Simonyan et al., arXiv 1312.6034, section 3 (gradient); Shrikumar et al., arXiv 1605.01713 (times input).

    Raises:
        ValueError: the model computes in integers, which gradients do not pass.
    """
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ValueError("gradients do not pass the 8-bit layers of this model; load it with dtype=float32")
    features = answered.image_features.detach().clone().requires_grad_()
    with evaluation_mode(model), torch.enable_grad():
        scores = word_scores(model, answered, features)[0]
        gradients = [torch.autograd.grad(score, features, retain_graph=True)[0] for score in scores]
    products = torch.cat(gradients).float() * answered.image_features.float()  # [W, P, E]
    return products.sum(-1).abs()


@torch.no_grad()
def occlusion_map(
    model: VLM, pixel_values: Tensor, answered: Answered, cells: int = CELLS, batch_size: int = BATCH_SIZE
) -> Tensor:
    """Drop of the answer's log-probability when a cell is covered with the picture's mean colour, float32 [G, G].

    Source: Zeiler and Fergus, arXiv 1311.2901, section 4.2.

    Args:
        pixel_values: float [1, 3, H, W], of the picture in ``answered``.
        cells: G, to a side. batch_size: covered pictures at once.

    Raises:
        ValueError: the picture has fewer pixels than cells.
    """
    height, width = pixel_values.shape[2:]
    if not 1 <= cells <= min(height, width):
        raise ValueError(
            f"cells is {cells}, but the picture has {width} x {height} pixels; give 1 to {min(height, width)}"
        )
    down, across = (torch.arange(size, device=pixel_values.device) * cells // size for size in (height, width))
    cell_of = down.unsqueeze(1) * cells + across  # [H, W]
    mean = pixel_values.mean((2, 3), keepdim=True)
    scores = []
    with evaluation_mode(model):
        for numbers in torch.arange(cells**2, device=pixel_values.device).split(batch_size):
            covered = torch.where(cell_of == numbers.view(-1, 1, 1, 1), mean, pixel_values)  # [N, 3, H, W]
            scores.append(word_scores(model, answered, model.encode_images(covered)).sum(1))
        whole = word_scores(model, answered, answered.image_features).sum()
    return (whole - torch.cat(scores)).view(cells, cells)


# --- places in the picture ---------------------------------------------------------------------------------------


def on_patches(model: VLM, values: Tensor) -> Tensor:
    """Values of the connector's inputs float [W, P] -> in the picture, float [W, side, side]; CLS has no place."""
    values = values[:, _num_prefix(model) :]
    return _as_grid(values)


def on_tokens(model: VLM, image_features: Tensor, values: Tensor) -> Tensor | None:
    """Values of the image tokens float [W, K] -> in the picture, float [W, side, side]; None if tokens have no place.

    Tokens are in the order of the grid if their connector ``keeps_grid``; cells that it does not pass on get 0. Queries
    (perceiver, qformer) look at the whole picture.

    image_features: float [1, P, E], from which a connector chooses cells.
    """
    connector: Any = model.connector
    if not getattr(connector, "keeps_grid", False):
        return None
    values = values[:, _num_prefix(model) :]
    if getattr(connector, "keep", None) is not None:
        inputs = model.connector_inputs(image_features)  # [1, P, E]
        cells = connector.cells_of_tokens(inputs)[0]  # a cell may be several tokens
        values = values.new_zeros(len(values), inputs.shape[1]).index_add_(1, cells, values)
    return _as_grid(values)


def _as_grid(values: Tensor) -> Tensor:
    side = grid_side(values.shape[1])
    return values.view(-1, side, side)


def _num_prefix(model: VLM) -> int:
    return model.config.num_prefix_tokens if model.config.keep_cls else 0


@torch.no_grad()
def answer_map(assistant: Assistant, sample: Sample, measure: Measure = "relevance") -> Tensor:
    """Where the true answer of a sample comes from, as a whole: float32 [side, side].

    Raises:
        ValueError: "rollout" is asked for, but the image tokens have no place.
    """
    model, answered = assistant.model, read_answer(assistant, sample.images, sample.messages).whole()
    with assistant.autocast():
        if measure == "occlusion":
            return occlusion_map(model, assistant.processor.pixel_values(sample.images).to(assistant.device), answered)
        if measure == "relevance":
            return on_patches(model, gradient_relevance(model, answered))[0]
        found = on_tokens(model, answered.image_features, rollout(model, answered))
    if found is None:
        raise ValueError(f"the tokens of {type(model.connector).__name__} have no place; choose relevance or occlusion")
    return found[0]


def trace_shown(
    assistant: Assistant, evaluation: Evaluation, samples: Sequence[Sample], number: int
) -> dict[str, Dependence | str]:
    """Where the model's answers come from, by gradient times input, for so many of the questions that a report shows
    and that are about one picture: by sample id the map, or the reason why there is none.

    Raises:
        ValueError: number is below 0.
    """
    if number < 0:
        raise ValueError(f"{number} questions are to be traced; give 0, or as many as the report is to show")
    by_id = {sample.id: sample for sample in samples}
    shown = [one for one in choose_shown(evaluation) if len(by_id[one.id].images) == 1]
    return {one.id: _trace(assistant, by_id[one.id], one.prediction) for one in shown[:number]}


def _trace(assistant: Assistant, sample: Sample, answer: str) -> Dependence | str:
    said: Message = {"role": "assistant", "content": [text_part(answer)]}
    try:
        found = answer_map(assistant, dataclasses.replace(sample, messages=(*sample.messages[:-1], said)))
    except ValueError as error:
        return str(error)
    how = "gradient times input, how much the log-probability of the answer rests on the features of each patch"
    return Dependence(as_read(assistant.processor, sample.images[0]), found.cpu().numpy(), how)


# --- all of it for one question ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What an answer depended on.

    words: the first W of ``num_words``. probabilities: float32 [W].
    picture: float32 [height, width, 3] in [0, 1], as the encoder reads it.
    lengths: float32 [side, side], of the patches' features.
    relevance: float32 [W, side, side]. attended: float32 [W], the share of roll-out that image tokens have.
    rollout: float32 [W, side, side], None if image tokens have no place in the picture.
    occlusion: float32 [G, G].
    """

    question: str
    answer: str
    words: tuple[str, ...]
    num_words: int
    probabilities: Tensor
    connector: str
    picture: Array
    lengths: Array
    relevance: Tensor
    attended: Tensor
    rollout: Tensor | None
    occlusion: Tensor


def explain(assistant: Assistant, image: Any, question: str, max_new_tokens: int = MAX_NEW_TOKENS) -> Explanation:
    """Ask a question about a picture, and trace the words of the answer back to it.

    Raises:
        ValueError: the answer is empty, or the model cannot be looked into (see the measures).
    """
    model, answer = assistant.model, assistant.ask([image], question, max_new_tokens=max_new_tokens)
    if not answer:
        raise ValueError(
            f"the model answered nothing to {question!r}, so there is no word to trace; ask something else"
        )
    everything = read_answer(assistant, [image], _conversation(image, question, answer))
    answered = everything.first(MOST_WORDS)
    pixels = assistant.processor.pixel_values([image]).to(assistant.device)
    with assistant.autocast(), torch.no_grad():
        probabilities = word_scores(model, answered, answered.image_features)[0].exp()
        tokens = rollout(model, answered)  # [W, K]
        placed = on_tokens(model, answered.image_features, tokens)
        relevance = on_patches(model, gradient_relevance(model, answered))
        occlusion = occlusion_map(model, pixels, everything)
    picture, lengths = patch_lengths(assistant, image)
    return Explanation(
        question=question,
        answer=answer,
        words=answered.words,
        num_words=len(everything.words),
        probabilities=probabilities.cpu(),
        connector=type(model.connector).__name__,
        picture=picture,
        lengths=lengths,
        relevance=relevance.cpu(),
        attended=tokens.sum(1).cpu(),
        rollout=None if placed is None else placed.cpu(),
        occlusion=occlusion.cpu(),
    )


def _conversation(image: Any, question: str, answer: str) -> list[Mapping[str, Any]]:
    return [*user_turn([image], question), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def shape_table(assistant: Assistant, image: Any, question: str, answer: str) -> str:
    """A line for every stage on the way through the model: its shape, and the part that made it with its parameters."""
    model, processor = assistant.model, assistant.processor
    encoded: Encoded = processor.encode_conversation(_conversation(image, question, answer))
    batch = {**processor.pad([encoded], "right"), "pixel_values": processor.pixel_values([image])}
    with assistant.autocast():
        rows = stages(model, {name: tensor.to(assistant.device) for name, tensor in batch.items()})
    numbers = {row.part: row.total for row in count_parameters(model)}
    made_by = {
        stage: f"{part} {type(getattr(model, part)).__name__}, {numbers[part]:,} parameters"
        for stage, part in
        (("image features", "vision"), ("image embeddings", "connector"), ("logits", "language"))
    }  # fmt: skip
    rows = [("pixel values", f"{list(batch['pixel_values'].shape)}"), *rows]
    width = max(len(shape) for _, shape in rows)
    return "\n".join(f"{stage:18}{shape:{width + 2}}{made_by.get(stage, '')}".rstrip() for stage, shape in rows)


def show_attention(assistant: Assistant, image: Any, question: str, folder: Path, command: str | None = None) -> None:
    """Print answer and shapes; write attention.png, and attention.html with the picture and the shapes, to a folder.

    command: that makes them again, for the page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    explanation = explain(assistant, image, question)
    shapes = shape_table(assistant, image, question, explanation.answer)
    picture, page = folder / "attention.png", folder / "attention.html"
    draw_explanation(explanation, picture)
    page.write_text(_page(explanation, picture.read_bytes(), shapes, command), encoding="utf-8")
    console = Console()
    for line in (explanation.answer, shapes, f"picture: {picture}", f"report: {page}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _page(explanation: Explanation, picture: bytes, shapes: str, command: str | None) -> str:
    maps = (
        '<figure><img style="width:100%" alt="maps of the picture for each word" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"></figure>'
    )
    parts = [
        f'<header><h1>{escape(explanation.question)}</h1><p class="soft">{escape(explanation.answer)}</p></header>',
        section("What each word depended on", maps),
        section("Shapes through the model", f"<pre><code>{escape(shapes)}</code></pre>"),
    ]
    if command:
        parts.append(section("Make it again", f"<pre><code>{escape(command)}</code></pre>"))
    return whole_page(f"{explanation.question} {explanation.answer}", "\n".join(parts))


# --- drawing -----------------------------------------------------------------------------------------------------


def draw_explanation(explanation: Explanation, file: Path) -> None:
    """The picture beside the lengths of its patch features and the occlusion map; below, a panel for each word.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the picture of an answer needs matplotlib; pip install "eyespot[pictures]"') from error
    blocks = list(_blocks(explanation))
    rows = -(-len(explanation.words) // COLUMNS)
    title = _title(explanation)
    block_height = 2 * HEADING + rows * (LABEL + SMALL + GAP)
    top = HEADING * len(title)
    figure = Figure(figsize=(WIDTH, top + LABEL + LARGE + len(blocks) * block_height + GAP), dpi=110)
    _write(figure, HEADING / 2, "\n".join(title), 12)
    _draw_head(figure, top + LABEL, explanation)
    top += LABEL + LARGE
    for heading, maps, labels in blocks:
        _write(figure, top + HEADING, heading, 11)
        _draw_words(figure, top + 2 * HEADING, explanation.picture, maps.numpy(), labels)
        top += block_height
    file.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # a model may write anything; what the font lacks becomes a box
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file)


def _blocks(explanation: Explanation) -> Iterator[tuple[str, Tensor, list[str]]]:
    """Title, maps float32 [W, side, side] and their labels."""
    words = [word if len(word) <= LETTERS else f"{word[: LETTERS - 1]}…" for word in explanation.words]
    largest = explanation.relevance.amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    labels = [f"{word}\np = {p:.3f}" for word, p in zip(words, explanation.probabilities.tolist(), strict=True)]
    yield (
        "gradient times input at the patches, in parts of each word's largest",
        explanation.relevance / largest,
        labels,
    )
    if explanation.rollout is not None:
        labels = [f"{word}\n{share:.0%}" for word, share in zip(words, explanation.attended.tolist(), strict=True)]
        yield "attention roll-out: shares of the image tokens in each word, and their sum", explanation.rollout, labels


def _title(explanation: Explanation) -> list[str]:
    lines = [
        *textwrap.wrap(explanation.question, 110, max_lines=2),
        *textwrap.wrap(explanation.answer, 110, max_lines=2),
    ]
    if explanation.num_words > len(explanation.words):
        lines.append(f"(the first {len(explanation.words)} of {explanation.num_words} words)")
    if explanation.rollout is None:
        lines.append(f"(no roll-out: the tokens of {explanation.connector} have no place in the picture)")
    return lines


def _write(figure: Any, top: float, text: str, size: int) -> None:
    across, down = figure.get_size_inches()
    figure.text(MARGIN / across, 1 - top / down, text, fontsize=size, va="top", linespacing=1.4, parse_math=False)


def _axes(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """A place in inches from the upper left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def _draw_head(figure: Any, top: float, explanation: Explanation) -> None:
    lengths, occlusion, picture = explanation.lengths, explanation.occlusion.numpy(), explanation.picture
    middle, most = float(lengths.mean()), max(float(abs(occlusion).max()), 1e-6)
    # a last normalisation may make all equally long; rounding is not to look like a difference
    limits = (min(float(lengths.min()), 0.99 * middle), max(float(lengths.max()), 1.01 * middle))
    panels: list[tuple[str, Array | None, str, tuple[float, float]]] = [
        ("what the encoder reads", None, "", (0, 1)),
        ("length of the patch features", lengths, "viridis", limits),
        ("log-probability lost when covered", occlusion, "RdBu_r", (-most, most)),
    ]
    for number, (title, values, colours, (low, high)) in enumerate(panels):
        left = MARGIN + number * (WIDTH - MARGIN) / len(panels)
        axis = _axes(figure, left, top, LARGE, LARGE)
        axis.set_axis_off()
        axis.set_title(title, fontsize=10)
        if values is None:
            axis.imshow(picture)
        else:
            heat = _heat(axis, picture, values, colours, low, high)
            _draw_bar(figure, heat, left + LARGE + BAR, top, LARGE)


def _draw_words(figure: Any, top: float, picture: Array, maps: Array, labels: Sequence[str]) -> None:
    """A panel for each word, all on one scale."""
    most = max(float(maps.max()), 1e-12)
    for number, (values, label) in enumerate(zip(maps, labels, strict=True)):
        left = MARGIN + number % COLUMNS * (SMALL + GAP)
        axis = _axes(figure, left, top + LABEL + number // COLUMNS * (LABEL + SMALL + GAP), SMALL, SMALL)
        axis.set_axis_off()
        axis.set_title(label, fontsize=9, parse_math=False)
        heat = _heat(axis, picture, values, "YlOrRd", 0.0, most)
    left = MARGIN + min(COLUMNS, len(labels)) * (SMALL + GAP)
    _draw_bar(figure, heat, left, top + LABEL, SMALL)


def _draw_bar(figure: Any, heat: Any, left: float, top: float, height: float) -> None:
    figure.colorbar(heat, cax=_axes(figure, left, top, BAR, height)).ax.tick_params(labelsize=8)


def _heat(axis: Any, picture: Array, values: Array, colours: str, low: float, high: float) -> Any:
    """A map over the picture in grey."""
    extent = (0, picture.shape[1], picture.shape[0], 0)
    axis.imshow(picture.mean(axis=2), extent=extent, cmap="gray", vmin=0, vmax=1)
    return axis.imshow(values, extent=extent, cmap=colours, vmin=low, vmax=high, alpha=0.65)


# --- the pointing game -------------------------------------------------------------------------------------------


class PointingScore(NamedTuple):
    """How often a map points at the thing that was asked about.

    Attributes:
        score: share of questions, with its 95% interval (low, high) over pictures.
        chance: the same of a cell drawn at random: the share of the picture that boxes have.
        others: the same for the boxes of the other things in the scenes; a map that points at anything that stands out,
            whatever was asked, reaches its score here, too. None if every thing was alone.
        num_questions: how many.
    """

    score: float
    low: float
    high: float
    chance: float
    others: float | None
    num_questions: int


class Asked(NamedTuple):
    """The box of the thing that a question is about, and those of all others in the scene."""

    box: Box
    others: tuple[Box, ...]


class Scenes:
    """Which thing a question of ``format=scenes`` is about, found by drawing its scene again.

    Args:
        objects, held_out, language, counting: those that the samples were read with, see ``read_scenes``.
    """

    def __init__(
        self,
        objects: str | int | list[str] = "frequent",
        held_out: HeldOut = "none",
        language: str = "en",
        counting: float = COUNTING,
    ) -> None:
        self.held_out: HeldOut = held_out
        self.counting = counting
        noun = wording.english if language == "en" else wording.quoted
        self.nouns = {char: noun(name) for char, name in things(objects, language).items()}

    def asked(self, sample: Sample) -> Asked | None:
        """The truth for "Where is the X?", and for "Is there a X?" with the answer yes, if there is one X; else None.

        Raises:
            ValueError: the sample is no scene, or another one than these options draw.
        """
        name, picture = sample.group.rpartition("scenes-")[2], sample.images[0] if sample.images else None
        if not isinstance(picture, ScenePicture):
            raise ValueError(f"sample {sample.id!r} has no drawn scene; give samples of format=scenes")  # noqa: TRY004
        if not (sample.kind == "where" or (sample.kind.startswith("presence") and sample.answers == ("yes",))):
            return None
        cast = Cast(tuple(self.nouns), "train" if name.startswith("train") else "test", self.held_out, self.counting)
        scene, _ = draw_scene(cast, name, picture.size)
        if scene.picture != picture:
            raise ValueError(
                f"sample {sample.id!r} shows another scene than its name draws with {len(cast.chars)} things and "
                f"held_out={self.held_out!r}; give the objects, held_out, language and counting that it was read with"
            )
        question = sample.messages[0]["content"][-1]["text"]
        ask = wording.where_question if sample.kind == "where" else wording.presence_question
        found = [index for index in scene.once() if ask(self.nouns[scene.objects[index].char]) == question]
        if not found:
            return None
        others = tuple(thing.box for index, thing in enumerate(scene.objects) if index != found[0])
        return Asked(scene.objects[found[0]].box, others)


def cells_inside(box: Box, side: int) -> Tensor:
    """Cells of a grid whose centre lies in a box, bool [side, side]."""
    centres = (torch.arange(side) + 0.5) / side
    across = (centres >= box.left) & (centres < box.right)
    down = (centres >= box.top) & (centres < box.bottom)
    return down.unsqueeze(1) & across


def pointing_game(
    assistant: Assistant,
    samples: Sequence[Sample],
    scenes: Scenes | None = None,
    map_of: Callable[[Assistant, Sample], Tensor] = answer_map,
) -> PointingScore:
    """Does the maximum of a map lie in the box of the thing that the question is about?

    Where several cells are the maximum, each counts its share, so an empty map scores what chance does. Samples that do
    not ask about one thing that occurs once are left out.

    Source: Zhang et al., arXiv 1608.00507, section 4.1; without their margin around the object.

    Args:
        samples: of ``format=scenes``. scenes: how they were read, by default with no options.
        map_of: a sample's map, float [side, side]; ``functools.partial(answer_map, measure="rollout")`` is another.

    Raises:
        ValueError: no sample asks about one thing (see also ``Scenes.asked`` and ``answer_map``).
    """
    scenes = Scenes() if scenes is None else scenes
    hits, chances, others, pictures = [], [], [], []
    for sample in samples:
        if (asked := scenes.asked(sample)) is None:
            continue
        found = map_of(assistant, sample).cpu()
        peak, side = (found == found.max()).float(), len(found)
        inside = cells_inside(asked.box, side)
        hits.append(_share(peak, inside))
        chances.append(float(inside.float().mean()))
        others += [_share(peak, cells_inside(box, side)) for box in asked.others]
        pictures.append(sample.group)
    if not hits:
        raise ValueError(
            f"none of {len(samples)} samples asks about one thing that is there; read scenes with questions=[where]"
        )
    low, high = cluster_bootstrap(hits, pictures)
    mean_others = sum(others) / len(others) if others else None
    return PointingScore(sum(hits) / len(hits), low, high, sum(chances) / len(hits), mean_others, len(hits))


def _share(peak: Tensor, inside: Tensor) -> float:
    """Of the peak's cells, how many lie inside."""
    return float((peak * inside).sum() / peak.sum())

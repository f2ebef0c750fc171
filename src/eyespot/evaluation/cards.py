"""Questions with their pictures, answers and truths as cards of a page: which are shown, and what stands on them."""

from __future__ import annotations

import base64
import io
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL.Image
from PIL.Image import Image, Resampling

from eyespot.data.boxes import draw_boxes, is_box, parse_boxes
from eyespot.evaluation.charts import Scale
from eyespot.evaluation.metrics import normalize_answer
from eyespot.evaluation.results import Evaluation, Prediction
from eyespot.evaluation.runner import truth_of
from eyespot.processing.images import ImageInput, open_image

if TYPE_CHECKING:
    from eyespot.data.sample import Sample

NUM_CARDS = 12
# All thumbnails together, before base64 adds a third: the page stays near 1 MB.
THUMBNAILS_BYTES = 720_000
THUMBNAIL_SIZES = (256, 192, 128, 64)
JPEG_QUALITY = 82
MOST_OPTIONS = 8
FRAME = 3  # pixels of a box in a thumbnail
WARM, MOST_WARM = (232, 89, 12), 0.8  # colour of a map, and how much of it covers the picture at most


@dataclass(frozen=True)
class Dependence:
    """Where in its picture an answer comes from.

    picture: float32 [height, width, 3] in [0, 1], as the encoder reads it.
    values: float32 [side, side], at least 0; only their ratios count.
    how: what the values are, in words for the page.
    """

    picture: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]
    how: str


class Thumbnail(NamedTuple):
    """A picture as a data URI; few_pixels: it is enlarged without blurring."""

    uri: str
    few_pixels: bool


# --- which are shown ---------------------------------------------------------------------------------------------


def choose_shown(evaluation: Evaluation) -> list[Prediction]:
    """The first questions about distinct pictures in an order drawn by the evaluation's seed; nobody picks them."""
    order = list(evaluation.predictions)
    random.Random(evaluation.settings["seed"]).shuffle(order)
    return _one_per_picture(order)


def choose_errors(evaluation: Evaluation, earlier: Mapping[str, Prediction]) -> list[Prediction]:
    """The worst wrong answers, one for each picture.

    Worst is what training or the picture spoiled: right before training and right without the picture count one each.
    Among equals come first the answers that the model was surest of, then the more frequent confusion, then the order
    of the samples. Where answers are not right or wrong (the limit of scores is not 1), the worst are those with the
    lowest scores, below the mean, and among equals the surest.
    """
    if evaluation.limit != 1:
        low = [prediction for prediction in evaluation.predictions if prediction.score < evaluation.accuracy]
        return _one_per_picture(sorted(low, key=lambda prediction: (prediction.score, -_sureness(prediction))))
    wrong = [prediction for prediction in evaluation.predictions if not prediction.correct]
    frequency = Counter(_pair(prediction) for prediction in wrong)

    def badness(prediction: Prediction) -> tuple[int, float, int]:
        before = prediction.id in earlier and earlier[prediction.id].correct
        blind = prediction.blind_score is not None and prediction.blind_score >= 0.5
        return before + blind, _sureness(prediction), frequency[_pair(prediction)]

    return _one_per_picture(sorted(wrong, key=badness, reverse=True))


def _one_per_picture(predictions: Iterable[Prediction]) -> list[Prediction]:
    first: dict[str, Prediction] = {}
    for prediction in predictions:
        first.setdefault(prediction.group, prediction)
    return list(first.values())[:NUM_CARDS]


def _pair(prediction: Prediction) -> tuple[str, str]:
    return truth_of(prediction.answers), normalize_answer(prediction.prediction)


def _sureness(prediction: Prediction) -> float:
    return prediction.probability or 0.0


# --- pictures ----------------------------------------------------------------------------------------------------


def thumbnails(
    predictions: Sequence[Prediction], samples: Sequence[Sample] | None, budget: int
) -> dict[str, Thumbnail]:
    """By sample id, of each question's first picture, each in at most so many bytes; empty without samples. Where the
    truth is a box it is drawn, and so is that of the answer.

    Raises:
        ValueError: samples lack a question.
        ImageError: a picture cannot be opened (a ValueError).
    """
    if samples is None:
        return {}
    images = {sample.id: sample.images for sample in samples}
    missing = [prediction.id for prediction in predictions if prediction.id not in images]
    if missing:
        raise ValueError(f"samples lack {len(missing)} shown questions, the first is {missing[0]!r}; give them all")
    return {
        prediction.id: thumbnail(with_boxes(open_image(images[prediction.id][0]), prediction), budget)
        for prediction in predictions
        if images[prediction.id]
    }


def with_boxes(picture: Image, prediction: Prediction) -> Image:
    """In the size of the page, with the boxes of answer and truth; the same picture if the truth is no box."""
    if not all(map(is_box, prediction.answers)):
        return picture
    share = THUMBNAIL_SIZES[0] / max(picture.size)
    across, down = (max(1, round(share * side)) for side in picture.size)
    shown = picture.resize((across, down), Resampling.NEAREST if share > 1 else Resampling.BICUBIC)
    boxes = [("truth", parse_boxes(prediction.answers[0])[0])]
    boxes += [("answer", box) for box in parse_boxes(prediction.prediction)[:1]]
    return draw_boxes(shown, [box for _, box in boxes], [name for name, _ in boxes], width=FRAME)


def thumbnail(source: ImageInput, max_bytes: int) -> Thumbnail:
    """A picture in at most max_bytes, before base64 (the smallest size is kept whatever it takes)."""
    picture = open_image(source)
    encoded, kind = b"", ""
    for size in THUMBNAIL_SIZES:
        small = picture.copy()
        small.thumbnail((size, size))
        encoded, kind = _encode(small, "PNG"), "PNG"
        # Drawings stay sharp as PNG, which is small for them; a photograph is many times smaller as JPEG.
        if len(encoded) > max_bytes // 4:
            encoded, kind = _encode(small, "JPEG"), "JPEG"
        if len(encoded) <= max_bytes:
            break
    few_pixels = max(picture.size) <= THUMBNAIL_SIZES[-2]
    uri = f"data:image/{kind.lower()};base64,{base64.b64encode(encoded).decode('ascii')}"
    return Thumbnail(uri, few_pixels)


def _encode(picture: Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, optimize=True, quality=JPEG_QUALITY)
    return buffer.getvalue()


def overlay(dependence: Dependence) -> Image:
    """The picture in grey, and over it each cell the warmer, the larger its value."""
    shares = dependence.values / max(float(dependence.values.max()), 1e-30)
    grey = _from_shares(dependence.picture.mean(axis=2))
    cover = _from_shares(MOST_WARM * shares).resize(grey.size, Resampling.NEAREST)
    return PIL.Image.composite(PIL.Image.new("RGB", grey.size, WARM), grey.convert("RGB"), cover)


def _from_shares(values: npt.NDArray[np.float32]) -> Image:
    """float [height, width] or [height, width, 3] in [0, 1] to a picture."""
    return PIL.Image.fromarray((255 * values).round().astype(np.uint8))


def _strongest(values: npt.NDArray[np.float32]) -> str:
    """Where the greatest value is, for those who do not see the map."""
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    down = ("top", "middle", "bottom")[int(3 * row / values.shape[0])]
    across = ("left", "centre", "right")[int(3 * column / values.shape[1])]
    return f"{down} {across}"


# --- cards -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cards:
    """What cards show: answers before training and thumbnails, by sample id, and how scores are written."""

    scale: Scale
    earlier: Mapping[str, Prediction]
    thumbnails: Mapping[str, Thumbnail]

    def answers(self, predictions: Sequence[Prediction]) -> str:
        """A list with a card for each question: picture, question, truth, answers."""
        cards = [card(_picture(one, self.thumbnails.get(one.id)), one.question, self._rows(one)) for one in predictions]
        return card_list(cards)

    def _rows(self, prediction: Prediction) -> list[tuple[str, str]]:
        rows = []
        if any(option not in prediction.question for option in prediction.options):
            more = ["…"] * (len(prediction.options) > MOST_OPTIONS)
            rows.append(("Choices", escape(" / ".join([*prediction.options[:MOST_OPTIONS], *more]))))
        rows.append(("Truth", escape(" / ".join(dict.fromkeys(prediction.answers)))))
        before = self.earlier.get(prediction.id)
        if before is not None:
            rows.append(("Untrained", marked(before.prediction, before.score, self.scale)))
        name = "Model" if before is None else "Trained"
        rows.append((name, marked(prediction.prediction, prediction.score, self.scale, prediction.probability)))
        if prediction.blind_prediction is not None:
            rows.append(("Blind", marked(prediction.blind_prediction, prediction.blind_score, self.scale)))
        return rows

    def maps(self, predictions: Sequence[Prediction], found: Mapping[str, Dependence], budget: int) -> str:
        """A list with a card for each question: picture and map of what the answer depended on, in so many bytes."""
        cards = []
        for one in predictions:
            answer = marked(one.prediction, one.score, self.scale, one.probability)
            cards.append(card(_pair_of_pictures(one, found[one.id], budget), one.question, [("Answer", answer)]))
        return card_list(cards, "cards wide")


def marked(text: str, score: float | None, scale: Scale, probability: float | None = None) -> str:
    """An answer with its sign, its colour and a word for those who hear the page; beside it the score, if it is not
    simply right or wrong, and how probable the model found it."""
    shown = escape(text) if text.strip() else "<em>nothing</em>"
    notes = []
    if score is not None and scale.limit == 1:
        kind, sign, word = ("right", "✓", "right") if score >= 0.5 else ("wrong", "✗", "wrong")
        said = f'<span aria-hidden="true">{sign}</span><span class="hidden">{word}:</span> {shown}'
        shown = f'<span class="mark {kind}">{said}</span>'
    if score is not None and (scale.limit != 1 or 0 < score < 1):
        notes.append(f"score\xa0{scale.text(score)}")
    if probability is not None:
        notes.append("p\xa0&lt;\xa00.01" if probability < 0.005 else f"p\xa0=\xa0{probability:.2f}")
    return f'{shown} <span class="aside">{", ".join(notes)}</span>' if notes else shown


def card_list(cards: Sequence[str], kind: str = "cards") -> str:
    return f'<ul class="{kind}">\n' + "\n".join(cards) + "\n</ul>"


def card(picture: str, question: str, rows: Sequence[tuple[str, str]]) -> str:
    """An item of ``card_list``; picture and the second parts of rows are HTML, question and names are plain text."""
    asked = f'<p class="question">{escape(question)}</p>' if question.strip() else ""
    answers = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return f'<li class="card">{picture}<div class="body">{asked}<dl class="answers">{answers}</dl></div></li>'


def _picture(prediction: Prediction, thumbnail: Thumbnail | None) -> str:
    if thumbnail is None:
        return '<div class="none">picture not included</div>'
    return _image(thumbnail, f"Picture {prediction.group}, asked about below")


def _pair_of_pictures(prediction: Prediction, dependence: Dependence, budget: int) -> str:
    seen = thumbnail(_from_shares(dependence.picture), budget)
    marked = thumbnail(overlay(dependence), budget)
    where = f"What the answer depended on in picture {prediction.group}, most at the {_strongest(dependence.values)}"
    pictures = _image(seen, f"Picture {prediction.group} as the encoder reads it") + _image(marked, where)
    return f'<div class="both">{pictures}</div>'


def _image(thumbnail: Thumbnail, words: str) -> str:
    pixels = ' class="pixels"' if thumbnail.few_pixels else ""
    return f'<img{pixels} src="{thumbnail.uri}" alt="{escape(words)}">'

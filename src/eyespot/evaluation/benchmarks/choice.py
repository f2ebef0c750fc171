"""Multiple choice: which of the options is right?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from string import ascii_uppercase
from typing import Any, get_args

from eyespot.data.sample import ImageSource, Rejected, Sample
from eyespot.evaluation.benchmarks.base import Benchmark, By, Reference, Scored
from eyespot.evaluation.benchmarks.options import options_of, right_option, split_question
from eyespot.evaluation.benchmarks.tables import questions_of, text_of
from eyespot.evaluation.metrics import normalize_answer
from eyespot.evaluation.scorers import choice


class Choice(Benchmark):
    """MMStar, and one's own questions of this kind; the kind of a question is its category.

    Rows of one's own are ``{"image": "x.jpg", "question": "What is it?", "options": ["a dog", "a cat"], "answer": "B",
    "category": "animals"}``; answer is a letter, the number of an option from 0, or its text. MMStar's rows have index,
    image, answer (a letter), category, and a question that ends in "Options: A: a dog, B: a cat".

    Asked by option, the model sees the question alone, and the option wins whose words are the likeliest answer, all
    tokens and the end together: so a model that never learned what letters mean is measured, too. Asked by letter or by
    text it sees the options as MMStar shows them. The majority control says an option's words, which the published
    reading does not know.

    Source: arXiv 2403.20330, https://github.com/MMStar-Benchmark/MMStar; on the Hub Lin-Chen/MMStar, split val.

    Args:
        path: file of rows, or a name on the Hub.
        image_folder: of the pictures; the folder of the file unless given.
        split: of a data set on the Hub.
        by: option or letter, the likelier one is taken; or text, the model says what it will and that is read.
        published: read what it says as the authors' script does (see ``scorers.choice.read_as_published``).
        prompt: said after each question, on a line of its own; LLaVA says "Answer with the option's letter from the
            given choices directly." (arXiv 2310.03744).
    """

    def __init__(
        self,
        path: str,
        image_folder: str | None = None,
        split: str | None = None,
        by: By = "option",
        published: bool = False,
        prompt: str = "",
    ) -> None:
        if by not in get_args(By):
            raise ValueError(f"by is {by!r}; choices: {', '.join(get_args(By))}")
        if published and by != "text":
            raise ValueError(f"published has no effect where by={by!r}, which reads no text; drop it or give by='text'")
        self.path, self.image_folder, self.split, self.by, self.prompt = path, image_folder, split, by, prompt
        free = choice.read_as_published if published else choice.read_choice
        self.read_answer = {"option": read_option, "letter": read_letter, "text": free}[by]

    def read(self) -> Iterator[Sample | Rejected]:
        yield from questions_of(self.path, self.image_folder, self.split, self._sample, id_column="index")

    def score(self, texts: Sequence[str], references: Sequence[Reference]) -> Scored:
        """Accuracy of each answer; of all the accuracy of guessing, and the share that chooses no option."""
        options = [each.options for each in references]
        truths = [each.options.index(each.answers[0]) for each in references]
        scores = choice.score(texts, truths, options, read=self.read_answer)
        return Scored(scores.samples, {"chance": scores.chance, "unparsed": scores.unparsed / scores.num_questions})

    def _sample(self, id: str, row: dict[str, Any], image: ImageSource, group: str) -> Sample:
        shown = text_of(row, "question")
        if row.get("options") is None:
            question, options = split_question(shown)
            right = right_option(row.get("answer"), options, by_words=False)
        else:
            question, options = shown, options_of(row["options"])
            right = right_option(row.get("answer"), options)
            lettered = [f"{letter}: {text}" for letter, text in zip(ascii_uppercase, options, strict=False)]
            shown = f"{question}\nOptions: {', '.join(lettered)}"
        asked = question if self.by == "option" else shown
        asked = f"{asked}\n{self.prompt}" if self.prompt else asked
        kind = str(row.get("category") or "")
        return Sample.question(id, image, asked, options[right], group=group, kind=kind, options=options)


def read_option(text: str, options: Sequence[str]) -> int | None:
    """The option of these very words, or else without case and final punctuation."""
    if text in options:
        return options.index(text)
    plain = [normalize_answer(option) for option in options]
    return plain.index(normalize_answer(text)) if normalize_answer(text) in plain else None


def read_letter(text: str, options: Sequence[str]) -> int | None:
    """The option of this capital letter, or else as ``read_option``."""
    place = ascii_uppercase.find(text) if len(text) == 1 else -1
    return place if 0 <= place < len(options) else read_option(text, options)

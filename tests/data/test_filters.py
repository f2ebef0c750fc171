"""What is left out, why, and that no sample is dropped in favour of one that is dropped itself."""

from __future__ import annotations

import io
import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from eyespot.config import ConfigError, DataSettings, build_parts
from eyespot.data import duplicates, filters, looks
from eyespot.data.duplicates import NUM_HASHES, RECALL, HammingIndex, TextIndex, banding, normalized, similarity
from eyespot.data.filters import Dropped
from eyespot.data.looks import Look, Looks, color_difference, difference_hash
from eyespot.data.sample import LoadReport, Sample
from eyespot.processing.images import ImageError
from eyespot.registry import FILTERS
from eyespot.training.run import load_data


def picture(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A blurry picture that no other seed resembles."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 60) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def ask(id: str, image: Any, question: str = "what is it?", answer: str = "a thing") -> Sample:
    return Sample.question(id, image, question, answer)


def drop(samples: list[Sample], **given: dict[str, Any]) -> tuple[list[str], dict[str, Dropped]]:
    """Ids that stay, and what was dropped by id."""
    report = LoadReport(accepted=len(samples))
    kept = filters.apply(build_parts(FILTERS, given, "data.filters"), samples, report)
    assert report.accepted == len(kept)
    dropped = {record.id: record for record in report.rejected if isinstance(record, Dropped)}
    assert len(dropped) == len(report.rejected) == len(samples) - len(kept)
    return [sample.id for sample in kept], dropped


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text_lenght": {}}, "unknown data filter 'text_lenght'; did you mean 'text_length'?"),
        ({"text_length": {"min_char": 3}}, "takes no argument 'min_char'; did you mean 'min_chars'?"),
        ({"text_length": {"min_chars": "3"}}, "data.filters.text_length.min_chars is '3' (str); it needs int"),
        ({"text_length": {"of": "both"}}, "data.filters.text_length.of is 'both'; choose one of: answer, question"),
        ({"text_length": {"min_words": 5, "max_words": 4}}, "words are limited to 5 at least and 4 at most"),
        ({"text_length": True}, "data.filters.text_length is True; give its arguments, or {} for the defaults"),
        ({"language": {}}, "data.filters.language.allowed is missing"),
        ({"language": {"allowed": ["english"]}}, "allowed is ['english']; give one or more of: ace, af"),
        ({"language": {"allowed": ["en"], "min_probability": 2}}, "min_probability is 2; give a number from 0 to 1"),
        ({"image_size": {"max_aspect": 0.5}}, "min_side is 32 and max_aspect is 0.5; both must be 1 or more"),
        ({"duplicate_images": {"max_distance": 16}}, "max_distance is 16; give 0 to 15 of the 64 bits"),
        ({"duplicate_images": {"max_difference": -0.1}}, "max_difference is -0.1; give a number from 0 to 1"),
        ({"duplicate_texts": {"min_similarity": 0}}, "min_similarity is 0; give a number above 0 and at most 1"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_parts(FILTERS, given, "data.filters")
    assert words in str(caught.value)


# --- one sample at a time -------------------------------------------------------------------------------------------


def test_length_of_answers_and_questions() -> None:
    samples = [ask("empty", (), answer=" "), ask("short", (), answer="ab"), ask("right", (), answer=" a thing ")]
    samples += [ask("long", (), answer="a" * 30), ask("wordy", (), answer="a b c d")]
    kept, dropped = drop(samples, text_length={"min_chars": 3, "max_chars": 20, "max_words": 3})
    assert kept == ["right"]
    assert {id: record.reason for id, record in dropped.items()} == {
        "empty": "answer has fewer than 3 characters",
        "short": "answer has fewer than 3 characters",
        "long": "answer has more than 20 characters",
        "wordy": "answer has more than 3 words",
    }
    assert str(dropped["short"]) == "short (2: 'ab')"
    assert drop([ask("q", (), "why?"), ask("r", (), "why is it so?")], text_length={"of": "question", "min_words": 2})[
        0
    ] == ["r"]


def test_every_caption_counts() -> None:
    samples = [Sample.caption("good", "x.png", ["a red ball", "the red ball"])]
    samples += [Sample.caption("one bad", "x.png", ["a red ball", "ball"])]
    assert drop(samples, text_length={"min_words": 2})[0] == ["good"]


def test_language() -> None:
    pytest.importorskip("py3langid")
    samples = [
        ask("en", (), "What are the two dogs doing in the field?", "They are running."),
        ask("de", (), "Was machen die beiden Hunde auf der Wiese?", "Sie laufen."),
        ask("fr", (), "Que font les deux chiens dans le champ ?", "Ils courent."),
        ask("uncertain", (), "red?", "no"),
    ]
    kept, dropped = drop(samples, language={"allowed": ["en"]})
    assert kept == ["en", "uncertain"]
    assert dropped["de"].reason == "language is not en" and dropped["de"].detail.startswith("de, ")
    assert drop(samples, language={"allowed": ["en", "fr"]})[0] == ["en", "fr", "uncertain"]
    assert drop(samples, language={"allowed": ["en"], "min_probability": 0.0})[0] == ["en"]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    filters._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ImportError, match=r"eyespot\[filters\]"):
        build_parts(FILTERS, {"language": {"allowed": ["en"]}}, "data.filters")


def test_broken_tiny_and_long_pictures(tmp_path: Path) -> None:
    broken = jpeg(picture(0))[:200]
    (tmp_path / "broken.jpg").write_bytes(broken)
    samples = [ask("good", picture(0)), ask("text alone", ()), ask("bytes", broken)]
    samples += [ask("file", str(tmp_path / "broken.jpg")), ask("gone", str(tmp_path / "gone.jpg"))]
    kept, dropped = drop(samples, readable_images={})
    assert kept == ["good", "text alone"]
    assert {record.reason for record in dropped.values()} == {"a picture cannot be opened"}
    assert "gone.jpg' does not exist" in dropped["gone"].detail
    sizes = {"tiny": (31, 40), "fits": (32, 160), "long": (32, 161), "tall": (161, 32)}
    samples = [ask(name, Image.new("RGB", size)) for name, size in sizes.items()]
    kept, dropped = drop([*samples, ask("bytes", broken)], image_size={})
    assert kept == ["fits"]
    assert str(dropped["tiny"]) == "tiny (31x40)" and "below 32 pixels" in dropped["tiny"].reason
    assert {dropped[name].reason for name in ("long", "tall")} == {"picture is more than 5 times as long as wide"}
    assert dropped["bytes"].reason == "a picture cannot be opened"


# --- near-duplicates ------------------------------------------------------------------------------------------------


def test_copies_of_a_picture_are_dropped_and_questions_about_it_are_not(tmp_path: Path) -> None:
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "same.png").write_bytes((tmp_path / "0.png").read_bytes())
    smaller = picture(0).resize((48, 32))
    samples = [
        ask("0a", str(tmp_path / "0.png")),
        ask("0b", str(tmp_path / "0.png"), "and now?"),
        ask("same pixels", str(tmp_path / "same.png"), "and here?"),
        ask("jpeg", jpeg(picture(0))),
        ask("smaller", smaller),
        ask("1", str(tmp_path / "1.png")),
        ask("both", (str(tmp_path / "2.png"), jpeg(picture(1)))),
        ask("2", str(tmp_path / "2.png")),
        ask("text", ()),
    ]
    kept, dropped = drop(samples, duplicate_images={})
    assert kept == ["0a", "0b", "same pixels", "1", "2", "text"]
    assert [dropped[id].twin and dropped[id].twin.id for id in ("jpeg", "smaller", "both")] == ["0a", "0a", "1"]
    assert all(record.reason == "picture nearly equals another" for record in dropped.values())
    assert dropped["jpeg"].sample is samples[3]


def test_colours_tell_pictures_of_one_shape_apart() -> None:
    discs = []
    for color in ("red", "blue"):
        disc = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(disc).ellipse((10, 20, 40, 50), fill=color)
        discs.append(disc)
    assert difference_hash(discs[0]) == difference_hash(discs[1])
    samples = [ask("red", discs[0]), ask("blue", discs[1]), ask("red again", jpeg(discs[0], 95))]
    assert drop(samples, duplicate_images={})[0] == ["red", "blue"]
    assert drop(samples, duplicate_images={"max_difference": 1.0})[0] == ["red"]


def test_texts_are_compared_about_the_same_picture_or_everywhere() -> None:
    first, second = picture(0), picture(1)
    samples = [
        ask("a", first, "Is there a dog?", "yes"),
        ask("b", first, "is there  a DOG", "Yes."),
        ask("c", second, "Is there a dog?", "yes"),
        ask("d", first, "Is there a cat?", "yes"),
        ask("e", (), "Is there a dog?", "yes"),
        ask("f", (), "Is there a dog?", "yes"),
    ]
    kept, dropped = drop(samples, duplicate_texts={})
    assert kept == ["a", "c", "d", "e"]
    assert dropped["b"].detail == "like that of a, 100%" and dropped["f"].twin is samples[4]
    assert drop(samples, duplicate_texts={"within": "all"})[0] == ["a", "d"]


def test_no_sample_gives_way_to_one_that_is_dropped() -> None:
    """Whatever the order of filters, a sample that is too long is nobody's twin."""
    samples = [
        ask("too long", picture(0), answer="a thing " * 20),
        ask("copy", jpeg(picture(0))),
        ask("copy of the copy", jpeg(picture(0), 50), "something else?"),
        ask("same words", picture(3), answer="a thing " * 20),
    ]
    given: dict[str, Any] = {
        "duplicate_images": {},
        "duplicate_texts": {"within": "all"},
        "text_length": {"max_chars": 9},
    }
    for order in itertools.permutations(given):
        kept, dropped = drop(samples, **{name: given[name] for name in order})
        assert kept == ["copy"]
        assert dropped["copy of the copy"].twin is samples[1]
        assert {dropped[id].reason for id in ("too long", "same words")} == {"answer has more than 9 characters"}


@given(st.integers(0, 15), st.integers(0, 2**32), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_the_hamming_index_finds_what_comparing_all_finds(max_distance: int, seed: int, count: int) -> None:
    rng = random.Random(seed)
    numbers = [rng.getrandbits(64) for _ in range(count)]
    for _ in range(count):  # some are near others
        flips = rng.sample(range(64), rng.randrange(0, 20))
        numbers.append(rng.choice(numbers) ^ sum(1 << bit for bit in flips))
    index = HammingIndex(max_distance)
    for place, number in enumerate(numbers):
        distances = ((number ^ other).bit_count() for other in numbers[:place])
        wanted = sorted((distance, i) for i, distance in enumerate(distances) if distance <= max_distance)
        assert index.near(number) == wanted
        index.add(number)


def variations(seed: int, count: int) -> list[str]:
    """Texts of random words and versions of them in which one word or more was exchanged."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randrange(2, 9))) for _ in range(300)]
    texts: list[str] = []
    for _ in range(count):
        text = (
            rng.choices(words, k=rng.randrange(1, 25)) if not texts or rng.random() < 0.4 else rng.choice(texts).split()
        )
        for place in rng.sample(range(len(text)), min(len(text), rng.randrange(0, 4))):
            text[place] = rng.choice(words)
        texts.append(normalized(" ".join(text)))
    return texts


@pytest.mark.parametrize("threshold", [0.4, 0.7, 0.9, 1.0])
def test_the_text_index_finds_what_comparing_all_finds(threshold: float) -> None:
    texts, index = variations(int(10 * threshold), 200), TextIndex(threshold)
    found = 0
    for place, text in enumerate(texts):
        near = [(similarity(text, other), -i) for i, other in enumerate(texts[:place])]
        wanted = max((pair for pair in near if pair[0] >= threshold), default=None)
        assert index.nearest(text) == (None if wanted is None else (wanted[0], -wanted[1]))
        found += wanted is not None
        index.add(text)
    assert 10 < found < 190


def test_few_texts_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def counted(a: str, b: str) -> float:
        compared.append((a, b))
        return similarity(a, b)

    monkeypatch.setattr(duplicates, "similarity", counted)
    index = TextIndex(0.8)
    rng = random.Random(0)
    texts = [" ".join("".join(rng.choices("abcdefghijklm", k=6)) for _ in range(12)) for _ in range(500)]
    for text in texts:
        assert index.nearest(text) is None
        index.add(text)
    assert len(compared) < 50  # of 124,750 pairs


@given(st.floats(0.05, 1.0))
def test_bands_find_similar_texts_almost_surely(threshold: float) -> None:
    bands, rows = banding(threshold)
    assert 1 <= bands * rows <= NUM_HASHES
    if threshold > 0.11:  # below, 64 rows of one hash are the most that can be had
        assert 1 - (1 - threshold**rows) ** bands >= RECALL


def test_texts_are_normalised() -> None:
    assert normalized("  Is THERE a\tdog?! ") == normalized("is there a dog") == "is there a dog"
    assert normalized("\ufb01sh \u2460") == "fish 1" and normalized("?!") == "?!" and normalized(" ") == ""
    assert similarity("", "") == 1 and similarity("abc", "abd") == 0
    broken = normalized("half a \ud800 pair")  # JSON may hold one
    index = TextIndex(0.9)
    index.add(broken)
    assert index.nearest(broken) == (1.0, 0)


# --- on real data, as docs/data.md tells ---------------------------------------------------------------------------


def test_colours_keep_drawings_apart_that_the_hash_confuses() -> None:
    easy_vqa = pytest.importorskip("easy_vqa")
    look_at = Looks()
    seen: list[Look] = []
    index, alike, copies = HammingIndex(4), 0, 0
    for path in easy_vqa.get_test_image_paths().values():
        look = look_at(path)
        near = [seen[place] for _, place in index.near(look.hash)]
        alike += len(near)
        copies += sum(color_difference(look.colors, other.colors) <= 0.02 for other in near)
        seen.append(look)
        index.add(look.hash)
    assert len(seen) == 1000 and 400 < alike < 600 and 0 < copies < 15


def test_no_english_question_is_taken_for_another_language() -> None:
    pytest.importorskip("py3langid")
    easy_vqa = pytest.importorskip("easy_vqa")
    questions, answers, _ = easy_vqa.get_train_questions()
    pairs = sorted(set(zip(questions, answers, strict=True)))
    samples = [ask(f"{question} {answer}", (), question, answer) for question, answer in pairs]
    assert len(samples) == 273
    assert drop(samples, language={"allowed": ["en"]})[1] == {}
    mistaken = drop(samples, language={"allowed": ["en"], "min_probability": 0.0})[1]
    assert 0 < len(mistaken) < 15


# --- in a run -------------------------------------------------------------------------------------------------------


def test_filters_run_before_the_split_and_everything_is_reported(tmp_path: Path) -> None:
    rows = []
    for number in range(20):
        picture(number).save(tmp_path / f"{number}.png")
        (tmp_path / f"copy-{number}.jpg").write_bytes(jpeg(picture(number)))
        rows += [
            {"id": name, "image": name, "question": "what?", "answer": "x"}
            for name in (f"{number}.png", f"copy-{number}.jpg")
        ]
    rows.append({"id": "gone", "image": "gone.png", "question": "what?", "answer": "x"})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings(train={"format": "vqa", "path": str(tmp_path / "q.jsonl")}, validation_share=0.3)
    train, validation, _ = load_data(data, seed=0)
    names = [{sample.id.removeprefix("copy-").split(".")[0] for sample in side} for side in (train, validation)]
    assert names[0] & names[1]  # without the filter a picture is trained on and its copy validated on
    data.filters = {"duplicate_images": {}}
    train, validation, report = load_data(data, seed=0)
    assert sorted(int(sample.id.split(".")[0]) for sample in [*train, *validation]) == list(range(20))
    assert validation
    assert report.accepted == 20 and len(report.rejected) == 21
    report.write(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["gone", *(f"copy-{number}.jpg" for number in range(20))]
    assert lines[0]["reason"] == "image file is missing" and "bits" in lines[1]["detail"]
    assert (tmp_path / "data_report.txt").read_text() == report.summary() + "\n"
    assert "20 x picture nearly equals another: copy-0.jpg (like that of 0.png, " in report.summary()


def test_nothing_left_is_an_error_with_the_reasons() -> None:
    data = DataSettings(train={"format": "easy_vqa"}, limit=5, filters={"text_length": {"min_chars": 99}})
    with pytest.raises(ConfigError, match=r"no usable training sample; 0 accepted, 5 rejected 5 x answer has fewer"):
        try:
            load_data(data, 0)
        except ConfigError as error:
            raise ConfigError(" ".join(str(error).split())) from error


def test_looks_are_taken_once_and_never_of_another_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    real = looks.open_image
    monkeypatch.setattr(looks, "open_image", lambda image: opened.append(type(image)) or real(image))
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    look = looks.Looks()
    assert look(str(tmp_path / "0.png")) == look(str(tmp_path / "0.png")) == look((tmp_path / "0.png").read_bytes())
    assert look((tmp_path / "0.png").read_bytes()).size == (96, 64)
    for _ in range(2):
        with pytest.raises(ImageError, match=r"broken\.png' is not a picture"):
            look(str(tmp_path / "broken.png"))
    assert opened == [str, bytes, str] and look.num_unreadable == 1
    contents = [
        look(picture(seed)).content for seed in range(20)
    ]  # each is gone before the next, which may take its place
    assert len(set(contents)) == 20

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eyespot.data.sample import LoadReport, Message, Rejected, Sample, image_part, text_part


def user(num_images: int) -> Message:
    return {"role": "user", "content": [*(image_part() for _ in range(num_images)), text_part("what?")]}


class TestValidation:
    @given(st.integers(0, 4), st.integers(0, 4))
    def test_image_parts_and_images_must_agree(self, num_parts: int, num_images: int) -> None:
        images = ("a.png",) * num_images
        if num_parts == num_images:
            assert Sample("x", images, (user(num_parts),)).images == images
        else:
            with pytest.raises(ValueError, match=f"has {num_parts} <image> but {num_images} image"):
                Sample("x", images, (user(num_parts),))

    def test_words_of_the_count_error(self) -> None:
        message = "sample 'x' has 2 <image> but 1 image was given; add the image or drop the placeholder"
        with pytest.raises(ValueError, match=f"^{message}$"):
            Sample("x", ("a.png",), (user(1), user(1)))
        with pytest.raises(ValueError, match="1 <image> but 2 images were given; add a placeholder or drop the image"):
            Sample("x", ("a.png", "b.png"), (user(1),))

    def test_literal_marker_in_text_is_no_image(self) -> None:
        Sample("x", (), ({"role": "user", "content": [text_part("write <image> here")]},))

    @pytest.mark.parametrize(
        ("message", "said"),
        [
            ({"role": "gpt", "content": []}, "role 'gpt'; choices: system, user, assistant"),
            ({"content": []}, "role None"),
            ({"role": "user", "content": "hello"}, "user content 'hello'; give a list"),
            ({"role": "user", "content": ["hello"]}, "user part 'hello'"),
            ({"role": "user", "content": [{"type": "text"}]}, "give an image part or a part with text"),
            ({"role": "user", "content": [{"type": "video"}]}, "give an image part or a part with text"),
            ({"role": "assistant", "content": [{"type": "image"}]}, "an image in a message of role 'assistant'"),
        ],
    )
    def test_messages(self, message: Any, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            Sample("x", (), (message,))

    def test_id_image_captions_and_answers(self) -> None:
        with pytest.raises(ValueError, match="the id of a sample is ''"):
            Sample("", (), ())
        image: Any = 3
        with pytest.raises(ValueError, match="sample 'x' has a int as image"):
            Sample("x", (image,), (user(1),))
        with pytest.raises(ValueError, match="empty caption or answer"):
            Sample("x", (), (user(0),), answers=("",))
        with pytest.raises(ValueError, match="captions but no last assistant message"):
            Sample("x", (), (user(0),), captions=("a",))

    def test_a_sample_does_not_change(self) -> None:
        sample: Any = Sample("x", (), (user(0),))
        with pytest.raises(AttributeError):
            sample.id = "y"


class TestConstructors:
    def test_question(self) -> None:
        picture = PIL.Image.new("RGB", (1, 1))
        sample = Sample.question("x", picture, "what?", "a dot", group="g")
        assert sample.images == (picture,)
        assert sample.messages == (
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a dot"}]},
        )
        assert (sample.answers, sample.group) == (("a dot",), "g")

    def test_question_about_several_pictures_or_none(self) -> None:
        assert Sample.question("x", ("a", b"b"), "what?", "dots", answers=("dots", "two")).answers == ("dots", "two")
        assert Sample.question("x", (), "what?", "no").messages[0]["content"] == [text_part("what?")]

    def test_caption(self) -> None:
        sample = Sample.caption("x", b"data", ["one", "two"], prompt="describe")
        assert sample.messages[0]["content"] == [image_part(), text_part("describe")]
        assert sample.messages[1]["content"] == [text_part("one")]
        assert sample.captions == sample.answers == ("one", "two")
        assert Sample.caption("x", "a", ["one"]).messages[0]["content"] == [image_part()]

    @pytest.mark.parametrize("captions", [[], "one"])
    def test_caption_needs_a_list(self, captions: Any) -> None:
        with pytest.raises(ValueError, match="give a list with one text or more"):
            Sample.caption("x", "a", captions)


class TestVisit:
    def test_same_generator_same_captions_and_all_come_up_equally(self) -> None:
        sample = Sample.caption("x", "a", ["one", "two", "three"])
        rng, again = random.Random(3), random.Random(3)
        drawn = [sample.visit(rng) for _ in range(300)]
        assert drawn == [sample.visit(again) for _ in range(300)]
        counts = Counter(str(seen.messages[-1]["content"][0].get("text")) for seen in drawn)
        assert set(counts) == {"one", "two", "three"}
        assert min(counts.values()) > 70
        assert drawn[0].messages[:-1] == sample.messages[:-1]
        assert sample.messages[-1]["content"] == [text_part("one")]

    def test_without_captions_nothing_is_drawn(self) -> None:
        sample = Sample.question("x", "a", "what?", "a dot")
        rng = random.Random(3)
        assert sample.visit(rng) is sample
        assert rng.random() == random.Random(3).random()


def test_report_counts_by_reason_and_names_the_first() -> None:
    rejected = [Rejected("r0", "no caption")]
    rejected += [Rejected(f"m{index}", "image file is missing", f"{index}.png") for index in range(7)]
    lines = LoadReport(12, rejected).summary().split("\n")
    assert lines[0] == "12 accepted, 8 rejected"
    assert lines[1].startswith("  7 x image file is missing: m0 (0.png), m1 (1.png)")
    assert lines[1].endswith("m4 (4.png) and 2 more")
    assert lines[2:] == ["  1 x no caption: r0"]

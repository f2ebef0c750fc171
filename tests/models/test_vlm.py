"""What the VLM does between its parts: the merge, the size of the image embeddings, its inputs."""

from __future__ import annotations

import pytest
import torch

from eyespot.models.merge import merge, padding_to_the_left, placeholder_mask
from tiny import VOCAB, WIDTH, close, collate, make_rows, make_vlm


def test_merge_writes_images_in_order() -> None:
    """A loop over positions, which takes the next image token at each placeholder."""
    ids = torch.tensor([[1, 9, 9, 2, 9, 9], [9, 9, 3, 4, 5, 6]])
    text = torch.randn(2, 6, 4)
    images = torch.randn(3, 2, 4)
    queue = list(images.flatten(0, 1))
    expected = text.clone()
    for b in range(2):
        for t in range(6):
            if ids[b, t] == 9:
                expected[b, t] = queue.pop(0)
    assert torch.equal(merge(text, images, placeholder_mask(ids, 9)), expected)
    assert torch.equal(merge(text.bfloat16(), images, placeholder_mask(ids, 9)), expected.bfloat16())


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_merge_counts(num_images: int) -> None:
    mask = torch.tensor([[True, True, True, True, False]])
    words = f"4 image placeholders but {num_images} images of 2 tokens need {2 * num_images}"
    with pytest.raises(ValueError, match=words):
        merge(torch.zeros(1, 5, 4), torch.zeros(num_images, 2, 4), mask)


def test_padding_moves_and_the_words_stay_in_order() -> None:
    ids, mask = torch.tensor([[5, 6, 7, 0, 0], [0, 1, 2, 3, 4]]), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    moved, moved_mask = padding_to_the_left(ids, mask)
    assert moved.tolist() == [[0, 0, 5, 6, 7], [0, 1, 2, 3, 4]]
    assert moved_mask.tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]


def test_image_scale_is_a_factor_on_the_connector() -> None:
    model = make_vlm("llama")
    pixels = collate(make_rows())["pixel_values"]
    with torch.no_grad():
        before = model.embed_images(pixels)
        model.config.image_scale = 0.25
        close(model.embed_images(pixels), 0.25 * before)
        close(before, model.connector(model.vision(pixels).last_hidden_state))


@pytest.mark.parametrize("language", ["llama", "gemma3", "gpt"])
def test_calibration_makes_images_as_large_as_words(language: str) -> None:
    """Gemma scales its token embeddings by the root of its width; images must follow."""
    model = make_vlm(language)
    batch = collate(make_rows())
    batch["attention_mask"][:] = 1
    with torch.no_grad():
        words = model.get_input_embeddings()(batch["input_ids"][batch["input_ids"] != VOCAB])
        images = model.embed_images(batch["pixel_values"])
    expected = float((images.pow(2).mean() / words.pow(2).mean()).sqrt())
    assert model.image_text_ratio(batch["pixel_values"], batch["input_ids"]) == pytest.approx(expected, rel=1e-5)
    found = model.calibrate(batch["pixel_values"], batch["input_ids"])
    assert found == pytest.approx(expected, rel=1e-5) and abs(found - 1) > 0.05
    assert model.config.image_scale == pytest.approx(1 / expected, rel=1e-5)
    assert model.image_text_ratio(batch["pixel_values"], batch["input_ids"]) == pytest.approx(1, rel=1e-5)


def test_the_placeholder_row_is_never_looked_up() -> None:
    """Beyond the vocabulary there is none, and inside it nothing depends on it."""
    model = make_vlm("llama", image_token_id=7)
    batch = collate(make_rows())
    batch["input_ids"][batch["input_ids"] == 7] = 8
    batch["input_ids"][batch["input_ids"] == VOCAB] = 7
    with torch.no_grad():
        before = model(**batch).logits
        model.get_input_embeddings().weight[7] = 100.0  # type: ignore[index]
        close(model(**batch).logits, before)


def test_ready_embeddings_take_the_place_of_ids() -> None:
    model = make_vlm("llama")
    batch = collate(make_rows())
    with torch.no_grad():
        embeds = model.embed(batch["input_ids"], model.embed_images(batch["pixel_values"]))
        output = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
        close(output.logits, model(**batch).logits)
    assert embeds.shape == (*batch["input_ids"].shape, WIDTH)


def test_the_output_holds_the_image_embeddings() -> None:
    model = make_vlm("llama")
    batch = collate(make_rows())
    with torch.no_grad():
        output = model(**batch)
        assert torch.equal(output.image_embeds, model.embed_images(batch["pixel_values"]))
        assert model(input_ids=torch.tensor([[1, 2]])).image_embeds is None

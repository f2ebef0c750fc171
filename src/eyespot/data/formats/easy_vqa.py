"""easy-VQA: questions about coloured shapes, 64 x 64 pixels, carried by an installed package.

Source: https://github.com/vzhou842/easy-VQA
"""

from __future__ import annotations

from collections.abc import Iterator

from eyespot.data.sample import Rejected, Sample
from eyespot.registry import closest

_SPLITS = ["train", "test"]


def read_easy_vqa(split: str = "train") -> Iterator[Sample | Rejected]:
    """The 38,575 questions about 4,000 pictures ("train") or the 9,673 about 1,000 others ("test").

    Raises:
        ImportError: the package easy-vqa is not installed.
        ValueError: unknown split.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("data format 'easy_vqa' needs a package; pip install \"eyespot[quickstart]\"") from error
    if split not in _SPLITS:
        raise ValueError(f"unknown split {split!r}{closest(split, _SPLITS)} (choices: {', '.join(_SPLITS)})")
    questions = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
    paths = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    for index, (question, answer, picture) in enumerate(zip(*questions, strict=True)):
        id = f"easy_vqa-{split}-{index}"
        if picture in paths:
            yield Sample.question(id, paths[picture], question, answer, group=f"easy_vqa-{split}-{picture}")
        else:
            yield Rejected(id, "image file is missing", f"picture {picture}")

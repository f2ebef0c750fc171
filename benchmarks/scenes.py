"""Scenes a second of one core: truth, questions and pixels, beside drawing every character anew from the font.

The time is that of the processor, so other programs on the machine hardly change it.

python benchmarks/scenes.py [FILE]
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator

from harness import finish

from eyespot.data.formats.scenes import read_scenes
from eyespot.data.sample import Sample
from eyespot.data.scenes import drawing, scene

SCENES = 400
REPEATS = 5
WARM_UP = 5
CACHES = (drawing._glyph, drawing._patch, drawing.mask, scene.area)
QUESTIONS = ["presence_random", "presence_adversarial", "count", "relation", "where", "list"]


def make(start: int, after_each: Callable[[], object]) -> Iterator[Sample]:
    """The samples of so many scenes, each picture drawn once."""
    drawn = None
    for sample in read_scenes(SCENES, start, questions=QUESTIONS):
        assert isinstance(sample, Sample)
        if sample.images[0] is not drawn:
            drawn = sample.images[0]
            drawn.draw()  # type: ignore[union-attr]
            after_each()
        yield sample


def forget() -> None:
    for cache in CACHES:
        cache.cache_clear()


def main() -> None:
    starts = itertools.count(0, SCENES)

    def per_s(after_each: Callable[[], object]) -> float:
        begin = time.process_time()
        for _ in make(next(starts), after_each):
            pass
        return SCENES / (time.process_time() - begin)

    naive = [per_s(forget) for _ in range(REPEATS)]
    ours = [per_s(lambda: None) for _ in range(WARM_UP + REPEATS)][WARM_UP:]
    questions = sum(1 for _ in make(next(starts), lambda: None)) / SCENES
    slow, quick = statistics.median(naive), statistics.median(ours)
    print(f"naive {slow:.0f}, ours {quick:.0f} scenes/s, ratio {quick / slow:.2f}; {questions:.1f} questions a scene")
    finish([{"name": "scenes/s of a core", "naive": naive, "ours": ours, "questions_per_scene": questions}])


if __name__ == "__main__":
    main()

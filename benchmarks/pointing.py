"""The pointing game: do the maps of a model point at the thing that a question about a drawn scene asks for?

    python benchmarks/pointing.py MODEL [result.json]

MODEL is a trained model of recipe scenes; the questions are "Is there a X?" about held-out scenes in which the answer
is yes and X occurs once. Chance is a cell drawn at random; "others" are the boxes of the other things in the scene.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import get_args

from harness import finish, seconds

from eyespot.data import sources
from eyespot.inference import load
from eyespot.relevance import Measure, answer_map, pointing_game

SCENES, IMAGE_SIZE = 120, 160


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    name = sys.argv.pop(1)
    assistant = load(name, "cpu")
    samples, _ = sources.load(
        "scenes", split="test", num_scenes=SCENES, image_size=IMAGE_SIZE, questions=["presence_random"]
    )
    rows = []
    for measure in get_args(Measure):
        found = []
        took = seconds(
            lambda m=measure, out=found: out.append(  # type: ignore[misc]
                pointing_game(assistant, samples, map_of=partial(answer_map, measure=m))
            )
        )
        score = found[0]
        others = "-" if score.others is None else f"{score.others:.1%}"
        print(
            f"{measure:12} {score.score:.1%} [{score.low:.1%}, {score.high:.1%}] of {score.num_questions} questions, "
            f"chance {score.chance:.1%}, others {others}, {took / score.num_questions:.2f} s each",
            flush=True,
        )
        rows.append({"measure": measure, "model": name, "seconds": took, **score._asdict()})
    finish(rows)


if __name__ == "__main__":
    main()

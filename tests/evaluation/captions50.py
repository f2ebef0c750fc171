"""Fifty invented captions with five references each, and what the official COCO code makes of them.

``python tests/evaluation/captions50.py`` writes captions50.json beside this file. It needs Java and pycocoevalcap 1.2
(``pip install pycocoevalcap==1.2``), whose tokenizer (Stanford PTBTokenizer 3.4.1) and scorers made the numbers; METEOR
is its meteor-1.5.jar with ``-l en -norm -m 'exact stem'``. The tests read the JSON and need neither.
"""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("captions50.json")
NUM_CAPTIONS, NUM_REFERENCES = 50, 5

# what different people call the same thing
WHO = (
    ("A man", "A guy", "An old man", "A man's friend", "The man who isn't young"),
    ("Two dogs", "A pair of dogs", "2 dogs", "Some dogs", "A dog and a smaller dog"),
    ("A young woman", "A woman", "A lady", "A girl in a T-shirt", "The woman"),
    ("Three children", "Several kids", "3 kids", "The children", "Children who don't look tired"),
    ("A black-and-white cat", "A cat", "A kitten", "One cat", "A cat that's black/white"),
    ("A U.S. flag", "A flag", "An American flag", 'A flag with "stars"', "The flag (red, white and blue)"),
)
DOES = (
    ("is sitting", "sits", "is seated", "can't stop sitting", "sat down"),
    ("is running quickly", "runs", "are running", "ran", "is out for a run"),
    ("plays with a 3.5-foot ball", "is playing", "playing ball", "plays ball", "is playing with a ball"),
    ("waits", "is waiting at 10:30 a.m.", "has been waiting", "waits, and waits", "is waiting for 1,000 people"),
    ("is eating a hot dog", "eats a hot dog", "eating", "has eaten 1/2 of a hot dog", "eats"),
)
WHERE = (
    ("on a well-lit bench", "on the bench", "on a park bench", "by the benches", "on a wooden bench"),
    ("in the street", "on St. Mary's street", "in a street; it's raining", "near the street", "in a city street"),
    ("on the beach", "at the beach", "by the sea...", "on a beach - a sandy one", "near the water's edge"),
    ("in the kitchen", "in a kitchen", "inside a kitchen", "in someone's kitchen", "at home in the kitchen"),
    ("under a tree", "under the trees", "beneath a tree", "by a big tree", "in the shade of a tree"),
)
ENDS = (".", "", " .", "!", "")


def written(rng: random.Random, scene: tuple[int, int, int]) -> str:
    """One person's caption."""
    words = [rng.choice(part[number]) for part, number in zip((WHO, DOES, WHERE), scene, strict=True)]
    return " ".join(words) + rng.choice(ENDS)


def predicted(rng: random.Random, references: list[str], kind: int) -> str:
    """A caption with one of the faults that models have."""
    caption = rng.choice(references)
    words = caption.split()
    if kind == 0:
        return ""
    if kind == 1:
        return caption
    if kind == 2:
        return " ".join(words[:3] * 4)
    if kind == 3:
        return words[0]
    if kind == 4:
        return caption.upper()
    if kind == 5:
        return " ".join(words[::-1])
    return " ".join(word for word in words if rng.random() < 0.85)


def captions() -> list[dict[str, Any]]:
    """References and a prediction of every picture; the same at every call."""
    rng = random.Random(50)
    items = []
    for number in range(NUM_CAPTIONS):
        scene = rng.randrange(len(WHO)), rng.randrange(len(DOES)), rng.randrange(len(WHERE))
        references = [written(rng, scene) for _ in range(NUM_REFERENCES)]
        other = scene if number % 3 else (rng.randrange(len(WHO)), *scene[1:])
        said = [written(rng, other) for _ in range(NUM_REFERENCES)]
        items.append({"references": references, "prediction": predicted(rng, said, number % 12)})
    return items


def measured(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Words, and scores of the set and of each caption, by the official code."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    given = {n: [{"caption": text} for text in item["references"]] for n, item in enumerate(items)}
    said = {n: [{"caption": item["prediction"]}] for n, item in enumerate(items)}
    given, said = PTBTokenizer().tokenize(given), PTBTokenizer().tokenize(said)
    bleu, bleu_samples = Bleu(4).compute_score(given, said, verbose=0)
    rouge, rouge_samples = Rouge().compute_score(given, said)
    cider, cider_samples = Cider().compute_score(given, said)
    meteor, meteor_samples = measured_meteor(given, said)
    return {
        "words": [{"references": given[n], "prediction": said[n][0]} for n in said],
        "bleu": list(bleu),
        "rouge_l": float(rouge),
        "cider_d": float(cider),
        "meteor": meteor,
        "bleu_4_samples": list(bleu_samples[3]),
        "rouge_l_samples": [float(value) for value in rouge_samples],
        "cider_d_samples": [float(value) for value in cider_samples],
        "meteor_samples": meteor_samples,
    }


def measured_meteor(given: dict[int, list[str]], said: dict[int, list[str]]) -> tuple[float, list[float]]:
    import pycocoevalcap.meteor.meteor as official

    jar = Path(official.__file__).with_name(official.METEOR_JAR)
    with tempfile.TemporaryDirectory() as folder:
        texts, truths = Path(folder, "said"), Path(folder, "given")
        texts.write_text("".join(f"{said[n][0]}\n" for n in said), encoding="utf-8")
        truths.write_text("".join(f"{text}\n" for n in said for text in given[n]), encoding="utf-8")
        options = ["-l", "en", "-norm", "-m", "exact stem", "-r", str(NUM_REFERENCES)]
        command = ["java", "-Xmx1G", "-jar", str(jar), str(texts), str(truths), *options]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    samples = [float(line.split()[-1]) for line in lines if line.startswith("Segment ")]
    return float(lines[-1].split()[-1]), samples


if __name__ == "__main__":
    items = captions()
    content = {"captions": items, "official": measured(items)}
    FILE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

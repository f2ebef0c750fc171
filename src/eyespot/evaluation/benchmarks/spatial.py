"""How things lie to each other: statements about a picture that are true or not (VSR), or questions about drawn scenes.

Source: Visual Spatial Reasoning, arXiv 2205.00363, https://github.com/cambridgeltl/visual-spatial-reasoning; on the Hub
cambridgeltl/vsr_random and cambridgeltl/vsr_zeroshot, whose pictures are those of COCO 2017.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from eyespot.data.formats.records import BadRecord
from eyespot.data.sample import ImageSource, Sample
from eyespot.evaluation.benchmarks.base import Reference, Scored
from eyespot.evaluation.benchmarks.drawn import FileOrScenes
from eyespot.evaluation.benchmarks.tables import text_of
from eyespot.evaluation.metrics import is_right
from eyespot.evaluation.scorers import pope

LABELS = {"1": "yes", "true": "yes", "yes": "yes", "0": "no", "false": "no", "no": "no"}
# Source: analysis_scripts/rel_meta_category_dict.txt of the authors, whose "among" counts for the last group it is in.
GROUPS = {
    "adjacency": "adjacent to, alongside, at the side of, at the right side of, at the left side of, attached to, "
    "at the back of, ahead of, against, at the edge of",
    "directional": "off, past, toward, down, deep down, up, away from, along, around, from, into, to, across, "
    "across from, through, down from",
    "orientation": "facing, facing away from, parallel to, perpendicular to",
    "projective": "on top of, beneath, beside, behind, left of, right of, under, in front of, below, above, over, "
    "in the middle of",
    "proximity": "by, close to, near, far from, far away from",
    "topological": "connected to, detached from, has as a part, part of, contains, within, at, on, in, with, "
    "surrounding, consists of, out of, between, inside, outside, touching",
    "unallocated": "beyond, next to, opposite to, after, among, enclosed by",
}
GROUP_OF = {relation: group for group, relations in GROUPS.items() for relation in relations.split(", ")}


class Spatial(FileOrScenes):
    """Statements of a file, each asked as a yes/no question of the group of its relation; without a file: is X left of
    Y, is X left or right of Y, is X behind Y?

    Rows are ``{"image": "000000050403.jpg", "caption": "The teddy bear is in front of the person.", "label": 1,
    "relation": "in front of"}``. Options: see ``FileOrScenes``; {caption} stands for the statement.
    """

    kinds = ("relation", "side", "behind")
    slot = "{caption}"
    prompt = "{caption} Is this true? Answer yes or no."

    def score(self, texts: Sequence[str], references: Sequence[Reference]) -> Scored:
        """Accuracy of each answer: yes and no as they are read in free text (see ``scorers.pope.read_yes_no``), others
        as they are. Of the yes/no questions the share of yes and of answers that say neither."""
        samples, said = [], []
        for text, reference in zip(texts, references, strict=True):
            if reference.answers[0] in ("yes", "no"):
                said.append(pope.read_yes_no(text))
                samples.append(float(said[-1] is (reference.answers[0] == "yes")))
            else:
                samples.append(float(is_right(text, reference.answers)))
        shares = {"yes_rate": said.count(True), "unparsed": said.count(None)}
        return Scored(samples, {name: count / len(said) for name, count in shares.items() if said})

    def samples(self, id: str, row: dict[str, Any], image: ImageSource, group: str) -> Iterable[Sample]:
        question = self.prompt.replace(self.slot, text_of(row, "caption"))
        label = LABELS.get(str(row.get("label")).lower())
        if label is None:
            raise BadRecord("label is neither 1 nor 0", repr(row.get("label"))[:80])
        relation = str(row.get("relation") or "")
        yield Sample.question(id, image, question, label, group=group, kind=GROUP_OF.get(relation, relation))

"""Under which terms the parts and the data of a run stand, as far as they are known here. No legal advice: the source
of each line is its address, and it is the address that counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from eyespot.models.language.gguf import GEMMA_PACKAGE


class Terms(NamedTuple):
    """name: the Hub's own name of a licence where it has one (https://huggingface.co/docs/hub/repositories-licenses).
    note: for readers. notice: what has to stand in a file NOTICE beside the model."""

    name: str
    url: str
    note: str = ""
    notice: str = ""


HUB = "https://huggingface.co/"
GEMMA_NOTE = "the terms bind models made from it, too, and are to be handed on with them"
# section 3.1 of the terms, and section 1.b.iii of Llama's
GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
LLAMA_NOTICE = (
    "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. All Rights "
    "Reserved."
)

# by the name under which a recipe loads weights
WEIGHTS: dict[str, Terms] = {
    "google/gemma-3-270m": Terms("gemma", "https://ai.google.dev/gemma/terms", GEMMA_NOTE, GEMMA_NOTICE),
    "meta-llama/Meta-Llama-3-8B": Terms(
        "llama3",
        "https://www.llama.com/llama3/license/",
        "names of models made from it begin with Llama 3",
        LLAMA_NOTICE,
    ),
    "mistralai/Mistral-7B-v0.1": Terms("apache-2.0", f"{HUB}mistralai/Mistral-7B-v0.1"),
    "HuggingFaceTB/SmolLM-360M": Terms("apache-2.0", f"{HUB}HuggingFaceTB/SmolLM-360M"),
    "HuggingFaceTB/SmolLM2-135M": Terms("apache-2.0", f"{HUB}HuggingFaceTB/SmolLM2-135M"),
    "openai/clip-vit-large-patch14": Terms("mit", "https://github.com/openai/CLIP/blob/main/LICENSE"),
    "google/vit-large-patch16-224": Terms("apache-2.0", f"{HUB}google/vit-large-patch16-224"),
    "google/siglip-base-patch16-224": Terms("apache-2.0", f"{HUB}google/siglip-base-patch16-224"),
    "google/siglip-so400m-patch14-224": Terms("apache-2.0", f"{HUB}google/siglip-so400m-patch14-224"),
    "facebook/dinov2-large": Terms("apache-2.0", f"{HUB}facebook/dinov2-large"),
    "google-bert/bert-base-uncased": Terms("apache-2.0", f"{HUB}google-bert/bert-base-uncased"),
    "EfficientNet-Lite (ImageNet)": Terms(
        "apache-2.0", "https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite"
    ),
}
# by format, or by the last part of a path
DATA: dict[str, Terms] = {
    "easy_vqa": Terms("mit", "https://github.com/vzhou842/easy-VQA"),
    "scenes": Terms("cc-by-sa-4.0", "https://openmoji.org", "pictures: OpenMoji, to be credited"),
    "flickr8k": Terms("other", f"{HUB}datasets/jxie/flickr8k", "photographs of Flickr's users; for research only"),
    "llava_instruct_150k.json": Terms(
        "cc-by-4.0", f"{HUB}datasets/liuhaotian/LLaVA-Instruct-150K", "written by GPT-4: OpenAI's terms apply, too"
    ),
    "llava_v1_5_mix665k.json": Terms(
        "other", f"{HUB}datasets/liuhaotian/LLaVA-Instruct-150K", "a mixture: each source has its own terms"
    ),
    "blip_laion_cc_sbu_558k.json": Terms(
        "other", f"{HUB}datasets/liuhaotian/LLaVA-Pretrain", "pictures of LAION, CC3M and SBU have their own terms"
    ),
    "train2017": Terms("other", "https://cocodataset.org/#termsofuse", "COCO: photographs under Flickr's terms"),
}
# of a model made from several parts the one that stands first here
STRICTEST = ("other", "gemma", "llama3", "apache-2.0", "mit")


@dataclass(frozen=True)
class Part:
    """A part or a source of data: what it is in the run, its name, and its terms if they are known."""

    role: str
    name: str
    terms: Terms | None


def weights_of(model: Mapping[str, Any]) -> list[Part]:
    """The pretrained weights that went into a model, by its settings as a run records them."""
    return [
        Part(role, name, WEIGHTS.get(name))
        for role, key in (("vision encoder", "vision"), ("connector", "connector"), ("language model", "language"))
        for name in _pretrained(model[key]["name"], model[key].get("args") or {})
    ]


def _pretrained(name: str, arguments: Mapping[str, Any]) -> Iterator[str]:
    if name == "fusion":
        for part in (arguments["first"], arguments["second"]):
            yield from _pretrained(part["name"], part)
    elif name == "efficientnet_lite":
        if arguments.get("pretrained", True):
            yield "EfficientNet-Lite (ImageNet)"
    elif name == "gguf" and arguments.get("source", GEMMA_PACKAGE) == GEMMA_PACKAGE:
        yield "google/gemma-3-270m"
    elif arguments.get("source"):
        yield public_name(arguments["source"])


def data_of(sources: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Part]:
    """What was read, by role ("training", "test") and the settings of a source; each name once for a role."""
    found: dict[tuple[str, str], Part] = {}
    for role, source in sources:
        paths = [
            source[key] for key in ("path", "image_folder", "image_url", "annotations", "images") if source.get(key)
        ]
        for name in map(public_name, map(str, paths or [source.get("format") or source["benchmark"]])):
            terms = next((DATA[key] for key in (name, PurePath(name).name) if key in DATA), None)
            found[role, name] = Part(role, name, terms)
    return list(found.values())


def public_name(source: str) -> str:
    """A name on the Hub as it is; of a path that only one machine has, or of an address, the last part."""
    is_path = source.startswith(("/", "~", ".")) or ":" in source or source.endswith(".gguf") or Path(source).exists()
    return PurePath(source).name if is_path else source


def strictest(parts: Iterable[Part]) -> Terms | None:
    """The terms that a model made of these parts stands under; None for one that is made of nothing.

    Where a part's terms are not known here, nothing can be promised: "other".
    """
    terms = [part.terms or Terms("other", "", f"the terms of {part.name} are not known here") for part in parts]
    return min(terms, key=lambda one: STRICTEST.index(one.name), default=None)

"""Our prompts in llama.cpp, token for token.

llama.cpp tokenizes all words between two pictures at once, training tokenizes what a person typed apart from the
template around it: "Human: " and "what" are other tokens than "Human:" and " what". Where that matters, the template of
the GGUF file marks where typed words begin and end, and the token beside a mark gets a second id, whose name contains
the mark. llama.cpp cuts a prompt at such names first, so no token reaches over the border and the marks are gone.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from eyespot.export.parity import refuse
from eyespot.inference import user_turn
from eyespot.processing.processor import Processor
from eyespot.processing.prompt import Message, parts_of

BEFORE, AFTER = "\ue000", "\ue001"
MEDIA = "<__media__>"  # stands for a picture while a prompt is tried out
QUESTIONS = ("What is here? Two  things", "the red one.", "2 more")

# llama.cpp gives a template each turn as one text, with "<__media...>" for every picture. Ours want the pictures that
# open a turn and the rest of it apart. BEGIN, END and ANSWER are replaced by marks or by nothing.
TURNS = """\
{%- set ns = namespace(turns=[], images='', text='', begin='', end='') -%}
{%- for m in messages -%}
{%- set ns.images = '' -%}{%- set ns.text = '' -%}{%- set ns.begin = '' -%}{%- set ns.end = '' -%}
{%- for piece in m.content.split('<__media') -%}
{%- set words = piece -%}
{%- if not loop.first -%}
{%- set cut = piece.split('>') -%}{%- set words = cut[1:] | join('>') -%}
{%- set picture = '<__media' + cut[0] + '>' -%}
{%- if ns.text -%}{%- set ns.text = ns.text + picture -%}{%- else -%}{%- set ns.images = ns.images + picture -%}
{%- endif -%}{%- set ns.end = '' -%}
{%- endif -%}
{%- if words -%}
{%- if m.role == 'assistant' -%}{%- set ns.begin = 'ANSWER' -%}
{%- else -%}{%- if not ns.text -%}{%- set ns.begin = 'BEGIN' -%}{%- endif -%}{%- set ns.end = 'END' -%}{%- endif -%}
{%- set ns.text = ns.text + words -%}
{%- endif -%}{%- endfor -%}
{%- set ns.text = ns.text + ns.end -%}
{%- set turn = {'role': m.role, 'images': ns.images, 'text': ns.begin + ns.text,
'content': ns.images + ns.text if ns.images else ns.begin + ns.text} -%}
{%- set ns.turns = ns.turns + [turn] -%}
{%- endfor -%}
{%- set messages = ns.turns -%}
""".replace("\n", " ")


@dataclass(frozen=True)
class Prompts:
    """The chat template of a GGUF file, and the names of second ids with the tokens that they are copies of."""

    template: str
    copies: dict[str, int]


def fitting_prompts(processor: Processor) -> Prompts:
    """With as few marks as give the tokens of training; in the end this is tried out.

    Raises:
        ExportError: not even marks on both sides help.
    """
    if processor.image_mode != "placeholder":
        cure = "export onnx or merged instead"
        refuse("gguf", "all pictures stand before all words (image_mode=prefix), which no chat template does", cure)
    tried = [user_turn(pictures, question) for question in QUESTIONS for pictures in ([None], [])]
    tried += [[*turn, {"role": "assistant", "content": "A red circle."}, *tried[-1]] for turn in tried[:2]]
    wanted = [processor.encode_prompt(messages).input_ids for messages in tried]
    for answer, end, begin in itertools.product(("", BEFORE), ("", AFTER), ("", BEFORE)):
        template = chat_template(processor, begin, end, answer)
        texts = [rendered(processor, template, messages) for messages in tried]
        prompts = Prompts(template, copies_beside_marks(processor.tokenizer, texts))
        tokenizer = with_copies(processor.tokenizer, prompts.copies)
        if [prompt_ids(processor, tokenizer, prompts.copies, text) for text in texts] == wanted:
            return prompts
    return refuse(
        "gguf",
        "llama.cpp cuts its prompts into other tokens than training did, because of what its template writes next to "
        "typed words",
        "train with model.language.template=raw, or export onnx or merged instead",
    )


def chat_template(processor: Processor, begin: str = "", end: str = "", answer: str = "") -> str:
    """The processor's template for the messages of llama.cpp, which knows BOS and EOS but no other variable of it.

    Args:
        begin, end: marks around what a user typed. answer: the mark before an earlier answer.
    """
    specials = {f"{name}_token": getattr(processor.tokenizer, f"{name}_token") for name in ("pad", "unk")}
    values = {name: value for name, value in specials.items() if value is not None} | processor.template_kwargs
    settings = "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in values.items())
    template = re.sub(r"(\{%-?\s*)generation\b", r"\1if true", str(processor.chat_template))  # no tag of llama.cpp
    template = re.sub(r"(\{%-?\s*)endgeneration\b", r"\1endif", template)
    turns = TURNS.replace("BEGIN", begin).replace("END", end).replace("ANSWER", answer)
    return settings + turns + template


def rendered(processor: Processor, template: str, messages: Sequence[Message]) -> str:
    """What the template makes of messages, without the BOS that llama.cpp adds by itself."""
    shown = [
        {
            "role": message["role"],
            "content": "".join(MEDIA if part["type"] == "image" else part["text"] for part in parts_of(message)),
        }
        for message in messages
    ]
    text = str(
        processor.tokenizer.apply_chat_template(
            shown, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    )
    return text.removeprefix(processor.tokenizer.bos_token) if processor.add_bos else text


def copies_beside_marks(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, int]:
    """Name of a second id -> the token that stands before BEFORE or behind AFTER, tokenized with its side only."""
    copies = {}
    for piece in MEDIA.join(texts).split(MEDIA):
        sides = re.split(f"([{BEFORE}{AFTER}])", piece)
        for i in range(1, len(sides), 2):
            place, words = (-1, sides[i - 1]) if sides[i] == BEFORE else (0, sides[i + 1])
            if not words:
                continue
            encoded = tokenizer(words, add_special_tokens=False, return_offsets_mapping=True)
            begin, end = encoded.offset_mapping[place]
            name = words[begin:end] + BEFORE if sides[i] == BEFORE else AFTER + words[begin:end]
            copies[name] = int(encoded.input_ids[place])
    return copies


def with_copies(tokenizer: PreTrainedTokenizerBase, copies: dict[str, int]) -> PreTrainedTokenizerBase:
    """A tokenizer that knows the names of second ids."""
    if not copies:
        return tokenizer
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([AddedToken(name, special=True, normalized=False) for name in copies], special_tokens=True)
    return larger


def prompt_ids(
    processor: Processor, tokenizer: PreTrainedTokenizerBase, copies: dict[str, int], text: str
) -> list[int]:
    """What llama.cpp makes of a text, with copies as the tokens that they stand for."""
    sources = {tokenizer.added_tokens_encoder[name]: token for name, token in copies.items()}
    ids = [int(tokenizer.bos_token_id)] if processor.add_bos else []
    for i, words in enumerate(text.split(MEDIA)):
        ids += [processor.image_token_id] * (processor.num_image_tokens if i else 0)
        ids += [sources.get(token, token) for token in tokenizer(words, add_special_tokens=False).input_ids]
    return ids

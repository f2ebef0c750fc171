"""A folder of transformers' own LLaVA, which needs no eyespot: for transformers, TRL, vLLM and SGLang.

Source: https://huggingface.co/docs/transformers/model_doc/llava (the model), arXiv 2310.03744 (LLaVA 1.5).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from eyespot.export.merged import without_adapters
from eyespot.export.parity import TOLERANCE, Reply, refuse
from eyespot.inference import Assistant, user_turn
from eyespot.models.connectors.mlp import MLPConnector
from eyespot.models.loss import after_head
from eyespot.models.vlm import VLM
from eyespot.processing.processor import IMAGE_TEXT, Processor

ENCODERS = ("clip_vision_model", "siglip_vision_model")
INSTEAD = "export it as onnx"
# between two marks of a prompt nothing is joined into one token, as in training; the tokenizer drops them
MARK = "\ue000"
# transformers hands lists of parts to a template, ours are written for text; the words of a user are marked on both
# sides, an answer behind itself only, because the space before it is part of what was learned
CONTENT_TO_TEXT = (
    """\
{%- set ns = namespace(turns=[], images='', text='') -%}
{%- for m in messages -%}
{%- set ns.images = '' -%}{%- set ns.text = '' -%}
{%- set open = '' if m.role == 'assistant' else 'MARK' -%}
{%- for p in ([{'type': 'text', 'text': m.content}] if m.content is string else m.content) -%}
{%- if p.type == 'text' -%}{%- if p.text -%}{%- set ns.text = ns.text + open + p.text + 'MARK' -%}{%- endif -%}
{%- elif ns.text -%}{%- set ns.text = ns.text + '<image>' -%}
{%- else -%}{%- set ns.images = ns.images + '<image>' -%}
{%- endif -%}{%- endfor -%}
{%- set turn = {'role': m.role, 'content': ns.images + ns.text, 'images': ns.images, 'text': ns.text} -%}
{%- set ns.turns = ns.turns + [turn] -%}
{%- endfor -%}
{%- set messages = ns.turns -%}
""".replace("MARK", MARK)
    .replace("<image>", IMAGE_TEXT)
    .strip()
)


class LlavaConsumer:
    """The folder under plain transformers."""

    tolerance = TOLERANCE

    def __init__(self, folder: Path) -> None:
        self.processor: Any = LlavaProcessor.from_pretrained(folder)
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    @torch.inference_mode()
    def answer(self, picture: PIL.Image.Image, question: str, max_new_tokens: int) -> Reply:
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        output = self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        text = self.processor.decode(tokens, skip_special_tokens=True).strip()
        return Reply(text, tokens, torch.cat(output.logits).numpy())


def export_llava(assistant: Assistant, folder: Path) -> LlavaConsumer:
    """Write model, processor and chat template.

    Raises:
        ExportError: LLaVA of transformers has no place for a part of this model; the message says which.
    """
    check_fits(assistant.model, assistant.processor)
    processor = llava_processor(assistant.model, assistant.processor)
    check_prompts(assistant.processor, processor)
    model = llava_model(without_adapters(assistant.model), processor.image_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return LlavaConsumer(folder)


def check_fits(model: VLM, processor: Processor) -> None:
    """Raise ExportError unless every part has its place in LLaVA."""
    config, language = model.config, model.language
    kind, text_kind = config.vision_config.model_type, config.text_config.model_type
    if kind not in ENCODERS:
        refuse("llava", f"its vision encoder is {kind}, and LLaVA takes CLIP or SigLIP", INSTEAD)
    if config.vision_positions:
        refuse("llava", "its patches are told their places (vision.positions), which LLaVA does not do", INSTEAD)
    if config.image_attention != "causal":
        refuse("llava", "its image tokens see each other (image_attention=bidirectional)", INSTEAD)
    if type(language.config) not in AutoModel._model_mapping or text_kind.startswith("eyespot"):
        refuse(
            "llava", f"its language model {text_kind} is eyespot's own, which transformers alone cannot load", INSTEAD
        )
    if after_head(language) != (1.0, None) or getattr(model.get_output_embeddings(), "bias", None) is not None:
        refuse("llava", f"{text_kind} scales, caps or shifts its logits, and LLaVA has a plain head", INSTEAD)
    if processor.image_mode != "placeholder":
        refuse("llava", "all pictures stand before all words (image_mode=prefix), which no chat template does", INSTEAD)
    if not isinstance(processor.tokenizer, PreTrainedTokenizerFast):
        kind = type(processor.tokenizer).__name__
        refuse("llava", f"its tokenizer is a {kind}, not one of tokenizers", "export it as merged")
    check_connector(model)


def check_connector(model: VLM) -> None:
    """Raise ExportError unless the connector is two linear layers, GELU between them, no wider than the text."""
    connector, width = model.connector, model.language_dim
    settings = dict(model.config.connector or {})
    retrain = f"{INSTEAD}, or train with model.connector.name=mlp and model.connector.args.hidden_dim={width}"
    if not isinstance(connector, MLPConnector):
        refuse("llava", f"its connector is {settings['name']}, and LLaVA has two linear layers with GELU", retrain)
    layers: list[Any] = [layer for layer in connector.layers if not isinstance(layer, nn.Dropout)]
    if list(map(type, layers)) != [nn.Linear, nn.GELU, nn.Linear] or connector.factor != 1:
        refuse("llava", f"its connector {settings} is not two linear layers with GELU for each patch", retrain)
    if (hidden := layers[0].out_features) > width:
        refuse("llava", f"its connector is {hidden} wide inside, and LLaVA as wide as the text, {width}", retrain)


def llava_model(model: VLM, image_token_id: int) -> LlavaForConditionalGeneration:
    """The same weights in transformers' LLaVA.

    Args:
        model: without adapters. image_token_id: of the new tokenizer; the vocabulary grows if it lies behind it.
    """
    config = llava_config(model, image_token_id)
    tensors = {f"model.vision_tower.{name}": t for name, t in model.vision.state_dict().items()}
    tensors |= {f"model.multi_modal_projector.{name}": t for name, t in projector(model).items()}
    tensors |= words(model, config.tie_word_embeddings, image_token_id + 1)
    with torch.device("meta"):
        llava: Any = LlavaForConditionalGeneration(config)
    llava.load_state_dict(tensors, strict=True, assign=True)
    llava.tie_weights()
    llava.generation_config = copy.deepcopy(model.generation_config)
    return llava.eval()  # type: ignore[no-any-return]


def words(model: VLM, tied: bool, num_rows: int) -> dict[str, Tensor]:
    """The language model with at least ``num_rows`` rows in its embeddings and its head, which may be the same ones."""
    base: Any = model.language.base_model
    embeddings: Any = model.get_input_embeddings().weight
    own_head: Any = model.get_output_embeddings().weight
    name = next(name for name, parameter in base.named_parameters() if parameter is embeddings)
    tensors: dict[str, Tensor] = {**base.state_dict(), name: with_rows(embeddings.detach(), num_rows)}
    last = tensors[name] if tied else with_rows(own_head.detach(), num_rows).clone()
    return {**{f"model.language_model.{name}": tensor for name, tensor in tensors.items()}, "lm_head.weight": last}


def llava_config(model: VLM, image_token_id: int) -> LlavaConfig:
    """What LLaVA is told about the parts."""
    ours = model.config
    text: PreTrainedConfig = copy.deepcopy(model.language.config)
    text.vocab_size = max(int(text.vocab_size), image_token_id + 1)
    # the only name that LLaVA ties its head to; other models (GPT-2) get a head of their own
    text.tie_word_embeddings = bool(text.tie_word_embeddings) and hasattr(model.language.base_model, "embed_tokens")
    vision = copy.deepcopy(model.vision.config)
    if vision.model_type == "siglip_vision_model":
        vision.vision_use_head = False
        # the last hidden state is the one behind the last norm, unless another one was asked for
        vision.tie_last_hidden_states = ours.vision_layer is None
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=ours.num_image_tokens,
        projector_hidden_act="gelu",
        vision_feature_layer=-1 if ours.vision_layer is None else ours.vision_layer,
        vision_feature_select_strategy=_strategy(ours),
        tie_word_embeddings=text.tie_word_embeddings,
        dtype=torch.float32,
    )


def _strategy(config: Any) -> Literal["default", "full"]:
    """LLaVA's "default" leaves out the first token, the CLS of CLIP; SigLIP has none."""
    return "default" if config.num_prefix_tokens and not config.keep_cls else "full"


def projector(model: VLM) -> dict[str, Tensor]:
    """The connector's two layers, with ``image_scale`` in the second one, and as wide between them as the text."""
    first, second = (layer for layer in model.connector.layers if isinstance(layer, nn.Linear))  # type: ignore[union-attr]
    gap = model.language_dim - first.out_features  # more units that give zero change nothing
    scale = model.config.image_scale
    return {
        "linear_1.weight": F.pad(first.weight.detach(), (0, 0, 0, gap)),
        "linear_1.bias": F.pad(first.bias.detach(), (0, gap)),
        "linear_2.weight": F.pad(second.weight.detach() * scale, (0, gap)),
        "linear_2.bias": second.bias.detach() * scale,
    }


def with_rows(weight: Tensor, num_rows: int) -> Tensor:
    """float [V, D] -> [num_rows, D]; a new row is the mean of all, so its logit is the mean, never the largest."""
    missing = num_rows - len(weight)
    return torch.cat([weight, weight.mean(0, keepdim=True).expand(missing, -1)]) if missing > 0 else weight


# --- words -----------------------------------------------------------------------------------------------------------


def llava_processor(model: VLM, processor: Processor) -> LlavaProcessor:
    """transformers' processor that writes our prompts, token for token."""
    tokenizer = marked_tokenizer(processor.tokenizer)
    config = model.config
    return LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=_strategy(config),
        num_additional_image_tokens=config.num_prefix_tokens,
        image_token=IMAGE_TEXT,
        chat_template=chat_template(processor),
    )


def marked_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy that knows ``<image>`` and drops MARK between tokens."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.add_special_tokens([AddedToken(IMAGE_TEXT, special=True, normalized=False)])
    cut: Any = pre_tokenizers.Split(MARK, "removed")
    then = backend.pre_tokenizer
    backend.pre_tokenizer = cut if then is None else pre_tokenizers.Sequence([cut, then])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def chat_template(processor: Processor) -> str:
    """Our template for the messages of transformers, with BOS where the model wants one."""
    settings = "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in processor.template_kwargs.items())
    bare = copy.copy(processor)
    bare.add_bos = False
    bos = processor.tokenizer.bos_token
    writes_bos = bos is not None and bare.apply_chat_template(user_turn([], "q")).startswith(bos)
    lead = "bos_token" if processor.add_bos and not writes_bos else "''"
    return f"{settings}{CONTENT_TO_TEXT}{{{{ {lead} }}}}{processor.chat_template}"


def check_prompts(ours: Processor, theirs: LlavaProcessor) -> None:
    """Raise ExportError unless both write the same tokens for a question, and for a second one behind an answer."""
    picture = PIL.Image.new("RGB", (64, 48))
    first = user_turn([picture], "What is here? Two  things")
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]}
    for messages in (first, [*first, answer, *user_turn([], "And now?")], user_turn([], "No picture?")):
        wanted = ours.encode_prompt(messages).input_ids
        wanted = [theirs.image_token_id if i == ours.image_token_id else i for i in wanted]
        shown = [_with_picture(message, picture) for message in messages]
        encoded: Any = theirs.apply_chat_template(shown, add_generation_prompt=True, tokenize=True, return_dict=True)
        if encoded["input_ids"][0] != wanted:
            refuse("llava", "its tokenizer joins words that training kept apart, so the prompts would differ", INSTEAD)


def _with_picture(message: Any, picture: PIL.Image.Image) -> dict[str, Any]:
    parts = [{**part, "image": picture} if part["type"] == "image" else part for part in message["content"]]
    return {"role": message["role"], "content": parts}

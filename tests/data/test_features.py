"""The feature cache: content addresses, whole files or none, limits, several processes."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eyespot.cli import main
from eyespot.compose import build_from_settings
from eyespot.config import ConnectorSettings, LanguageSettings, ModelSettings, VisionSettings
from eyespot.data import features
from eyespot.data.features import CacheFull, FeatureStore, clear, encoder_key, fill, make_room, picture_digest, stored
from eyespot.models.vlm import VLM
from eyespot.processing.images import ImageError
from eyespot.processing.processor import Processor

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def parts(seed: int = 0, **image: int) -> tuple[VLM, Processor]:
    torch.manual_seed(seed)
    return build_from_settings(
        ModelSettings(
            VisionSettings("vit", {"image_size": 16, "patch_size": 8, **SIZES, **image}, train="frozen"),
            ConnectorSettings("linear"),
            LanguageSettings("gpt", {"max_position_embeddings": 96, **SIZES}, tokenizer="byte"),
        )
    )


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    names = [str(tmp_path / f"{i}.png") for i in range(10)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(name)
    return names


def digests(count: int, seed: int = 0) -> list[bytes]:
    return [bytes([seed, i]) + bytes(30) for i in range(count)]


def test_a_picture_is_known_by_its_content(pictures: list[str], tmp_path: Path) -> None:
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(pictures[0]).read_bytes())
    assert picture_digest(pictures[0]) == picture_digest(copy) == picture_digest(copy.read_bytes())
    assert len({picture_digest(name) for name in pictures}) == 10
    copy.write_bytes(Path(pictures[1]).read_bytes())
    assert picture_digest(copy) == picture_digest(pictures[1]), "a changed file has another digest"
    assert picture_digest(Image.open(copy)) == picture_digest(Image.open(pictures[1]))
    assert picture_digest(Image.open(copy)) != picture_digest(Image.open(pictures[0]))


def test_an_unreadable_picture_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("missing.png", "does not exist"), ("", "folder"), ("pipe", "not a regular file")):
        with pytest.raises(ImageError, match=words):
            picture_digest(tmp_path / name)


def test_the_key_follows_weights_preprocessing_layer_and_precision() -> None:
    model, processor = parts()
    key = encoder_key(model, processor, "32-true cpu")
    assert key == encoder_key(*parts(), "32-true cpu")
    others = [encoder_key(*parts(seed=1), "32-true cpu"), encoder_key(*parts(image_size=24), "32-true cpu")]
    others.append(encoder_key(model, processor, "bf16-mixed cpu"))
    model.config.vision_layer = -2
    others.append(encoder_key(model, processor, "32-true cpu"))
    model.config.vision_layer = None
    processor.image_processor.image_mean = (0.1, 0.2, 0.3)
    others.append(encoder_key(model, processor, "32-true cpu"))
    assert len({key, *others}) == 6


def test_fill_and_read(pictures: list[str], tmp_path: Path) -> None:
    model, processor = parts()
    with torch.no_grad():
        wanted = model.encode_images(processor.pixel_values(pictures))
    store = FeatureStore(tmp_path / "cache" / "key")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with torch.no_grad():
        given = [*pictures[:7], pictures[0], str(broken), str(tmp_path / "missing.png"), *pictures[7:]]
        done = fill(store, given, processor, model.encode_images, limit_bytes=1e9, batch_size=4, num_workers=1)
    assert done == len(store) == 10
    assert fill(store, given[:8], processor, model.encode_images, limit_bytes=1e9) == 0
    assert str(broken) not in store
    for other in (store, FeatureStore(store.folder), pickle.loads(pickle.dumps(store))):
        for picture, features_wanted in zip(pictures, wanted, strict=True):
            torch.testing.assert_close(other[picture], features_wanted)
    with pytest.raises(KeyError):
        store[str(broken)]


def test_an_interrupted_fill_goes_on(pictures: list[str], tmp_path: Path) -> None:
    model, processor = parts()
    store = FeatureStore(tmp_path / "cache" / "key")
    calls = 0

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        with torch.no_grad():
            return model.encode_images(pixels)

    with pytest.raises(KeyboardInterrupt):
        fill(store, pictures, processor, encode, limit_bytes=1e9, batch_size=3)
    assert len(FeatureStore(store.folder)) == 6
    assert fill(store, pictures, processor, encode, limit_bytes=1e9, batch_size=3) == 4
    assert len(store) == 10


def test_a_killed_writer_leaves_no_half_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(tmp_path / "key")

    def dies(tensors: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(features, "save_file", dies)
    with pytest.raises(OSError, match="No space"):
        store.add(digests(2), torch.zeros(2, 3, 4))
    assert list(store.folder.iterdir()) == []


def test_two_stores_see_each_other(tmp_path: Path) -> None:
    one, other = FeatureStore(tmp_path / "key"), FeatureStore(tmp_path / "key")
    one.add(digests(2), torch.zeros(2, 3, 4))
    other.add(digests(3, 1), torch.ones(3, 3, 4))
    one.refresh()
    assert len(one) == len(other) == 5


def test_segments_are_mapped_not_read(tmp_path: Path) -> None:
    FeatureStore(tmp_path / "key").add(digests(64), torch.ones(64, 1000, 1000))  # 256 MB
    before = resident()
    store = FeatureStore(tmp_path / "key")
    assert len(store) == 64
    assert resident() - before < 64e6


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_least_recently_used_encoder_makes_room(tmp_path: Path) -> None:
    for age, name in ((300, "old"), (200, "middle"), (100, "new")):
        store = FeatureStore(tmp_path / name)
        store.add(digests(10), torch.zeros(10, 10, 250))  # 100 kB
        for path in store.folder.iterdir():
            os.utime(path, (1e9 - age, 1e9 - age))
    make_room(tmp_path / "mine", 50_000, limit_bytes=400_000)
    assert {row.key for row in stored(tmp_path) if row.num_pictures} == {"old", "middle", "new"}
    make_room(tmp_path / "mine", 150_000, limit_bytes=400_000)
    assert {row.key for row in stored(tmp_path) if row.num_pictures} == {"middle", "new"}
    with pytest.raises(CacheFull, match=r"need 0\.0 GB; the limit is 0\.0 GB \(data\.cache_gb\)"):
        make_room(tmp_path / "mine", 450_000, limit_bytes=400_000)
    assert {row.key for row in stored(tmp_path) if row.num_pictures} == {"middle", "new"}, "nothing is deleted in vain"


def test_own_features_are_never_deleted_for_more_of_them(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "mine")
    store.add(digests(10), torch.zeros(10, 10, 250))
    with pytest.raises(CacheFull):
        make_room(store.folder, 350_000, limit_bytes=400_000)
    assert len(FeatureStore(store.folder)) == 10


def test_clear(tmp_path: Path) -> None:
    for name in ("a", "b"):
        FeatureStore(tmp_path / name).add(digests(1), torch.zeros(1, 10, 250))
    with pytest.raises(ValueError, match=r"no features of an encoder 'c' are kept; there are: [ab], [ab]"):
        clear(tmp_path, "c")
    assert clear(tmp_path, "a") > 10_000
    assert [row.key for row in stored(tmp_path)] == ["b"]
    assert clear(tmp_path) > 10_000
    assert stored(tmp_path) == [] and clear(tmp_path) == 0


@pytest.mark.filterwarnings("ignore")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EYESPOT_CACHE", str(tmp_path))
    assert main(["cache", "show"]) == 0
    assert "0.0 MB in" in capsys.readouterr().out
    assert main(["cache", "fill", "recipe=smoke", "model.vision.train=frozen"]) == 0
    shown = capsys.readouterr().out
    [row] = stored(tmp_path / "features")
    assert row.key in shown and "eyespot_vit" in shown and row.num_pictures > 5
    assert main(["cache", "fill", "recipe=smoke"]) == 2
    assert "model.vision.train is 'full'" in capsys.readouterr().err
    assert main(["cache", "clear", "nothing"]) == 2
    assert main(["cache", "clear", row.key]) == 0
    assert "freed" in capsys.readouterr().out and stored(tmp_path / "features") == []


def test_bytes_of_a_picture_are_a_picture(tmp_path: Path) -> None:
    model, processor = parts()
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    store = FeatureStore(tmp_path / "key")
    with torch.no_grad():
        assert fill(store, [file.getvalue()], processor, model.encode_images, limit_bytes=1e9) == 1
    assert file.getvalue() in store

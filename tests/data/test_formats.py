from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eyespot.data.formats.captions import read_captions
from eyespot.data.formats.easy_vqa import read_easy_vqa
from eyespot.data.formats.llava import _parts, read_llava
from eyespot.data.formats.records import BadRecord, image_file
from eyespot.data.formats.vqa import read_vqa
from eyespot.data.sample import Rejected, Sample, image_part, text_part
from eyespot.processing.images import ImageError, open_image


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        (tmp_path / name).write_bytes(png(colour))
    return tmp_path


def sides(records: Iterable[Sample | Rejected]) -> tuple[list[Sample], list[Rejected]]:
    found = list(records)
    samples = [record for record in found if isinstance(record, Sample)]
    return samples, [record for record in found if isinstance(record, Rejected)]


def turns(*values: str, first: str = "human") -> list[dict[str, str]]:
    speakers = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": speakers[index % 2], "value": value} for index, value in enumerate(values)]


def test_readers_import_without_torch() -> None:
    code = (
        "import sys, eyespot.data.sources\n"
        "from eyespot.registry import FORMATS\n"
        "[FORMATS[name] for name in FORMATS]\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class TestEasyVqa:
    def test_sizes_answers_and_groups(self) -> None:
        pytest.importorskip("easy_vqa")
        samples, rejected = sides(read_easy_vqa("test"))
        assert (len(samples), rejected) == (9_673, [])
        assert len({sample.group for sample in samples}) == 1_000
        assert len({sample.id for sample in samples}) == 9_673
        assert {answer for sample in samples for answer in sample.answers} >= {"yes", "no", "circle"}
        assert open_image(samples[0].images[0]).size == (64, 64)
        assert samples[0].messages[1]["content"] == [text_part(samples[0].answers[0])]

    def test_missing_picture_is_rejected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        easy_vqa = pytest.importorskip("easy_vqa")
        monkeypatch.setattr(easy_vqa, "get_test_questions", lambda: (["q", "q"], ["yes", "no"], [0, 10**6]))
        samples, rejected = sides(read_easy_vqa("test"))
        assert len(samples) == 1
        assert rejected == [Rejected("easy_vqa-test-1", "image file is missing", "picture 1000000")]

    def test_unknown_split_and_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("easy_vqa")
        with pytest.raises(ValueError, match=r"unknown split 'tset'; did you mean 'test'\? \(choices: train, test\)"):
            next(read_easy_vqa("tset"))
        monkeypatch.setitem(sys.modules, "easy_vqa", None)
        with pytest.raises(ImportError, match=r'pip install "eyespot\[quickstart\]"'):
            next(read_easy_vqa())


def llava_file(folder: Path, records: Any) -> Path:
    path = folder / "chat.json"
    path.write_text(json.dumps(records))
    return path


class TestLlava:
    def test_turns_and_places_of_images(self, folder: Path) -> None:
        records = [
            {"id": 7, "image": "a.png", "conversations": turns("<image>\nwhat?", "red", "sure?", "yes")},
            {"image": ["a.png", "b.png"], "conversations": turns("<image>\n<image>\ncompare", "red, blue")},
            {"image": ["a.png", "b.png"], "conversations": turns("first\n<image>", "red", "then <image>", "blue")},
            {"id": "text", "conversations": [{"from": "system", "value": "be kind"}, *turns("hello", "hi")]},
        ]
        samples, rejected = sides(read_llava(llava_file(folder, records)))
        assert rejected == []
        assert [sample.id for sample in samples] == ["7", "chat:2", "chat:3", "text"]
        assert [message["role"] for message in samples[0].messages] == ["user", "assistant"] * 2
        assert samples[0].messages[0]["content"] == [image_part(), text_part("what?")]
        assert samples[0].images == (str(folder / "a.png"),)
        assert samples[1].messages[0]["content"] == [image_part(), image_part(), text_part("compare")]
        assert samples[2].messages[0]["content"] == [text_part("first"), image_part()]
        assert samples[2].messages[2]["content"] == [text_part("then "), image_part()]
        assert samples[3].messages[0] == {"role": "system", "content": [text_part("be kind")]}

    @pytest.mark.parametrize(
        ("record", "reason"),
        [
            ("text", "record is not a JSON object"),
            ({}, "'conversations' is not a list of turns"),
            ({"conversations": []}, "'conversations' is not a list of turns"),
            ({"conversations": ["hi"]}, "turn is not a JSON object"),
            ({"conversations": [{"from": "robot", "value": "hi"}]}, "turn is neither from human nor gpt nor system"),
            ({"conversations": [{"from": ["x"], "value": "hi"}]}, "turn is neither from human nor gpt nor system"),
            ({"conversations": turns("", "hi")}, "turn has no text"),
            ({"conversations": [{"from": "human"}]}, "turn has no text"),
            ({"conversations": turns("hi")}, "human and gpt do not alternate from a human to a gpt turn"),
            ({"conversations": turns("hi", "ho", first="gpt")}, "human and gpt do not alternate"),
            ({"conversations": turns("hi", "ho") * 2 + turns("hi") * 2}, "human and gpt do not alternate"),
            ({"conversations": [{"from": "system", "value": "hi"}]}, "human and gpt do not alternate"),
            ({"conversations": turns("<image>\nhi", "ho")}, "number of <image> differs"),
            ({"image": "a.png", "conversations": turns("hi", "ho")}, "number of <image> differs"),
            ({"image": ["a.png"], "conversations": turns("<image><image>", "ho")}, "number of <image> differs"),
            ({"image": "a.png", "conversations": turns("hi", "<image>")}, "<image> stands outside a human turn"),
            ({"image": "no.png", "conversations": turns("<image>\nhi", "ho")}, "image file is missing"),
            ({"image": "", "conversations": turns("<image>\nhi", "ho")}, "image is not a file name"),
            ({"image": 3, "conversations": turns("<image>\nhi", "ho")}, "image is not a file name"),
            ({"image": "a\0.png", "conversations": turns("<image>\nhi", "ho")}, "image file is missing"),
        ],
    )
    def test_bad_records_are_rejected_and_the_next_is_read(self, folder: Path, record: Any, reason: str) -> None:
        good = {"image": "b.png", "conversations": turns("<image>\nwhat?", "blue")}
        samples, rejected = sides(read_llava(llava_file(folder, [record, good])))
        assert len(samples) == 1
        assert [item.id for item in rejected] == ["chat:1"]
        assert rejected[0].reason.startswith(reason)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ('[\n {"id": 1,}\n]', r"chat\.json' is not JSON: .* at line 2, column \d+"),
            ('{"id": 1}', "holds a JSON dict; LLaVA's format is a list"),
            ("", "at line 1, column 1"),
        ],
    )
    def test_files_that_are_no_list_of_records(self, tmp_path: Path, text: str, said: str) -> None:
        path = tmp_path / "chat.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            next(read_llava(path))

    def test_missing_file_binary_file_and_both_places(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"no\.json' does not exist; check the path"):
            next(read_llava(tmp_path / "no.json"))
        (tmp_path / "chat.json").write_bytes(b"\xff\xfe[]")
        with pytest.raises(ValueError, match="is not UTF-8 text"):
            next(read_llava(tmp_path / "chat.json"))
        with pytest.raises(ValueError, match="were both given; drop one"):
            next(read_llava(tmp_path / "chat.json", image_folder=tmp_path, image_url="http://example.org"))

    def test_urls_are_fetched_with_the_options(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[Any, ...]] = []

        def fetch(url: str, *options: Any) -> Path:
            asked.append((url, *options))
            if url.endswith("gone.png"):
                raise ImageError("404")
            return folder / "a.png"

        monkeypatch.setattr("eyespot.processing.images.fetch_image", fetch)
        names = ["train/1 2.png", "https://example.org/b.png", "gone.png"]
        records = [{"image": name, "conversations": turns("<image>\nwhat?", "red")} for name in names]
        path = llava_file(folder, records)
        read = read_llava(path, image_url="http://host/coco/", cache_dir=folder / "c", timeout_s=2.0, retries=1)
        samples, rejected = sides(read)
        assert [item[0] for item in asked] == [
            "http://host/coco/train/1%202.png",
            "https://example.org/b.png",
            "http://host/coco/gone.png",
        ]
        assert {item[1:] for item in asked} == {(folder / "c", 2.0, 1)}
        assert [sample.images for sample in samples] == [(str(folder / "a.png"),)] * 2
        assert [(item.id, item.reason, item.detail) for item in rejected] == [
            ("chat:3", "image cannot be fetched", "404")
        ]

    @given(st.lists(st.sampled_from(["<image>", "\n", "\r\n", "word", " ", "<image", "image>"]), max_size=12))
    def test_markers_become_images_and_words_are_kept(self, pieces: list[str]) -> None:
        value = "".join(pieces)
        parts = _parts(value)
        assert sum(part["type"] == "image" for part in parts) == value.count("<image>")
        kept = "".join(part.get("text", "") for part in parts)
        assert kept.split() == " ".join(kept.split()).split()
        assert "".join(kept.split()) == "".join(value.replace("<image>", "").split())


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return path


def captions_of(samples: Iterable[Sample]) -> list[tuple[str, ...]]:
    return [sample.captions for sample in samples]


class TestCaptions:
    def test_csv(self, folder: Path) -> None:
        path = folder / "c.csv"
        path.write_text('image,caption_0,caption_10,caption_2\na.png,one,"ten, ten",two\nb.png,only,,\nno.png,x,y,z\n')
        samples, rejected = sides(read_captions(path, prompt="say"))
        assert captions_of(samples) == [("one", "two", "ten, ten"), ("only",)]
        assert samples[0].id == "c:1"
        assert samples[0].group == str(folder / "a.png")
        assert samples[0].messages[0]["content"] == [image_part(), text_part("say")]
        assert [(item.id, item.reason) for item in rejected] == [("c:3", "image file is missing")]

    def test_csv_with_uneven_rows_and_tsv(self, folder: Path) -> None:
        path = folder / "c.csv"
        path.write_text("\ufeffimage,caption\na.png\na.png,x,y\nb.png,fine\n", encoding="utf-8")
        samples, rejected = sides(read_captions(path))
        assert captions_of(samples) == [("fine",)]
        assert {item.reason for item in rejected} == {"row has another number of fields than the header"}
        path = folder / "c.tsv"
        path.write_text("image\tcaption\na.png\ta, b\n")
        assert captions_of(sides(read_captions(path))[0]) == [("a, b",)]

    def test_json_lines(self, folder: Path) -> None:
        records = [
            {"id": "x", "image": "a.png", "captions": ["one", "", "two"]},
            {"image": "a.png", "caption": "one"},
            {"image": "a.png", "caption": None},
            {"image": "a.png", "caption": 3},
            {"image": None, "caption": "one"},
            "{broken",
            "[1]",
            "",
        ]
        samples, rejected = sides(read_captions(write_lines(folder / "c.jsonl", records)))
        assert [sample.id for sample in samples] == ["x", "c:2"]
        assert captions_of(samples) == [("one", "two"), ("one",)]
        assert [(item.id, item.reason) for item in rejected] == [
            ("c:3", "no caption"),
            ("c:4", "caption is not a text"),
            ("c:5", "image is not a file name"),
            ("c:6", "line is not JSON"),
            ("c:7", "line is not a JSON object"),
        ]

    def test_chosen_columns_and_folder(self, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        path = write_lines(
            tmp_path_factory.mktemp("away") / "c.jsonl", [{"file": "a.png", "en": "one", "de": ["eins"]}]
        )
        read = read_captions(path, image_folder=folder, image_column="file", caption_columns=["de", "en"])
        assert captions_of(sides(read)[0]) == [("eins", "one")]
        assert sides(read_captions(path, image_column="file", caption_columns=["en"]))[1] != []

    def test_parquet_with_bytes_and_with_paths(self, folder: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = [
            {"image": {"bytes": png(), "path": None}, "caption": ["one", "two"]},
            {"image": {"bytes": None, "path": "b.png"}, "caption": ["three"]},
            {"image": None, "caption": ["four"]},
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "c.parquet")
        samples, rejected = sides(read_captions(folder / "c.parquet"))
        assert [sample.images[0] for sample in samples] == [png(), str(folder / "b.png")]
        assert captions_of(samples) == [("one", "two"), ("three",)]
        assert samples[0].group not in ("", samples[1].group)
        assert [item.id for item in rejected] == ["c:3"]

    def test_folder_of_datasets_keeps_pictures_undecoded(self, folder: Path) -> None:
        datasets = pytest.importorskip("datasets")
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        data = datasets.Dataset.from_dict(
            {"image": [{"bytes": png(), "path": None}, {"bytes": b"broken", "path": None}], "caption": ["one", "two"]},
            features=features,
        )
        data.save_to_disk(str(folder / "one"))
        samples, rejected = sides(read_captions(folder / "one"))
        assert rejected == []
        assert [sample.images[0] for sample in samples] == [png(), b"broken"]
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(folder / "two"))
        assert len(sides(read_captions(folder / "two", split="test"))[0]) == 1
        with pytest.raises(ValueError, match="has no split None; choices: train, test"):
            next(read_captions(folder / "two"))
        with pytest.raises(ValueError, match="split='test' has no effect"):
            next(read_captions(folder / "one", split="test"))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_hub_name(self, folder: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
        datasets = pytest.importorskip("datasets")
        asked: list[Any] = []
        rows: list[dict[str, Any]] = [
            {"image": PIL.Image.new("RGB", (4, 4)), "caption": "one"},
            {"image": "a.png", "caption": "two"},
        ]

        def rows_again() -> Iterator[dict[str, Any]]:
            yield from rows

        def load_dataset(name: str, split: str, streaming: bool) -> Any:
            asked.append((name, split, streaming))
            return datasets.IterableDataset.from_generator(rows_again)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        read = read_captions("some/pictures", image_folder=folder, split="train", streaming=streaming)
        samples, rejected = sides(read)
        assert (asked, rejected) == ([("some/pictures", "train", streaming)], [])
        assert isinstance(samples[0].images[0], PIL.Image.Image)
        assert samples[0].group == samples[0].id == "pictures:1"
        with pytest.raises(ValueError, match="a data set of the Hub needs a split; give split='train'"):
            next(read_captions("some/pictures"))

    def test_hub_error_says_that_nothing_was_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")

        def load_dataset(name: str, **options: Any) -> Any:
            raise FileNotFoundError("no such\ndata set")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(
            ValueError, match="'some/thing' is not on the disk and the Hub did not give it: no such data"
        ):
            next(read_captions("some/thing", split="train"))

    def test_options_without_effect_and_wrong_places(self, folder: Path) -> None:
        path = write_lines(folder / "c.jsonl", [])
        cases: list[tuple[Path, dict[str, Any], str]] = [
            (path, {"split": "train"}, "split='train' has no effect on the file"),
            (path, {"streaming": True}, "streaming has no effect"),
            (path, {"caption_columns": "en"}, "caption_columns is the text 'en'; give a list"),
            (folder / "no.csv", {}, r"no\.csv' does not exist"),
            (folder / "a.png", {}, r"ends in '\.png'; give one of \.csv"),
            (folder, {}, "was not written by save_to_disk"),
        ]
        for place, options, said in cases:
            with pytest.raises(ValueError, match=said):
                next(read_captions(place, **options))

    def test_missing_column_names_the_columns(self, folder: Path) -> None:
        path = folder / "c.csv"
        path.write_text("images,caption\na.png,one\n")
        with pytest.raises(
            ValueError, match=r"no column 'image'; did you mean 'images'\? \(columns: images, caption\)"
        ):
            next(read_captions(path))
        with pytest.raises(ValueError, match="no column 'text'"):
            next(read_captions(path, image_column="images", caption_columns=["text"]))

    def test_damaged_files(self, folder: Path) -> None:
        (folder / "c.csv").write_bytes(b"image,caption\n\xff,x\n")
        with pytest.raises(ValueError, match="is not UTF-8 text"):
            list(read_captions(folder / "c.csv"))
        (folder / "d.csv").write_text("image,caption\na.png," + "x" * 200_000)
        with pytest.raises(ValueError, match="is not CSV: field larger"):
            list(read_captions(folder / "d.csv"))
        pytest.importorskip("pyarrow")
        (folder / "c.parquet").write_bytes(b"no parquet at all")
        with pytest.raises(ValueError, match="is not a parquet file"):
            list(read_captions(folder / "c.parquet"))


class TestVqa:
    def test_good_lines(self, folder: Path) -> None:
        records = [
            {"id": 0, "image": "a.png", "question": "what?", "answer": "red"},
            {"images": ["a.png", "b.png"], "question": "which?", "answers": ["blue", "red", "red"]},
            {"images": [], "question": "why?", "answer": "so", "answers": ["so", "thus"]},
        ]
        samples, rejected = sides(read_vqa(write_lines(folder / "q.jsonl", records)))
        assert rejected == []
        assert [sample.id for sample in samples] == ["0", "q:2", "q:3"]
        assert [len(sample.images) for sample in samples] == [1, 2, 0]
        assert [sample.messages[1]["content"][0].get("text") for sample in samples] == ["red", "red", "so"]
        assert [sample.answers for sample in samples] == [("red",), ("blue", "red", "red"), ("so", "thus")]
        assert samples[0].group == str(folder / "a.png")

    @pytest.mark.parametrize(
        ("record", "reason"),
        [
            ("{", "line is not JSON"),
            ("3", "line is not a JSON object"),
            ({"question": "what?", "answer": "red"}, "record needs exactly one of 'image' and 'images'"),
            ({"image": "a.png", "images": [], "question": "what?", "answer": "red"}, "record needs exactly one"),
            ({"images": "a.png", "question": "what?", "answer": "red"}, "'images' is not a list"),
            ({"image": "no.png", "question": "what?", "answer": "red"}, "image file is missing"),
            ({"image": "a.png", "answer": "red"}, "question is not a text"),
            ({"image": "a.png", "question": " ", "answer": "red"}, "question is not a text"),
            ({"image": "a.png", "question": "what?"}, "answer is not a text"),
            ({"image": "a.png", "question": "what?", "answer": 3}, "answer is not a text"),
            ({"image": "a.png", "question": "what?", "answers": []}, "'answers' is not a list of texts"),
            ({"image": "a.png", "question": "what?", "answers": "red"}, "'answers' is not a list of texts"),
            ({"image": "a.png", "question": "what?", "answers": ["red", None]}, "answer is not a text"),
        ],
    )
    def test_bad_lines_are_rejected_and_the_next_is_read(self, folder: Path, record: Any, reason: str) -> None:
        good = {"image": "b.png", "question": "what?", "answer": "blue"}
        samples, rejected = sides(read_vqa(write_lines(folder / "q.jsonl", [record, good])))
        assert len(samples) == 1
        assert [item.id for item in rejected] == ["q:1"]
        assert rejected[0].reason.startswith(reason)

    def test_folder_in_place_of_a_file_and_other_text(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="is a folder; check the path"):
            next(read_vqa(folder))
        (folder / "q.jsonl").write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match="is not UTF-8 text"):
            next(read_vqa(folder / "q.jsonl"))

    @given(
        st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda c: st.lists(c, max_size=2))
    )
    def test_any_value_anywhere_gives_a_sample_or_a_rejection(self, value: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "eyespot.data.formats.vqa.json_lines",
                lambda path: enumerate(
                    {"image": "x", "question": "q", "answer": "a", key: value}
                    for key in ("id", "image", "question", "answer", "answers")
                ),
            )
            for record in read_vqa(__file__):
                assert isinstance(record, (Sample, Rejected))


def test_image_file_takes_absolute_and_relative_names(folder: Path) -> None:
    assert image_file("a.png", folder) == image_file(str(folder / "a.png"), "/elsewhere") == str(folder / "a.png")
    with pytest.raises(BadRecord, match="image file is missing"):
        image_file(".", folder)

from __future__ import annotations

import contextlib
import http.server
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING, AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from eyespot.processing.images import EyespotImageProcessor, ImageError, content_hash, fetch_image, open_image


def picture(width: int = 8, height: int = 6, seed: int = 0) -> PIL.Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def encoded(image: PIL.Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def same(first: PIL.Image.Image, second: PIL.Image.Image) -> bool:
    return first.mode == second.mode and first.size == second.size and first.tobytes() == second.tobytes()


class TestOpenImage:
    def test_path_text_path_object_bytes_and_pillow_image_agree(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(encoded(picture()))
        for source in (path, str(path), path.read_bytes(), picture()):
            assert same(open_image(source), picture())

    @pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "JPEG", "JPEG2000", "AVIF", "TGA"])
    def test_formats_open_as_rgb(self, format: str) -> None:
        opened = open_image(encoded(picture(16, 16), format))
        assert (opened.mode, opened.size) == ("RGB", (16, 16))

    def test_every_orientation_stands_upright_once(self) -> None:
        for orientation in range(1, 9):
            exif = PIL.Image.Exif()
            exif[0x0112] = orientation
            stored = picture()
            turned = {
                2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
                3: PIL.Image.Transpose.ROTATE_180,
                4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
                5: PIL.Image.Transpose.TRANSPOSE,
                6: PIL.Image.Transpose.ROTATE_270,
                7: PIL.Image.Transpose.TRANSVERSE,
                8: PIL.Image.Transpose.ROTATE_90,
            }
            upright = stored.transpose(turned[orientation]) if orientation in turned else stored
            opened = open_image(encoded(stored, exif=exif))
            assert same(opened, upright)
            assert same(open_image(opened), upright)

    def test_given_pillow_image_is_left_alone(self) -> None:
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        given_image = PIL.Image.open(io.BytesIO(encoded(picture(), exif=exif)))
        assert open_image(given_image).size == (6, 8)
        assert given_image.size == (8, 6)
        plain = picture()
        assert open_image(plain) is not plain

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa"])
    def test_transparency_is_laid_on_white(self, mode: str) -> None:
        image = PIL.Image.new("RGBA", (2, 1), (0, 0, 0, 0))
        image.putpixel((1, 0), (0, 0, 0, 255))
        image = image.convert("LA").convert(mode) if mode in ("LA", "La") else image.convert(mode)
        assert list(open_image(image).get_flattened_data()) == [(255, 255, 255), (0, 0, 0)]

    def test_transparent_palette_entry_and_grey_level(self) -> None:
        with_alpha = PIL.Image.new("PA", (1, 1))
        with_alpha.putpalette([5, 6, 7])
        with_alpha.putpixel((0, 0), (0, 0))
        assert open_image(with_alpha).getpixel((0, 0)) == (255, 255, 255)
        palette = PIL.Image.new("P", (2, 1))
        palette.putpalette([255, 0, 0, 0, 0, 255])
        palette.putpixel((1, 0), 1)
        assert list(open_image(encoded(palette)).get_flattened_data()) == [(255, 0, 0), (0, 0, 255)]
        clear = open_image(encoded(palette, transparency=0))
        assert list(clear.get_flattened_data()) == [(255, 255, 255), (0, 0, 255)]
        grey = encoded(PIL.Image.new("L", (1, 1), 7), transparency=7)
        assert open_image(grey).getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32])
    def test_sixteen_bit_grey_is_scaled_and_not_clipped(self, dtype: type) -> None:
        image = PIL.Image.fromarray(np.array([[0, 257, 32_896, 65_535]], dtype=dtype))
        assert [red for red, _, _ in np.asarray(open_image(image))[0].tolist()] == [0, 1, 128, 255]

    def test_sixteen_bit_png_with_transparent_level(self) -> None:
        image = PIL.Image.fromarray(np.array([[300, 32_896]], dtype=np.uint16))
        opened = open_image(encoded(image, transparency=300))
        assert [red for red, _, _ in np.asarray(opened)[0].tolist()] == [255, 128]

    def test_cmyk_one_bit_and_grey(self) -> None:
        assert open_image(PIL.Image.new("CMYK", (1, 1), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
        assert open_image(PIL.Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
        assert open_image(PIL.Image.new("L", (1, 1), 9)).getpixel((0, 0)) == (9, 9, 9)

    def test_first_frame_of_an_animation(self) -> None:
        red, blue = PIL.Image.new("RGB", (4, 4), "red"), PIL.Image.new("RGB", (4, 4), "blue")
        for format in ("GIF", "PNG", "WEBP"):
            data = encoded(red, format, save_all=True, append_images=[blue])
            pixel = open_image(data).getpixel((0, 0))
            assert isinstance(pixel, tuple)
            assert pixel[0] > 200 and pixel[2] < 50, format


class TestOpenImageErrors:
    def test_missing_folder_device_and_url(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match=r"'.*no\.png' does not exist; check the path"):
            open_image(tmp_path / "no.png")
        with pytest.raises(ImageError, match="is a folder; give the path of a picture file"):
            open_image(tmp_path)
        with pytest.raises(ImageError, match="'/dev/zero' is not a regular file"):
            open_image("/dev/zero")
        with pytest.raises(ImageError, match="is a URL, not a file; get it with fetch_image"):
            open_image("https://example.org/a.png")

    def test_text_file_with_the_name_of_a_picture(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_text("I am not a picture")
        with pytest.raises(ImageError, match=r"a\.png' is not a picture; give a file in one of PNG, JPEG"):
            open_image(path)
        path.write_bytes(b"")
        with pytest.raises(ImageError, match="is empty; give a picture"):
            open_image(path)

    def test_postscript_is_refused(self) -> None:
        with pytest.raises(ImageError, match="is not a picture"):
            open_image(encoded(picture(), "EPS"))

    @pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
    def test_truncated(self, format: str) -> None:
        data = encoded(picture(64, 64), format)
        with pytest.raises(ImageError, match=r"broken or cut short|not a picture"):
            open_image(data[: len(data) // 2])

    def test_too_many_pixels_are_refused_before_decoding(self) -> None:
        bomb = encoded(PIL.Image.new("1", (9_000, 9_000)))
        with pytest.raises(ImageError, match=r"9000x9000 = 81000000 pixels, the limit is 64000000; .* max_pixels"):
            open_image(bomb)
        with pytest.raises(ImageError, match="the limit is 47"):
            open_image(picture(8, 6), max_pixels=47)
        assert open_image(picture(8, 6), max_pixels=48).size == (8, 6)

    def test_more_pixels_than_pillow_itself_allows(self) -> None:
        with pytest.raises(ImageError, match=r"limit|too large"):
            open_image(encoded(PIL.Image.new("1", (20_000, 10_000))), max_pixels=10**12)

    def test_no_pixels_and_unbounded_pixels(self) -> None:
        with pytest.raises(ImageError, match="0x5 and has no pixels"):
            open_image(PIL.Image.new("RGB", (0, 5)))
        with pytest.raises(ImageError, match="32-bit float"):
            open_image(PIL.Image.new("F", (2, 2)))
        with pytest.raises(ImageError, match="pixels from -5 to -5, the limits are 0 and 65535"):
            open_image(PIL.Image.new("I", (2, 2), -5))

    @pytest.mark.parametrize("source", [None, 3, [], np.zeros((2, 2, 3)), "", "a\0b", "x" * 10_000, b"", Path()])
    def test_strange_sources(self, source: Any) -> None:
        with pytest.raises(ImageError) as caught:
            open_image(source)
        assert "\n" not in str(caught.value)

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def test_damaged_files_give_a_picture_or_an_image_error(self, data: st.DataObject) -> None:
        format = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "TGA", "PPM"]))
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif} if format in ("PNG", "JPEG", "WEBP", "TIFF") else {}
        damaged = bytearray(encoded(picture(16, 16), format, **options))
        for _ in range(data.draw(st.integers(0, 6))):
            damaged[data.draw(st.integers(0, min(len(damaged), 200) - 1))] = data.draw(st.integers(0, 255))
        try:
            opened = open_image(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]), max_pixels=1_000_000)
        except ImageError as error:
            assert "\n" not in str(error)
        else:
            assert opened.mode == "RGB"

    @settings(max_examples=100, deadline=None)
    @given(st.binary(max_size=200))
    def test_arbitrary_bytes(self, data: bytes) -> None:
        with contextlib.suppress(ImageError):
            assert open_image(data, max_pixels=1_000_000).mode == "RGB"


class TestContentHash:
    def test_encodings_of_one_picture_agree_and_other_pictures_differ(self, tmp_path: Path) -> None:
        image = picture()
        (tmp_path / "copy.bmp").write_bytes(encoded(image, "BMP"))
        one = content_hash(encoded(image, "PNG"))
        assert one == content_hash(image) == content_hash(tmp_path / "copy.bmp")
        assert one == content_hash(encoded(image, "WEBP", lossless=True))
        assert len(one) == 64
        assert one != content_hash(picture(seed=1))

    def test_shape_counts(self) -> None:
        assert content_hash(PIL.Image.new("RGB", (2, 8))) != content_hash(PIL.Image.new("RGB", (8, 2)))


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    requests = 0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    body = encoded(picture(64, 64))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert isinstance(self.server, Server)
            self.server.requests += 1
            path = self.path.lstrip("/")
            if path == "missing" or (path == "flaky" and self.server.requests < 3):
                self.send_error(404 if path == "missing" else 503)
                return
            if path == "file":
                self.send_response(302)
                self.send_header("Location", "file:///etc/hostname")
                self.end_headers()
                return
            self.send_response(200)
            if path != "nolength":
                self.send_header("Content-Length", str(len(body) + (10 if path == "short" else 0)))
            self.end_headers()
            self.send(path)

        def send(self, path: str) -> None:
            if path == "slow":
                time.sleep(0.6)
            if path == "drip":
                for byte in body[:40]:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.03)
            self.wfile.write(b"<html>" * 10 if path == "page" else body)

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:
                self.close_connection = True

        def finish(self) -> None:
            try:
                super().finish()
            except ConnectionError:
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def url(server: Server, path: str) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/{path}"


class TestFetchImage:
    def test_good_picture_is_cached_and_survives_the_server(self, server: Server, tmp_path: Path) -> None:
        path = fetch_image(url(server, "good"), tmp_path / "cache")
        assert same(open_image(path), picture(64, 64))
        server.shutdown()
        server.server_close()
        assert fetch_image(url(server, "good"), tmp_path / "cache", retries=0) == path
        assert server.requests == 1
        assert [file.name for file in (tmp_path / "cache").iterdir()] == [path.name]
        with pytest.raises(ImageError, match=r"cannot fetch 'http.*other': .*\(attempts: 2, time-out: 1\.0 s\)"):
            fetch_image(url(server, "other"), tmp_path / "cache", timeout_s=1.0, retries=1, back_off_s=0.01)

    def test_not_found_is_not_tried_again(self, server: Server, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="the server answered 404 Not Found; check the address"):
            fetch_image(url(server, "missing"), tmp_path)
        assert server.requests == 1

    def test_flaky_server_is_tried_again(self, server: Server, tmp_path: Path) -> None:
        assert fetch_image(url(server, "flaky"), tmp_path, retries=2, back_off_s=0.01).is_file()
        assert server.requests == 3

    def test_flaky_server_beyond_the_retries(self, server: Server, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match=r"503 .*\(attempts: 2"):
            fetch_image(url(server, "flaky"), tmp_path, retries=1, back_off_s=0.01)

    @pytest.mark.parametrize("path", ["slow", "drip"])
    def test_slow_server_runs_into_the_time_limit(self, server: Server, tmp_path: Path, path: str) -> None:
        start = time.monotonic()
        with pytest.raises(ImageError, match=r"timed out.*time-out: 0\.2 s"):
            fetch_image(url(server, path), tmp_path, timeout_s=0.2, retries=0)
        assert time.monotonic() - start < 0.55

    @pytest.mark.parametrize("path", ["good", "nolength"])
    def test_too_large(self, server: Server, tmp_path: Path, path: str) -> None:
        with pytest.raises(ImageError, match="has more than 1000 bytes; choose a smaller picture or raise max_bytes"):
            fetch_image(url(server, path), tmp_path, max_bytes=1_000)
        assert server.requests == 1

    @pytest.mark.parametrize(
        ("path", "said"), [("page", "gave no usable picture|cannot fetch"), ("short", "cannot fetch"), ("file", "file")]
    )
    def test_what_is_no_picture_is_not_cached(self, server: Server, tmp_path: Path, path: str, said: str) -> None:
        with pytest.raises(ImageError, match=said):
            fetch_image(url(server, path), tmp_path, retries=0)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "address", ["ftp://example.org/a", "file:///etc/hostname", "a.png", "", "http://", "http://[", "http://a:b/c"]
    )
    def test_other_addresses(self, tmp_path: Path, address: str) -> None:
        with pytest.raises(ImageError, match="URL"):
            fetch_image(address, tmp_path, retries=0)

    def test_letters_outside_ascii_and_blanks(self, server: Server, tmp_path: Path) -> None:
        assert fetch_image(url(server, "gr\u00fcn 1.png"), tmp_path, retries=0).is_file()


MEANS: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


class TestEyespotImageProcessor:
    @pytest.mark.parametrize("size", [(31, 17), (17, 31), (64, 64), (300, 200), (5, 5)])
    @pytest.mark.parametrize("resample", [0, 1, 2, 3])
    @pytest.mark.parametrize("reference", [ViTImageProcessorPil, SiglipImageProcessorPil])
    def test_equals_transformers(self, reference: Any, resample: int, size: tuple[int, int]) -> None:
        ours = EyespotImageProcessor(size=32, resample=resample, **MEANS)
        theirs = reference(size={"height": 32, "width": 32}, resample=resample, **MEANS)
        pictures = [picture(*size), picture(*size, seed=1)]
        expected = theirs(pictures, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(ours(pictures)["pixel_values"], expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("size", [(31, 17), (17, 31), (64, 64), (301, 200), (33, 1000)])
    def test_crop_equals_clip_of_transformers(self, size: tuple[int, int]) -> None:
        ours = EyespotImageProcessor(size=32, resize_mode="crop", **MEANS)
        theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32, resample=3, **MEANS)
        expected = theirs(picture(*size), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(ours(picture(*size))["pixel_values"], expected, rtol=0, atol=1e-6)

    def test_pad_keeps_the_shape_between_bars_of_zeros(self) -> None:
        white = PIL.Image.new("RGB", (40, 20), "white")
        pixel_values = EyespotImageProcessor(size=16, resize_mode="pad")(white)["pixel_values"]
        assert pixel_values[0, :, 4:12].eq(1).all()
        # The mean 0.5 is 127.5, which no byte is.
        assert pixel_values[0, :, :4].abs().max() < 0.005
        assert pixel_values[0, :, 12:].abs().max() < 0.005

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["squash", "crop", "pad"]), st.integers(1, 33))
    def test_shape_and_type_for_every_size(self, width: int, height: int, mode: str, size: int) -> None:
        pixel_values = EyespotImageProcessor(size=size, resize_mode=mode)(picture(width, height))["pixel_values"]
        assert pixel_values.shape == (1, 3, size, size)
        assert pixel_values.dtype == torch.float32
        assert pixel_values.isfinite().all()

    def test_one_picture_is_the_list_of_one_and_every_source_is_taken(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(encoded(picture()))
        processor = EyespotImageProcessor(size=4)
        one = processor(picture())["pixel_values"]
        mixed = processor([picture(), path, str(path), path.read_bytes()])["pixel_values"]
        assert mixed.equal(one.expand(4, 3, 4, 4))
        assert isinstance(processor(picture(), return_tensors="np")["pixel_values"], np.ndarray)

    def test_save_and_load(self, tmp_path: Path) -> None:
        saved = EyespotImageProcessor(size=24, resample=2, resize_mode="pad", rescale_factor=1 / 127, **MEANS)
        saved.save_pretrained(tmp_path)
        file = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert file["image_processor_type"] == "EyespotImageProcessor"
        loaded = EyespotImageProcessor.from_pretrained(tmp_path)
        assert loaded.to_dict() == saved.to_dict()
        assert loaded(picture())["pixel_values"].equal(saved(picture())["pixel_values"])
        assert EyespotImageProcessor.from_pretrained(tmp_path, resize_mode="crop", size=8).size == 8

    def test_auto_class_loads_it_once_registered(self, tmp_path: Path) -> None:
        class Config(PreTrainedConfig):  # type: ignore[no-untyped-call]
            model_type = "eyespot_test_of_images"

        EyespotImageProcessor(size=24).save_pretrained(tmp_path)
        AutoImageProcessor.register(
            Config, image_processor_classes={"pil": EyespotImageProcessor, "torchvision": EyespotImageProcessor}
        )
        try:
            loaded = AutoImageProcessor.from_pretrained(tmp_path)  # type: ignore[no-untyped-call]
        finally:
            del IMAGE_PROCESSOR_MAPPING._extra_content[Config]
        assert type(loaded) is EyespotImageProcessor
        assert loaded.size == 24

    @pytest.mark.parametrize(
        ("setting", "said"),
        [
            ({"size": 0}, "size is 0"),
            ({"size": {"height": 2, "width": 2}}, "size is {'height'"),
            ({"resample": 9}, "resample is 9"),
            ({"resize_mode": "strech"}, "resize_mode is 'strech'; choices: squash, crop, pad"),
            ({"image_mean": [0.5]}, "image_mean has 1 values; give 3"),
            ({"image_std": [0.5, 0.0, 0.5]}, "must be above 0"),
            ({"do_resize": False}, "unknown image processor setting 'do_resize'; choices: size, "),
        ],
    )
    def test_wrong_settings(self, setting: dict[str, Any], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            EyespotImageProcessor(**setting)

    def test_wrong_calls(self) -> None:
        with pytest.raises(ValueError, match="0 pictures were given"):
            EyespotImageProcessor()([])
        with pytest.raises(ValueError, match="unknown keyword 'size'"):
            EyespotImageProcessor()(picture(), size=3)
        with pytest.raises(ImageError, match="1x101 is longer than 100 times"):
            EyespotImageProcessor(resize_mode="crop")(picture(1, 101))

"""Pictures: open anything as RGB, fetch from the web, know a picture by its content, turn pictures into pixel tensors.

Letters in shapes: N pictures, S pixels of a side.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import io
import os
import stat
import string
import struct
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from eyespot.pictures import LazyPicture

ImageInput = str | os.PathLike[str] | bytes | PIL.Image.Image | LazyPicture

# An allow-list, because Pillow also knows formats that start other programs (EPS runs Ghostscript).
# Source: https://pillow.readthedocs.io/en/stable/handbook/image-file-formats.html
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")

# Pillow's decoders parse bytes that strangers wrote, and each of them fails in its own way.
_DECODER_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    SyntaxError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    BufferError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
    Warning,
)

_NETWORK_ERRORS = (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException)
# Request timeout, too many requests, and everything that is the server's own trouble, may pass.
# Source: https://www.rfc-editor.org/rfc/rfc9110#name-status-codes
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_CHUNK_BYTES = 65_536

# Source: https://huggingface.co/docs/transformers/main/en/main_classes/image_processor (IMAGENET_STANDARD_MEAN, _STD)
_HALF = (0.5, 0.5, 0.5)
_RESIZE_MODES = ("squash", "crop", "pad")
_SETTINGS = ("size", "resample", "resize_mode", "image_mean", "image_std", "rescale_factor")
# The shorter side is brought to S first, so a very long and thin picture would grow without bound.
_MAX_CROP_RATIO = 100


class ImageError(ValueError):
    """A picture that cannot be had; the text names the picture and the cure, in one line."""


def open_image(source: ImageInput, max_pixels: int = 64_000_000) -> PIL.Image.Image:
    """Decode a picture completely, as RGB.

    The EXIF orientation is applied, so that the model sees the picture upright as a person does. Transparency is laid
    on white, because what lies under transparent pixels is arbitrary (often black), pages are white, and transformers
    does the same. 16-bit grey is scaled to 8 bits (65535 becomes 255). Of an animation the first frame is taken, of a
    Pillow image its current frame. The result is a fresh image; the given one is left as it was.

    Args:
        source: a path, the bytes of a picture file, a Pillow image, or a picture to be drawn.
        max_pixels: limit of width x height, checked before anything is decoded.

    Returns:
        A Pillow image of mode RGB, uint8 [height, width, 3].

    Raises:
        ImageError: for every source that is no readable picture, and for no other reason another error.
    """
    if isinstance(source, LazyPicture):
        source = source.draw()
    name = _name(source)
    with _decoding(name):
        image = source if isinstance(source, PIL.Image.Image) else _identify(source, name)
        _check_size(image, max_pixels, name)
        return _upright_rgb(image, name)


def image_size(source: str | os.PathLike[str] | bytes | PIL.Image.Image) -> tuple[int, int]:
    """Width and height of what `open_image` gives; pixels are decoded only where the orientation stands behind them.

    Raises:
        ImageError: no picture, as far as its header tells.
    """
    name = _name(source)
    with _decoding(name):
        image = source if isinstance(source, PIL.Image.Image) else _identify(source, name)
        width, height = image.size
        # From 5 on a quarter turn: https://pillow.readthedocs.io/en/stable/reference/ImageOps.html (exif_transpose)
        return (height, width) if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) >= 5 else (width, height)


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Whatever goes wrong with a picture is an ImageError that names it."""
    try:
        yield
    except ImageError:
        raise
    except PIL.UnidentifiedImageError:
        raise ImageError(f"{name} is not a picture; give a file in one of {', '.join(FORMATS)}") from None
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large for Pillow: {_line(error)}; make the picture smaller") from None
    except _DECODER_ERRORS as error:
        raise ImageError(f"{name} is broken or cut short: {_line(error)}; replace the file") from error


def content_hash(source: ImageInput) -> str:
    """SHA-256 of width, height and RGB pixels: the same picture in two files or two encodings gives the same text.

    Returns:
        64 hexadecimal digits.

    Raises:
        ImageError: as `open_image`.
    """
    if isinstance(source, LazyPicture):
        return _drawn_hash(source)
    image = open_image(source)
    digest = hashlib.sha256(struct.pack("<QQ", *image.size))
    digest.update(image.tobytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1_000_000)
def _drawn_hash(picture: LazyPicture) -> str:
    """The hash of the pixels, and not of the values they come from: another font or another Pillow may draw others."""
    return content_hash(picture.draw())


def fetch_image(
    url: str,
    cache_dir: str | os.PathLike[str],
    timeout_s: float = 10.0,
    retries: int = 3,
    max_bytes: int = 20_000_000,
    back_off_s: float = 0.5,
) -> Path:
    """Download a picture once and keep it; the file is named by the SHA-256 of the URL.

    Only bytes that decode as a picture are kept, so an error page never enters the cache. Any host is allowed, also
    one of the local network: a server that takes URLs from strangers must check the host first.

    Args:
        timeout_s: limit for connecting, for every wait and for the whole body, of each attempt.
        retries: further attempts after the first; only for troubles that may pass (no 404).
        max_bytes: limit of the body.
        back_off_s: wait before the first retry; it doubles each time.

    Returns:
        The path of the cached file.

    Raises:
        ImageError: not http(s), not found, too slow, too large, not a picture.
        OSError: the cache folder cannot be written.
    """
    _check_url(url)
    path = Path(cache_dir) / hashlib.sha256(url.encode()).hexdigest()
    if path.is_file():
        return path
    data = _download(url, timeout_s, retries, max_bytes, back_off_s)
    try:
        open_image(data)
    except ImageError as error:
        raise ImageError(f"{url!r} gave no usable picture: {error}") from None
    _write_atomically(path, data)
    return path


def _name(source: object) -> str:
    if isinstance(source, bytes):
        return f"picture of {len(source)} bytes"
    if isinstance(source, PIL.Image.Image):
        return f"Pillow image of mode {source.mode}"
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    raise ImageError(f"cannot open a {type(source).__name__} as a picture; give a path, bytes or a Pillow image")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _identify(source: str | os.PathLike[str] | bytes, name: str) -> PIL.Image.Image:
    data = source if isinstance(source, bytes) else _read(source, name)
    if not data:
        raise ImageError(f"{name} is empty; give a picture")
    return PIL.Image.open(io.BytesIO(data), formats=_known_formats())


@functools.cache
def _known_formats() -> tuple[str, ...]:
    # A format that this Pillow was built without must not stop the others from being tried.
    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def _read(path: str | os.PathLike[str], name: str) -> bytes:
    if os.fspath(path).startswith(("http://", "https://")):
        raise ImageError(f"{name} is a URL, not a file; get it with fetch_image first")
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  Path would read "" as the current folder
        if stat.S_ISDIR(mode):
            raise ImageError(f"{name} is a folder; give the path of a picture file")
        # A device or a pipe could keep us reading for ever.
        if not stat.S_ISREG(mode):
            raise ImageError(f"{name} is not a regular file; give the path of a picture file")
        with Path(path).open("rb") as file:
            return file.read()
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; check the path") from None
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}; check the path and its permissions") from None


def _check_size(image: PIL.Image.Image, max_pixels: int, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height} and has no pixels; give a picture")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is {width}x{height} = {width * height} pixels, the limit is {max_pixels}; "
            "make the picture smaller or raise max_pixels"
        )


def _upright_rgb(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bit(image, name)
    if image.mode == "F":
        raise ImageError(f"{name} has 32-bit float pixels without a fixed white; save it with 8 or 16 bits")
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = PIL.Image.new("RGBA", image.size, "white")
    return PIL.Image.alpha_composite(white, image).convert("RGB")


def _eight_bit(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Grey of 16 bits as grey of 8 bits; Pillow's own conversion clips at 255, which turns most pixels white."""
    values = np.asarray(image).astype(np.int64)  # [H, W]
    if values.min() < 0 or values.max() > 65_535:
        raise ImageError(
            f"{name} has pixels from {values.min()} to {values.max()}, the limits are 0 and 65535; "
            "save it with 8 or 16 bits"
        )
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = 65_535
    return PIL.Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise ImageError(f"{url!r} is not a URL: {_line(error)}; check it") from None
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ImageError(f"{url!r} is not an http or https URL; give one, or the path of a file to open_image")


def _download(url: str, timeout_s: float, retries: int, max_bytes: int, back_off_s: float) -> bytes:
    for attempt in range(retries + 1):
        try:
            return _get(url, timeout_s, max_bytes)
        except urllib.error.HTTPError as error:
            trouble = f"the server answered {error.code} {error.reason}"
            error.close()
            if error.code not in _PASSING_STATUS:
                raise ImageError(f"cannot fetch {url!r}: {trouble}; check the address") from None
        except ImageError:
            raise
        except (http.client.InvalidURL, ValueError) as error:
            raise ImageError(f"{url!r} is not a URL: {_line(error)}; check it") from None
        except _NETWORK_ERRORS as error:
            trouble = _line(error)
        if attempt < retries:
            time.sleep(back_off_s * 2**attempt)
    raise ImageError(
        f"cannot fetch {url!r}: {trouble} (attempts: {retries + 1}, time-out: {timeout_s} s); "
        "try later or raise timeout_s"
    )


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    """Handlers for http and https alone: a redirection to file: or ftp: finds none and is an error."""
    opener = urllib.request.OpenerDirector()
    opener.addheaders = [("User-Agent", "eyespot")]
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _get(url: str, timeout_s: float, max_bytes: int) -> bytes:
    deadline = time.monotonic() + timeout_s
    too_large = ImageError(f"{url!r} has more than {max_bytes} bytes; choose a smaller picture or raise max_bytes")
    # Only spaces and letters outside ASCII are escaped; escapes already there stay.
    request = urllib.request.Request(urllib.parse.quote(url, safe=string.punctuation))
    with _opener().open(request, timeout=timeout_s) as response:
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > max_bytes:
            raise too_large
        body = bytearray()
        # read1 returns what has come, so that a server that drips bytes still meets the deadline.
        while chunk := response.read1(_CHUNK_BYTES):
            body += chunk
            if len(body) > max_bytes:
                raise too_large
            if time.monotonic() > deadline:
                raise TimeoutError("timed out while reading")
    if length.isdecimal() and len(body) < int(length):
        raise http.client.IncompleteRead(b"", int(length) - len(body))
    return bytes(body)


def _write_atomically(path: Path, data: bytes) -> None:
    """Two processes may fetch the same picture; a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink()
        raise


class _Settings(ImagesKwargs, total=False):
    """What `from_pretrained` may override by keyword; transformers reads the annotations."""

    resize_mode: str


class EyespotImageProcessor(BaseImageProcessor):
    """Pictures to the pixel tensor of our own vision encoders; the same numbers as transformers' Pillow backends.

    Args:
        size: side S of the square result, in pixels.
        resample: Pillow's code of the filter (0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming).
        resize_mode: "squash" (ignore the aspect ratio), "crop" (shorter side to S, then the middle) or "pad" (longer
            side to S, then bars of the mean colour, which are zeros after normalisation; Source: arXiv:2310.03744).
        image_mean: mean of the red, green and blue channel after rescaling.
        image_std: standard deviation of the same.
        rescale_factor: multiplies the uint8 values before normalisation.

    Raises:
        ValueError: a setting out of its range, or an unknown one.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = _Settings

    def __init__(
        self,
        size: int = 224,
        resample: int = 3,
        resize_mode: str = "squash",
        image_mean: Sequence[float] = _HALF,
        image_std: Sequence[float] = _HALF,
        rescale_factor: float = 1 / 255,
        **saved: Any,
    ) -> None:
        _check_settings(size, resample, resize_mode, image_mean, image_std)
        # transformers writes these two names beside the settings.
        unknown = sorted(set(saved) - {"image_processor_type", "processor_class"})
        if unknown:
            raise ValueError(f"unknown image processor setting {unknown[0]!r}; choices: {', '.join(_SETTINGS)}")
        super().__init__()
        self.size = size
        self.resample = int(resample)
        self.resize_mode = resize_mode
        self.image_mean = tuple(float(mean) for mean in image_mean)
        self.image_std = tuple(float(std) for std in image_std)
        self.rescale_factor = float(rescale_factor)

    def __call__(  # type: ignore[override]  # names of files are taken too, and settings are never overridden per call
        self, images: ImageInput | Sequence[ImageInput], return_tensors: str | None = "pt", **unknown: Any
    ) -> BatchFeature:
        """One picture or a list of pictures to pixel values.

        Returns:
            `pixel_values`, float32 [N, 3, S, S].

        Raises:
            ImageError: a picture cannot be opened.
            ValueError: no picture, or an unknown keyword.
        """
        if unknown:
            raise ValueError(f"unknown keyword {min(unknown)!r}; settings are given when the processor is made")
        pictures: Sequence[ImageInput] = images if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]
        if not pictures:
            raise ValueError("0 pictures were given; give one or more, or leave the image processor out")
        pixel_values = np.stack([self._normalise(self._resize(open_image(picture))) for picture in pictures])
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    preprocess = __call__

    def _resize(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """RGB image of any size to S x S."""
        resample = PIL.Image.Resampling(self.resample)
        if self.resize_mode == "squash":
            return image.resize((self.size, self.size), resample)
        return self._crop(image, resample) if self.resize_mode == "crop" else self._pad(image, resample)

    def _crop(self, image: PIL.Image.Image, resample: PIL.Image.Resampling) -> PIL.Image.Image:
        """Shorter side to S, then the middle."""
        width, height = image.size
        shorter = min(width, height)
        if max(width, height) > _MAX_CROP_RATIO * shorter:
            raise ImageError(
                f"picture of {width}x{height} is longer than {_MAX_CROP_RATIO} times its width; "
                "resize_mode 'crop' would see almost nothing of it: use 'pad' or 'squash'"
            )
        scaled = (self.size * width // shorter, self.size * height // shorter)
        left, top = (scaled[0] - self.size) // 2, (scaled[1] - self.size) // 2
        return image.resize(scaled, resample).crop((left, top, left + self.size, top + self.size))

    def _pad(self, image: PIL.Image.Image, resample: PIL.Image.Resampling) -> PIL.Image.Image:
        """Longer side to S, in the middle of a square of the mean colour."""
        width, height = image.size
        longer = max(width, height)
        scaled = (max(1, round(self.size * width / longer)), max(1, round(self.size * height / longer)))
        red, green, blue = (round(mean / self.rescale_factor) for mean in self.image_mean)
        square = PIL.Image.new("RGB", (self.size, self.size), (red, green, blue))
        square.paste(image.resize(scaled, resample), ((self.size - scaled[0]) // 2, (self.size - scaled[1]) // 2))
        return square

    def _normalise(self, image: PIL.Image.Image) -> NDArray[np.float32]:
        """RGB image S x S to float32 [3, S, S]."""
        # A byte has 256 values, so every channel is one look-up in a table computed with the definition's arithmetic.
        scaled = (np.arange(256) * self.rescale_factor).astype(np.float32)
        pixels = np.asarray(image)  # [S, S, 3]
        channels = []
        for channel, (mean, std) in enumerate(zip(self.image_mean, self.image_std, strict=True)):
            table = (scaled - np.float32(mean)) / np.float32(std)
            channels.append(table[pixels[..., channel]])
        return np.stack(channels)


def _check_settings(
    size: object, resample: int, resize_mode: str, image_mean: Sequence[float], image_std: Sequence[float]
) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size is {size!r}; give the side of the square in pixels, a whole number from 1")
    filters = [code.value for code in PIL.Image.Resampling]
    if resample not in filters:
        raise ValueError(f"resample is {resample!r}; give one of Pillow's codes {sorted(filters)}")
    if resize_mode not in _RESIZE_MODES:
        raise ValueError(f"resize_mode is {resize_mode!r}; choices: {', '.join(_RESIZE_MODES)}")
    for name, values in (("image_mean", image_mean), ("image_std", image_std)):
        if len(values) != 3:
            raise ValueError(f"{name} has {len(values)} values; give 3, for red, green and blue")
    if min(image_std) <= 0:
        raise ValueError(f"image_std is {tuple(image_std)}; every value must be above 0")

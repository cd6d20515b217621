"""Opening a picture that nobody vouches for: what is taken, up to which size, and why anything else is not.

The one place where a file becomes pixels, for the load, the encoders and the server. It runs in a process that may be
killed (decoders.py); the words of a refusal are the same everywhere.
"""

import io
from pathlib import Path

from PIL import Image

from feature_repo.schema import IMAGE_FORMATS, MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, MAX_IMAGE_RATIO

FORMATS_TOLD = ", ".join(IMAGE_FORMATS[:-1]).replace("WEBP", "WebP") + " or " + IMAGE_FORMATS[-1]

# How the formats begin that people meet and that are not taken: for the message only.
_OTHERS = (
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphe", "HEIC"),
    (4, b"ftypmi", "HEIC"),
    (0, b"%!PS", "PostScript"),
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "SVG or XML"),
    (0, b"\x00\x00\x00\x0cjP", "JPEG 2000"),
)

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(Exception):
    """Why a picture is not taken, in the words that every door uses."""


def read_picture(path: Path) -> bytes:
    """A picture's bytes. Raises PictureError when there are none, or too many."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise PictureError("is not a file")
        check_bytes(size)
        return path.read_bytes()
    except FileNotFoundError:
        raise PictureError("no such image file") from None
    except OSError as error:
        raise PictureError(f"the image file cannot be read: {error.strerror}") from None


def check_bytes(size: int) -> None:
    """Raises PictureError when a file of this size is too large."""
    if size > MAX_IMAGE_BYTES:
        raise PictureError(f"the image has {size:,} bytes, more than {MAX_IMAGE_BYTES:,}")


def open_picture(content: bytes, edge: int) -> Image.Image:
    """A picture upright in RGB, transparency on white; its first frame when it has several.

    edge: pixels that its shorter side needs. A larger picture is made smaller by a whole factor where that leaves
    twice as many; a JPEG is decoded at an eighth, quarter or half at once. Raises PictureError with the reason.
    """
    check_bytes(len(content))
    # The limit is ours, and told in our words.
    Image.MAX_IMAGE_PIXELS = None
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    except MemoryError:
        raise
    except Exception:  # Pillow's parsers raise whatever a broken header leads them to
        raise PictureError(_no_picture(content)) from None
    _check_size(*image.size)
    try:
        image.draft("RGB", (2 * edge, 2 * edge))
        image.load()
        image = _on_white(_upright(image))
        factor = min(image.size) // (2 * edge)
        return image.reduce(factor) if factor > 1 else image
    except MemoryError:
        raise
    except Exception as error:
        raise PictureError(f"is truncated or damaged: {error}") from None


def _no_picture(content: bytes) -> str:
    told = f"is not an image that is read here ({FORMATS_TOLD})"
    for start, magic, name in _OTHERS:
        if content[start : start + len(magic)] == magic:
            return f"{told}, but {name}: convert it"
    return told if content else f"{told}: the file is empty"


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise PictureError(f"the picture has {width:,} × {height:,} pixels, more than {MAX_IMAGE_PIXELS:,}")
    # A checkpoint that scales the shorter side up would make gigabytes of a line.
    if max(width, height) > MAX_IMAGE_RATIO * min(width, height):
        raise PictureError(
            f"the picture has {width:,} × {height:,} pixels: one side is more than {MAX_IMAGE_RATIO} times the other"
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # damaged EXIF says nothing; the pixels are whole
        return image
    return image if turn is None else image.transpose(turn)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")

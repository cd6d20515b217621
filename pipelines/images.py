"""Is this file an image that an encoder may open? Looks at the path, the size, the header, and then decodes it."""

import hashlib
import struct
import warnings
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from polytower.errors import UserError

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
# No format that runs an interpreter (EPS) or rarely met parsers.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_BOMB = f"decompression bomb: more than {MAX_PIXELS:,} pixels"
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


@dataclass(frozen=True)
class CheckedImage:
    """path: absolute; sha256: hex digest of the file's bytes."""

    path: str
    sha256: str


class ImageError(Exception):
    """The message says why this file is not taken, as the report of rejected rows prints it."""


def images_root(directory: Path) -> Path:
    """The resolved folder of images; UserError when there is none."""
    if not directory.is_dir():
        raise UserError(f"the images folder {directory} does not exist (or is not a folder)")
    return directory.resolve()


def check_image(root: Path, name: str) -> CheckedImage:
    """Checks the image called `name` below `root` (from images_root). Raises ImageError with the reason."""
    path = _inside(root, name)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ImageError("no such image file") from None
    except OSError as error:
        raise ImageError(f"the image file cannot be read: {error.strerror}") from None
    if not path.is_file():
        raise ImageError("is not a file")
    if size > MAX_BYTES:
        raise ImageError(f"the image has {size:,} bytes, more than {MAX_BYTES:,}")
    content = path.read_bytes()
    _decode(content)
    return CheckedImage(str(path), hashlib.sha256(content).hexdigest())


def _inside(root: Path, name: str) -> Path:
    asked = Path(name)
    if asked.is_absolute() or ".." in asked.parts:
        raise ImageError("the image path leaves the images folder")
    try:
        path = (root / asked).resolve()
    except (OSError, RuntimeError):
        raise ImageError("the image path is a circle of links") from None
    if not path.is_relative_to(root):
        raise ImageError("the image path leaves the images folder through a link")
    return path


def _decode(content: bytes) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(f"{_BOMB} ({image.width} × {image.height})")
                image.draft("RGB", (64, 64))  # a JPEG is then decoded at an eighth of its size
                image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(_BOMB) from None
    except _UNREADABLE as error:
        raise ImageError(f"is not an image, or a truncated one: {error}") from None

"""Is this file an image that an encoder may open? Looks at the path, the size, the header, and then decodes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from encoders.content.decoders import Decoders
from encoders.content.picture import PictureError
from polytower.errors import UserError

# A JPEG is then decoded at an eighth of its size.
_EDGE = 32


@dataclass(frozen=True)
class CheckedImage:
    """path: absolute; sha256: hex digest of the file's bytes."""

    path: str
    sha256: str


def images_root(directory: Path) -> Path:
    """The resolved folder of images; UserError when there is none."""
    if not directory.is_dir():
        raise UserError(f"the images folder {directory} does not exist (or is not a folder)")
    return directory.resolve()


class ImageChecks:
    """Looks at the images below `root` (from images_root) as encoding them will, in processes that a file may end."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._decoders = Decoders(None, _EDGE)

    def check(self, names: Sequence[str]) -> list[CheckedImage | PictureError]:
        """For each name the image, or why it is not taken."""
        paths = [_inside(self.root, name) for name in names]
        checked = self._decoders.check([path for path in paths if isinstance(path, Path)])
        found: list[CheckedImage | PictureError] = []
        for path in paths:
            result = next(checked) if isinstance(path, Path) else path
            found.append(result if isinstance(result, PictureError) else CheckedImage(str(path), result))
        return found

    def close(self) -> None:
        """Ends the processes."""
        self._decoders.close()


def _inside(root: Path, name: str) -> Path | PictureError:
    asked = Path(name)
    if asked.is_absolute() or ".." in asked.parts:
        return PictureError("the image path leaves the images folder")
    try:
        path = (root / asked).resolve()
    except (OSError, RuntimeError):
        return PictureError("the image path is a loop of links")
    if not path.is_relative_to(root):
        return PictureError("the image path leaves the images folder through a link")
    return path

"""Images: what is taken, and every way in which one is not."""

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from PIL import Image

from encoders.content.picture import PictureError
from feature_repo.schema import MAX_IMAGE_BYTES
from pipelines.load.folder import load_folder
from pipelines.load.images import CheckedImage, ImageChecks, images_root
from polytower.errors import UserError
from tests.factories import tiny_folder, tiny_items, write_rows


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return images_root(tmp_path / "images")


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageChecks]:
    """One decoder for the module."""
    opened = ImageChecks(tmp_path_factory.mktemp("nowhere"))
    yield opened
    opened.close()


@pytest.fixture
def check(checks: ImageChecks, root: Path) -> Callable[[str], CheckedImage]:
    """Checks one image below `root`; raises the reason why it is not taken."""
    checks.root = root

    def one(name: str) -> CheckedImage:
        (found,) = checks.check([name])
        if isinstance(found, PictureError):
            raise found
        return found

    return one


Check = Callable[[str], CheckedImage]


def picture(path: Path, size: tuple[int, int] = (60, 40)) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.effect_noise(size, 90).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff"])
def test_taken(check: Check, root: Path, suffix: str) -> None:
    path = picture(root / f"a.{suffix}")
    found = check(f"a.{suffix}")
    assert found.path == str(path)
    assert len(found.sha256) == 64


def test_below_a_folder_and_through_a_link_that_stays(check: Check, root: Path) -> None:
    picture(root / "sub" / "a.jpg")
    (root / "b.jpg").symlink_to(root / "sub" / "a.jpg")
    assert check("sub/a.jpg") == check("b.jpg")


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "sub/../../secret.jpg", "{absolute}", "link.jpg", "linked/secret.jpg"]
)
def test_leaving_the_folder(check: Check, root: Path, name: str) -> None:
    secret = picture(root.parent / "secret.jpg")
    (root / "link.jpg").symlink_to(secret)
    (root / "linked").symlink_to(root.parent)
    with pytest.raises(PictureError, match="leaves the images folder"):
        check(name.format(absolute=secret))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims this size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such image file"),
        (b"", "is not an image .*: the file is empty"),
        (b"plain words", r"is not an image that is read here \(JPEG, PNG, WebP, GIF, BMP or TIFF\)$"),
        (b"<svg/>", "is not an image .*, but SVG: convert it"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image .*, but PostScript: convert it"),
        (b"\0\0\0\x1cftypheic\0\0\0\0mif1heic", "is not an image .*, but HEIC: convert it"),
        (bomb(8_000, 7_000), "8,000 × 7,000 pixels, more than 50,000,000"),
        (bomb(10_000, 10_000), "10,000 × 10,000 pixels, more than 50,000,000"),
        (bomb(60_000, 60_000), "60,000 × 60,000 pixels, more than 50,000,000"),
        (bomb(10, 2_001), "10 × 2,001 pixels: one side is more than 200 times the other"),
        (bomb(100, 100), "is truncated or damaged"),
    ],
)
def test_refused(check: Check, root: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (root / "a.jpg").write_bytes(content)
    with pytest.raises(PictureError, match=reason):
        check("a.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated(check: Check, root: Path, suffix: str) -> None:
    path = picture(root / f"a.{suffix}", (300, 300))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(PictureError, match="truncated"):
        check(path.name)


def test_too_many_bytes(check: Check, root: Path) -> None:
    with (root / "a.png").open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(PictureError, match="has 20,000,001 bytes, more than 20,000,000"):
        check("a.png")


def test_an_avif_picture_is_named(check: Check, root: Path) -> None:
    picture(root / "a.avif").rename(root / "a.jpg")
    with pytest.raises(PictureError, match="but AVIF"):
        check("a.jpg")


@pytest.mark.parametrize("size", [(3, 500), (500, 3), (1, 1), (1, 200)])
def test_small_and_narrow_ones_are_taken(check: Check, root: Path, size: tuple[int, int]) -> None:
    picture(root / "a.png", size)
    assert check("a.png").path


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_damaged_exif_says_nothing(check: Check, root: Path, exif: bytes) -> None:
    Image.effect_noise((60, 40), 90).convert("RGB").save(root / "a.jpg", exif=exif)
    assert check("a.jpg").path


def test_a_folder_is_not_a_file(check: Check, root: Path) -> None:
    (root / "a.jpg").mkdir()
    with pytest.raises(PictureError, match="is not a file"):
        check("a.jpg")


def test_a_faulty_image_is_dropped_alone(emptied: psycopg.Connection, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, images=True)
    (folder / "images" / "i5.jpg").write_bytes(b"no image")
    (folder / "images" / "i6.jpg").unlink()
    rows = tiny_items(60, images=True)
    rows[7]["image"] = "../i1.jpg"
    write_rows(folder / "items.parquet", rows)
    report = load_folder(emptied, folder, folder / "images")
    assert (report.counts["items_new"], report.counts["items_rejected"]) == (60, 0)
    assert (report.counts["items_images"], report.counts["items_images_dropped"]) == (56, 3)
    dropped = emptied.execute("select row_number, column_name, value from rejected_rows order by 1").fetchall()
    assert dropped == [(6, "image", "i5.jpg"), (7, "image", "i6.jpg"), (8, "image", "../i1.jpg")]
    without = "select item_id from items where image is null and image_path is null and image_sha256 is null order by 1"
    assert [row[0] for row in emptied.execute(without).fetchall()] == ["i5", "i58", "i6", "i7"]


def test_the_wrong_folder_loses_no_images(emptied: psycopg.Connection, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, images=True)
    load_folder(emptied, folder, folder / "images")
    (tmp_path / "empty").mkdir()
    for wrong, message in ((tmp_path / "empty", "none of the 59 images"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=message):
            load_folder(emptied, folder, wrong)
    assert emptied.execute("select count(image_path) from items").fetchone() == (59,)

"""Images: what is taken, and every way in which one is not."""

import struct
import zlib
from pathlib import Path

import psycopg
import pytest
from PIL import Image

from pipelines import images
from pipelines.images import ImageError, check_image, images_root
from pipelines.load import load_folder
from polytower.errors import UserError
from tests.factories import tiny_folder, tiny_items, write_rows


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return images_root(tmp_path / "images")


def picture(path: Path, size: tuple[int, int] = (60, 40)) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.effect_noise(size, 90).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff"])
def test_taken(root: Path, suffix: str) -> None:
    path = picture(root / f"a.{suffix}")
    found = check_image(root, f"a.{suffix}")
    assert found.path == str(path)
    assert len(found.sha256) == 64


def test_below_a_folder_and_through_a_link_that_stays(root: Path) -> None:
    picture(root / "sub" / "a.jpg")
    (root / "b.jpg").symlink_to(root / "sub" / "a.jpg")
    assert check_image(root, "sub/a.jpg") == check_image(root, "b.jpg")


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "sub/../../secret.jpg", "{absolute}", "link.jpg", "linked/secret.jpg"]
)
def test_leaving_the_folder(root: Path, name: str) -> None:
    secret = picture(root.parent / "secret.jpg")
    (root / "link.jpg").symlink_to(secret)
    (root / "linked").symlink_to(root.parent)
    with pytest.raises(ImageError, match="leaves the images folder"):
        check_image(root, name.format(absolute=secret))


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
        (b"", "is not an image"),
        (b"<svg/>", "is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
        (bomb(8_000, 7_000), "decompression bomb: more than 50,000,000 pixels"),
        (bomb(10_000, 10_000), "decompression bomb"),
        (bomb(60_000, 60_000), "decompression bomb"),
        (bomb(100, 100), "is not an image, or a truncated one"),
    ],
)
def test_refused(root: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (root / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        check_image(root, "a.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated(root: Path, suffix: str) -> None:
    path = picture(root / f"a.{suffix}", (300, 300))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match="truncated"):
        check_image(root, path.name)


def test_too_many_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    picture(root / "a.png")
    with pytest.raises(ImageError, match="more than 100"):
        check_image(root, "a.png")


def test_a_folder_is_not_a_file(root: Path) -> None:
    (root / "a.jpg").mkdir()
    with pytest.raises(ImageError, match="is not a file"):
        check_image(root, "a.jpg")


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

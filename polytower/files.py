"""Files that are nobody else's business: folders of mode 0700, and small files that are written whole or not at all."""

import os
import tempfile
from pathlib import Path


def private_folder(path: Path) -> Path:
    """The folder, created when absent; closed to others either way. Folders above it are left as they are."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.stat()
    if found.st_mode & 0o077 and found.st_uid == os.geteuid():
        path.chmod(0o700)
    return path


def write_private(path: Path, text: str) -> None:
    """Writes a file of mode 0600; whoever reads meanwhile, or after a kill, sees the old text or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

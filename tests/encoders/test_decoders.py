"""Decoding processes: what a picture may take, what happens to one that takes more, and whose they are."""

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from encoders.content import decoders
from encoders.content.decoders import Decoder, Decoders
from encoders.content.picture import PictureError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    opened = Decoder(32)
    yield opened
    opened.close()


def picture(size: tuple[int, int] = (60, 40)) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(file, "PNG")
    return file.getvalue()


def test_paths_and_bytes_mixed_keep_their_order(decoder: Decoder, tmp_path: Path) -> None:
    paths = []
    for number in range(40):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(picture((number + 1, 2)))
    found = decoder.decode([*paths, picture((77, 2))])
    assert [each.size for each in found if isinstance(each, Image.Image)] == [(n, 2) for n in [*range(1, 41), 77]]


def test_postscript_never_runs(decoder: Decoder) -> None:
    """Ghostscript would loop for ever, and hold everybody up."""
    endless = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
    (found,) = decoder.decode([endless])
    assert isinstance(found, PictureError)
    assert "PostScript" in str(found)


def slow() -> bytes:
    """A progressive JPEG of many scans: kilobytes that take seconds, as they are decoded once per scan."""
    file = io.BytesIO()
    Image.new("RGB", (7_000, 7_000)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    start = content.rindex(b"\xff\xda")
    return content[:start] + content[start:-2] * 200 + content[-2:]


def test_a_slow_picture_is_ended_alone(decoder: Decoder, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.jpg"
    good.write_bytes(picture())
    bad.write_bytes(slow())
    found = decoder.decode([good, bad, good, good], seconds=1)
    assert [isinstance(each, Image.Image) for each in found] == [True, False, True, True]
    assert str(found[1]) == "takes more than 1 s of computing to decode"


def test_a_decoder_that_does_not_answer_is_given_up(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, it waits as it would for a dead network folder: no computing that the kernel could count."""
    monkeypatch.setattr(decoders, "PATIENCE", 0.5)
    decoder.decode([picture()])
    assert decoder._process is not None
    os.kill(decoder._process.pid, signal.SIGSTOP)
    found = decoder.decode([picture(), picture()], seconds=1)
    assert str(found[0]) == "took more than 2 s to read and decode"
    assert isinstance(found[1], Image.Image)


def test_a_hungry_picture_is_refused() -> None:
    """In a process of its own, whose limit is lower than the product's."""
    code = (
        "import io, sys; from PIL import Image; from encoders.content import decoders\n"
        "file = io.BytesIO(); Image.new('1', (7000, 7000)).save(file, 'PNG')\n"
        "decoders.limit_memory(100 << 20)\n"
        "print(decoders._answer(b'b', file.getvalue(), 3500, 0)[:60].decode())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("-needs more than"), done


def test_the_largest_picture_fits(decoder: Decoder) -> None:
    file = io.BytesIO()
    Image.new("LA", (7_000, 7_000)).save(file, "PNG")
    (found,) = decoder.decode([file.getvalue()])
    assert isinstance(found, Image.Image), found
    assert min(found.size) >= 64


def test_it_knows_no_password_and_holds_no_file_of_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTOWER_DATABASE_URL", "postgresql://postgres:secret@127.0.0.1/x")
    with (tmp_path / "connection").open("w") as opened:
        os.set_inheritable(opened.fileno(), True)
        decoder = Decoder(32)
        decoder.decode([picture()])
        assert decoder._process is not None
        child = psutil.Process(decoder._process.pid)
        assert "POLYTOWER_DATABASE_URL" not in child.environ()
        assert str(tmp_path / "connection") not in [file.path for file in child.open_files()]
        decoder.close()
    assert not child.is_running()


def test_it_ends_with_its_parent_however_that_died(tmp_path: Path) -> None:
    code = (
        "import sys, threading; from encoders.content.decoders import Decoder\n"
        "decoder = Decoder(32); decoder.decode([sys.argv[1]])\n"
        "print(decoder._process.pid, flush=True); threading.Event().wait()"
    )
    (tmp_path / "a.png").write_bytes(picture())
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_decoders_run_side_by_side_in_order(tmp_path: Path) -> None:
    pool = Decoders(2, 32)
    tasks = [[picture((n + 1, 3))] for n in range(30)]
    met = threading.Barrier(2, timeout=60)
    seen = 0

    def work(decoder: Decoder, task: list[bytes]) -> tuple[int, int]:
        nonlocal seen
        seen += 1
        if seen <= 2:
            met.wait()  # only passes when two are at work at once
        (image,) = decoder.decode(task)
        assert isinstance(image, Image.Image)
        return image.size

    assert list(pool.map(tasks, work)) == [(n + 1, 3) for n in range(30)]
    pool.close()

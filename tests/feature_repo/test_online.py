"""Online reads: Feast answers what the tables hold, on both of its paths."""

import pytest

from feature_repo.schema import ITEM_ID, USER_ID
from feature_repo.views import VIEWS
from polytower.postgres import connect
from tests.feature_repo import rows
from tests.feature_repo.asked import entities_of, expected, parsed, references
from tests.feature_repo.conftest import Filled


@pytest.mark.parametrize("view", VIEWS)
def test_online_equals_the_tables(filled: Filled, view: str) -> None:
    key, ids = entities_of(view)
    answer = filled.store.get_online_features(features=references(view), entity_rows={key: ids})
    columns = parsed(answer.to_dict())
    assert columns.pop(key) == ids
    assert columns == expected(filled, view, ids)


@pytest.mark.parametrize("view", VIEWS)
def test_both_paths_give_the_same_protobuf(filled: Filled, view: str) -> None:
    """Ours (columns) and Feast's own (cells), which a request for version metadata takes."""
    key, ids = entities_of(view)
    refs, entities = references(view), [{key: each} for each in ids]
    ours = filled.store.get_online_features(features=refs, entity_rows=entities)
    feasts = filled.store.get_online_features(
        features=refs, entity_rows=entities, include_feature_view_version_metadata=True
    )
    assert type(ours) is not type(feasts)
    assert ours.proto.results == feasts.proto.results
    assert list(ours.proto.metadata.feature_names.val) == list(feasts.proto.metadata.feature_names.val)
    assert ours.to_dict(include_event_timestamps=True) == feasts.to_dict(include_event_timestamps=True)
    assert ours.to_df().equals(feasts.to_df())


def test_full_names_and_statuses(filled: Filled) -> None:
    answer = filled.store.get_online_features(
        features=["user_stats:user_interactions"], entity_rows={USER_ID: ["nobody", "u0"]}, full_feature_names=True
    )
    interactions = rows.newest(filled.history, "user_stats", "u0")
    assert interactions is not None
    assert answer.to_dict()["user_stats__user_interactions"] == [None, interactions[1]["user_interactions"]]
    from feast.protos.feast.serving.ServingService_pb2 import NOT_FOUND, PRESENT

    assert [list(result.statuses) for result in answer.proto.results] == [[PRESENT, PRESENT], [NOT_FOUND, PRESENT]]


def test_to_tensor_brings_torch_late(filled: Filled) -> None:
    answer = filled.store.get_online_features(
        features=["user_stats:user_interactions"], entity_rows={USER_ID: ["u0", "u1"]}
    )
    assert answer.to_tensor()["user_interactions"].tolist() == answer.to_dict()["user_interactions"]


def test_missing_join_key_is_feasts_error(filled: Filled) -> None:
    with pytest.raises(KeyError, match="user_id"):
        filled.store.get_online_features(features=["user_stats:user_interactions"], entity_rows={ITEM_ID: ["i0"]})


def test_a_promotion_shows_at_once(writable: Filled) -> None:
    refs, wanted = ["item_embedding:embedding_generation"], {ITEM_ID: ["i0"]}
    assert writable.store.get_online_features(refs, wanted).to_dict()["embedding_generation"] == [1]
    with connect(writable.url) as connection:
        connection.execute("update generations set state = 'retired' where generation = 1")
        connection.execute("update generations set state = 'live' where generation = 2")
        connection.execute("update promotions set live_until = now() where live_until is null")
        connection.execute("insert into promotions (generation) values (2)")
    assert writable.store.get_online_features(refs, wanted).to_dict()["embedding_generation"] == [2]


def test_no_live_generation_means_absent(writable: Filled) -> None:
    with connect(writable.url) as connection:
        connection.execute("update generations set state = 'retired' where generation = 1")
    answer = writable.store.get_online_features(["item_embedding:embedding"], {ITEM_ID: ["i0"]})
    assert answer.to_dict()["embedding"] == [None]


def test_the_online_read_of_embeddings_uses_the_live_partition_only(filled: Filled) -> None:
    from feature_repo.views.online_reads import query

    with connect(filled.url) as connection:
        explained = b"explain (analyze) " + query("item_embedding", ("embedding",))
        plan = "\n".join(row[0] for row in connection.execute(explained, {"ids": ["i0"]}))
    assert plan.count("never executed") == 2, plan

"""All constants that cut work into pieces, each with a value that makes at least three rounds of a small flow."""

USERS, ITEMS, EVENTS = 23, 24, 12
# Constant → (its value here, of how many): three rounds and a remainder, at least.
PIECES: dict[str, tuple[int, int]] = {
    "encoders.codes.quantise.CHUNK": (7, ITEMS),
    "encoders.content.attributes._BATCH": (7, ITEMS),
    "encoders.evaluation.evaluate._CHUNK": (7, USERS),
    "encoders.experiments.experiment._CHUNK": (7, ITEMS),
    "encoders.content.image._BATCH": (2, 7),  # the pictures of one chunk
    "encoders.content.image._CHUNK": (7, ITEMS - 1),  # one item has no picture
    "encoders.towers.losses._CHUNK": (10, USERS * EVENTS // 2),  # positions of a step; halved for two interests
    "encoders.training.optimise._CHUNK": (7, ITEMS),
    "encoders.content.text._BATCH": (2, 7),
    "encoders.content.text._CHUNK": (7, ITEMS),
    "encoders.towers.model._CHUNK": (7, ITEMS),
    "encoders.towers.adapted._CHUNK": (7, ITEMS),
    "encoders.towers.search.EVENTS_BLOCK": (3, 40),  # events of tests/encoders/test_search.py
    "feature_repo.views.online_writes._CHUNK": (7, USERS),
    "pipelines.generation.build.USER_CHUNK": (7, USERS),
    "pipelines.content_codes.ITEMS_BATCH": (7, ITEMS),
    "pipelines.content_embeddings._CHUNK": (7, ITEMS - 1),
    "pipelines.export.ROW_CHUNK": (7, ITEMS),
    "pipelines.load.contract.BATCH_ROWS": (7, USERS),
    "pipelines.generation.past_interests.ROW_CHUNK": (7, USERS),
    "pipelines.query_embeddings.QUERY_CHUNK": (7, ITEMS),
    "pipelines.generation.search_depth.BLOCK": (7, ITEMS),
    "pipelines.generation.training_set.ITEMS_BATCH": (7, ITEMS),
    "pipelines.generation.training_set.USERS_BATCH": (7, USERS),
    "serving.memory.interest_lists.BLOCK": (7, ITEMS),
    "serving.memory.inverted_file.BLOCK": (7, ITEMS),
    "serving.loaded.content_queries.BATCH": (7, ITEMS),
    "serving.memory.fill.BLOCK": (3, ITEMS + 1),
    "serving.memory.fill.BLOCK_BATCH": (2, 9),  # blocks
    "serving.loaded.user_towers.BATCH": (7, USERS),
    "serving.rank.relevance.BLOCK": (2, 7),  # the pairs of one chunk
    "serving.rank.relevance.CHUNK": (7, ITEMS),
    "serving.rank.similarity.CHUNK": (7, USERS),
}

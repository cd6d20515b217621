"""What each gate says when it fails, in one sentence: shown in Dagster, by `polytower generations quality`, and in
refusals. A test holds the names equal to those of the gates.
"""

_VECTORS = {
    "finite": "vectors hold NaN or infinity",
    "norm_error": "vectors are not of length one, so that a score is no cosine",
    "mean_cosine": "all vectors point the same way: everything is like everything",
    "effective_rank": "the vectors lie in a few directions: most of the space is unused",
    "dead_dimensions": "many columns never vary",
    "duplicates": "many vectors repeat another one bit for bit",
}

MEANINGS: dict[str, str] = {
    **{f"content_{name}": f"content embeddings: {words}" for name, words in _VECTORS.items()},
    **{f"item_{name}": f"item embeddings: {words}" for name, words in _VECTORS.items()},
    "content_coverage": "many items that have this content are not encoded",
    "content_replay": "the encoder, asked again, says something else of items that it has encoded:"
    " vectors of another model or of other items lie under its revision",
    "code_coverage": "content embeddings have no codes of their own",
    "code_cosine": "codes say too little of the embeddings that they stand for",
    "interest_norm_error": "interests are not of length one",
    "interest_collapse": "a user's interests are all the same one",
    "interest_weights": "the weights of a user's interests do not sum to one, or are no shares",
    "interest_variety": "all users have the same interests",
    "coverage_head": "popular items have no embedding",
    "coverage_tail": "items with events have no embedding",
    "coverage_cold": "items without events have no embedding",
    "coverage_users": "users with events have no interests",
    "stale_users": "users have events that their interests do not know",
    "as_of_error": "interests are dated otherwise than the newest event that they know",
    "ghost_items": "the generation recommends items that are not in the catalogue",
    "ghost_users": "the generation has interests of users whom the database does not know",
    "content_placed": "items of one modality have no content embedding",
    "neighbour_churn": "nearly all neighbours differ from those of the live generation",
    "indexes": "an HNSW index is missing or not valid",
    "ann_recall": "the index does not find what a scan finds",
    "ndcg_over_popularity": "training reported less than popularity reaches",
    "stored_towers": "a tower that servers need is missing, or cannot be read",
    "user_replay": "the stored user tower makes other interests of the stored items than those that are stored:"
    " a server would answer otherwise than the table",
    "weight_replay": "the stored user tower weighs interests otherwise than they are stored",
    "content_tower_replay": "the stored content tower places items elsewhere than they are stored:"
    " questions by text or picture would miss",
    "item_replay": "the checkpoint places items elsewhere than they are stored: vectors are damaged or under other ids",
    "held_out_recall": "asked through what is stored, held-out items are found far less often than training reported",
    "held_out_ndcg": "asked through what is stored, held-out items rank far lower than training reported",
    "reported_ndcg": "training reported what no full ranking reaches: the answers leaked into it",
    "reported_apart": "what training reported is not what the stored generation does",
    "recall_over_popularity": "the generation finds, for certain, less than half of what popularity finds",
    "recall_over_knn": "the generation finds, for certain, less than an item-kNN",
    "recall_over_live": "the generation finds, for certain, less than half of what the live one finds",
    "title_recall_text": "titles, asked as texts, do not find their items among what the text encoder made of them",
    "title_recall_content": "titles find their items far worse in the towers' content space than in the encoder's own",
}

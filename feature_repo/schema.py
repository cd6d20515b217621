"""THE names: tables, columns, states. Standard library only; everything else imports from here."""

from typing import Literal

SCHEMA = "polytower"
READER_ROLE = "polytower_reader"
SERVER_ROLE = "polytower_server"

# Tables (DDL: migrations/; see docs/reference/tables.md for the columns)
INTERACTIONS = "interactions"
ITEMS = "items"
USERS = "users"
CONTENT_ENCODERS = "content_encoders"
GENERATIONS = "generations"

# Entities
USER = "user"
ITEM = "item"
USER_ID = "user_id"
ITEM_ID = "item_id"
# Entity → the column of its id
ENTITIES = {USER: USER_ID, ITEM: ITEM_ID}

# The kind of an interaction whose source names none
DEFAULT_KIND = "interaction"

GenerationState = Literal["building", "ready", "live", "retired", "failed"]

# A similarity space and the column of item_embeddings that holds it
SPACES = {"item": "embedding", "content": "content_embedding", "id": "id_embedding"}

# Limits. Every door (files, HTTP, expectations, encoders, SQL) reads them here and refuses in the same words.
# Ids, kinds and event ids, in bytes of UTF-8: four of them share one index row, which Postgres limits to 2,700 bytes.
MAX_ID_BYTES = 500
# A text that is searched for, and the query that an event came from, in characters
MAX_QUERY_CHARACTERS = 10_000
# What the sequence feature keeps of a query, in characters: 200 events of 10,000 would be megabytes a row
SEQUENCE_QUERY_CHARACTERS = 200
# How far ahead of this clock an event may be dated, in seconds
MAX_AHEAD_SECONDS = 300
# Pictures: bytes of a file, and pixels that it unfolds into (a few bytes can make gigabytes)
MAX_IMAGE_BYTES = 20_000_000
MAX_IMAGE_PIXELS = 50_000_000
# The longer side over the shorter one: what scales the shorter side up makes gigabytes of a line
MAX_IMAGE_RATIO = 200
# By content, as Pillow calls them; none that runs an interpreter (EPS), no rarely met parsers
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Interactions kept in a user's sequence feature (the newest ones)
SEQUENCE_LENGTH = 200
# Interactions that the search over a long history sees (the newest ones)
LONG_HISTORY = 10_000

# Feast: its registry and the views behind its sources share one schema of the same database
FEAST_SCHEMA = "feast"
# Feature service → what it is for; its views name it (feature_repo/views/)
RETRIEVAL_SERVICE = "retrieval"
RANKER_SERVICE = "ranker"
SERVICES = {
    RETRIEVAL_SERVICE: "What finds candidates for a user",
    RANKER_SERVICE: "What orders the candidates: users and items side by side",
}
# A column of the rows that a training set is asked for: how the past is read
POINT_IN_TIME = "point_in_time"
PointInTime = Literal["strict", "backfilled"]

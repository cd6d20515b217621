"""The HTTP server of the feature benchmark: ours, with one service more that has the benchmark's three views.

python -m benchmarks.feature_server postgresql://… PORT
"""

import sys

import uvicorn

from feature_repo.schema import ITEM_EMBEDDING_VIEW, SERVICES, USER_SEQUENCE_VIEW, USER_STATS_VIEW
from serving.http.app import create_app

SERVICE = "benchmark"

if __name__ == "__main__":
    SERVICES[SERVICE] = (USER_SEQUENCE_VIEW, USER_STATS_VIEW, ITEM_EMBEDDING_VIEW)
    uvicorn.run(create_app(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")

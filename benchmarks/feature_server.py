"""The HTTP server of the feature benchmark: ours, with one service more that has the benchmark's three views.

python -m benchmarks.feature_server postgresql://… PORT
"""

import sys
from dataclasses import replace

import uvicorn

from feature_repo.schema import SERVICES
from feature_repo.views import VIEWS
from serving.http.app import create_app

SERVICE = "benchmark"
BENCHMARKED = ("user_sequence", "user_stats", "item_embedding")

if __name__ == "__main__":
    SERVICES[SERVICE] = "What the benchmark reads"
    for name in BENCHMARKED:
        VIEWS[name] = replace(VIEWS[name], services=(SERVICE,))
    uvicorn.run(create_app(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")

"""What `import feast` does to a process stays out of ours."""

import os
import subprocess
import sys


def test_neither_torch_nor_shared_counters_come_with_feast() -> None:
    script = (
        "import feature_repo, feast, sys; from prometheus_client import values;"
        "print('torch' in sys.modules, values.ValueClass.__name__)"
    )
    # Without what an `import feast` in this process may have left in its environment.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PROMETHEUS_")}
    program = [sys.executable, "-W", "ignore", "-c", script]
    told = subprocess.run(program, capture_output=True, text=True, check=True, env=clean)
    assert told.stdout.split() == ["False", "MutexValue"]

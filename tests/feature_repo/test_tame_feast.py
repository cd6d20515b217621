"""What `import feast` does to a process stays out of ours."""

import subprocess
import sys


def test_neither_torch_nor_shared_counters_come_with_feast() -> None:
    script = (
        "import feature_repo, feast, sys; from prometheus_client import values;"
        "print('torch' in sys.modules, values.ValueClass.__name__)"
    )
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "MutexValue"]

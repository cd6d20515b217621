"""Two habits of `import feast` that a server cannot have, undone beforehand.

Feast imports torch with its first line, for the one method `OnlineResponse.to_tensor`: 180 MB and seconds that an API
server does not have. Feast asks its own module `feast.torch_wrapper` for torch; put in place beforehand, ours imports
it at the first `to_tensor`.

Feast also sets the environment variable that makes prometheus_client keep all counters in files shared by processes:
two servers, or a server and its predecessor, would then count as one. prometheus_client decides when it is imported.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


def tame_feast() -> None:
    """To be called before the first `import feast`; afterwards it does nothing."""
    if "feast" in sys.modules:
        return
    importlib.import_module("prometheus_client")
    wrapper = ModuleType("feast.torch_wrapper", __doc__)
    wrapper.get_torch = _get_torch  # type: ignore[attr-defined]
    sys.modules["feast.torch_wrapper"] = wrapper


def _get_torch() -> Any:
    return importlib.import_module("torch")

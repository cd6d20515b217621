"""What can be wrong with a set of embeddings, as numbers and gates. Pure numpy: no database, no torch.

Legend: N vectors, D their width, K interests of a user. All vectors are meant to be unit rows, score = inner product.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Severity = Literal["error", "warn"]
Bound = Literal["at least", "at most"]

# Below so many vectors a spectrum says nothing about the encoder: the gates on shape then pass without a value.
ENOUGH = 32
# halfvec keeps 11 bits: the norm of a rounded unit vector is off by less than .001 at any width.
NORM_TOLERANCE = 0.01


@dataclass(frozen=True)
class Gate:
    """One measured number held against a threshold.

    value None: there was nothing to measure, which passes. severity: an "error" blocks promotion, a "warn" is told.
    passed: whether the value lies on the right side; NaN never does.
    """

    name: str
    value: float | None
    threshold: float
    bound: Bound
    severity: Severity = "error"
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        passed = self.value is None or (
            self.value >= self.threshold if self.bound == "at least" else self.value <= self.threshold
        )
        object.__setattr__(self, "passed", passed)

    def as_json(self) -> dict[str, Any]:
        """All fields; a value that JSON cannot hold becomes its name."""
        fields = asdict(self)
        if self.value is not None and not np.isfinite(self.value):
            fields["value"] = str(self.value)
        return fields

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        return f"{self.name} is {value} (needs {self.bound} {self.threshold:.4g})"


@dataclass(frozen=True)
class Limits:
    """Thresholds of `vector_gates`.

    effective_rank: as a share of the largest possible one, min(N - 1, D). dead_dimensions, duplicates: shares.
    """

    mean_cosine: float = 0.95
    effective_rank: float = 0.02
    dead_dimensions: float = 0.5
    duplicates: float = 0.5


def vector_gates(prefix: str, vectors: Floats, limits: Limits | None = None) -> list[Gate]:
    """The six gates that any embedding [N, D] has to pass; their names start with `prefix` and an underscore.

    Numbers that are not finite fail `finite` and are left out of the other five. Duplicates and dead dimensions are
    warnings: equal content gives equal vectors, and hashed attributes leave buckets empty, with nothing broken.
    """
    limits = limits or Limits()
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(vectors).all(axis=1))
    sound = vectors[finite]
    shapely = len(sound) >= ENOUGH
    possible = max(min(len(sound) - 1, vectors.shape[1]), 1)
    return [
        Gate(f"{prefix}_finite", _share(finite), 1.0, "at least"),
        Gate(f"{prefix}_norm_error", norm_error(sound), NORM_TOLERANCE, "at most"),
        Gate(f"{prefix}_mean_cosine", mean_cosine(sound) if shapely else None, limits.mean_cosine, "at most"),
        Gate(
            f"{prefix}_effective_rank",
            effective_rank(sound) if shapely else None,
            max(1.5, limits.effective_rank * possible),
            "at least",
        ),
        Gate(
            f"{prefix}_dead_dimensions",
            dead_dimensions(sound) if shapely else None,
            limits.dead_dimensions,
            "at most",
            "warn",
        ),
        Gate(f"{prefix}_duplicates", duplicates(sound) if shapely else None, limits.duplicates, "at most", "warn"),
    ]


VECTOR_GATES = ("finite", "norm_error", "mean_cosine", "effective_rank", "dead_dimensions", "duplicates")


def norm_error(vectors: Floats) -> float | None:
    """Largest |length - 1| of the rows [N, D]; None without rows."""
    if not len(vectors):
        return None
    return float(np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max())


def mean_cosine(vectors: Floats) -> float:
    """Mean inner product of two different rows [N, D], N >= 2: near 1 when all rows point one way.

    Exact for unit rows in O(N D): the sum over all pairs is the squared length of the sum.
    """
    n = len(vectors)
    total = vectors.astype(np.float64).sum(axis=0)
    return float((total @ total - np.square(vectors, dtype=np.float64).sum()) / (n * (n - 1)))


def effective_rank(vectors: Floats) -> float:
    """exp of the entropy of the normalised singular values of the centred rows [N, D] (Roy and Vetterli 2007, §3).

    Deviation: the rows are centred, since a common offset carries no ranking. 1 when all rows are equal or on a line.
    """
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    # The spectrum of the small Gram side costs O(N D min(N, D)) without the singular vectors.
    gram = centred.T @ centred if centred.shape[1] <= len(centred) else centred @ centred.T
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    total = singular.sum()
    if total < 1e-9:
        return 1.0
    shares = singular[singular > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def dead_dimensions(vectors: Floats) -> float:
    """Share of columns [N, D] that do not vary: standard deviation below a thousandth of an even spread's 1/sqrt(D)."""
    spread = vectors.std(axis=0, dtype=np.float64)
    return _share(spread < 1e-3 / np.sqrt(vectors.shape[1]))


def duplicates(vectors: Floats) -> float:
    """Share of rows [N, D] that repeat an earlier one bit for bit."""
    rows = {row.tobytes() for row in np.ascontiguousarray(vectors)}
    return 1 - len(rows) / len(vectors)


def interest_collapse(interests: Iterable[Floats]) -> float | None:
    """Mean over users of the largest cosine between two of the user's interests [K, D]; users with one are left out.

    1 means that K interests say no more than one; None when nobody has two.
    """
    largest = []
    for own_KD in interests:
        if len(own_KD) < 2:
            continue
        cosines_KK = own_KD @ own_KD.T
        np.fill_diagonal(cosines_KK, -np.inf)
        largest.append(float(cosines_KK.max()))
    return float(np.mean(largest)) if largest else None


def _share(flags: NDArray[np.bool_]) -> float:
    return float(flags.mean()) if len(flags) else 1.0

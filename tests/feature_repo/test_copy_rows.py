"""The fast encodings of lists equal what Postgres' array format says, for any strings and numbers."""

from struct import pack
from typing import Any

from feast.protos.feast.types.Value_pb2 import Int64List, StringList
from hypothesis import example, given, settings
from hypothesis import strategies as st

from feature_repo.columns import POSTGRES_EPOCH_MICROS
from feature_repo.copy_rows import value_cells

# Newlines look like protobuf's tags, ten bytes give a length that does, and above 127 bytes a length takes two bytes.
_texts = st.one_of(
    st.text(max_size=3),
    st.text("\n\x00aé", max_size=12),
    st.just("0123456789"),
    st.integers(120, 140).map("x".__mul__),
)
_micros = st.one_of(st.integers(-(2**63) + POSTGRES_EPOCH_MICROS, 2**63 - 1), st.integers(2**49, 2**56 - 1))


def _array(element: int, bodies: list[bytes] | None) -> bytes:
    if bodies is None:
        return pack(">i", -1)
    elements = b"".join(pack(">i", len(each)) + each for each in bodies)
    head = pack(">iiI", 1, 0, element) + pack(">ii", len(bodies), 1) if bodies else pack(">iiI", 0, 0, element)
    return pack(">i", len(head) + len(elements)) + head + elements


@settings(max_examples=60)
@given(st.lists(st.none() | st.lists(_texts, max_size=5), max_size=5))
@example([["abc\n"], ["d"]])
@example([["a" * 10, "\n" * 10], ["b\n", "c"], None, []])
@example([["a\n"]])
def test_lists_of_strings(lists: list[list[str] | None]) -> None:
    messages = [None if each is None else StringList(val=each) for each in lists]
    expected = [_array(25, None if each is None else [text.encode() for text in each]) for each in lists]
    assert value_cells("texts", messages) == expected


@settings(max_examples=60)
@given(st.lists(st.none() | st.lists(_micros, max_size=20), max_size=5))
@example([[2**56, 2**49]])
@example([[2**56 - 1, 2**49] * 9, None, []])
def test_lists_of_moments(lists: list[list[int] | None]) -> None:
    messages: list[Any] = [None if each is None else Int64List(val=each) for each in lists]
    expected = [
        _array(1184, None if each is None else [pack(">q", micros - POSTGRES_EPOCH_MICROS) for micros in each])
        for each in lists
    ]
    assert value_cells("moments", messages) == expected

"""Cuts of the histories into what is learned from and what is asked.

A question is a history and the item that came next. Nothing that happened after a question's cut is in its history or
in the training part of its split; `tests/encoders/test_splits.py` shuffles the future to prove it.
"""

from dataclasses import dataclass, replace

import numpy as np

from encoders.catalogue import BoolArray, Histories, IntArray


@dataclass(frozen=True, eq=False)
class Questions:
    """One question per row: histories (Q of them, the input) and targets int64 [N], the catalogue indices asked for.

    A question has one target, in the same row (N = Q), unless sets (int64 [N], ascending) says which question each
    target belongs to; every question has at least one.
    """

    histories: Histories
    targets: IntArray
    sets: IntArray | None = None

    def __len__(self) -> int:
        return len(self.histories)

    def select(self, rows: IntArray) -> tuple["Questions", IntArray]:
        """These questions in this order, and the places that their targets have among all."""
        chosen = self.histories.select(rows)
        if self.sets is None:
            return Questions(chosen, self.targets[rows]), rows
        first = np.searchsorted(self.sets, rows)
        sizes = np.searchsorted(self.sets, rows, side="right") - first
        sets = np.repeat(np.arange(len(rows)), sizes)
        places = np.repeat(first - (np.cumsum(sizes) - sizes), sizes) + np.arange(len(sets))
        return Questions(chosen, self.targets[places], sets), places


@dataclass(frozen=True, eq=False)
class Split:
    """train: all that a model may learn from; validation selects, test reports. name says which rule cut it."""

    name: str
    train: Histories
    validation: Questions
    test: Questions


def leave_one_out(histories: Histories, *, search: bool = False) -> Split:
    """Strict leave-one-out: a user's last event is the test target, the one before it the validation target.

    The validation item is an input at test time and never trained on. Users with fewer than 3 events are trained on
    whole and asked nothing: with one event there is nothing to predict from, with two no honest validation. search:
    a question also tells the query of its target, as somebody who searches does.
    """
    lengths = histories.lengths
    asked = np.flatnonzero(lengths >= 3)
    held = np.where(lengths >= 3, 2, 0)
    return Split(
        "leave_one_out",
        histories.keep(_heads(histories, lengths - held)),
        _asking(histories, asked, back=2, search=search),
        _asking(histories, asked, back=1, search=search),
    )


def refit(histories: Histories) -> Split:
    """Leave-one-out that also trains on the validation items: another protocol, never mixed with the strict one."""
    strict = leave_one_out(histories)
    held = np.where(histories.lengths >= 3, 1, 0)
    return Split("refit", histories.keep(_heads(histories, histories.lengths - held)), no_questions(), strict.test)


def production(histories: Histories) -> Split:
    """Everything is trained on and nothing is asked: the split of a generation that is refitted after the selection."""
    return Split("production", histories, no_questions(), no_questions())


def temporal(histories: Histories, *, test: float = 0.1, validation: float = 0.1) -> Split:
    """Global temporal split: two instants cut all users' events alike; a question is the first event after a cut.

    test and validation are the shares of events after the second and between the two cuts. Users with no event before
    a cut are asked nothing there.
    """
    ordered = np.sort(histories.times)
    cuts = (
        [ordered[int(len(ordered) * share)] for share in (1 - test - validation, 1 - test)] if len(ordered) else [0, 0]
    )
    return Split(
        "temporal",
        histories.keep(histories.times < cuts[0]),
        _first_after(histories, int(cuts[0]), int(cuts[1])),
        _first_after(histories, int(cuts[1]), None),
    )


def searches(histories: Histories, *, test: float = 0.1, validation: float = 0.1) -> Split:
    """Search by time: two instants cut all events alike, and every event with a query after one is a question.

    It has the events before it as its history, tells its query, and asks for its item. test and validation are the
    shares of events after the second instant and between the two. Raises ValueError for histories without queries.
    """
    ordered = np.sort(histories.times)
    first, second = (ordered[int(len(ordered) * share)] for share in (1 - test - validation, 1 - test))
    between = (histories.times >= first) & (histories.times < second)
    return Split(
        "searches",
        histories.keep(histories.times < first),
        _searching(histories, between),
        _searching(histories, histories.times >= second),
    )


def _searching(histories: Histories, chosen: BoolArray) -> Questions:
    """A question for each chosen event that has a query; its history ends before it."""
    if histories.queries is None:
        raise ValueError("histories without queries hold no searches")
    events = np.flatnonzero(chosen & (histories.queries >= 0))
    owners = np.searchsorted(histories.offsets, events, side="right") - 1
    heads = histories.select(owners)
    heads = heads.keep(_heads(heads, events - histories.offsets[owners]))
    return Questions(replace(heads, asked=histories.queries[events]), histories.items[events])


def strong_generalisation(histories: Histories, *, share: float = 0.1, seed: int = 0) -> Split:
    """Users disjoint: a share of the users is validated on, as many are tested on, the others are trained on whole.

    A held-out user's last event is the target, all before it the input; held-out users need at least 2 events.
    """
    able = np.flatnonzero(histories.lengths >= 2)
    drawn = np.random.default_rng(seed).permutation(able)
    size = min(int(len(histories) * share), len(able) // 3)
    validating, testing = np.sort(drawn[:size]), np.sort(drawn[size : 2 * size])
    training = np.setdiff1d(np.arange(len(histories)), drawn[: 2 * size])
    return Split(
        "strong_generalisation",
        histories.select(training),
        _asking(histories, validating, back=1),
        _asking(histories, testing, back=1),
    )


def cold_items(histories: Histories, items: int, *, share: float = 0.05, seed: int = 0) -> Split:
    """A share of the items loses every training event and is asked for: only content can find it.

    The test questions are the first events on cold items that follow at least one event on a warm one; their history
    holds warm items alone. Validation is the strict leave-one-out on what is left.
    """
    cold = np.zeros(items, dtype=np.bool_)
    seen = np.unique(histories.items)
    cold[np.random.default_rng(seed).permutation(seen)[: max(1, int(len(seen) * share))]] = True
    warm = histories.keep(~cold[histories.items])
    strict = leave_one_out(warm)
    return Split("cold_items", strict.train, strict.validation, _cold_questions(histories, cold))


def cold_users(histories: Histories, *, share: float = 0.2, seed: int = 0) -> Split:
    """A share of the users is kept from training whole, and asked for the first event while nothing has happened yet.

    Only what is known of a user (`towers.user_attributes`) can tell these questions apart. Validation is the strict
    leave-one-out on the other users.
    """
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(histories.lengths))
    cold = np.sort(drawn[: int(len(drawn) * share)])
    strict = leave_one_out(histories.select(np.setdiff1d(np.arange(len(histories)), cold)))
    asked = histories.select(cold)
    nothing = asked.keep(np.zeros(len(asked.items), dtype=np.bool_))
    return Split("cold_users", strict.train, strict.validation, Questions(nothing, asked.items[asked.offsets[:-1]]))


def future(
    histories: Histories, *, test: float = 0.2, validation: float = 0.1, strangers: float = 0.1, seed: int = 0
) -> Split:
    """What a user takes up in time, not next: the last fifth of the events is the set to find, the tenth before it
    validates, and the history ends before either.

    A set holds distinct items that the history does not. Users with less than one event in each part are trained on
    whole. strangers: share of the users who are kept from training, asked to the test like the others.
    """
    lengths = histories.lengths
    head = np.floor(lengths * (1 - test - validation) + 1e-9).astype(np.int64)
    known = np.floor(lengths * (1 - test) + 1e-9).astype(np.int64)
    asked = (head >= 1) & (known > head) & (lengths > known)
    drawn = np.random.default_rng(seed).permutation(len(histories))
    strange = np.zeros(len(histories), dtype=np.bool_)
    strange[drawn[: int(len(drawn) * strangers)]] = True
    cut = histories.keep(_heads(histories, np.where(asked, head, lengths)))
    return Split(
        "future",
        cut.select(np.flatnonzero(~strange)),
        _sets(histories, np.flatnonzero(asked & ~strange), head, known),
        _sets(histories, np.flatnonzero(asked), known, lengths),
    )


def _sets(histories: Histories, users: IntArray, begin: IntArray, end: IntArray) -> Questions:
    """For each user the distinct new items of the events [begin, end), after the history up to begin."""
    found = [
        np.setdiff1d(histories.of(user)[begin[user] : end[user]], histories.of(user)[: begin[user]])
        for user in users.tolist()
    ]
    asks = np.array([len(items) > 0 for items in found], dtype=np.bool_)
    found = [items for items in found if len(items)]
    chosen = histories.select(users[asks])
    sizes = np.array([len(items) for items in found], dtype=np.int64)
    targets = np.concatenate([np.zeros(0, np.int64), *found])
    heads = chosen.keep(_heads(chosen, begin[users[asks]]))
    return Questions(heads, targets, np.repeat(np.arange(len(found)), sizes))


def no_questions() -> Questions:
    """An empty set of questions."""
    empty = np.zeros(0, dtype=np.int64)
    return Questions(Histories([], np.zeros(1, dtype=np.int64), empty, empty), empty)


def _heads(histories: Histories, lengths: IntArray) -> BoolArray:
    """Marks the first lengths[u] events of each user, bool [N]."""
    position = np.arange(len(histories.items)) - np.repeat(histories.offsets[:-1], histories.lengths)
    marked: BoolArray = position < np.repeat(lengths, histories.lengths)
    return marked


def _asking(histories: Histories, users: IntArray, *, back: int, search: bool = False) -> Questions:
    """The question for the event `back` places from the end, for each of these users; search: with its query."""
    events = histories.offsets[users + 1] - back
    chosen = histories.select(users)
    heads = chosen.keep(_heads(chosen, chosen.lengths - back))
    if search and histories.queries is not None:
        heads = replace(heads, asked=histories.queries[events])
    return Questions(heads, histories.items[events])


def _first_after(histories: Histories, cut: int, end: int | None) -> Questions:
    """Users with an event in [cut, end) and one before the cut, asked for the first one after it."""
    users, targets = [], []
    for user in range(len(histories)):
        times = histories.times[histories.offsets[user] : histories.offsets[user + 1]]
        first = int(np.searchsorted(times, cut))
        if 0 < first < len(times) and (end is None or times[first] < end):
            users.append(user)
            targets.append(histories.of(user)[first])
    chosen = histories.select(np.array(users, dtype=np.int64))
    return Questions(chosen.keep(chosen.times < cut), np.array(targets, dtype=np.int64))


def _cold_questions(histories: Histories, cold: BoolArray) -> Questions:
    """The first event on a cold item of each user who has a warm one before it."""
    users, targets, lengths = [], [], []
    for user in range(len(histories)):
        is_cold = cold[histories.of(user)]
        warm_before = np.cumsum(~is_cold)
        found = np.flatnonzero(is_cold & (warm_before > 0))
        if len(found):
            users.append(user)
            targets.append(histories.of(user)[found[0]])
            lengths.append(found[0])
    chosen = histories.select(np.array(users, dtype=np.int64))
    before = _heads(chosen, np.array(lengths, dtype=np.int64))
    return Questions(chosen.keep(before & ~cold[chosen.items]), np.array(targets, dtype=np.int64))

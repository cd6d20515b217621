"""What the platform has said yes to: the harness's own model, which the database is held against."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from threading import Lock

# An event with an id is one event, whatever its time; one without is known by its user, item and time.
Event = tuple[str, ...]


def event(user: str, item: str, time: datetime, event_id: str = "") -> Event:
    """The key that an event is known by."""
    return (event_id,) if event_id else (user, item, time.isoformat())


@dataclass
class Ledger:
    """Events and items that were acknowledged, and groups of events that were sent and not (yet) answered.

    A group (a load, a request) is all or nothing. Threads may write.
    """

    events: set[Event] = field(default_factory=set)
    items: set[str] = field(default_factory=set)
    open: list[frozenset[Event]] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    def send(self, events: Iterable[Event]) -> frozenset[Event]:
        """Notes a group before it is sent; hand the answer to `acknowledge`."""
        group = frozenset(events)
        with self._lock:
            self.open.append(group)
        return group

    def acknowledge(self, group: frozenset[Event], items: Collection[str] = ()) -> None:
        """From now on every event of the group, and every item, has to be there exactly once."""
        with self._lock:
            self.open.remove(group)
            self.events |= group
            self.items.update(items)

    def compare(self, found: Counter[Event]) -> list[str]:
        """What the found events say against the ledger; empty when they agree."""
        faults = []
        missing = [key for key in self.events if not found[key]]
        if missing:
            faults.append(f"{len(missing)} acknowledged events are gone, such as {missing[0]}")
        doubled = [key for key, count in found.items() if count > 1]
        if doubled:
            faults.append(f"{len(doubled)} events are there more than once, such as {doubled[0]}")
        for group in self.open:
            there = sum(key in found for key in group)
            if there not in (0, len(group)):
                faults.append(f"{there} of the {len(group)} events of one unanswered load or request are there")
        known = self.events.union(*self.open)
        strangers = [key for key in found if key not in known]
        if strangers:
            faults.append(f"{len(strangers)} events are there that nobody sent, such as {strangers[0]}")
        return faults

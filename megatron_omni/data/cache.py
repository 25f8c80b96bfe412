"""What a loader remembers: values by (source, row), the least recently used forgotten first."""

import threading
from collections import OrderedDict


class Lru[V]:
    """Least recently used values up to a total cost, shared by threads. A limit of 0 keeps nothing."""

    def __init__(self, limit: int) -> None:
        self.limit, self._cost = limit, 0
        self._items: OrderedDict[tuple[int, int], tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int]) -> V | None:
        """The value, None where there is none."""
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: tuple[int, int], value: V, *, cost: int) -> None:
        """Keep a value as long as there is room for its cost."""
        with self._lock:
            self._cost += cost - self._items.pop(key, (None, 0))[1]
            self._items[key] = value, cost
            while self._cost > self.limit:
                _, (_, freed) = self._items.popitem(last=False)
                self._cost -= freed

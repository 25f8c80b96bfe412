"""Records whose headers a rank could not read in time, which all ranks then pass over, from the same step on.

Every rank plans for itself, which is right as long as a plan is a function of the data alone. A header on a disk that
hangs for one rank is no such function: that rank tells the others what it gave up, all pass the record over, and all
plan the step anew.
"""

from collections.abc import Callable

Key = tuple[int, int]
"""Number of a source, and a row of it."""


class Stalls[V]:
    """What became of the records that stalled (``V``), by key, the same on all ranks at the start of every step."""

    def __init__(self, agree: Callable[[list[Key]], list[Key]] | None, outcome: Callable[[Key], V]) -> None:
        """``agree`` gives what any rank found to all of them, which call it at the same steps; None: nobody else plans."""
        self._agree, self._outcome = agree or list, outcome
        self._known: dict[Key, V] = {}
        self._untold: list[Key] = []

    def get(self, key: Key) -> V | None:
        """The outcome of a record that stalled, None for any other."""
        return self._known.get(key)

    def add(self, key: Key) -> None:
        """This rank gave a record up; the others do not know yet."""
        self._known[key] = self._outcome(key)
        self._untold.append(key)

    def agreed[S](self, prepare: Callable[[], S], *, forget: Callable[[], None]) -> S:
        """What ``prepare`` gives once all ranks know the same; ``forget`` what was planned whenever they learn more."""
        while True:
            made, error = None, None
            try:
                made = prepare()
            except Exception as caught:  # raised below: the other ranks wait in ``agree``
                error = caught
            found, self._untold = self._agree(self._untold), []
            if found:  # then all go round again, also a rank with an error
                self._known |= {key: self._outcome(key) for key in found}
                forget()
            elif error is not None:
                raise error
            else:
                assert made is not None
                return made

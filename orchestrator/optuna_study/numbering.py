"""Numbers: which of the trials in a storage is trial n of the sweep."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from optuna.trial import FrozenTrial

SOURCE = "source"  # user attribute of a trial that was taken over from another study: where it was found
RETRIES = "retries"  # user attribute of a trial that tries a failed one again: the storage's number of that one


class Numbering:
    """Trials that were taken over from other studies come first in the storage, and have no number.

    One that tries a failed trial again has that one's number: to the sweep it is the same trial, in its newest form.
    """

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        """``trials`` are all that there are so far, in the storage's order."""
        self._num_imported = sum(SOURCE in trial.user_attrs for trial in trials)
        self._retries: list[int] = []  # as the storage numbers them, in order
        self._newest: dict[int, int] = {}  # of trials that were tried again, by number: as the storage numbers it
        self.num_seen = 0
        for trial in trials:
            self.see(trial)

    @property
    def num_trials(self) -> int:
        """Of the sweep, those that wait included."""
        return self.num_seen - self._num_imported - len(self._retries)

    def see(self, trial: FrozenTrial) -> None:
        """Take in the storage's next trial."""
        self.num_seen += 1
        if RETRIES in trial.user_attrs:
            self._retries.append(trial.number)
            self._newest[self.number(trial)] = trial.number

    def number(self, trial: FrozenTrial) -> int:
        first: int = trial.user_attrs.get(RETRIES, trial.number)
        return first - self._num_imported - bisect_left(self._retries, first)

    def in_storage(self, number: int) -> int:
        """The storage's number of a trial, in its newest form."""
        if number in self._newest:
            return self._newest[number]
        place = number + self._num_imported
        for retry in self._retries:
            place += retry <= place
        return place

    def newest(self, trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
        """The sweep's trials by number, in order, each in its newest form. ``trials`` have all been seen."""
        ours = [trial for trial in trials if SOURCE not in trial.user_attrs]
        found = {self.number(trial): trial for trial in ours}
        return dict(sorted(found.items()))

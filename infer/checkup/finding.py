"""What a check comes to, and faults that are counted as they are met."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A row of the doctor's table. passed: None if there was nothing to check. where: the first or the worst
    place; of a check that passed, at most what its number means."""

    check: str
    passed: bool | None
    number: str = ""
    where: str = ""


class Tally:
    """How many there are of a fault, and where the first one is."""

    def __init__(self):
        self.count, self.first = 0, ""

    def add(self, where: str, count: int = 1) -> None:
        self.first = self.first or where
        self.count += count

    def finding(self, check: str, of: int) -> Finding:
        """Passed if there are none. of: how many could have had it."""
        return Finding(check, self.count == 0, f"{self.count:,} of {of:,}", self.first)

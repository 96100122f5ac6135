"""A trial that tries hard to break the project: one file a kind of trouble. frame.py says what is judged."""

from trial.kills import Kills, Phases

KINDS = {
    "kills": Kills,
    "phases": Phases,
}

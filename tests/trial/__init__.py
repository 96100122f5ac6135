"""A trial that tries hard to break the project: one file a kind of trouble. frame.py says what is judged."""

from trial.data import Coco, Lines
from trial.disk import FullDisks
from trial.evaluations import Evaluations
from trial.flips import Flips
from trial.images import Images
from trial.kills import Kills, Phases
from trial.load import Load
from trial.ranks import Ranks
from trial.weights import Adapters, Checkpoints, Codecs

KINDS = {
    "images": Images,
    "flips": Flips,
    "weights": Checkpoints,
    "adapters": Adapters,
    "codecs": Codecs,
    "lines": Lines,
    "coco": Coco,
    "evaluations": Evaluations,
    "kills": Kills,
    "phases": Phases,
    "disk": FullDisks,
    "ranks": Ranks,
    "load": Load,
}

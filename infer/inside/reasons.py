"""The mask of a pass, cell by cell, with the reason why each is open or closed.   S: positions."""

import numpy as np

REASONS = [  # (may be read, why); a cell holds the index of one
    (True, "every token reads itself"),
    (True, "both belong to the prefix, image and prompt, which reads all of itself in both directions"),
    (True, "the answer reads the image and the prompt"),
    (True, "the answer reads what was written before"),
    (False, "the prefix never reads the answer: it was there first"),
    (False, "the answer is written from left to right: nothing reads what comes later"),
    (False, "another branch: branches read the prefix and themselves, not each other"),
    (False, "too far back: outside the sliding window of this layer"),
    (True, "opened by the mask function that was put in place"),
    (False, "closed by the mask function that was put in place"),
]
_OPEN = np.array([may for may, _ in REASONS])


def reasons(
    mask: np.ndarray, prefix: int, positions: np.ndarray, branch: np.ndarray, window: int | None
) -> np.ndarray:
    """uint8 [S, S]: for query t and key s, the index of a reason.

    mask bool [S, S]: what a layer was given. prefix: how many positions image and prompt have. positions
    [S]: of the tokens; those of different branches share them. branch [S]: which branch of the answer a token
    belongs to, all 0 if there are none. window: of this layer, None if it has none.
    """
    t, s = np.ogrid[: len(mask), : len(mask)]
    answer_t, answer_s = t >= prefix, s >= prefix
    far = positions[:, None] - positions[None] >= window if window else np.zeros_like(mask)
    other = answer_s & (branch[:, None] != branch[None])
    # By number in REASONS; the first that holds counts.
    conditions = {0: t == s, 1: ~answer_t & ~answer_s, 4: ~answer_t, 6: other, 5: s > t, 7: far, 2: ~answer_s}
    cells = np.select(list(conditions.values()), list(conditions), default=3)
    # A mask of another function (model/seam.py) has reasons of its own.
    return np.where(_OPEN[cells] == mask, cells, np.where(mask, 8, 9)).astype(np.uint8)

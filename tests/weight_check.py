"""What it costs at loading that weights which are no numbers are refused, on PaliGemma 2 3B.

    python tests/weight_check.py --folder /big/disk/3b       # builds a random checkpoint there, of 6 GB, once
    python tests/weight_check.py --folder /big/disk/3b --variant paligemma2-3b-448 --rounds 9

Not a pytest test. Loads as the programs do, for decoding on a CPU, with and without the check in turns, and
prints the medians. The files are in the system's memory from the first round on, so that no disk hides it.
"""

import statistics
import time
from pathlib import Path

from infer.lib.measuring import random_checkpoint
from model.config import VARIANTS
from model.decoding.packing import load_for_decoding
from model.io import weights
from train.run.program import parser, positive, run

LIMIT = 0.05


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, metavar="DIR", help="keep the checkpoint there")
    options.add_argument("--variant", choices=VARIANTS, default="paligemma2-3b-224")
    options.add_argument("--rounds", type=positive, default=5)
    args = options.parse_args()
    checks = {"with": weights.bound, "without": lambda tensor: tensor.new_zeros(())}
    took = {name: [] for name in checks}
    with random_checkpoint(args.variant, args.folder) as folder:
        for _ in range(args.rounds + 1):
            for name, weights.bound in checks.items():
                start = time.perf_counter()
                load_for_decoding(folder)
                took[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[1:]) for name, times in took.items()}  # the first reads the disk
    share = medians["with"] / medians["without"] - 1
    print(
        f"with {medians['with']:.2f} s, without {medians['without']:.2f} s: {share:+.1%} (limit {LIMIT:.0%})"
    )
    return int(share > LIMIT)


if __name__ == "__main__":
    run(main, __file__)

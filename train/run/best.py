"""Validation at intervals of a run, the weights that did best, and what is said about them."""

import argparse
import shlex
import sys
from collections.abc import Callable

import torch

from model import PaliGemma
from train.run.checkpoint import Run, Saver, replacing, save_model
from train.run.log import Log
from train.run.processes import all_gather


class Best:
    """Validates at the start, every so many steps and at the end; OUT/best has the weights of the best one.

    The trainer's state (trainer.json) has "best" and "validated", the last validation, as {"step", "score"}.
    So a run that ended during a validation starts with it when it is resumed.
    """

    def __init__(
        self,
        validate: Callable[[], tuple[dict[str, float], str]],
        every: int,
        args: argparse.Namespace,
        model: PaliGemma,
        run: Run,
        saver: Saver,
        log: Log | None,
    ):
        """validate: figures and a warning (Validation.run); every: steps; log: of the first process."""
        self.validate, self.every, self.args = validate, every, args
        self.model, self.run, self.saver, self.trainer, self.log = model, run, saver, saver.trainer, log
        self.warned = False

    def look(self) -> None:
        """Validate if it is time to. All processes call this after every step, and before the first."""
        step = self.trainer["step"]
        due = step % self.every == 0 or step == self.args.steps
        if not due or self.trainer.get("validated", {}).get("step") == step:
            return
        if step:
            self.saver.save()  # validation may take long, and meet pictures that training did not
        # One process decides for all: sums may differ in a digit, and then only some would save.
        figures, warning = all_gather(self.validate())[0]
        score = [figures[name] * sign for name, sign in (("val_mAP", 1), ("val_loss", -1)) if name in figures]
        now = self.trainer["validated"] = dict(step=step, score=score)
        if better := "best" not in self.trainer or score >= self.trainer["best"]["score"]:
            with replacing(self.run.out / "best") as folder:
                save_model(self.model, folder, self.run, torch.bfloat16)
            self.trainer["best"] = now
        if step:
            self.saver.save()  # what is known now
        if self.log:
            self.log.write(dict(step=step, **figures))
            words = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            self.log.bar.write(f"step {step}: {words}{' (the best so far)' if better and step else ''}")
            if warning and step and (not self.warned or step == self.args.steps):
                self.log.bar.write(f"warning: {warning}", file=sys.stderr)
                self.warned = True


def forget_other_scores(trainer: dict, before: dict, options: dict) -> None:
    """Forget scores on other pictures, or of the loss instead of the mAP; before, options: run.json as it
    was and is."""
    names = "val", "val_count", "shard", "skipped_val"
    score = trainer.get("best", {}).get("score")
    if not isinstance(score, list | None) or any(before.get(name) != options[name] for name in names):
        trainer.pop("best", None)
        trainer.pop("validated", None)


def verdict(args: argparse.Namespace, trainer: dict, closed_set: bool) -> str:
    """The last line of a run: which weights are the better ones, and the command that uses them."""
    final, best = args.out / "final", args.out / "best"
    program = "infer/detect.py" if closed_set else "infer/generate.py"

    def command(folder) -> str:
        source = ["--model", args.model, "--adapter", folder] if args.lora else ["--model", folder]
        return shlex.join(["python", program, *map(str, source), "--image", "PICTURE"])

    if "best" not in trainer:
        return f"{final}: {command(final)}"
    (at, score), last = trainer["best"].values(), trainer["validated"]["score"]
    if at == trainer["validated"]["step"]:
        return f"{final} is the best of all validations ({words_of(score)}), as {best}: {command(final)}"
    when = f"step {at:,}" if at else "before the first step"
    found = f"{best} ({when}: {words_of(score)}) is better than {final} ({words_of(last)})"
    return f"{found}: {command(best)}"


def words_of(score: list[float]) -> str:
    """The score as a person reads it: val_mAP if there is one, and val_loss."""
    *mAP, loss = score
    return "".join(f"val_mAP {value:.3f}, " for value in mAP) + f"val_loss {-loss:.3f}"

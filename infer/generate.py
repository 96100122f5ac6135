"""Ask a model about an image, in words.

    python infer/generate.py --image photo.jpg --prompt "caption en"    # one answer
    python infer/generate.py --image photo.jpg    # a conversation: /image FILE, /help, Ctrl-D ends

The answer is printed as it comes, then its length and speed. The official checkpoints know prompts such as
"caption en", "answer en how many dogs?", "detect cat ; dog", "segment cat", "ocr". What the shipped nano
understands is listed in train/practice/sentences.py.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path
from unicodedata import category

import torch

from infer.lib.options import (
    add_model_arguments,
    add_sampling_arguments,
    load_model,
    note_closed_set_only,
    sampling_options,
)
from model import PaliGemma
from model.decoding.batches import network_images
from model.decoding.generate import generate
from model.decoding.open_set import check_prompt
from model.decoding.photographs import are_photographs, photograph_warning
from model.io.image import load_image
from model.io.names import shown
from train.run.program import complain, parser, positive, run

HELP = "ask about the image, or: /image FILE (look at another), /help, Ctrl-D (end)"


class Speaker:
    """A model, how it chooses its words, and the image that it looks at."""

    def __init__(self, model: PaliGemma, args: argparse.Namespace):
        self.model, self.tokenizer = model, model.tokenizer
        self.samples, self.max_tokens = args.samples, args.max_tokens
        self.sampling = sampling_options(args)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.warned = False  # of photographs, to a model that knows none
        self.look(args.image)

    def look(self, file: Path) -> None:
        """Encode an image, once for all prompts that follow."""
        with torch.inference_mode():
            self.image_tokens = self.model.encode(network_images(self.model, [load_image(file)]))
        if not self.warned and are_photographs(self.model, 1) == [True]:
            self.warned = True
            complain(photograph_warning([file], 1), __file__)

    def answer(self, prompt: str) -> None:
        """Print the answers to a prompt: one as it comes, several when all have ended.

        A prompt that is too long, or asks for what the model cannot know, is refused.
        """
        check_prompt(prompt, self.model.config)
        image_tokens = self.image_tokens.expand(self.samples, -1, -1)
        prompts = [self.tokenizer.encode_prompt(prompt)] * self.samples
        steps = generate(self.model, image_tokens, prompts, self.max_tokens, self.sampling, self.generator)
        start, count, printed = time.perf_counter(), 0, ""
        answers: list[list[int]] = [[] for _ in prompts]
        for tokens, _ in steps:
            count += 1
            # tolist() waits for the GPU at every token: that is the price of printing answers as they come.
            for answer, token in zip(answers, tokens.tolist(), strict=True):
                if self.tokenizer.eos not in answer:
                    answer.append(token)
            text = self.decode(answers[0])
            # A token may end in the middle of a character, which then decodes to U+FFFD.
            if self.samples == 1 and not text.endswith("\ufffd"):
                print(printable(text[len(printed) :]), end="", flush=True)
                printed = text
        seconds = time.perf_counter() - start
        print(printable("\n".join(map(self.decode, answers))) if self.samples > 1 else "")
        print(f"  {count} tokens, {count / seconds:.1f} a second", file=sys.stderr)

    def decode(self, answer: list[int]) -> str:
        return self.tokenizer.decode([token for token in answer if token != self.tokenizer.eos])


def printable(answer: str) -> str:
    """An answer with the characters that control a terminal escaped: weights may come from anywhere.

    Unlike in `shown`, format characters stay: the scripts of Persian or Hindi need them.
    """
    return "".join(shown(c) if category(c) == "Cc" and c not in "\n\t" else c for c in answer)


def converse(speaker: Speaker) -> None:
    """Read prompts until the input ends; a mistake costs a line, not the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history and editing
    sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not text cost their own line only
    print(HELP)
    while True:
        try:
            line = input("> ").strip()
            command, _, rest = line.partition(" ")
            if command == "/image" and rest:
                speaker.look(Path(rest.strip()))
            elif line.startswith("/"):
                print(HELP)
            elif line:
                speaker.answer(line)
        except EOFError:
            return print()
        except (ValueError, OSError) as error:
            complain(error, __file__)


def main() -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--image", type=Path, required=True, metavar="FILE")
    add("--prompt", help="without it, prompts are read line by line")
    add("--max-tokens", type=positive, default=100, help="most tokens of an answer")
    add("--samples", type=positive, default=1, help="answers to each prompt")
    add_sampling_arguments(options)
    add_model_arguments(options)
    args = options.parse_args()
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError('--prompt is empty; write --prompt "caption en", or leave it out for a conversation')
    if args.samples > 1 and args.temperature == 0:
        raise ValueError("--samples are all alike at temperature 0; give --temperature 1, for example")
    speaker = Speaker(load_model(args), args)
    note_closed_set_only(speaker.model)
    if args.prompt is None:
        converse(speaker)
    else:
        speaker.answer(args.prompt.strip())


if __name__ == "__main__":
    run(main, __file__)

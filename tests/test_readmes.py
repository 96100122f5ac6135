"""The four READMEs: every command runs, what they show is what comes out, and what they point to is there.

A command is a line of a fenced block without a language, or text in backticks that begins like one. Each is
run by a shell as it stands, in a folder with the files that the READMEs take for granted, after the commands
whose --out it reads. QUICK and INSTEAD are all that is changed: slow things become small ones.
"""

import re
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, ROOT, save_tiny_model
from PIL import Image
from zygote import stand_in

from model import PaliGemma
from model.io.adapter import save_adapter
from model.io.hub import NANO
from model.lora import TARGETS, add_lora
from train.practice.write import write_coco

# Options added to a program's own; of an option given twice, the last one counts.
QUICK = {
    "train/fit.py": "--steps 2 --batch-size 4 --workers 0 --no-compile",  # compiling takes a minute
    "train/practice/write.py": "--count 4",
    "train/practice/drawings.py": "--train 4 --test 2",
    "infer/evaluate.py": "--count 2",
    "infer/doctor.py": "--count 2",
    "infer/ablate.py": '--count 2 --only "causal prefix"',
    "infer/heads.py": "--count 2",
    "infer/evaluate_answers.py": "--count 2",
    # a tiny model, found in --folder, in place of random weights of an official size; and no transformers,
    # slow to start: test_benchmark.py runs that side.
    "infer/benchmark.py": "--groups 1 --batch-size 1 --rounds 1 --seconds 0.01 --threads 1 --peers "
    "--device cpu --folder tiny",
    "infer/benchmark_step.py": "--steps 1 --no-peer --device cpu --folder tiny",
    "infer/tradeoffs.py early-stop": "--count 2 --repeats 1 --noise 0.5 --patience 1",
    "infer/tradeoffs.py growth": "--count 2 --repeats 1 --groups 1 2 --batch-size 1 2 --sides 32 64",
    "infer/tradeoffs.py seam": "--repeats 2",
    "infer/tradeoffs.py layouts": "--model nano --rows 2 --repeats 1",
    "infer/tradeoffs.py head": "--repeats 2 --widths nano --device cpu",
    "tests/run_trial.py": "--only codecs --cases 2",  # test_trial.py runs the short form
    "train/recipes/drawings_nano.sh": "--steps 2 --batch-size 4 --workers 0",  # likewise
    "train/recipes/nano.sh": "--batch-size 1 --workers 0 --no-compile --muon-lr 0",  # of its runs of fit.py
}
INSTEAD = {
    "--nproc_per_node=8": "--nproc_per_node=2 --standalone",  # a free port instead of the same for all
    "python -m pytest tests/": "ls tests/",  # this suite runs them
    "python -m pytest -m gpu": "grep '\"gpu:' pyproject.toml",
    "train/recipes/drawings_nano.sh": "TRAIN=8 TEST=4 train/recipes/drawings_nano.sh",
    "hf auth login": "hf auth login --help",  # no account here
    'python -m pip install -e ".[demo]"': "grep demo pyproject.toml",  # no gradio here
    "python infer/demo.py": "python infer/demo.py --help",  # it would serve for ever
    "photographs.py --photographs FOLDER": "photographs.py --help",  # it would replace nano's
}

# ---- what is in a README -----------------------------------------------------------------------------------

READMES = "README.md", "model/README.md", "train/README.md", "infer/README.md"
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in READMES}
CI = re.compile(r"<!-- ci -->.*?&& (.*?)\n.*?<!-- /ci -->", re.DOTALL)  # .ci/run executes these
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROGRAM = re.compile(r"(\w+=\S+ )*(python|torchrun|hf|bash|\S+\.sh) ")


def blocks(name: str, language: str = "") -> list[str]:
    return [body for of, body in BLOCK.findall(CI.sub("", TEXTS[name])) if of == language]


def find_commands() -> list[str]:
    """All commands in their order, each on one line and without its comment."""
    lines = "".join(body for name in READMES for body in blocks(name)).replace("\\\n", " ").splitlines()
    lines = [" ".join(re.sub(r"\s# .*", "", line).split()) for line in lines if line]
    quoted = re.findall(r"`([^`]+)`", "".join(BLOCK.sub("", text) for text in TEXTS.values()))
    quoted = [line for line in (" ".join(text.split()) for text in quoted) if PROGRAM.match(line)]
    # In a sentence, a command may be shortened to the beginning of one that is written out elsewhere.
    quoted = [line for line in quoted if not any(whole.startswith(line) for whole in lines)]
    return list(dict.fromkeys(lines + quoted))


COMMANDS = find_commands()


def quick(command: str) -> str:
    """The command as it is run here."""
    for words, others in INSTEAD.items():
        command = command.replace(words, others)
    return " ".join([command, *(more for program, more in QUICK.items() if f"{program} " in f"{command} ")])


def makers(command: str) -> list[str]:
    """The commands before it that write to a file or folder which it names."""
    outs = {other: re.search(r"--out (\S+)", other) for other in COMMANDS[: COMMANDS.index(command)]}
    return [other for other, out in outs.items() if out and re.search(rf" {out[1]}(/|\s|$)", command)]


# ---- running -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A user's working folder: the repository, pictures, and a cache of the hub with nano's files for all."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("model", "train", "infer", "tests", "media", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    write_coco(folder / "practice" / "scenes", 4)
    (folder / "coco" / "annotations").mkdir(parents=True)
    for name in ("photos", "coco/train2017"):
        (folder / name).symlink_to(folder / "practice" / "scenes" / "images")
    for name in ("instances.json", "coco/annotations/instances_train2017.json"):
        (folder / name).symlink_to(folder / "practice" / "scenes" / "instances.json")
    (folder / "mine.py").write_text(blocks("model/README.md", "python")[-1])  # an attention of one's own
    save_tiny_model(folder / "tiny", NANO / "tokenizer.model")
    (folder / "raccoon").mkdir()
    for name, file in (
        ("images", "images"),
        ("train.json", "instances.json"),
        ("test.json", "instances.json"),
    ):
        (folder / "raccoon" / name).symlink_to(folder / "practice" / "scenes" / file)
    Image.open(folder / "photos" / "000000.png").save(folder / "photo.jpg")
    tuned = PaliGemma.from_pretrained("nano")
    add_lora(tuned, TARGETS["published"])
    for source in set(re.findall(r"(?:google|segis95)/[\w.-]+", " ".join(COMMANDS))):
        cached = folder / "hub" / f"models--{source.replace('/', '--')}"
        if "adapter" in source:
            save_adapter(tuned, cached / "snapshots" / "0")
        else:
            shutil.copytree(NANO, cached / "snapshots" / "0")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0")
    return folder


def shell(folder: Path, line: str, stdin: str = "") -> str:
    """Run a line of the shell, which must succeed; returns what it prints on both outputs."""
    own = dict(HF_HUB_CACHE=str(folder / "hub"), CUDA_VISIBLE_DEVICES="", PYTHONUNBUFFERED="1")
    own |= dict(PATH=f"{stand_in().parent}:{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}")
    own |= dict(PYTHON_EXEC=str(stand_in()))  # torchrun's python
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=ENVIRONMENT | own, input=stdin, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def run(request, folder):
    """What a command prints, run once and after those that it needs. All commands of the selected tests start
    here, two at a time, since most of their time is spent on starting Python."""
    running = {}

    def work(command: str, needed: list[Future]) -> str:
        for other in needed:
            other.result()
        return shell(folder, quick(command))

    def start(command: str) -> Future:
        if command not in running:  # what it needs goes into the queue before it
            running[command] = pool.submit(work, command, [start(other) for other in makers(command)])
        return running[command]

    with ThreadPoolExecutor(2) as pool:
        for test in request.session.items:
            if getattr(test, "originalname", "") == "test_command":
                start(test.callspec.params["command"])
        yield lambda command: start(command).result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("command", COMMANDS, ids=COMMANDS)
def test_command(command, run):
    run(command)


def test_nano_recipe(run, folder):
    """It ends in a checkpoint."""
    (command,) = (command for command in COMMANDS if "recipes/nano.sh" in command)
    result = run(command).splitlines()[-1].removeprefix("nano: ")
    assert PaliGemma.from_pretrained(str(folder / result)).config.open_vocabulary is False


# ---- what is shown -----------------------------------------------------------------------------------------


def test_all_other_blocks_are_below():
    others = ["".join(language[:1] for language, _ in BLOCK.findall(text)) for text in TEXTS.values()]
    assert others == ["tpt", "ppp", "t", "t"], "p(ython) or t(ext) of each README"


def test_what_you_should_see(folder):
    shown, *_ = blocks("README.md", "text")
    shutil.rmtree(folder / "detections", ignore_errors=True)  # as other commands' pictures stay in it
    assert shell(folder, CI.search(TEXTS["README.md"])[1]) == shown


def test_python_prints_what_is_shown(folder):
    (code,), (*_, shown) = blocks("README.md", "python"), blocks("README.md", "text")
    assert shell(folder, f"python - <<'END'\n{code}\nEND") == shown


def test_python_of_the_network(folder):
    """With images and tokens for its placeholders."""
    code = "\n".join(blocks("model/README.md", "python"))
    given = "images, tokens, prefix_len = torch.rand(2, 3, 128, 128), torch.ones(2, 5).long(), 3"
    code = f"import torch\n{given}\n{code}\nprint(*logits.shape, logits.dtype, *maps[0].shape)"
    assert shell(folder, f"python - <<'END'\n{code}\nEND") == "2 5 2560 torch.float32 2 4 69 69\n"


def test_conversation(folder):
    (shown,) = blocks("infer/README.md", "text")
    prompts = re.findall("^> (.*)", shown, re.MULTILINE)
    printed = shell(folder, "python infer/generate.py --image media/example.png", "\n".join(prompts))
    _, *answers, end = re.sub(r"\n  \d+ tokens, .*", "", printed).split("\n> ")
    said = "".join(f"> {prompt}\n{answer}\n" for prompt, answer in zip(prompts, answers, strict=True))
    assert said == shown and end == "\n"


@pytest.mark.parametrize("name", TEXTS)
def test_what_it_points_to_is_there(name):
    """Links and pictures; and files of the repository, by their names or the ends of their paths."""
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[name]):
        assert ((ROOT / name).parent / link).exists(), link
    files = [str(file) for top in ("model", "train", "infer", "tests") for file in (ROOT / top).rglob("*.*")]
    for mentioned in re.findall(r"[\w/]+\.(?:py|sh)\b", TEXTS[name]):
        assert mentioned == "mine.py" or any(file.endswith(f"/{mentioned}") for file in files), mentioned

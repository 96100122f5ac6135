"""PaliGemma 2 3B at its real size, beside transformers: load time, peak memory, next-token distributions.

    python tests/full_size.py                       # minutes; 8 GB of disk, 8 GB of memory
    python tests/full_size.py --float32             # both in float32 too, as the yardstick: 16 GB of memory
    python tests/full_size.py --folder /big/disk    # where the temporary checkpoint goes

Not a pytest test: it writes a random checkpoint as the hub publishes them (bfloat16, two shards, official
names) and loads it in a new process for each side, so that peaks do not mix. Memory is told after loading,
after reading a byte of every page of every weight, and after a forward: a file that is mapped rather than
copied costs nothing before it is read. Exit code 0 if every check holds.
"""

import argparse
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GB = 1e9
SIZE, P, T, PREFIX = 224, 256, 12, 8  # pixels; image tokens, text tokens, how many of these are the prompt
BOS, NEWLINE, IMAGE, VOCAB = 2, 108, 257_152, 257_216
SIDES = ["ours bfloat16", "transformers bfloat16", "ours float32", "transformers float32"]
STAGES = ["load", "read", "forward"]
# in file sizes: float32 weights are two, and the mapped file stays resident until all of it is converted
MAX_PEAK = {"ours bfloat16": 1.1, "ours float32": 3.2}
MAX_KL = {"bfloat16": 0.1, "float32": 1e-6}  # nats, at every position; measured: 0.04 and 2e-10


# Child processes ------------------------------------------------------------------------------------------


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """bfloat16; activations of about 1, attention scores and logits of about +-4."""
    noise = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
    if name == "language_model.model.norm.weight":
        return noise.mul_(0.3).add_(7)  # Gemma's norms multiply by 1 + weight
    if "norm" in name and name.endswith("weight"):
        return noise.mul_(0.1).add_(0 if name.startswith("language_model") else 1)
    if name.endswith("bias"):
        return noise.mul_(0.1)
    gain = 2 if "q_proj" in name or "k_proj" in name else 1
    gain = 0.5 if "embed_tokens" in name else gain  # with more, the tied head would only repeat its input
    return noise.mul_(gain * shape[1:].numel() ** -0.5)


def build(folder: Path) -> None:
    """Write the checkpoint; one shard is in memory at a time. Names and shapes come from transformers."""
    from reference import published_config, rename
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    text = dict(
        model_type="gemma2",
        vocab_size=VOCAB,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        sliding_window=4096,
    )
    vision = dict(
        model_type="siglip_vision_model",
        image_size=SIZE,
        patch_size=14,
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        vision_use_head=False,
    )
    with torch.device("meta"):
        config = PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=text["hidden_size"])
        hf = PaliGemmaForConditionalGeneration(config)
    raw = published_config(hf)  # written for tiny models, whose vocabulary is smaller
    raw |= {"image_token_index": IMAGE, "_vocab_size": VOCAB}
    raw["text_config"]["vocab_size"] = VOCAB
    (folder / "config.json").write_text(json.dumps(raw, indent=2))

    shapes = {rename(name, "A"): weight.shape for name, weight in hf.named_parameters()}  # no tied head
    total, done, files = sum(shape.numel() for shape in shapes.values()), 0, {}
    for name, shape in shapes.items():
        files[name] = f"model-0000{1 if done < total / 2 else 2}-of-00002.safetensors"
        done += shape.numel()
    index = {"metadata": {"total_size": 2 * total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    generator = torch.Generator().manual_seed(0)
    for file in sorted(set(files.values())):
        names = [name for name in files if files[name] == file]
        shard = {name: random_weight(name, shapes[name], generator) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard  # before the next is made


def inputs() -> tuple[Tensor, Tensor]:
    """A random image [1, 3, S, S] in [-1, 1], and tokens [1, T]: bos, words, newline, words of the answer."""
    generator = torch.Generator().manual_seed(1)
    images = 2 * torch.rand(1, 3, SIZE, SIZE, generator=generator) - 1
    tokens = torch.randint(473, 255_968, (1, T), generator=generator)
    tokens[0, 0], tokens[0, PREFIX - 1] = BOS, NEWLINE
    return images, tokens


def our_side():
    """Two functions: folder, dtype -> our model; model -> logits [T, vocab]."""
    from model import PaliGemma

    def load(folder, dtype):
        return PaliGemma.from_pretrained(str(folder), dtype=dtype)

    return load, lambda model: model(*inputs(), PREFIX)[0]


def their_side():
    """The same two of transformers."""
    from transformers import PaliGemmaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()

    def load(folder, dtype):
        model, report = PaliGemmaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
        if any(report.values()):
            sys.exit(f"transformers expects other tensors: {report}")
        return model.eval()

    def run(model):
        images, tokens = inputs()
        image = tokens.new_zeros(1, P)
        is_suffix = torch.arange(T)[None] >= PREFIX
        ids = torch.cat((image + IMAGE, tokens), dim=1)
        out = model(
            pixel_values=images,
            input_ids=ids,
            token_type_ids=torch.cat((image, is_suffix.long()), dim=1),  # or it is causal everywhere
            attention_mask=torch.ones_like(ids),
            use_cache=False,
        )
        return out.logits[0, -T:].float()

    return load, run


def memory() -> dict[str, int]:
    """Bytes: the peak of the resident memory so far; what is resident now, anonymous and of files."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    size = {words[0]: 1024 * int(words[1]) for words in lines if words[-1] == "kB"}
    return {"peak": size["VmHWM:"], "anon": size["RssAnon:"], "file": size["RssFile:"] + size["RssShmem:"]}


@torch.no_grad()
def measure(side: str, folder: Path) -> dict:
    """Seconds, and memory above that of the imported libraries, after each stage. Writes the logits too."""
    load, run = our_side() if side.startswith("ours") else their_side()
    base = memory()
    base["peak"] = base["anon"] + base["file"]
    report = {}

    def stage(name, action):
        start = time.perf_counter()
        result = action()
        seconds = time.perf_counter() - start
        report[name] = {"seconds": seconds} | {key: value - base[key] for key, value in memory().items()}
        return result

    model = stage("load", lambda: load(folder, getattr(torch, side.split()[1])))
    pages = [weight.flatten().view(torch.uint8)[:: mmap.PAGESIZE] for weight in model.parameters()]
    stage("read", lambda: [page.sum() for page in pages])
    logits = stage("forward", lambda: run(model))
    save_file({"logits": logits.contiguous()}, folder / f"logits of {side}")
    return report


# The parent process ---------------------------------------------------------------------------------------


def in_child(task: str, folder: Path) -> dict | None:
    """What `build` or `measure` returns in a new process, which finds no weights in the page cache."""
    print(f"{task} ...", flush=True)
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--child", task, "--folder", str(folder)]
    child = subprocess.run(command, stdout=subprocess.PIPE)  # if interrupted, it ends the child
    if child.returncode:
        killed = ": killed, perhaps for want of memory" if child.returncode == -signal.SIGKILL else ""
        sys.exit(f"FAILED: {task!r} ended with exit code {child.returncode}{killed}")
    return json.loads(child.stdout.splitlines()[-1])


def check_room(folder: Path, disk: float, wanted: float) -> None:
    """Exit with a message if free disk space or memory (GB) do not suffice."""
    if not Path("/proc/meminfo").exists():
        sys.exit("this program reads its memory use from /proc: it needs Linux")
    if not folder.is_dir():
        sys.exit(f"no folder {folder}")
    free = shutil.disk_usage(folder).free / GB
    if free < disk:
        sys.exit(f"{folder} has {free:.1f} GB free, {disk} GB are needed: choose another --folder")
    available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024 / GB
    if available < wanted:
        sys.exit(f"{available:.1f} GB of memory are available, {wanted} GB are needed")


def compare_memory(reports: dict[str, dict], size: int) -> list[str]:
    """Print the table of seconds and memory; returns the complaints."""
    print(f"\ncheckpoint {size / GB:.2f} GB; memory in GB, above that of the imported libraries")
    print(f"{'':22} {'stage':8}{'seconds':>9}{'peak':>8}{'/ file':>8}{'anon':>8}{'mapped':>8}")
    complaints = []
    for side, report in reports.items():
        for stage in STAGES:
            now = report[stage]
            peak, anon, file = (now[key] / GB for key in ("peak", "anon", "file"))
            times = now["peak"] / size
            print(f"{side:22} {stage:8}{now['seconds']:9.1f}{peak:8.2f}{times:8.2f}{anon:8.2f}{file:8.2f}")
        weights = size * (2 if side.endswith("float32") else 1)
        resident = (report["read"]["anon"] + report["read"]["file"]) / weights
        if resident < 0.99:
            complaints.append(f"{side}: only {resident:.2f} of the weights are resident: its peak is no peak")
        if side in MAX_PEAK and times > MAX_PEAK[side]:
            complaints.append(f"{side}: the peak is {times:.2f} file sizes, more than {MAX_PEAK[side]}")
        if side in MAX_PEAK and (now["anon"] + now["file"]) / weights > 1.1:
            complaints.append(f"{side}: more than the weights stays in memory")
    return complaints


def compare_logits(logits: dict[str, Tensor]) -> list[str]:
    """Print how far apart the next-token distributions are; returns the complaints."""
    logs = {side: value.double().log_softmax(-1) for side, value in logits.items()}
    print(f"\n{'next token':22} {'entropy, nats':>16}{'top probability':>18}{'top tokens':>12}")
    for side, log in logs.items():
        entropy, top = -(log.exp() * log).sum(-1), log.max(-1)
        spread = f"{entropy.min():.2f} to {entropy.max():.2f}", f"{top.values.min().exp():.3f} to "
        different = f"{len(top.indices.unique())} of {T}"
        print(f"{side:22} {spread[0]:>16}{spread[1] + f'{top.values.max().exp():.3f}':>18}{different:>12}")
    print(f"\n{'KL(p || q)':46}{'max':>10}{'mean':>10}{'same top':>10}")
    kl = {}
    for p, q in [(1, 0), (2, 0), (2, 1), (3, 2)][: 4 if len(logs) == 4 else 1]:
        log_p, log_q = logs[SIDES[p]], logs[SIDES[q]]
        kl[p, q] = (log_p.exp() * (log_p - log_q)).sum(-1)
        same = f"{(log_p.argmax(-1) == log_q.argmax(-1)).sum()} of {T}"
        print(f"{SIDES[p]:22}{SIDES[q]:24}{kl[p, q].max():10.1e}{kl[p, q].mean():10.1e}{same:>10}")
    complaints = []
    for pair, dtype in (((1, 0), "bfloat16"), ((3, 2), "float32")):
        if pair in kl and not kl[pair].max() <= MAX_KL[dtype]:  # `not <=` so that NaN is a complaint
            complaints.append(f"{dtype}: KL up to {kl[pair].max():.1e} nats, more than {MAX_KL[dtype]}")
    if (2, 0) in kl and kl[2, 0].mean() > 1.5 * kl[2, 1].mean():
        complaints.append("bfloat16: ours is further from float32 than transformers is")
    return complaints


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--float32", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--child", choices=["build", *SIDES], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(build(args.folder) if args.child == "build" else measure(args.child, args.folder)))
        return
    check_room(args.folder, disk=8, wanted=16 if args.float32 else 8)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("FAILED: ended from outside"))  # removes the folder
    sides = SIDES if args.float32 else SIDES[:2]
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="paligemma2-3b-") as temporary:
        folder = Path(temporary)
        in_child("build", folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        reports = {side: in_child(side, folder) for side in sides}
        logits = {side: load_file(folder / f"logits of {side}")["logits"] for side in sides}
    complaints = compare_memory(reports, size) + compare_logits(logits)
    if complaints:
        sys.exit("\nFAILED: " + "; ".join(complaints))
    print("\npassed")


if __name__ == "__main__":
    main()

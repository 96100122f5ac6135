"""Training in several processes, sharded or not, on one node and on two, and the device of each."""

import random
import shutil
import socket
import subprocess
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from helpers import ENVIRONMENT, ROOT, same, torchrun
from torch.distributed import HashStore
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import (
    PLAIN,
    USUAL,
    command,
    launch,
    metrics,
    parsed,
    run,
    run_complaint,
    weights,
    weights_apart,
)

from model import PaliGemma
from model.io.tokenizer import Tokenizer
from train import fit as train
from train import loss as objective_module
from train import setup
from train.data.open import open_data
from train.data.samples import collate
from train.loss import Objective
from train.run import checkpoint, processes

# The device of a process ------------------------------------------------------------------------------------


class OnTheCpu(TorchFunctionMode):
    """Whatever is asked for on a GPU is made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def place(value):
            asked = isinstance(value, str | torch.device) and str(value).startswith("cuda")
            return torch.device("cpu") if asked and func is not torch.device else value

        return func(*map(place, args), **{name: place(value) for name, value in (kwargs or {}).items()})


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as far as Python can see; the numbers of those that were made the current one. Of
    torch.cuda.set_device only the call into C is replaced, so its own checks run."""
    current = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", current.append, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with OnTheCpu():
        yield current


@pytest.mark.parametrize(
    ("device", "environment", "current"),
    [("cuda", {}, 0), ("cuda:1", {}, 1), ("cuda", dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"), 0)],
    ids=["the GPU", "one by its number", "torchrun, one process"],
)
def test_training_on_a_gpu(device, environment, current, gpus, tiny, scenes, tmp_path, monkeypatch):
    """With validation, a checkpoint and going on from it: what the CPU does, autocast included."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options = f"{PLAIN} --data {scenes} --val {scenes} --val-every 2 --val-count 4 --save-every 2"
    run(tiny, tmp_path / "run", f"{options} --steps 4 --device {device} --amp")
    for name in ("step-0000004", "final"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    run(tiny, tmp_path / "run", f"{options} --steps 4 --device {device} --amp", "--resume")
    assert gpus == [current, current]
    assert same(weights(tmp_path / "run" / "step-0000004"), weights(tmp_path / "step-0000004"))
    run(tiny, tmp_path / "cpu", f"{options} --steps 4 --amp")
    one, two = (
        [line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("run", "cpu")
    )
    assert one == pytest.approx(two, abs=1e-3)


def test_device_of_each_process(monkeypatch):
    """Of several on a machine, each has a GPU of its own."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train.own_device("cuda", world=8) == torch.device("cuda:1")
    assert train.own_device("cpu", world=8) == torch.device("cpu")


def test_shard_without_torchrun(tiny, tmp_path):
    assert "torchrun --nproc_per_node" in run_complaint(tiny, tmp_path / "run", "--shard")


@pytest.mark.parametrize("device", ["cuda:2", "gpu", "xpu"])
def test_no_such_device(device, gpus, tmp_path):
    with pytest.raises(ValueError, match=f"--device {device}"):
        run("nano", tmp_path / "run", f"--device {device}")
    assert not gpus and not (tmp_path / "run").exists()


# As one process does ----------------------------------------------------------------------------------------


def test_two_processes(tiny, tmp_path):
    """Two processes with half of each batch do what one does with all of it."""
    options = "--steps 4 --warmup 1"
    run(tiny, tmp_path / "one", options)
    launch(tiny, tmp_path / "two", f"{USUAL} {options}", torchrun(2))
    one, two = (weights(tmp_path / name / "step-0000004") for name in ("one", "two"))
    assert weights_apart(one, two) <= 1e-4
    moved = [(one[name] - tensor).abs().max() for name, tensor in weights(tiny).items()]
    assert max(moved) > 1e-3, "the test needs steps longer than its tolerance"


@pytest.mark.parametrize("option", ["", "--shard"], ids=["DDP", "FSDP"])
def test_micro_batches_in_two_processes(option, tiny, pairs, tmp_path):
    """Two micro-batches on each of two processes do what one process does with the batch at once. Answers
    have different lengths, so no part has a loss of the same weight."""
    options = f"--data {pairs} --steps 3"
    run(tiny, tmp_path / "one", f"{PLAIN} {options}")
    launch(tiny, tmp_path / "two", f"{options} --save-every 3 --accumulate 2 {option}", torchrun(2))
    one, two = (weights(tmp_path / name / "step-0000003") for name in ("one", "two"))
    assert weights_apart(one, two) < 1e-4 and weights_apart(one, weights(tiny)) > 1e-3
    one, two = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=2e-4)


def test_sharded(tiny, scenes, tmp_path):
    """FSDP2 on two processes, interrupted by the end of its steps and resumed, against one process."""
    options = f"--data {scenes} --save-every 2 --keep 5"
    run(tiny, tmp_path / "one", f"{PLAIN} {options} --steps 4 --warmup 2")
    for steps in (2, 4):
        more = f"{options} --shard --steps 4" + (" --resume" if steps == 4 else "")
        launch(tiny, tmp_path / "two", more, torchrun(2))
        if steps == 2:
            shutil.rmtree(tmp_path / "two" / "step-0000004")
            shutil.rmtree(tmp_path / "two" / "final")
    one, two = (weights(tmp_path / name / "step-0000004") for name in ("one", "two"))
    assert weights_apart(one, two) < 1e-4
    assert PaliGemma.from_pretrained(str(tmp_path / "two" / "final")).config.groups == 12


# Sharded weights --------------------------------------------------------------------------------------------


@pytest.fixture
def group():
    """This process as the only one of torchrun."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(folder, options="") -> Objective:
    argv = f"--model {folder} --out x --device cpu --shard {options}".split()
    model = PaliGemma.from_pretrained(str(folder), dtype=torch.float32)
    return train.distribute(Objective(model, None).train(), train.arguments(argv))


def test_sharded_on_the_cpu_of_a_machine_with_gpus(group, tiny, monkeypatch):
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("cuda"))
    assert {p.device_mesh.device_type for p in sharded(tiny).parameters()} == {"cpu"}


@pytest.fixture(params=[3, 7])
def one_of_eight(request):
    """This process as one of eight. Nothing that it sends arrives, and it receives nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=8)
    yield request.param
    dist.destroy_process_group()


class Made(TorchDispatchMode):
    """Bytes of all memory that tensors are given; pages mapped from a file are not."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if type(x) is torch.Tensor and x.untyped_storage().resizable():  # no mapped pages
                self.sizes[x.untyped_storage()._cdata] = 0 if x.is_meta else x.nbytes
        return results


def test_a_process_reads_its_own_part(one_of_eight, tiny, tmp_path):
    """Of every weight its own rows, which are the same as those of a whole model; and while it does so, no
    weight is whole, so a model may be larger than a GPU."""
    whole = PaliGemma.from_pretrained(str(tiny))
    whole.save_pretrained(tmp_path, torch.bfloat16)  # so that weights are converted, not only mapped
    args = parsed(f"--shard --lora --lora-rank 2 --dtype float32 --model {tmp_path}")
    with Made() as made:
        model = setup.load_model(args, tmp_path, None, None, torch.device("cpu"))
        objective = Objective(model, None)
        train.distribute(objective, args)
        setup.load_shards(args, model, tmp_path, torch.device("cpu"))
    for name, tensor in whole.state_dict().items():
        own = tensor.float().chunk(8)[one_of_eight : one_of_eight + 1] or [tensor[:0]]
        assert torch.equal(model.state_dict()[name].to_local(), own[0]), name
    parameters = dict(model.named_parameters())
    assert not any(p.is_meta for p in parameters.values())
    assert {name[-2:] for name, p in parameters.items() if p.requires_grad} == {".A", ".B"}
    sizes = {name: p.numel() * 4 for name, p in parameters.items()}
    assert max(made.sizes.values()) < max(sizes.values()) / 6
    assert sum(made.sizes.values()) < sum(sizes.values()) / 2


def test_only_the_first_process_holds_the_whole_state(group, tiny, monkeypatch):
    """The others help to put each tensor together, and let go of it before the next."""
    state, made, real = sharded(tiny).model.state_dict(), [], DTensor.full_tensor

    def full_tensor(tensor):
        assert not any(whole() is not None for whole in made)
        made.append(weakref.ref(tensor := real(tensor).clone()))
        return tensor

    unsharded = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32)
    assert same(checkpoint.whole(state), unsharded.state_dict())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(DTensor, "full_tensor", full_tensor)
    assert checkpoint.whole(state) == {} and len(made) == len(state)


def test_sharded_with_amp_rounds_no_totals_and_no_angles(group, tiny, scenes, monkeypatch):
    """Weights are cast to bfloat16; the weights of the loss, their total and RoPE's angles are not."""
    objective = sharded(tiny, "--amp")
    attention, attend, loss_of = objective.model.decoder.layers[1].attn, [], []
    forward, real = attention.forward, objective_module.vocabulary_loss

    def watched_attention(x, rope, *rest):
        attend.append((x, *rope))
        return forward(x, rope, *rest)

    def watched_loss(decoder, hidden, labels, weights):
        loss_of.append((weights, real(decoder, hidden, labels, weights)))
        return loss_of[-1][1]

    monkeypatch.setattr(attention, "forward", watched_attention)
    monkeypatch.setattr(objective_module, "vocabulary_loss", watched_loss)
    data = open_data(scenes, None, objective.model, Tokenizer(tiny), seed=0, augment=False)
    batch = collate([data[i, i] for i in range(4)], objective.model.config.pad)
    loss, logged = objective(batch | {"total": torch.tensor(240.5)})
    ((x, cos, sin),), ((weights_, loss_sum),) = attend, loss_of
    assert x.dtype == torch.bfloat16
    assert {t.dtype for t in (cos, sin, weights_, loss_sum, loss)} == {torch.float32}
    assert logged.item() == pytest.approx(loss_sum.item() / 240.5, abs=1e-5)


# Lost and started again -------------------------------------------------------------------------------------


def test_processes_of_a_restart_find_each_other():
    """Whatever the dead processes left in the store, and in whatever order the new ones come."""
    store, dice, names = HashStore(), random.Random(0), []
    for _ in range(20):
        with ThreadPoolExecutor(3) as pool:
            ranks = dice.sample(range(3), 3)
            starts = []
            for rank in ranks:
                starts.append(pool.submit(processes._name_of_this_start, store, rank, 3))
                time.sleep(dice.random() * 0.03)
            found = {start.result(timeout=20) for start in starts}
        assert len(found) == 1
        names += found
    assert len(set(names)) == 20


def test_two_nodes_and_a_lost_rank(tiny, scenes, tmp_path):
    """Two torchrun agents on this machine; the first time a rank dies after step 2, and --max-restarts goes
    on by itself from the checkpoint of step 2. The result is that of one process."""
    options = f"--data {scenes} --save-every 2 --steps 4"
    run(tiny, tmp_path / "one", f"{PLAIN} {options} --warmup 2")
    nodes = []
    dying = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}  # python imports sitecustomize when it starts
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1' and os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0':\n"
        "    import threading, time, pathlib\n"
        f"    run = pathlib.Path({str(tmp_path / 'two')!r})\n"
        "    def die():\n"
        "        while not (run / 'step-0000002').exists():\n"
        "            time.sleep(0.005)\n"
        "        os._exit(9)\n"
        "    threading.Thread(target=die, daemon=True).start()\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for node in range(2):
        launcher = torchrun(
            1, "--nnodes=2", f"--node_rank={node}", "--max-restarts=2", "--rdzv_backend=c10d",
            f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test",
        )  # fmt: skip
        nodes.append(subprocess.Popen(
            command(tiny, tmp_path / "two", options, launcher), env=dying, stderr=subprocess.PIPE, text=True
        ))  # fmt: skip
    errors = [node.communicate(timeout=400)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    one, two = (weights(tmp_path / name / "step-0000004") for name in ("one", "two"))
    assert weights_apart(one, two) < 1e-4

"""LoRA against PEFT: what one writes the other loads, to equal logits; all but plain LoRA is refused."""

import json
import shutil

import numpy as np
import pytest
import reference
import torch
from helpers import apart, edit_json, load
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PaliGemmaForConditionalGeneration

from model import Detector, PaliGemma
from model.config import COCO_CLASSES, VARIANTS
from model.decoding.detections import Selection
from model.io.adapter import DETECTION, load_adapter, save_adapter
from model.lora import TARGETS, LoRALinear, add_lora, fold, lora_layers

PUBLISHED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj"]
LIMIT = 2e-4


@pytest.fixture(scope="module")
def hf():
    return reference.tiny_paligemma(window=8)


@pytest.fixture(scope="module")
def base(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    reference.save(hf, folder)
    return folder


def randomize(parameters, seed=0):
    """Adapters are the identity at first: give both matrices values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def random_adapter(model, targets=TARGETS["published"], **options):
    names = add_lora(model, targets, **options)
    randomize([p for layer in lora_layers(model).values() for p in (layer.A, layer.B)])
    return names


def peft_adapter(base, folder, seed=0, **options):
    """An adapter written by PEFT, and the logits of the model that wrote it."""
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(base, attn_implementation="eager")
    options = dict(r=4, lora_alpha=6, lora_dropout=0.1, target_modules=PUBLISHED) | options
    theirs = get_peft_model(theirs.eval(), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    randomize([p for name, p in theirs.named_parameters() if p.requires_grad], seed)
    theirs.save_pretrained(folder)
    return logits_of(theirs)


def logits_of(theirs, seed=0):
    images, tokens = reference.random_inputs(theirs, seed=seed)
    return reference.reference_logits(theirs, images, tokens, prefix_len=4)


@torch.no_grad()
def our_logits(model, hf, seed=0):
    images, tokens = reference.random_inputs(hf, seed=seed)
    return model(images, tokens, 4)


# The layer --------------------------------------------------------------------------------------------------


def test_identity_at_start(hf, base):
    model = load(base)
    before = our_logits(model, hf)
    weight = model.decoder.layers[0].attn.q_proj.weight
    names = add_lora(model, TARGETS["published"])
    assert len(names) == 3 * 7 + 2 * 4
    assert model.decoder.layers[0].attn.q_proj.weight is weight, "the weight is shared, not copied"
    assert torch.equal(our_logits(model, hf), before)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{matrix}" for name in names for matrix in "AB"}


@pytest.mark.parametrize("rslora", [False, True])
def test_formula(rslora):
    torch.manual_seed(0)
    linear = torch.nn.Linear(7, 5)
    layer = LoRALinear(linear, rank=4, alpha=6, rslora=rslora)
    randomize([layer.A, layer.B])
    x = torch.randn(3, 2, 7)
    scale = 6 / 2 if rslora else 6 / 4
    want = x.double() @ (linear.weight + scale * layer.B @ layer.A).double().T + linear.bias
    assert apart(layer(x), want) < 1e-5


def test_dropout_only_while_training(hf, base):
    model = load(base)
    random_adapter(model, dropout=0.5)
    once = our_logits(model, hf)
    assert torch.equal(our_logits(model, hf), once)
    model.train()
    torch.manual_seed(0)
    assert apart(our_logits(model, hf), once) > 0.1


def test_fold(hf, base):
    """The adapter goes into the weights, once: plain Linears, still frozen, the same logits."""
    model = load(base)
    plain = our_logits(model, hf)
    random_adapter(model, targets=TARGETS["decoder"])
    adapted = our_logits(model, hf)
    assert apart(adapted, plain) > 0.1
    assert fold(model) is model and not lora_layers(model)
    assert apart(our_logits(model, hf), adapted) < LIMIT
    assert torch.equal(our_logits(fold(model), hf), our_logits(model, hf)), "nothing is left to fold"
    assert type(model.decoder.layers[0].attn.q_proj) is torch.nn.Linear
    assert not any(p.requires_grad for p in model.parameters())


def test_adapter_stays_float32(base):
    """On a bfloat16 base; gradients too, so that steps of 1e-5 are not rounded away."""
    model = load(base, dtype=torch.bfloat16)
    random_adapter(model)
    layer = model.decoder.layers[0].mlp.gate_proj
    layer(torch.randn(3, 48, dtype=torch.bfloat16)).float().square().sum().backward()
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.grad is None
    assert layer.A.dtype == layer.B.dtype == layer.A.grad.dtype == torch.float32
    assert layer.A.grad.abs().max() > 0 and layer.B.grad.abs().max() > 0


def test_published_targets_of_the_10b():
    with torch.device("meta"):
        model = PaliGemma(VARIANTS["paligemma2-10b-448"])
        smaller = PaliGemma(VARIANTS["paligemma2-3b-224"])
    names = add_lora(model, TARGETS["published"], rank=16)
    assert len(names) == 42 * 7 + 27 * 4 == 402
    width, mlp, kv, q, vision = 3584, 14336, 8 * 256, 16 * 256, 1152
    sides = 2 * (width + q) + 2 * (width + kv) + 3 * (width + mlp)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 16 * (42 * sides + 27 * 4 * 2 * vision)
    assert len(add_lora(smaller, TARGETS["decoder"])) == 26 * 7


@pytest.mark.parametrize(
    ("targets", "word"),
    [
        ("q_proj", "no module"),
        ("decoder.embed", "Embedding"),
        ("(", "regular expression"),
        (r"decoder\.layers\.0", "Block"),
    ],
)
def test_bad_targets(targets, word, base):
    with pytest.raises(ValueError, match=word):
        add_lora(load(base), targets)


# PEFT's files -----------------------------------------------------------------------------------------------

OPTIONS = {
    "published": {},
    "rsLoRA": dict(use_rslora=True),
    "regex": dict(target_modules=r".*language_model.*\.(q_proj|down_proj)"),
    "patterns": dict(
        rank_pattern={"q_proj": 2, r"language_model.layers.1.mlp.up_proj": 3},
        alpha_pattern={"layers.0.self_attn.k_proj": 9, "out_proj": 2},
    ),
    "modules to save": dict(modules_to_save=["multi_modal_projector", "input_layernorm"]),
    "some layers": dict(
        target_modules=["gate_proj", "v_proj"], layers_to_transform=[0, 2], layers_pattern="layers"
    ),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_peft_writes_we_load(options, hf, base, tmp_path):
    want = peft_adapter(base, tmp_path / "peft", **options)
    model = load(base, tmp_path / "peft")
    assert apart(our_logits(model, hf), want) <= LIMIT
    assert apart(our_logits(load(base), hf), want) > 0.1


@pytest.mark.parametrize("names", ["A", "B", "C"])
@pytest.mark.parametrize("options", ["published", "patterns", "modules to save"])
def test_all_generations_of_paths(options, names, hf, base, tmp_path):
    want = peft_adapter(base, tmp_path, **OPTIONS[options])
    prefix = "base_model.model."
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {prefix + reference.rename(name.removeprefix(prefix), names): x for name, x in tensors.items()}
    assert (renamed.keys() == tensors.keys()) == (names == "C")
    save_file(renamed, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    assert apart(our_logits(load(base, tmp_path), hf), want) <= LIMIT


def peft_loads(base, folder):
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(base, attn_implementation="eager")
    return PeftModel.from_pretrained(theirs, folder).eval()


A_FEW = r"projector|decoder\.layers\.[02]\..*[qv]_proj|vision.*out_proj"


@pytest.mark.parametrize(
    "options",
    [{}, dict(rslora=True), dict(targets=TARGETS["decoder"]), dict(targets=A_FEW)],
    ids=["published", "rsLoRA", "decoder", "a few"],
)
@pytest.mark.filterwarnings("error:.*missing")
def test_we_write_peft_loads(options, hf, base, tmp_path):
    model = load(base)
    names = random_adapter(model, rank=3, alpha=5, dropout=0.05, **options)
    save_adapter(model, tmp_path, base=str(base))
    theirs = peft_loads(base, tmp_path)
    assert sum(1 for name, _ in theirs.named_parameters() if "lora_A" in name) == len(names)
    assert apart(our_logits(model, hf), logits_of(theirs)) <= LIMIT
    assert torch.equal(our_logits(load(base, tmp_path), hf), our_logits(model, hf))


def test_what_we_read_we_write(hf, base, tmp_path):
    """Ranks and alphas of their own, and modules trained whole, survive: PEFT -> we -> PEFT."""
    for name in ("patterns", "modules to save"):
        want = peft_adapter(base, tmp_path / name, **OPTIONS[name])
        save_adapter(load(base, tmp_path / name), tmp_path / "again", base=str(base))
        assert apart(logits_of(peft_loads(base, tmp_path / "again")), want) <= LIMIT


def test_scaled_down_10b(tmp_path):
    """The 10B's proportions (q wider than the model, two query heads a kv head), its adapter's settings."""
    hf = reference.tiny_paligemma(width=56, layers=4, heads=8, kv_heads=4, head_dim=8)
    reference.save(hf, tmp_path / "base", names="A", shards=3)
    want = peft_adapter(tmp_path / "base", tmp_path / "peft", r=16, lora_alpha=16, lora_dropout=0.05)
    model = load(tmp_path / "base", tmp_path / "peft")
    assert len(lora_layers(model)) == 4 * 7 + 2 * 4 and all(x.scale == 1 for x in lora_layers(model).values())
    assert apart(our_logits(model, hf), want) <= LIMIT


def test_merged_checkpoint_for_transformers(hf, base, tmp_path):
    model = load(base)
    random_adapter(model)
    want = our_logits(model, hf)
    with pytest.raises(ValueError, match="fold"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    fold(model).save_pretrained(tmp_path, max_shard_bytes=200_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert apart(logits_of(theirs), want) <= LIMIT
    assert apart(our_logits(load(tmp_path), hf), want) <= LIMIT


def test_classes_travel_with_the_adapter(base, tmp_path):
    model = PaliGemma.from_pretrained(str(base), groups=7, classes=("nut", "bolt"))
    add_lora(model, TARGETS["decoder"])
    save_adapter(model, tmp_path)
    assert load(base, tmp_path).config.classes == ("nut", "bolt") and load(base, tmp_path).config.groups == 7
    other = PaliGemma.from_pretrained(str(base), adapter=str(tmp_path), groups=3)
    assert other.config.groups == 3, "what the caller says wins"


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(use_dora=True), "use_dora"),
        (dict(bias="lora_only"), "bias"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out"),
        (dict(init_lora_weights="pissa"), "init_lora_weights"),
        (dict(peft_type="IA3"), "IA3"),
        (dict(target_parameters=["x"]), "target_parameters"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(layer_replication=[[0, 1]]), "layer_replication"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
        (dict(a_later_invention={"on": 1}), "a_later_invention"),
        (dict(r="four"), "r = 'four'"),
        (dict(r=5), "rank 5"),
    ],
    ids=str,
)
def test_refused(change, word, base, tmp_path):
    peft_adapter(base, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=word) as error:
        load(base, tmp_path)
    assert str(tmp_path) in str(error.value)


def test_damaged(base, tmp_path):
    """Tensors missing, strange, or of another model: each is named, with the model it was made for."""
    peft_adapter(base, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if "lora_A" in name)
    embedding = "base_model.model.model.language_model.embed_tokens."
    layer_9 = "base_model.model.model.language_model.layers.9.mlp.up_proj."
    for broken in (
        {name: x for name, x in tensors.items() if name != key},
        tensors | {key: tensors[key][:, :-1].contiguous()},
        tensors | {layer_9 + "lora_A.weight": torch.zeros(4, 48)},
        tensors | {"something": torch.zeros(1)},
        tensors | {embedding + "lora_embedding_A": torch.zeros(4, 1536)},
        tensors | {embedding + "weight": torch.zeros(1536, 48)},
    ):  # fmt: skip
        save_file(broken, file)
        with pytest.raises(ValueError, match="made for") as error:
            load_adapter(load(base), tmp_path)
        changed = (broken.keys() - tensors.keys()) or {key.rpartition(".lora")[0]}
        assert changed.pop().removeprefix("base_model.model.") in str(error.value)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="safetensors"):
        load(base, tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="missing"):
        load(base, tmp_path)
    with pytest.raises(ValueError, match="adapter_config.json is missing"):
        load(base, base)


def test_as_the_published_adapter(model, tmp_path):
    """No detection.json, plain names of modules in any order, and a base whose config.json says nothing of
    detection: read in the published language, 51 groups in sequence of COCO's classes."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(model, base)
    edit_json(base / "config.json", lambda raw: raw.pop("detection"))
    tuned = load(base)
    assert len(random_adapter(tuned, TARGETS["published"], rank=16, alpha=16)) == 2 * 7 + 2 * 4
    save_adapter(tuned, folder, "google/paligemma2-10b-pt-448")
    (folder / DETECTION).unlink()
    edit_json(
        folder / "adapter_config.json",
        lambda raw: raw.update(target_modules=PUBLISHED[::-1], rank_pattern={}, peft_version="0.17.1"),
    )
    detector = Detector.from_pretrained(base, adapter=folder, device="cpu", score_threshold=0, nms_iou=1)
    config = detector.model.config
    assert (config.groups, config.answers, config.classes) == (51, "sequence", COCO_CLASSES)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    found = detector(image)
    assert found.tokens.shape == (51, 5) and set(found.labels) <= set(COCO_CLASSES)
    again = Detector(fold(tuned), Selection(0, 1))(image)
    assert np.array_equal(found.tokens, again.tokens) and len(found) == len(again) > 0

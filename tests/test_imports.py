"""Imports run in one direction, infer -> train -> model, without a circle, and stay within requirements.txt.

Every file is read, none is imported, so an import that stands inside a function counts like any other.
"""

import ast
import re
import sys
from dataclasses import dataclass
from functools import cache

import pytest
from helpers import ROOT

PACKAGES = "model", "train", "infer"  # each may import those before it
THE_LOOP = {
    f"train.{name}"
    for name in ("fit", "setup", "loss", "validate", "measures", "collapse", "merge", "convert")
}
# What infer takes from train: the practice set, the measures and the readers, never the loop.
READERS = r"data\.(coco|folders|forms|jsonl|open|records|save)"
FOR_INFER = rf"train\.(practice(\..+)?|measures|collapse|{READERS}|run\.(pictures|processes|program))"
OPTIONAL = {  # packages outside requirements.txt: who may import them, always inside a function
    "supervision": {"model.decoding.detections"},
    "tensorboard": {"train.run.log"},
    "transformers": {"infer.lib.peers", "infer.benchmark_step"},
    "llama_cpp": {"infer.lib.peers"},
    "gguf": {"infer.lib.peers"},
    "peft": {"infer.benchmark_step"},
    "gradio": {"infer.live.app"},
}
IMPORT_NAMES = {
    "pillow": "PIL",
    "huggingface-hub": "huggingface_hub",
    "pyyaml": "yaml",
}  # where it is not the project's name
# Heavy packages that the library imports only when they are needed: `import model` stays quick.
LATE_IN_MODEL = {"pycocotools", "matplotlib", "tqdm", "huggingface_hub", "triton"}
LATE = [  # the only imports inside functions: (importer, imported)
    (r"model\.(attention|paligemma)", r"model\.flex"),  # FlexAttention is compiled by TorchInductor
    (r"model\.paligemma", r"model\.(io|decoding)\..+"),  # from_pretrained, save_pretrained and generate
    (r"model\.io\.hub", r"huggingface_hub.*"),
    (r"model\.decoding\.masks", r"pycocotools.*"),
    (r"model\.decoding\.detections", r"supervision"),
    (r".*", r"model\.decoding\.head_kernel"),  # needs Triton, which has no build for some systems
    (r"infer\..+", r"matplotlib.*"),
    (r"infer\.generate", r"readline"),  # Windows has none
    (r"infer\.live\.app", r"gradio"),
    (r"train\.run\.log", r"torch\.utils\.tensorboard"),
    (r"train\.run\.processes", r"resource"),  # Windows has none
    (r"infer\.(lib\.peers|benchmark_step)", r"(transformers|peft|llama_cpp|gguf)(\..+)?"),
]


@dataclass(frozen=True)
class Import:
    """`importer` imports `name`, a module (or something outside); late: inside a function or a condition."""

    importer: str
    name: str
    late: bool
    line: int

    def __str__(self):
        return f"{self.importer} line {self.line} imports {self.name}"

    @property
    def ours(self) -> bool:
        return self.name.partition(".")[0] in PACKAGES


@cache
def modules() -> dict[str, ast.Module]:
    """Every module by its dotted name; a package's name is that of its __init__.py."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    names = [file.relative_to(ROOT).with_suffix("").parts for file in files]
    dotted = [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names]
    return {name: ast.parse(file.read_text()) for name, file in zip(dotted, files, strict=True)}


def imports_of(importer: str, tree: ast.Module) -> list[Import]:
    """All of a file. `from model import decoding` imports model.decoding, if there is such a module."""
    found = []
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, f"{importer} line {statement.lineno}: a relative import"
            names = {f"{statement.module}.{alias.name}" for alias in statement.names}
            names = {name if name in modules() else statement.module for name in names}
        else:
            continue
        late = statement not in tree.body
        found += [Import(importer, name, late, statement.lineno) for name in sorted(names)]
    return found


@cache
def imports() -> list[Import]:
    return [found for name, tree in modules().items() for found in imports_of(name, tree)]


def folder(name: str) -> str:
    """Of a module: model.io.hub lies in model.io. A package's own __init__.py lies in its folder."""
    return name if (ROOT.joinpath(*name.split("."))).is_dir() else name.rpartition(".")[0]


def circle(arrows: set[tuple[str, str]]) -> list[str]:
    """The nodes along one circle, or none."""

    def search(path: list[str]) -> list[str]:
        for node in sorted(b for a, b in arrows if a == path[-1] and b not in harmless):
            if node in path:
                return path[path.index(node) :]
            if found := search([*path, node]):
                return found
        harmless.add(path[-1])  # no circle can be reached from here
        return []

    harmless: set[str] = set()
    return next((found for start in sorted({a for a, _ in arrows}) if (found := search([start]))), [])


def assert_none(wrong) -> None:
    assert not (lines := "\n".join(map(str, wrong))), f"\n{lines}"


# The rules --------------------------------------------------------------------------------------------------


def test_every_file_is_read():
    assert {"model", "model.decoding.boxes", "train.fit", "infer.lib.options"} <= modules().keys()
    found = {(x.importer, x.name, x.late) for x in imports()}
    assert ("model.io.hub", "huggingface_hub", True) in found


def test_infer_train_model():
    """No arrow runs back."""

    def place(name):
        return PACKAGES.index(name.partition(".")[0])

    assert_none(x for x in imports() if x.ours and place(x.name) > place(x.importer))


def test_what_infer_takes_from_train():
    losses = FOR_INFER + r"|train\.(loss|data\.(open|samples|targets))"  # what a step of training minimises
    allowed = {"infer.benchmark_step": losses, "infer.ablate": losses}
    taken = [x for x in imports() if x.importer.startswith("infer") and x.name.startswith("train")]
    assert taken
    assert_none(x for x in taken if not re.fullmatch(allowed.get(x.importer, FOR_INFER), x.name))


def test_rooms_do_not_import_the_loop():
    """In train/, the loop and the programs beside it import the rooms run, data, practice and nano, never the
    reverse; the measures are for fit and validate, and for infer."""
    rooms = [x for x in imports() if re.match(r"train\.\w+\.", x.importer)]
    assert rooms
    assert_none(x for x in rooms if x.name in THE_LOOP)
    loop = [x for x in imports() if x.importer in THE_LOOP - {"train.fit", "train.validate"}]
    assert_none(x for x in loop if x.name == "train.measures")


def test_the_network_does_not_import_its_rooms():
    """Except PaliGemma.from_pretrained, save_pretrained and generate, inside these functions."""
    network = [x for x in imports() if re.fullmatch(r"model\.\w+", x.importer) and x.importer in files()]
    assert network
    rooms = [x for x in network if re.match(r"model\.(io|decoding)\b", x.name)]
    assert_none(x for x in rooms if not (x.importer == "model.paligemma" and x.late))


def files() -> set[str]:
    return {name for name in modules() if folder(name) != name}


def test_no_circle_of_files():
    """Of imports at the top of files. `model` itself is a file too: its __init__.py."""
    arrows = {(x.importer, x.name) for x in imports() if x.ours and not x.late}
    assert circle(arrows) == []


def test_no_circle_of_folders():
    """model/__init__.py is the door of the library, not of the network: it may open every room."""
    late = {(x.importer, x.name) for x in imports() if x.late and x.importer == "model.paligemma"}
    arrows = {(x.importer, x.name) for x in imports() if x.ours and x.importer not in PACKAGES} - late
    arrows = {(folder(a), folder(b)) for a, b in arrows}
    assert circle({(a, b) for a, b in arrows if a != b}) == []


def test_imports_inside_functions():
    """Only where they are listed, with the reason."""
    late = [x for x in imports() if x.late]
    assert_none(
        x for x in late if not any(re.fullmatch(a, x.importer) and re.fullmatch(b, x.name) for a, b in LATE)
    )


def test_only_what_is_required():
    """The standard library and requirements.txt; transformers and the like are for benchmarks and tests."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.match(r"[\w-]+", line).group() for line in lines if line[0] != "#"}
    required = {IMPORT_NAMES.get(name, name) for name in required}
    known = required | sys.stdlib_module_names | set(PACKAGES)

    def allowed(x):
        package = "tensorboard" if "tensorboard" in x.name else x.name.partition(".")[0]
        return package in known or (x.late and x.importer in OPTIONAL.get(package, ()))

    assert_none(x for x in imports() if not allowed(x))
    assert_none(required - {x.name.partition(".")[0] for x in imports()})  # and nothing for nobody


def test_the_library_is_light():
    at_the_top = [x for x in imports() if x.importer.startswith("model") and not x.late]
    kernel = {"model.decoding.head_kernel"}  # is Triton, and imported where there is one
    assert_none(
        x for x in at_the_top if x.name.partition(".")[0] in LATE_IN_MODEL and x.importer not in kernel
    )
    assert_none(x for x in at_the_top if x.name in kernel)


# The checker ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrows", "found"),
    [
        ("ab bc cd", ""),
        ("ab bc ca", "abc"),
        ("ab ba cd", "ab"),
        ("xa ab ba by", "ab"),
        ("aa", "a"),
        ("", ""),
    ],
)
def test_circle(arrows, found):
    assert circle({tuple(pair) for pair in arrows.split()}) == list(found)


def test_imports_are_found_wherever_they_stand():
    code = "import a.b\nfrom c import d\ntry:\n    import e\nexcept ImportError:\n    pass\n"
    code += "def f():\n    from model.io import hub\n    from model.io.hub import resolve\n"
    found = [(x.name, x.late) for x in imports_of("x", ast.parse(code))]
    assert sorted(found) == [
        ("a.b", False), ("c", False), ("e", True), ("model.io.hub", True), ("model.io.hub", True)
    ]  # fmt: skip

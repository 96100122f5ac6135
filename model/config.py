"""Configurations: what makes one PaliGemma different from another, and the official variants in one table.

Sources of the table: the model cards, and the scripts that converted PaliGemma 1 and 2 for the hub. The hub's
config.json is read and written by model/io/config_json.py.
"""

from dataclasses import dataclass, field, fields, replace

COCO_CLASSES = tuple(
    "person;bicycle;car;motorcycle;airplane;bus;train;truck;boat;traffic light;fire hydrant;stop sign;"
    "parking meter;bench;bird;cat;dog;horse;sheep;cow;elephant;bear;zebra;giraffe;backpack;umbrella;handbag;"
    "tie;suitcase;frisbee;skis;snowboard;sports ball;kite;baseball bat;baseball glove;skateboard;surfboard;"
    "tennis racket;bottle;wine glass;cup;fork;knife;spoon;bowl;banana;apple;sandwich;orange;broccoli;carrot;"
    "hot dog;pizza;donut;cake;chair;couch;potted plant;bed;dining table;toilet;tv;laptop;mouse;remote;"
    "keyboard;cell phone;microwave;oven;toaster;sink;refrigerator;book;clock;vase;scissors;teddy bear;"
    "hair drier;toothbrush".split(";")
)
MAX_CLASSES = 98  # class c is the token <unused c>, noise the one after: Gemma has <unused0> to <unused98>

# Far above every real model. A damaged file must be refused before memory is allocated or a loop is entered;
# within these limits the size of every tensor fits in 63 bits.
MAX_SIZE = 1 << 20  # widths, vocabulary, positions
MAX_LAYERS = 1000
MAX_IMAGE_SIZE, MAX_IMAGE_TOKENS, MAX_CHANNELS = 1 << 13, 1 << 16, 16
MAX_GROUPS = 1000
MAX_NUMBER = 1e12


def _check(condition, config, name, why):
    if not condition:
        raise ValueError(f"{type(config).__name__}.{name} = {getattr(config, name)!r:.200}: {why}")


def is_number(value) -> bool:
    """Whether a JSON value is a number of magnitude MAX_NUMBER or less: no boolean, NaN or infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def _check_positive(config, *names, kind=int, optional=False, most=MAX_SIZE):
    want = f"{'an integer' if kind is int else 'a number'} > 0, at most {most:,}"
    for name in names:
        value = getattr(config, name)
        positive = isinstance(value, kind) and is_number(value) and 0 < value <= most
        null = ", or null for off" if optional else ""
        _check(positive or (optional and value is None), config, name, f"must be {want}{null}")


def _check_multiple(config, name, factor):
    divisor = getattr(config, factor)
    _check(getattr(config, name) % divisor == 0, config, name, f"not a multiple of {factor} {divisor}")


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP. The defaults are So400m/14, the encoder of every official checkpoint."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1152
    layers: int = 27
    heads: int = 16
    mlp: int = 4304
    channels: int = 3
    norm_eps: float = 1e-6

    def __post_init__(self):
        _check_positive(self, "width", "heads", "mlp")
        _check_positive(self, "layers", most=MAX_LAYERS)
        _check_positive(self, "image_size", "patch_size", most=MAX_IMAGE_SIZE)
        _check_positive(self, "channels", most=MAX_CHANNELS)
        _check_positive(self, "norm_eps", kind=int | float, most=1)
        patch = self.patch_size
        below = max(1, self.image_size // patch) * patch
        why = f"not a multiple of patch_size {patch}; the nearest are {below} and {below + patch}"
        _check(self.image_size % patch == 0, self, "image_size", why)
        many = f"{self.tokens:,} patches of {patch} pixels are too many: at most {MAX_IMAGE_TOKENS:,}"
        _check(self.tokens <= MAX_IMAGE_TOKENS, self, "image_size", many)
        _check_multiple(self, "width", "heads")

    @property
    def tokens(self) -> int:
        """Patches of an image, each of which becomes one image token of the decoder."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """Gemma 1 or 2. Caps and window: None switches them off (0 is read as None)."""

    version: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    # Not always head_dim ** -0.5: the 28B was trained with (width / heads) ** -0.5 = 144 ** -0.5, although
    # its head_dim is 128.
    query_scale: float
    attn_cap: float | None = None  # attention scores become cap * tanh(score / cap)
    final_cap: float | None = None  # and so do the logits
    sliding_window: int | None = None  # of the local layers 0, 2, 4, ...; the others are global
    vocab_size: int = 257_216
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    max_positions: int = 8192

    def __post_init__(self):
        for name in ("attn_cap", "final_cap", "sliding_window"):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, None)
        _check(self.version in (1, 2), self, "version", "only Gemma 1 and 2 are known")
        _check_positive(self, "width", "heads", "kv_heads", "head_dim", "mlp", "vocab_size", "max_positions")
        _check_positive(self, "layers", most=MAX_LAYERS)
        _check_positive(self, "query_scale", "rope_theta", kind=int | float, most=MAX_NUMBER)
        _check_positive(self, "norm_eps", kind=int | float, most=1)
        _check_positive(self, "attn_cap", "final_cap", kind=int | float, optional=True, most=MAX_NUMBER)
        _check_positive(self, "sliding_window", optional=True)
        _check_multiple(self, "heads", "kv_heads")
        _check(self.head_dim % 2 == 0, self, "head_dim", "RoPE rotates pairs, so it must be even")


BRANCHES = 32  # boxes decoded in parallel where nothing else is known
FORMS = "sequence", "parallel"  # of closed-set answers: one box after the other, or each in its own branch


@dataclass(frozen=True)
class PaliGemmaConfig:
    """Both towers, the special ids, and what the model was taught to detect."""

    vision: VisionConfig
    text: TextConfig
    # Never fed to the network: it only marks the image's place in transformers' prompts.
    image_token: int = 257_152
    bos: int = 2
    eos: int = 1
    pad: int = 0
    groups: int = 51  # boxes in a closed-set answer
    answers: str = "sequence"  # one of FORMS: how closed-set answers were taught
    branches: int = BRANCHES  # boxes decoded in parallel by default
    # (a, b, c): of parallel boxes with score s, sigmoid(a ln s - b ln(1 - s) + c) is the share that is right.
    # None: s itself
    calibration: tuple[float, float, float] | None = None
    classes: tuple[str, ...] = field(default=COCO_CLASSES, repr=False)
    open_vocabulary: bool = True  # False: it knows no words except its classes, like nano
    closed_set_only: bool = False  # True: what it was trained on last had no answers in words

    def __post_init__(self):
        for name in ("classes", "calibration"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        names = isinstance(self.classes, tuple) and all(isinstance(name, str) for name in self.classes)
        good = names and 0 < len(self.classes) <= MAX_CLASSES
        _check(good, self, "classes", f"must be a list of 1 to {MAX_CLASSES} names")
        _check(all(map(str.strip, self.classes)), self, "classes", "one of the names is empty")
        twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
        _check(not twice, self, "classes", f"named more than once: {', '.join(twice)}")
        for name in ("open_vocabulary", "closed_set_only"):
            _check(isinstance(getattr(self, name), bool), self, name, "must be true or false")
        _check_positive(self, "groups", "branches", most=MAX_GROUPS)
        _check(self.answers in FORMS, self, "answers", f"must be {' or '.join(FORMS)}")
        if self.calibration is not None:
            good = isinstance(self.calibration, tuple) and len(self.calibration) == 3
            good = good and all(map(is_number, self.calibration)) and min(self.calibration[:2]) >= 0
            _check(good, self, "calibration", "must be null or three numbers, the first two at least 0")
        for name in ("bos", "eos", "pad"):
            value = getattr(self, name)
            in_vocab = type(value) is int and 0 <= value < self.text.vocab_size
            _check(in_vocab, self, name, f"not an id below vocab_size {self.text.vocab_size}")
        _check_positive(self, "image_token")

    def override(self, **changes) -> "PaliGemmaConfig":
        """A copy with fields of this config or of `text` replaced, e.g. override(attn_cap=None, groups=20).
        Of the vision tower, only image_size can be changed: see at_image_size."""
        config = self.at_image_size(changes.pop("image_size")) if "image_size" in changes else self
        for name, value in changes.items():
            if name in _OWN_FIELDS:
                config = replace(config, **{name: value})
            elif name in _TEXT_FIELDS:
                config = replace(config, text=replace(config.text, **{name: value}))
            else:
                known = sorted(_OWN_FIELDS | _TEXT_FIELDS | {"image_size"})
                raise ValueError(f"no config field {name!r}; there are {known}")
        return config

    def at_image_size(self, image_size: int) -> "PaliGemmaConfig":
        """A copy for images of another size.

        The local layers' window grows by the number of image tokens added, so that no more of them are out of
        an answer token's reach than at the old size: nano's window of 112 positions would end in the middle
        of an image of 224 px, the official one of 4,096 above 896 px. It does not shrink for smaller images.
        """
        vision = replace(self.vision, image_size=image_size)
        added = max(0, vision.tokens - self.vision.tokens)
        window = self.text.sliding_window and self.text.sliding_window + added
        return replace(self, vision=vision, text=replace(self.text, sliding_window=window))


_TEXT_FIELDS = {f.name for f in fields(TextConfig)}
_OWN_FIELDS = {f.name for f in fields(PaliGemmaConfig)} - {"vision", "text"}

_CAPS = dict(attn_cap=50.0, final_cap=30.0, sliding_window=4096)
_TEXT_VARIANTS = {  # version, width, layers, heads, kv heads, head_dim, mlp, query scale
    "paligemma-3b": TextConfig(1, 2048, 18, 8, 1, 256, 16384, 256**-0.5),
    "paligemma2-3b": TextConfig(2, 2304, 26, 8, 4, 256, 9216, 256**-0.5, **_CAPS),
    "paligemma2-10b": TextConfig(2, 3584, 42, 16, 8, 256, 14336, 256**-0.5, **_CAPS),
    "paligemma2-28b": TextConfig(2, 4608, 46, 32, 16, 128, 36864, 144**-0.5, **_CAPS),
}
VARIANTS = {
    f"{name}-{size}": PaliGemmaConfig(VisionConfig(image_size=size), text)
    for name, text in _TEXT_VARIANTS.items()
    for size in (224, 448, 896)
}

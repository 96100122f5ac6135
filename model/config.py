"""Configurations, and the official variants in one table (config_json.py reads and writes config.json).

Sources of the table: the model cards and the scripts that converted PaliGemma 1 and 2 for the hub.
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


def _check(condition, config, name, why):
    if not condition:
        raise ValueError(f"{type(config).__name__}.{name} = {getattr(config, name)!r}: {why}")


def _check_positive(config, *names):
    for name in names:
        value = getattr(config, name)
        _check(
            isinstance(value, int) and not isinstance(value, bool) and value > 0,
            config,
            name,
            "must be an integer > 0",
        )


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
        _check_positive(self, "image_size", "patch_size", "width", "layers", "heads", "mlp", "channels")
        _check(
            self.image_size % self.patch_size == 0,
            self,
            "image_size",
            f"not a multiple of patch_size {self.patch_size}",
        )
        _check(self.width % self.heads == 0, self, "width", f"not a multiple of heads {self.heads}")

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """Gemma 1 or 2. Caps and window: None is off (0 is read as None)."""

    version: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    query_scale: float  # an explicit field: the 28B divides by sqrt(width / heads), not by sqrt(head_dim)
    attn_cap: float | None = None
    final_cap: float | None = None
    sliding_window: int | None = None  # in the local layers 0, 2, 4, ...
    vocab_size: int = 257_216
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    max_positions: int = 8192

    def __post_init__(self):
        for name in ("attn_cap", "final_cap", "sliding_window"):
            object.__setattr__(self, name, getattr(self, name) or None)
        _check(self.version in (1, 2), self, "version", "only Gemma 1 and 2 are known")
        _check_positive(
            self, "width", "layers", "heads", "kv_heads", "head_dim", "mlp", "vocab_size", "max_positions"
        )
        _check(self.heads % self.kv_heads == 0, self, "heads", f"not a multiple of kv_heads {self.kv_heads}")
        _check(self.head_dim % 2 == 0, self, "head_dim", "RoPE rotates pairs, so it must be even")
        for name in ("query_scale", "attn_cap", "final_cap", "sliding_window", "norm_eps", "rope_theta"):
            value = getattr(self, name)
            kind = int if name == "sliding_window" else int | float
            off = value is None and name in ("attn_cap", "final_cap", "sliding_window")
            positive = isinstance(value, kind) and value > 0
            _check(off or positive, self, name, "must be > 0 (or, for caps and window, 0 or null for off)")


@dataclass(frozen=True)
class PaliGemmaConfig:
    vision: VisionConfig
    text: TextConfig
    image_token: int = (
        257_152  # never fed to the network: it only marks the image's place in transformers' prompts
    )
    bos: int = 2
    eos: int = 1
    pad: int = 0
    groups: int = 51  # boxes in a closed-set answer
    classes: tuple[str, ...] = field(default=COCO_CLASSES, repr=False)
    open_vocabulary: bool = True  # False: has heard of nothing but its classes, as nano

    def __post_init__(self):
        _check_positive(self, "groups")
        _check(
            0 < len(self.classes) <= 98,
            self,
            "classes",
            "1 to 98 names: with noise they must fit <unused0..98>",
        )
        for name in ("bos", "eos", "pad"):
            value = getattr(self, name)
            in_vocab = isinstance(value, int) and 0 <= value < self.text.vocab_size
            _check(in_vocab, self, name, f"not an id below vocab_size {self.text.vocab_size}")

    def override(self, **changes) -> "PaliGemmaConfig":
        """A copy with fields replaced wherever they live, e.g. override(attn_cap=None, groups=20)."""
        config = self
        for name, value in changes.items():
            if name in _OWN_FIELDS:
                config = replace(config, **{name: value})
            elif name in _TEXT_FIELDS:
                config = replace(config, text=replace(config.text, **{name: value}))
            else:
                raise ValueError(f"no config field {name!r}; there are {sorted(_OWN_FIELDS | _TEXT_FIELDS)}")
        return config


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

"""Build the sprite pack in media/sprites from free emoji and icon packages.

train/practice/scenes.py pastes the pack's drawings into its scenes. The pack is kept in the repository: you
need this file only to change it. It needs `pip install resvg-py pillow` and the packages that sources.py
lists, each unpacked into a folder of its own name:

    mkdir sources && cd sources
    python ../media/sprites/build.py --list | bash    # fetches and unpacks each package
    cd .. && python media/sprites/build.py sources

It writes one WebP sheet per source, sprites.json (one sprite per line) and CREDITS.md. The drawings of the
source "own" are the project's: SVG files in media/sprites/own, named after their class and a number.
"""

import argparse
import collections
import io
import json
import pathlib
import re

from sources import DISTRACTORS, DROP, NAMES, RACKETS, classes, sources

try:
    import resvg_py
    from PIL import Image
except ImportError:
    resvg_py = Image = None

SIZE = 96  # the longest side of a sprite
SHEET_WIDTH = 1024
QUALITY = 85

CREDITS = """# Credits of the sprites

Each sheet `<source>.webp` holds drawings of one project, named in `sprites.json`. What was changed: all were
rasterised, trimmed to their visible pixels and resized to 96 pixels; shadows on the ground were left out;
one-colour icons were made white, and are recoloured when scenes are made. Licence texts:
[Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0), [MIT](https://opensource.org/license/mit),
[ISC](https://opensource.org/license/isc-license-txt), [CC0-1.0](https://creativecommons.org/publicdomain/zero/1.0/),
[CC-BY-3.0](https://creativecommons.org/licenses/by/3.0/), [CC-BY-4.0](https://creativecommons.org/licenses/by/4.0/).
"""


class Icons:
    """The icons of one source, and its names for emoji."""

    def __init__(self, folder, name):
        self.set = json.loads((folder / name / "icons.json").read_text(encoding="utf-8"))
        chars = folder / name / "chars.json"
        chars = json.loads(chars.read_text(encoding="utf-8")) if chars.exists() else {}
        self.chars = {code.removesuffix("-fe0f"): icon for code, icon in chars.items()}
        entries = NAMES.get(name, "").replace("\n", " ").split(",")
        self.renamed = {entry.split()[0]: entry.split()[1:] for entry in entries if entry.strip()}
        self.compact = name == "fxemoji"  # its names have no hyphens
        self.numbered = name == "streamline-emojis"  # several drawings of an emoji have numbers

    def of_emoji(self, code, words):
        """Names of this source's drawings of an emoji, given by its code points. words: the names that other
        sources have for it."""
        if code in self.renamed:
            return [name for name in self.renamed[code] if self.icon(name)]
        names = [self.chars[code]] if code in self.chars else list(dict.fromkeys(words))
        if self.compact:
            names = [name.replace("-", "") for name in names]
        if self.numbered:
            names = [name + tail for name in names for tail in ("", "-1", "-2", "-3")]
        return [name for name in names if self.icon(name)]

    def icon(self, name):
        alias = self.set.get("aliases", {}).get(name)
        return self.icon(alias["parent"]) if alias else self.set["icons"].get(name)

    def svg(self, name, colour):
        """An icon as SVG text, without the shadow that one source draws on the ground."""
        icon = self.icon(name)
        width, height = (icon.get(side, self.set.get(side, 16)) for side in ("width", "height"))
        body = re.sub(r'<path fill="#45413c"[^>]*opacity="\.15"/>', "", icon["body"])
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">'
            + body.replace("currentColor", colour)
            + "</svg>"
        )


def rasterise(svg):
    """SVG text -> a sprite, or None if nothing is visible."""
    svg = svg.replace("<svg ", f'<svg width="{4 * SIZE}" height="{4 * SIZE}" ', 1)
    return trim(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))))


def trim(file, threshold=16):
    """An image file -> a sprite, cut to its pixels of more alpha than the threshold and resized; or None."""
    image = Image.open(file).convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > threshold)).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = SIZE / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def collect(folder, out):
    """Every sprite of the pack: {source: [(class or None, name, image)]}."""
    table = sources()
    sets = {name: Icons(folder, name) for name, source in table.items() if source.form not in ("png", "own")}
    words = collections.defaultdict(list)  # code point: its names in the sources that have a table
    for icons in sets.values():
        for code, name in icons.chars.items():
            words[code].append(name)
    emoji = [name for name, source in table.items() if source.form == "emoji"]
    sprites = collections.defaultdict(list)

    def add(label, vendor, key, icon):
        """Add a sprite; returns how many were added, 1 or 0."""
        if f"{vendor}:{key}" in DROP.split():
            return 0
        colour = "#ffffff" if table[vendor].form == "icon" else "#333333"
        if table[vendor].form == "png":  # the high threshold leaves out shadows
            image = trim(folder / vendor / f"{icon}.png", 200)
        else:
            image = rasterise(sets[vendor].svg(icon, colour))
        if image is None:
            print("empty:", vendor, key)
            return 0
        if f"{vendor}:{key}" in RACKETS.split():
            label = "tennis racket"
        sprites[vendor].append((label, key, image))
        return 1

    for label, names in classes().items():
        for name in names:
            vendor, _, icon = name.rpartition(":")
            if vendor:
                add(label, vendor, icon, icon)
                continue
            for vendor in emoji:
                for number, icon in enumerate(sets[vendor].of_emoji(name, words[name]), 1):
                    add(label, vendor, name if number == 1 else f"{name}.{number}", icon)
    training = [name for name in emoji if not table[name].held_out]
    for turn, code in enumerate(DISTRACTORS.split()):
        drawn = 0  # two drawings of a distractor are enough; the sources take turns
        for vendor in training[turn % len(training) :] + training[: turn % len(training)]:
            for icon in sets[vendor].of_emoji(code, words[code])[:1]:
                drawn += drawn < 2 and add(None, vendor, code, icon)
    for path in sorted((out / "own").glob("*.svg")):
        label = path.stem.rstrip("0123456789").rstrip("-").replace("-", " ")
        sprites["own"].append((label, path.stem, rasterise(path.read_text(encoding="utf-8"))))
    return sprites


def place_on_sheet(images, gap=4):
    """Positions of images on a sheet, row by row, the tallest first: ([(x, y)], height of the sheet)."""
    positions, x, y, row = [None] * len(images), gap, gap, 0
    for index in sorted(range(len(images)), key=lambda i: -images[i].height):
        width, height = images[index].size
        if x + width + gap > SHEET_WIDTH:
            x, y, row = gap, y + row + gap, 0
        positions[index] = (x, y)
        x, row = x + width + gap, max(row, height)
    return positions, y + row + gap


def write_pack(sprites, out):
    """Write the sheets, sprites.json and CREDITS.md."""
    lines, about, texts = [], [], [CREDITS]
    for name, source in sources().items():
        rows = sprites[name]
        positions, height = place_on_sheet([image for *_, image in rows])
        sheet = Image.new("RGBA", (SHEET_WIDTH, height))
        for (label, key, image), position in zip(rows, positions, strict=True):
            sheet.paste(image, position)
            record = {"source": name, "class": label, "name": key, "box": [*position, *image.size]}
            lines.append("  " + json.dumps(record | {"tint": source.form == "icon"}))
        coding = {"lossless": True} if source.form == "icon" else {"quality": QUALITY, "alpha_quality": 95}
        sheet.save(out / f"{name}.webp", method=6, **coding)
        package, url, kind = f"@iconify-json/{name}", f"https://github.com/{source.project}", "npm"
        if source.form == "png":
            package, url, kind = f"{name}-png", f"https://{source.project}", "Debian"
        elif source.form == "own":
            package, url = None, source.project
        version = source.version if package else None
        entry = {
            "package": package,
            "version": version,
            "licence": source.licence,
            "attribution": source.author,
            "url": url,
            "held_out": source.held_out,
        }
        about.append(f"  {json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}")
        link = f"[{source.project}]({url}), {kind} package `{package}` {version}" if package else f"`{url}`"
        use = "held out, never used in training" if source.held_out else "for training"
        labels = ", ".join(sorted({label or "distractors" for label, *_ in rows}))
        texts.append(
            f"\n## {name}\n\nBy {source.author}, {link}.\nLicence: {source.licence}. "
            f"{len(rows)} drawings, {use}.\n\nClasses: {labels}.\n"
        )
    about, lines = ",\n".join(about), ",\n".join(lines)
    labels = json.dumps(list(classes()))
    text = f'{{"classes": {labels},\n "sources": {{\n{about}\n }},\n "sprites": [\n{lines}\n ]}}\n'
    (out / "sprites.json").write_text(text, encoding="utf-8")
    (out / "CREDITS.md").write_text("".join(texts), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description="Build the sprite pack in media/sprites.")
    parser.add_argument("folder", nargs="?", type=pathlib.Path, help="the folder with the unpacked packages")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--list", action="store_true", help="print the commands that fetch the packages")
    args = parser.parse_args()
    if args.list:
        for name, source in sources().items():
            if source.form == "png":
                print(
                    f"apt-get download {name}-png && dpkg-deb -x {name}-png_*.deb {name}-deb && "
                    f"mkdir -p {name} && find {name}-deb -name '*.png' -exec cp -n -t {name} {{}} +"
                )
            elif source.form != "own":
                print(
                    f"npm pack @iconify-json/{name}@{source.version} && mkdir -p {name} && tar xzf "
                    f"iconify-json-{name}-{source.version}.tgz -C {name} --strip-components=1"
                )
    elif args.folder is None:
        parser.error("give the folder with the unpacked packages")
    elif resvg_py is None:
        parser.error("rebuilding the sprite pack needs: pip install resvg-py pillow")
    else:
        write_pack(collect(args.folder, args.out), args.out)


if __name__ == "__main__":
    main()

"""Build the sprite pack in media/sprites from free emoji and icon packages.

The pack is what train/scenes.py pastes into its practice scenes. It is kept in the repository, so only who
wants to change it runs this file, which takes `pip install resvg-py pillow` and the packages of SOURCES,
each unpacked into a folder of its own name:

    mkdir sources && cd sources
    python ../train/sprite_pack.py --list | bash    # fetches and unpacks each package
    cd .. && python train/sprite_pack.py sources

It writes one WebP sheet per source, sprites.json (one sprite a line) and CREDITS.md. The drawings of the
source "own" are the project's: SVG files in media/sprites/own, named after their class and a number.
"""

import argparse
import collections
import io
import json
import pathlib
import re

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

# source | version | licence | author | project | form (icon: one colour, tinted later) | use
SOURCES = """
noto | 1.2.9 | Apache-2.0 | Google | googlefonts/noto-emoji | emoji | training
noto-v1 | 1.2.5 | Apache-2.0 | Google | googlefonts/noto-emoji | emoji | training
fluent-emoji | 1.2.7 | MIT | Microsoft | microsoft/fluentui-emoji | emoji | training
fluent-emoji-flat | 1.2.6 | MIT | Microsoft | microsoft/fluentui-emoji | emoji | training
emojione | 1.2.3 | CC-BY-4.0 | EmojiOne | EmojiTwo/emojitwo | emoji | training
fxemoji | 1.2.2 | Apache-2.0 | Mozilla | mozilla/fxemoji | emoji | training
streamline-emojis | 1.2.4 | CC-BY-4.0 | Streamline | webalys-hq/streamline-vectors | emoji | training
icon-park | 1.2.4 | Apache-2.0 | ByteDance | bytedance/IconPark | colour | training
mdi | 1.2.3 | Apache-2.0 | Pictogrammers | Templarian/MaterialDesign | icon | training
game-icons | 1.2.4 | CC-BY-3.0 | Delapouite, Lorc, Skoll and others | game-icons/icons | icon | training
temaki | 1.2.6 | CC0-1.0 | Bryan Housel | rapideditor/temaki | icon | training
tabler | 1.2.41 | MIT | Paweł Kuna | tabler/tabler-icons | icon | training
lucide | 1.2.137 | ISC | Lucide Contributors | lucide-icons/lucide | icon | training
own | - | Apache-2.0 | this project | media/sprites/own | own | training
twemoji | 1.2.5 | CC-BY-4.0 | Twitter and other contributors | jdecked/twemoji | emoji | held out
material-symbols | 1.2.98 | Apache-2.0 | Google | google/material-design-icons | icon | held out
mingcute | 1.2.8 | Apache-2.0 | MingCute Design | Richard9394/MingCute | icon | held out
ph | 1.2.2 | MIT | Phosphor Icons | phosphor-icons/core | icon | held out
fluent | 1.2.60 | MIT | Microsoft | microsoft/fluentui-system-icons | icon | held out
fa6-solid | 1.2.4 | CC-BY-4.0 | Fonticons, Inc. (Dave Gandy) | FortAwesome/Font-Awesome | icon | held out
openclipart | 0.18 | public domain | ganson, davek, Benji Park and others | openclipart.org | png | held out
"""

# COCO's 80 classes in its order: the emoji of each (hex code points), then source:icon
CLASSES = """
person: 1f9cd 1f6b6 1f3c3 1f483 1f57a 1f468 1f469 1f466 1f467 1f46e 1f477 1f474 1f475 1f482
bicycle: 1f6b2
car: 1f697 1f699 1f698 1f695 1f693
motorcycle: 1f3cd 1f6f5
airplane: 2708 1f6e9
bus: 1f68c 1f68d 1f68e
train: 1f682 1f686 1f684 1f685 1f68a 1f688
truck: 1f69a 1f69b 1f6fb 1f692
boat: 26f5 1f6a4 1f6e5 26f4 1f6a2 1f6f6
traffic light: 1f6a5 1f6a6
fire hydrant: mdi:fire-hydrant temaki:fire-hydrant tabler:fire-hydrant material-symbols:fire-hydrant
stop sign: 1f6d1
parking meter: tabler:parking-meter lucide:parking-meter material-symbols:parking-meter
bench: mdi:bench-back temaki:bench fluent:bench-24-filled
bird: 1f426 1f424 1f99c 1f989 1f985 1f986 1f54a 1f427 1f414 1f9a2 1f9a9 1f413
cat: 1f431 1f408
dog: 1f436 1f415 1f429
horse: 1f434 1f40e
sheep: 1f411 1f40f
cow: 1f404 1f42e 1f402
elephant: 1f418
bear: 1f43b
zebra: 1f993
giraffe: 1f992
backpack: 1f392
umbrella: 2602 2614 1f302 26f1
handbag: 1f45c 1f45d
tie: 1f454 mdi:tie game-icons:tie
suitcase: 1f9f3 1f4bc mdi:bag-suitcase game-icons:rolling-suitcase
frisbee: 1f94f game-icons:frisbee
skis: 1f3bf game-icons:skis
snowboard: game-icons:snowboard
sports ball: 26bd 26be 1f3c0 1f3d0 1f3c8 1f3c9 1f3be
kite: 1fa81 mdi:kite game-icons:kite
baseball bat: mdi:baseball-bat game-icons:baseball-bat icon-park:baseball-bat fa6-solid:baseball-bat-ball
  openclipart:baseball_bat_ganson
baseball glove: game-icons:baseball-glove openclipart:baseball_glove_ganson
skateboard: 1f6f9 mdi:skateboard game-icons:skateboard
surfboard: game-icons:surf-board openclipart:surfboard_davek_01
tennis racket: mdi:tennis game-icons:tennis-racket ph:racquet-fill openclipart:tennis_racket_01
bottle: 1f37e 1f37c 1f9f4
wine glass: 1f377
cup: 2615 1f375 1f964 1f95b
fork: mdi:silverware-fork mingcute:fork-fill
knife: 1f52a
spoon: 1f944 mdi:silverware-spoon game-icons:spoon
bowl: 1f963 1f35c 1f35a 1f957
banana: 1f34c
apple: 1f34e 1f34f
sandwich: 1f96a 1f354
orange: 1f34a
broccoli: 1f966 game-icons:broccoli
carrot: 1f955
hot dog: 1f32d
pizza: 1f355
donut: 1f369
cake: 1f382 1f370 1f9c1
chair: 1fa91 1f4ba game-icons:wooden-chair
couch: 1f6cb mdi:sofa game-icons:sofa
potted plant: 1fab4 game-icons:flower-pot
bed: 1f6cf game-icons:bed
dining table: mdi:table-furniture game-icons:table material-symbols:table-restaurant
  openclipart:wooden_table_benji_park_01 openclipart:small_square_table_01
toilet: 1f6bd mdi:toilet
tv: 1f4fa 1f5a5 mdi:television-classic
laptop: 1f4bb
mouse: 1f5b1 mdi:mouse
remote: mdi:remote-tv game-icons:tv-remote icon-park:remote-control icon-park:remote-control-one
  material-symbols:tv-remote mingcute:remote-control-fill
keyboard: 2328 mdi:keyboard
cell phone: 1f4f1
microwave: mdi:microwave icon-park:microwave-oven tabler:microwave-filled material-symbols:microwave
oven: mdi:stove material-symbols:oven ph:oven-fill
toaster: mdi:toaster game-icons:toaster
sink: mdi:countertop game-icons:sink temaki:kitchen-sink fa6-solid:sink
refrigerator: mdi:fridge game-icons:fridge icon-park:refrigerator material-symbols:kitchen
  mingcute:fridge-fill
book: 1f4d6 1f4d5 1f4d7 1f4d8 1f4d9
clock: 1f550 1f557 1f570 23f0
vase: 1f3fa 26b1 game-icons:porcelain-vase
scissors: 2702
teddy bear: 1f9f8 mdi:teddy-bear
hair drier: mdi:hair-dryer icon-park:hair-dryer icon-park:hair-dryer-one ph:hair-dryer-fill
toothbrush: 1faa5 mdi:toothbrush
"""

# Things of none of the 80 classes
DISTRACTORS = """
2764 2b50 1f352 1f344 1f337 1f33b 1f339 1f3e0 1f3f0 1f333 1f334 1f384 1f319 1f381 1f388 1f3b8 1f3ba 1f3bb
1f3b7 1f941 1f347 1f349 1f353 1f34d 1f41a 1f451 1f525 2744 1f308 2601 1f30d 1f680 2693 1f511 1f512 1f514
1f4a1 1f528 1f527 1f41f 1f419 1f422 1f40c 1f98b 1f41d 1f41e 1f430 1f438 1f460 1f462 1f452 1f455 1f456 1f457
1f48e 1f48d 1f4f7 1f50d 1f3c6 1f3af 1f3b2 1f4e6 1f36d 1f366 1f36a 1f35f 1f33d 1f346 1f345 1f341 1f47b 1f480
26c4 26fa
"""

# What a source calls an emoji, where it is not the name that the others use (several: a space between)
NAMES = {
    "fxemoji": """
1f6b6 walking, 1f3c3 running, 1f483 dancer, 1f468 man, 1f469 woman, 1f466 boy, 1f467 girl, 1f46e cop, 1f474
gpa, 1f475 gma, 1f482 guardsman, 1f699 recreationalvehicle, 1f698 oncomingautomobile, 1f693 policecar, 1f68d
oncomingbus, 1f682 steamlocomotive, 1f684 highspeedtrain, 1f685 highspeedtrainbulletnose, 1f688 lightrail,
1f69a deliverytruck, 1f69b articulatedlorry, 1f692 fireengine, 1f6a5 horizontaltrafficlight, 1f6a6
verticaltrafficlight, 1f424 babychick, 1f54a doveofpeace, 1f431 cat, 1f408 catside, 1f436 dog, 1f415
dogside, 1f434 horseface, 1f411 sheep, 1f42e cowface, 1f402 ox, 1f392 schoolsatchel, 2614
umbrellawithraindrops, 26f1 beachumbrella, 1f454 tie, 1f3bf skiandskiboot, 1f3c2 snowboarder, 26bd
soccerball, 1f3c8 americanfootball, 1f3c9 rugbyfootball, 1f3be tennisball, 1f37c babybottle, 1f377
wineglass, 2615 hotbeverage, 1f375 teacupwithouthandle, 1f52a hocho, 1f35c steamingbowl, 1f35a cookedrice,
1f34e redapple, 1f34f greenapple, 1f355 sliceofpizza, 1f382 birthdaycake, 1f5a5 desktopcomputer, 1f4bb
personalcomputer, 1f5b1 onebuttonmouse twobuttonmouse threebuttonmouse, 2328 wiredkeyboard, 1f4f1 cellphone,
1f4d6 openbook, 1f4d5 closedbook, 1f4d7 greenbook, 1f4d8 bluebook, 1f4d9 orangebook, 1f550 clock1oclock,
1f557 clock7oclock, 1f570 manltepiececlock, 23f0 alarmclock, 2702 blackscissors, 1f4ba seat, 1f384
christmastree
""",
    "streamline-emojis": """
1f392 school-backpack, 1f43b bear-face, 1f377 red-wine-glass wine-glass, 1f46e man-police-officer-1 woman-
police-officer-2, 1f6b6 man-walking-1 woman-walking-2, 1f3c3 man-running-2 woman-running-1, 1f6a4 speedboat
""",
}

# Drawings with a scene around them, or of something else than their class
DROP = """
noto-v1:1f3c0 emojione:1f3c0 fxemoji:1f6a2 fxemoji:26f5 streamline-emojis:1f6a2 fxemoji:1f424 fxemoji:26f1
fxemoji:1f3bf emojione:26b1 emojione:26fa emojione:1f3cd fxemoji:1f5a5 fxemoji:1f4bb noto-v1:1f4bb
"""
# The tennis emoji is a racket for some and a ball for others
RACKETS = """
noto:1f3be noto-v1:1f3be fluent-emoji:1f3be fluent-emoji-flat:1f3be emojione:1f3be streamline-emojis:1f3be.2
"""

Source = collections.namedtuple("Source", "name version licence author project form held_out")


def sources():
    """The table of sources: {name: Source}."""
    rows = [[cell.strip() for cell in line.split("|")] for line in SOURCES.strip().splitlines()]
    return {row[0]: Source(*row[:6], row[6] == "held out") for row in rows}


def classes():
    """The table of classes: {name: [emoji code points and source:icon names]}."""
    lines = CLASSES.replace("\n  ", " ").strip().splitlines()
    return {line.split(":")[0]: line.partition(":")[2].split() for line in lines}


class Icons:
    """One source's icons and the names it gives to emoji."""

    def __init__(self, folder, name):
        self.set = json.loads((folder / name / "icons.json").read_text(encoding="utf-8"))
        chars = folder / name / "chars.json"
        chars = json.loads(chars.read_text(encoding="utf-8")) if chars.exists() else {}
        self.chars = {code.removesuffix("-fe0f"): icon for code, icon in chars.items()}
        entries = NAMES.get(name, "").replace("\n", " ").split(",")
        self.renamed = {entry.split()[0]: entry.split()[1:] for entry in entries if entry.strip()}
        self.compact, self.numbered = name == "fxemoji", name == "streamline-emojis"

    def of_emoji(self, code, words):
        """The names of the drawings of an emoji, given what other sources call it."""
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
        """An icon as the text of an SVG file, without the shadow that one source draws on the ground."""
        icon = self.icon(name)
        width, height = (icon.get(side, self.set.get(side, 16)) for side in ("width", "height"))
        body = re.sub(r'<path fill="#45413c"[^>]*opacity="\.15"/>', "", icon["body"])
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">'
            + body.replace("currentColor", colour)
            + "</svg>"
        )


def draw(svg):
    """An SVG as a sprite: trimmed to what is visible and resized, or None where nothing is."""
    svg = svg.replace("<svg ", f'<svg width="{4 * SIZE}" height="{4 * SIZE}" ', 1)
    return trim(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))))


def trim(file, threshold=16):
    """An image file as a sprite."""
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
    words = collections.defaultdict(list)  # code point: the names that the sources with a table give it
    for icons in sets.values():
        for code, name in icons.chars.items():
            words[code].append(name)
    emoji = [name for name, source in table.items() if source.form == "emoji"]
    sprites = collections.defaultdict(list)

    def add(label, vendor, key, icon):
        if f"{vendor}:{key}" in DROP.split():
            return 0
        colour = "#ffffff" if table[vendor].form == "icon" else "#333333"
        if table[vendor].form == "png":  # the threshold leaves a shadow out
            image = trim(folder / vendor / f"{icon}.png", 200)
        else:
            image = draw(sets[vendor].svg(icon, colour))
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
        drawn = 0  # two drawings of a distractor are enough, from one source and another in turn
        for vendor in training[turn % len(training) :] + training[: turn % len(training)]:
            for icon in sets[vendor].of_emoji(code, words[code])[:1]:
                drawn += drawn < 2 and add(None, vendor, code, icon)
    for path in sorted((out / "own").glob("*.svg")):
        label = path.stem.rstrip("0123456789").rstrip("-").replace("-", " ")
        sprites["own"].append((label, path.stem, draw(path.read_text(encoding="utf-8"))))
    return sprites


def pack(images, gap=4):
    """Places for images on a sheet, row by row, the tallest first: ([(x, y)], height of the sheet)."""
    places, x, y, row = [None] * len(images), gap, gap, 0
    for index in sorted(range(len(images)), key=lambda i: -images[i].height):
        width, height = images[index].size
        if x + width + gap > SHEET_WIDTH:
            x, y, row = gap, y + row + gap, 0
        places[index] = (x, y)
        x, row = x + width + gap, max(row, height)
    return places, y + row + gap


def write(sprites, out):
    """The sheets, sprites.json and CREDITS.md."""
    lines, about, texts = [], [], [CREDITS]
    for name, source in sources().items():
        rows = sprites[name]
        places, height = pack([image for *_, image in rows])
        sheet = Image.new("RGBA", (SHEET_WIDTH, height))
        for (label, key, image), place in zip(rows, places, strict=True):
            sheet.paste(image, place)
            record = {"source": name, "class": label, "name": key, "box": [*place, *image.size]}
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
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("media/sprites"))
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
        parser.error("name the folder with the unpacked packages")
    elif resvg_py is None:
        parser.error("rebuilding the sprite pack needs: pip install resvg-py pillow")
    else:
        write(collect(args.folder, args.out), args.out)


if __name__ == "__main__":
    main()

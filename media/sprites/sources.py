"""The drawings of the sprite pack: their sources, and what each class is called there. Tables of build.py.

An emoji is given by its code points in hexadecimal, an icon by source:name.
"""

import collections

# source | version | licence | author | project | form (icon: one colour, tinted in scenes) | use
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

# COCO's 80 classes in their order, as model/config.py has them: the emoji of each, then its icons
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

# Emoji of things outside the 80 classes
DISTRACTORS = """
2764 2b50 1f352 1f344 1f337 1f33b 1f339 1f3e0 1f3f0 1f333 1f334 1f384 1f319 1f381 1f388 1f3b8 1f3ba 1f3bb
1f3b7 1f941 1f347 1f349 1f353 1f34d 1f41a 1f451 1f525 2744 1f308 2601 1f30d 1f680 2693 1f511 1f512 1f514
1f4a1 1f528 1f527 1f41f 1f419 1f422 1f40c 1f98b 1f41d 1f41e 1f430 1f438 1f460 1f462 1f452 1f455 1f456 1f457
1f48e 1f48d 1f4f7 1f50d 1f3c6 1f3af 1f3b2 1f4e6 1f36d 1f366 1f36a 1f35f 1f33d 1f346 1f345 1f341 1f47b 1f480
26c4 26fa
"""

# What a source calls an emoji if the others use another name (of several drawings: separated by spaces)
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

# Left out: drawings with a scene around them, or of something other than their class
DROP = """
noto-v1:1f3c0 emojione:1f3c0 fxemoji:1f6a2 fxemoji:26f5 streamline-emojis:1f6a2 fxemoji:1f424 fxemoji:26f1
fxemoji:1f3bf emojione:26b1 emojione:26fa emojione:1f3cd fxemoji:1f5a5 fxemoji:1f4bb noto-v1:1f4bb
"""
# Sources whose tennis emoji is a racket, for the others it is a ball
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

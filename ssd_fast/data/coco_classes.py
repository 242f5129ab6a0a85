"""COCO's 80 classes, in COCO's order: those of weights that come from COCO without names."""

from ssd_fast.data.annotations import Category

_NAMES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
    stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
    backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
    baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl,
    banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant,
    bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink,
    refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)

COCO_CATEGORIES = tuple(
    Category(id_, name)
    for id_, name in zip(
        (id_ for id_ in range(1, 91) if id_ not in _UNUSED_IDS),
        (name.strip() for name in _NAMES.replace("\n", " ").split(",")),
        strict=True,
    )
)

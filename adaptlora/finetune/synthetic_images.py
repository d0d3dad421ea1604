"""Made-up images and boxes for dry runs."""

import random

from ._extras import need

_BLOTS = 8  # coloured fields along each side: no file is large, and none is one colour


def image_feature(size):
    return need("datasets", "made-up images").Image()


def image(generator: random.Random, size: list[int], row: dict):
    """A PIL image of `size` (width, height)."""
    pillow = need("PIL.Image", "made-up images")
    return pillow.frombytes("RGB", (_BLOTS, _BLOTS), generator.randbytes(3 * _BLOTS**2)).resize(
        size, resample=0
    )  # 0: nearest


def is_size(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


def objects_feature(argument: dict):
    datasets = need("datasets", "made-up boxes")
    return {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
        "category": datasets.List(datasets.ClassLabel(names=argument["classes"])),
    }


def objects(generator: random.Random, argument: dict, row: dict) -> dict[str, list]:
    """One to three boxes inside an image of argument["size"], as its "format" says, "xywh" or "xyxy"."""
    boxes, count = [], generator.randint(1, 3)
    for _ in range(count):
        (x, right), (y, bottom) = (
            sorted((generator.uniform(0, side), generator.uniform(0, side))) for side in argument["size"]
        )
        boxes.append([x, y, right, bottom] if argument["format"] == "xyxy" else [x, y, right - x, bottom - y])
    return {"bbox": boxes, "category": [generator.randrange(len(argument["classes"])) for _ in range(count)]}


def is_objects(value) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"classes", "size", "format"}
        and isinstance(value["classes"], list)
        and is_size(value["size"])
        and value["format"] in ("xywh", "xyxy")
    )

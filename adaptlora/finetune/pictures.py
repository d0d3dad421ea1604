"""Images of data sets: found, opened, and cropped at random. PIL alone, so that nothing depends on torchvision."""

from pathlib import Path

import torch

from ._extras import need

BILINEAR = 2  # PIL.Image.Resampling's number: PIL itself is imported when it is needed
_MIRROR = 0  # PIL.Image.Transpose.FLIP_LEFT_RIGHT
_COLUMN = "image"


def check_files(rows, where: str) -> None:
    """All image files that `rows` only point at are there. Looks at no image that is stored in the data set itself.

    Args:
        rows: a datasets.Dataset with a column `image`.
        where: "train" or "test", for the message.
    Raises: ValueError (no images in that column, a missing file).
    """
    datasets = need("datasets", "adaptlora finetune on images")
    if not isinstance(rows.features[_COLUMN], datasets.Image):
        raise ValueError(
            f"finetune: the image column of the {where} data must hold images, got {rows.features[_COLUMN]!r}"
        )
    compute = need("pyarrow.compute", "adaptlora finetune on images")
    column = rows.data.column(_COLUMN)
    outside = compute.is_null(compute.struct_field(column, "bytes"))
    for path in compute.struct_field(column, "path").filter(outside).to_pylist():
        if path is None or ("://" not in path and not Path(path).is_file()):
            raise ValueError(f"finetune: every image of the {where} data must be a file that exists, got {path!r}")


def with_files(rows, folder: Path):
    """`rows` whose column `image` holds file names relative to `folder`, with the images themselves there instead.

    Raises: ValueError (not a name).
    """
    datasets = need("datasets", "adaptlora finetune on images")

    def absolute(row: dict) -> dict:
        if not row[_COLUMN]:
            raise ValueError(f"finetune: every row must name an image file, got {row[_COLUMN]!r}")
        return {_COLUMN: str(folder / row[_COLUMN])}

    return rows.map(absolute, keep_in_memory=True).cast_column(_COLUMN, datasets.Image())


def picture(rows, row: int):
    """The image of a row, PIL, RGB. Raises: ValueError (no image, damaged)."""
    try:
        image = rows[row][_COLUMN]
        if image is None:
            raise OSError("there is none")
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # PIL's ways to say that a file is damaged
        raise ValueError(f"finetune: every image must be one that PIL reads, got row {row}: {error}") from error


def random_crop(image, size: tuple[int, int], scale: tuple[float, float], generator: torch.Generator):
    """A part of an image, `scale` of its area and of a shape from 3:4 to 4:3 of its own, at a random place, resized.

    Args:
        image: PIL.   size: (height, width).   scale: least and largest share of the area, 0 < least ≤ largest ≤ 1.
    """
    area, shape, left, top = torch.rand(4, generator=generator).tolist()
    area = scale[0] + (scale[1] - scale[0]) * area
    shape = (4 / 3) ** (shape - 0.5)  # √ of the ratio by which the shape changes
    width, height = (
        max(1.0, side * min(1.0, area**0.5 * by)) for side, by in zip(image.size, (shape, 1 / shape), strict=True)
    )
    x, y = left * (image.width - width), top * (image.height - height)
    return image.resize((size[1], size[0]), resample=BILINEAR, box=(x, y, x + width, y + height))


def random_flip(image, generator: torch.Generator):
    """(image, whether it was flipped): mirrored left to right in half of the cases."""
    flip = torch.rand((), generator=generator).item() < 0.5
    return (image.transpose(_MIRROR) if flip else image), flip

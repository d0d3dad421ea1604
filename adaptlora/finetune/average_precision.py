"""COCO's average precision of boxes: the mean over classes, ten thresholds of overlap and 101 recalls.

A class's detections over all images are ranked by score; at each threshold one is right if it overlaps a box of its class and image, not
taken by a better one, by at least that much.     [COCO detection evaluation, area "all", 100 detections of a class and image]
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

THRESHOLDS = numpy.linspace(0.5, 0.95, 10)
RECALLS = numpy.linspace(0, 1, 101)


@dataclass(frozen=True)
class Detections:
    """What was found in one image: boxes (D, 4) as x₀ y₀ x₁ y₁, scores (D,), labels (D,)."""

    boxes: numpy.ndarray
    scores: numpy.ndarray
    labels: numpy.ndarray


@dataclass(frozen=True)
class Truth:
    """What is in it: boxes (G, 4) as x₀ y₀ x₁ y₁, labels (G,), crowd (G,) bool: boxes around groups, which count neither way."""

    boxes: numpy.ndarray
    labels: numpy.ndarray
    crowd: numpy.ndarray


def average_precision(
    detections: Sequence[Detections], truths: Sequence[Truth], *, max_detections: int = 100
) -> dict[str, float]:
    """{"map", "map_50", "map_75"}: over all thresholds, and at overlaps of 0.5 and 0.75; 0 to 1.

    Args:
        detections, truths: one each for every image, in the same order.
        max_detections: the best so many of a class and image count.
    Raises: ValueError (lengths that differ, no box to find).
    """
    if len(detections) != len(truths):
        raise ValueError(
            f"average_precision: detections must be given for each of {len(truths)} images, got {len(detections)}"
        )
    scores, outcomes, wanted = defaultdict(list), defaultdict(list), defaultdict(int)
    for found, truth in zip(detections, truths, strict=True):
        for label in numpy.union1d(found.labels, truth.labels).tolist():
            mine, theirs = found.labels == label, truth.labels == label
            crowd = truth.crowd[theirs]
            wanted[label] += int((~crowd).sum())
            best = numpy.argsort(-found.scores[mine], kind="stable")[:max_detections]
            if len(best):
                scores[label].append(found.scores[mine][best])
                outcomes[label].append(_outcomes(found.boxes[mine][best], truth.boxes[theirs], crowd))
    classes = [label for label, count in wanted.items() if count]
    if not classes:
        raise ValueError("average_precision: truths must hold at least one box that is no crowd, got none")
    table = numpy.zeros((len(classes), len(THRESHOLDS)))
    for row, label in enumerate(classes):
        if scores[label]:
            order = numpy.argsort(-numpy.concatenate(scores[label]), kind="stable")
            table[row] = _areas(numpy.concatenate(outcomes[label], axis=1)[:, order], wanted[label])
    at = {f"map_{percent}": table[:, (percent - 50) // 5].mean().item() for percent in (50, 75)}
    return {"map": table.mean().item(), **at}


def overlaps(boxes: numpy.ndarray, others: numpy.ndarray, crowd: numpy.ndarray) -> numpy.ndarray:
    """Intersection over union (D, G); with a crowd's box the share of the box that lies in it."""
    low = numpy.maximum(boxes[:, None, :2], others[None, :, :2])
    high = numpy.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (high - low).clip(min=0).prod(axis=-1)
    area, their_area = ((b[:, 2:] - b[:, :2]).prod(axis=-1) for b in (boxes, others))
    union = area[:, None] + numpy.where(crowd, 0.0, their_area - shared)
    return numpy.divide(shared, union, out=numpy.zeros_like(shared), where=union > 0)


def _outcomes(boxes, others, crowd) -> numpy.ndarray:
    """(10, D) for the boxes of one class and image, best first: 1 right, 0 wrong, −1 in a crowd."""
    outcome = numpy.zeros((len(THRESHOLDS), len(boxes)), dtype=numpy.int8)
    if not len(others):
        return outcome
    taken = numpy.zeros((len(THRESHOLDS), len(others)), dtype=bool)
    rows, last = numpy.arange(len(THRESHOLDS)), len(others) - 1
    for column, overlap in enumerate(overlaps(boxes, others, crowd)):
        fits = (overlap >= THRESHOLDS[:, None]) & (crowd | ~taken)
        # a box of one thing goes before a crowd's, and among equals the last, as in COCO's code
        preference = numpy.where(fits, overlap + ~crowd, -1.0)
        choice = last - preference[:, ::-1].argmax(axis=1)
        hit = fits[rows, choice]
        outcome[hit, column] = numpy.where(crowd[choice[hit]], -1, 1)
        taken[rows[hit], choice[hit]] = True
    return outcome


def _areas(outcomes: numpy.ndarray, wanted: int) -> numpy.ndarray:
    """(10,) mean over the recalls of the best precision at this recall or a higher one; outcomes (10, D) by falling score."""
    areas = numpy.zeros(len(outcomes))
    for row, outcome in enumerate(outcomes):
        outcome = outcome[outcome >= 0]
        if not len(outcome):
            continue
        right = outcome.cumsum(dtype=numpy.int64)
        precision = right / numpy.arange(1, len(outcome) + 1)
        envelope = numpy.maximum.accumulate(precision[::-1])[::-1]
        first = numpy.searchsorted(right / wanted, RECALLS, side="left")
        reached = first[first < len(envelope)]
        areas[row] = envelope[reached].sum() / len(RECALLS)
    return areas

"""What scores mean and from which on they are told: chosen on validation patients, never on those of the test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from slidescan.detect.card import Card
from slidescan.errors import ConfigError
from slidescan.train import metrics
from slidescan.train.evaluate import best_cut

__all__ = ["choose_operating_point"]


def choose_operating_point(
    card: Card, kinds: Mapping[str, Sequence[metrics.Image]], log: Callable[[str], None]
) -> Card:
    """Return the card with calibration, threshold and cuts of the attributes.

    The first kind is the likest to a slide, and calibrates: how sure one may be depends on how rare objects are. The
    threshold has the best mean F1 over all kinds.

    Parameters
    ----------
    card : Card
    kinds : mapping of str to sequence of Image
        What was found, with scores as the network gives them, by kind of image.
    log : callable
        Takes one line.

    Raises
    ------
    ConfigError
        If there is no image.
    """
    if not kinds:
        raise ConfigError("validation: expected images to choose threshold and calibration by, got none")
    likest = next(iter(kinds))
    before = metrics.calibration_error(kinds[likest])
    temperature, offset = metrics.fit_calibration(kinds[likest])
    kinds = {kind: metrics.calibrate(found, temperature, offset) for kind, found in kinds.items()}
    images = [image for found in kinds.values() for image in found]
    threshold = round(metrics.best_threshold(*kinds.values()), 2)
    cuts = tuple(best_cut(images, threshold, column) for column in range(len(card.attributes)))
    at = {kind: metrics.score(found, threshold) for kind, found in kinds.items()}
    lines = [f"{kind} F1 {s.f1:.3f} (precision {s.precision:.3f}, recall {s.recall:.3f})" for kind, s in at.items()]
    after = metrics.calibration_error(kinds[likest])
    error = f"calibration error ({likest}) {before:.3f} before and {after:.3f} after"
    log("validation: " + "; ".join([*lines, error, f"threshold {threshold:g}"]))
    return dataclasses.replace(card, temperature=temperature, offset=offset, threshold=threshold, attribute_cuts=cuts)

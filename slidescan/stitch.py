"""From per-tile detections to one exact set: ownership with slack, then suppression between tiles at the seams.

The rule, in any one frame:

0. A box cut by its tile's read window, but not by the slide's edge, is dropped: a neighbour sees it whole.
1. A box stays with a tile if its centre lies less than `slack` outside the tile's core.
2. Of two boxes of one class from *different* tiles, both with their centre within 3·`slack` of their own core's edge,
   whose centres are less than 2·`slack` apart and which overlap by more than `iou`, the lower one goes.
3. "Lower" is the order by (-score, x0, y0, x1, y1, label), then by the tile's place and the attributes, so the result
   does not depend on the order of the input.

If the centre of an object moves by less than `slack` between two tiles that see it, each object survives exactly
once in each class it is said to be: some tile finds it within slack of its own core, and its twins lie at most slack +
2·jitter < 3·slack inside theirs and less than 2·slack away. They must overlap by more than `iou`, too: at 0.3 those of
squares wider than 3.2·slack do, whichever way the centre moved. Duplicates within one tile, and several classes for one
object, are the detector's business; tissue away from the seams is never touched.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from slidescan.detections import Detections, iou_pairs
from slidescan.geometry import Box

__all__ = ["owned", "stitch"]

# px of the frame at hand; a box this near the read window's edge was cut by it. Detectors clip to the window exactly.
_CUT_PX = 1.0


def owned(detections: Detections, core: Box, read: Box, bounds: Box, *, slack: float) -> NDArray[np.bool_]:
    """Tell which of a tile's detections the tile may keep (rules 0 and 1).

    Parameters
    ----------
    detections : Detections
        Boxes in the frame of the three boxes.
    core, read, bounds : Box
        What the tile owns, what it sees, and the slide's extent.
    slack : float
        Same frame; more than the centre's jitter.

    Returns
    -------
    ndarray of bool, shape (N,)

    Examples
    --------
    >>> d = Detections.build([[40, 40, 60, 60], [118, 40, 128, 60]], [0.9, 0.9])
    >>> owned(d, Box(16, 16, 112, 112), Box(0, 0, 128, 128), Box(0, 0, 500, 500), slack=4.0)
    array([ True, False])
    """
    x0, y0, x1, y1 = detections.xyxy.T
    cut = (
        ((x0 < read.x0 + _CUT_PX) & (read.x0 > bounds.x0))
        | ((y0 < read.y0 + _CUT_PX) & (read.y0 > bounds.y0))
        | ((x1 > read.x1 - _CUT_PX) & (read.x1 < bounds.x1))
        | ((y1 > read.y1 - _CUT_PX) & (read.y1 < bounds.y1))
    )
    x, y = detections.centers.T
    reach = core.grow(slack)
    return np.asarray(~cut & (x >= reach.x0) & (x < reach.x1) & (y >= reach.y0) & (y < reach.y1))


def stitch(
    detections: Detections, tile: NDArray[np.intp], cores: NDArray[np.float64], *, slack: float, iou: float
) -> Detections:
    """Merge the detections that tiles kept into one slide-level set (rules 2 and 3).

    Parameters
    ----------
    detections : Detections
        Rows of all tiles, in any order; `xyxy` in the frame of `cores`.
    tile : ndarray of int, shape (N,)
        Row of `cores` each detection came from.
    cores : ndarray of float64, shape (T, 4)
        Core of each tile, x0 y0 x1 y1.
    slack, iou : float
        See the module's rule.

    Returns
    -------
    Detections
        Sorted by falling score, then box; the same for any order of the input.

    Notes
    -----
    O(N log N) in the number of detections near seams (k-d tree), O(N) memory.

    Examples
    --------
    >>> twins = Detections.build([[90, 40, 110, 60], [91, 40, 111, 60]], [0.8, 0.9])
    >>> cores = np.array([[0, 0, 100, 100], [100, 0, 200, 100]], float)
    >>> stitch(twins, np.array([0, 1]), cores, slack=4.0, iou=0.3).score
    array([0.9], dtype=float32)
    """
    boxes, core = detections.xyxy, cores[tile]
    last = (*detections.attributes.T, core[:, 1], core[:, 0], detections.label)
    order = np.lexsort((*last, boxes[:, 3], boxes[:, 2], boxes[:, 1], boxes[:, 0], -detections.score))
    ranked, tile, core = detections[order], np.asarray(tile)[order], core[order]
    centers = ranked.centers
    depth = np.minimum(centers - core[:, :2], core[:, 2:] - centers).min(1)
    seam = np.flatnonzero(depth < 3 * slack)
    if len(seam) < 2:
        return ranked
    pairs = cKDTree(centers[seam]).query_pairs(2 * slack, p=np.inf, output_type="ndarray")
    pairs = seam[np.sort(pairs, axis=1)]
    one, other = pairs.T
    pairs = pairs[(tile[one] != tile[other]) & (ranked.label[one] == ranked.label[other])]
    pairs = pairs[iou_pairs(ranked.xyxy[pairs[:, 0]], ranked.xyxy[pairs[:, 1]]) > iou]
    keep = [True] * len(ranked)
    # By the time a box is the upper one of a pair, every box above it has had its say: greedy suppression in one pass.
    for upper, lower in pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].tolist():
        if keep[upper]:
            keep[lower] = False
    return ranked[np.array(keep)]

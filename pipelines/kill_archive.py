"""Kill runs of an archive at random moments, continue them, and compare: nothing may be lost, left over or done twice.

python pipelines/kill_archive.py                       50 rounds, ten minutes on two cores
python pipelines/kill_archive.py --rounds 1 --seed 17  round 17 again
python pipelines/kill_archive.py --smoke               two rounds of a smaller archive, for tests

A round scans a few slides of discs with `slidescan archive`, at a moment drawn at random kills what its turn says (a
worker, the main process politely, the main process, all workers, everything), and runs the same command again where the
first run did not end by itself. Its files must then be those of an undisturbed run, times and memory apart; no process
and no file half written may be left; no region that was committed before the kill may be scored after it. For that the
detector, which is slow and knows the answer, writes down which region it is given. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import tifffile
from kill_processes import LONGEST_S, begun, ended, kill, left_by, until, workers_of
from numpy.typing import NDArray

import slidescan as ss
from slidescan import cli
from slidescan.archive import read_listing
from slidescan.prepare import prepare
from slidescan.testing import TISSUE_GROUND, OracleDetector, disc_image, random_centers

KINDS = ("SIGKILL a worker", "SIGTERM main", "SIGKILL main", "SIGKILL workers", "SIGKILL everything")
_SIZE_WH, _MPP, _WORKERS = (1000, 800), 0.5, 2
_SETTINGS = {"tiling.region_px": 320, "detect.batch_tiles": 64, "tissue.thumbnail_px": 512, "map.um_per_px": 8.0}
_SCORING_S = 0.1  # for a row of a region, so that moments within its work are drawn too
_EARLY = 0.15  # share of rounds whose moment is before the first region
_SIGTERM_S = 10  # until which a run must have ended
# What two runs differ in: when and how fast, in how much memory, in how many attempts; and how much of a slide the run
# scored that finished it.
_DIFFER = {"seconds", "profile", "stages_s", "peak_rss_mb", "finished_s", "attempts", "megapixels"}
_FIRST = "records"  # what a run makes before anything else
_NOT_COMPARED = ("log.jsonl", "report.html")

Place = tuple[str, str]  # a region: its slide's id and its own name


@dataclass(frozen=True)
class Witness(OracleDetector):
    """Takes its time, and writes down when it was given what."""

    scored: Path = field(default=Path(), repr=False)  # the digest is made of what is shown: it does not depend on this

    def detect(self, tiles: NDArray[np.uint8], min_score: float) -> list[ss.Detections]:
        """Score the tiles of a region, a row at a time."""
        with self.scored.open("a", encoding="utf-8") as file:
            file.write(f"{time.time_ns()} {digest(tiles[0])}\n")
        time.sleep(_SCORING_S)
        return super().detect(tiles, min_score)


@dataclass(frozen=True)
class Reference:
    """An archive, and what an undisturbed run makes of it."""

    slides: Path
    regions: dict[str, Place]
    """All regions by the digest of their first tile."""
    tree: dict[str, Any]
    starts_s: float
    """From its first trace until the first region was scored: its workers start."""
    works_s: float
    """From then on until it said that it ended."""


@dataclass
class Round:
    """What became of one round."""

    kind: str
    said: str = ""
    lost: int = 0
    """Regions scored that had to be scored again."""
    recomputed: int = 0
    """Regions scored again although they were committed."""
    same: bool = False
    """Whether the files are those of the undisturbed run."""
    ended_s: float = 0.0
    """From the signal until no process was left."""
    problems: list[str] = field(default_factory=list)


def digest(tile: NDArray[np.uint8]) -> str:
    """Name a tile by its pixels."""
    return hashlib.sha256(np.ascontiguousarray(tile).tobytes()).hexdigest()


def witness(scored: Path) -> Witness:
    """Return the detector that writes to `scored`."""
    return Witness(mpp=_MPP, input_px=256, object_um=20.0, max_per_tile=1000, scored=scored)


def work(slides: str, out: str) -> None:
    """Be `slidescan archive`, with the witness for the bundled detector."""
    settings = [text for key, value in _SETTINGS.items() for text in ("--set", f"{key}={value}")]
    sys.argv = ["slidescan", "archive", slides, "-o", out, "--workers", str(_WORKERS), *settings]
    with mock.patch("slidescan.detect.load_detector", return_value=witness(scored_in(Path(out)))):
        cli.main()


def scored_in(out: Path) -> Path:
    """Return the file that tells what was scored for an output directory."""
    return out.with_name(f"{out.name}.scored")


def said_in(out: Path) -> Path:
    """Return the file that holds what the runs said."""
    return out.with_name(f"{out.name}.said")


def start(slides: Path, out: Path) -> subprocess.Popen[bytes]:
    """Start a run in a session of its own."""
    command = [sys.executable, __file__, "--work", str(slides), str(out)]
    environment = {**os.environ, "TMPDIR": str(slides.parent)}  # killed workers leave their scratch directories
    with said_in(out).open("ab") as said:
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True, env=environment
        )


def committed(out: Path, regions: dict[str, Place]) -> dict[Place, int]:
    """Return the regions that are on disk, in a part of their own or in a result, and since when (ns since 1970)."""
    found: dict[Place, int] = {}
    for folder, _, files in os.walk(out / "slides"):  # which minds nothing that vanishes
        at = Path(folder)
        for name in files:
            with suppress(FileNotFoundError):
                if at.name.startswith("parts-") and name.endswith(".npz"):
                    found[at.parent.name, name[: -len(".npz")]] = (at / name).stat().st_mtime_ns
                elif name == "manifest.json":
                    since = (at / name).stat().st_mtime_ns
                    found |= {place: since for place in regions.values() if place[0] == at.name}
    return found


def scorings(out: Path, regions: dict[str, Place]) -> list[tuple[int, Place]]:
    """Return when each region was scored, nanoseconds since 1970; its first row tells."""
    scored = scored_in(out)
    rows = [line.split() for line in scored.read_text(encoding="utf-8").splitlines()] if scored.exists() else []
    return [(int(when), regions[what]) for when, what in rows if what in regions]


def tree(out: Path) -> dict[str, Any]:
    """Return what is compared of all files of an output directory."""
    found: dict[str, Any] = {}
    for file in sorted(out.rglob("*")):
        name = file.relative_to(out).as_posix()
        if not file.is_file() or name in _NOT_COMPARED:
            continue
        if name == "index.parquet":
            found[name] = without_times(pq.read_table(file).to_pylist())
        elif file.name == "manifest.json" or name.startswith("records/"):
            found[name] = without_times(json.loads(file.read_bytes()))
        else:
            found[name] = file.read_bytes()
    return found


def without_times(told: Any) -> Any:
    """Return a JSON document without what differs between two runs."""
    if isinstance(told, dict):
        return {key: without_times(value) for key, value in told.items() if key not in _DIFFER}
    return [without_times(value) for value in told] if isinstance(told, list) else told


def differences(ours: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Name the files that differ, and why a file must not be there."""
    found = [f"{name} is missing" for name in sorted(reference.keys() - ours.keys())]
    found += [f"{name} is left over" for name in sorted(ours.keys() - reference.keys())]
    both = sorted(ours.keys() & reference.keys())
    return found + [f"{name} differs" for name in both if ours[name] != reference[name]]


def write_slide(path: Path, rng: np.random.Generator) -> None:
    """Write a slide of discs on tissue of which no two places look the same."""
    centers = random_centers(rng, _SIZE_WH, 12, apart_px=33, margin_px=12)
    pixels = disc_image(_SIZE_WH, centers, 11, ground=TISSUE_GROUND)
    pixels -= rng.integers(0, 4, pixels.shape, np.uint8)
    scale = {"resolution": (1e4 / _MPP, 1e4 / _MPP), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", compression="zlib", metadata=None, **scale)


def undisturbed(folder: Path, slides: int) -> Reference:
    """Write the slides and scan them."""
    (folder / "slides").mkdir()
    regions: dict[str, Place] = {}
    n = 0
    for seed in range(slides):
        write_slide(folder / "slides" / f"{seed}.tiff", np.random.default_rng(seed))
    for entry in read_listing(folder / "slides"):
        slide = ss.open_slide(entry.path)
        prepared = prepare(slide, witness(Path()), ss.ScanConfig.load({}, _SETTINGS))
        for region in prepared.plan.regions:
            x0, y0, x1, y1 = region.tiles[0].read.round_out()
            pixels = slide.read(x0, y0, x1 - x0, y1 - y0, prepared.plane)
            regions[digest(pixels.rgb)] = entry.slide_id, region.name
            n += 1
    assert n == len(regions), "two regions look the same"
    out = folder / "whole"
    run = start(folder / "slides", out)
    begun(run, out / _FIRST)
    begun_s = time.time()
    code, scored = ended(run), scorings(out, regions)
    if code != 0 or left_by(run) or len(scored) != n:
        raise SystemExit(f"the undisturbed run ended with {code}:\n{said_in(out).read_text(encoding='utf-8')}")
    events = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    first_s = scored[0][0] / 1e9
    return Reference(folder / "slides", regions, tree(out), first_s - begun_s, events[-1]["at"] - first_s)


def had_finished(out: Path) -> bool:
    """Return whether the log says that the run came to its end by itself."""
    log = out / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return bool(lines) and json.loads(lines[-1]).get("because") == "finished"


def disturbed(reference: Reference, out: Path, seed: int) -> Round:
    """Start a run, kill what the seed says when it says, continue, and compare."""
    one = Round(KINDS[seed % len(KINDS)])
    early, share, choice = np.random.default_rng(seed).random(3)
    since, seconds = ("start", reference.starts_s) if early < _EARLY else ("first region", reference.works_s)
    run = start(reference.slides, out)
    begun(run, out / _FIRST if early < _EARLY else scored_in(out))
    until(lambda: run.poll() is not None, share * seconds)
    # Before the kill: what is there then must stay. Where nothing lives on, it is looked at once more afterwards.
    before, at_ns = committed(out, reference.regions), time.time_ns()
    if run.poll() is not None:
        one.said = f"had ended with {run.returncode}"
        if run.returncode:
            one.problems.append(one.said)
    elif one.kind == "SIGKILL main":
        kill(run.pid)
        run.wait()
    elif one.kind == "SIGTERM main":
        kill(run.pid, signal.SIGTERM)
        code = ended(run, 3 * _SIGTERM_S)
        one.said = "hangs" if code is None else f"ended with {code}"
        # Where it came too late: 0, or its own number where Python had put away its handlers already.
        too_late = (0, -signal.SIGTERM) if had_finished(out) else ()
        if code not in (3, *too_late):
            one.problems.append(one.said)
    else:
        # One that is killed before it has any goes on to have some.
        until(lambda: run.poll() is not None or len(workers_of(run.pid)) == _WORKERS, LONGEST_S)
        workers = workers_of(run.pid)
        before, at_ns = committed(out, reference.regions), time.time_ns()
        if one.kind == "SIGKILL everything":
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        else:
            for pid in workers if one.kind == "SIGKILL workers" else workers[int(choice * len(workers)) :][:1]:
                kill(pid)
            killed = time.monotonic()
            code = ended(run)
            one.said = f"went on for {time.monotonic() - killed:.1f} s, ended with {code}"
            if code:
                one.problems.append(f"a run that lost workers {one.said}")
    stopped = time.time_ns()
    if left := left_by(run):
        one.problems.append(f"{left} processes left")
    one.ended_s = (time.time_ns() - at_ns) / 1e9
    if one.kind == "SIGTERM main" and one.ended_s > _SIGTERM_S:
        one.problems.append(f"took {one.ended_s:.1f} s to end")
    if run.returncode != 0:
        before, at_ns = committed(out, reference.regions), max(stopped, time.time_ns())
        again = start(reference.slides, out)
        if code := ended(again):
            one.problems.append(f"continuing ended with {code}")
        if left := left_by(again):
            one.problems.append(f"{left} processes left after continuing")
    scored = scorings(out, reference.regions)
    one.lost = len(scored) - len(reference.regions)
    for place in (place for when, place in scored if when > at_ns and place in before):
        one.recomputed += 1
        age_s = (at_ns - before[place]) / 1e9
        one.problems.append(f"{'/'.join(place)} scored again, committed {age_s:.2f} s before")
    differ = differences(tree(out), reference.tree)
    one.same, one.problems = not differ, one.problems + differ
    if b"Traceback" in said_in(out).read_bytes():
        one.problems.append("a traceback")
    at = f"{share * seconds:.2f} s after its {since}, {len(before)} of {len(reference.regions)} regions committed"
    one.said = f"{at}, {one.lost} scored in vain" + (f"; {one.said}" if one.said else "")
    return one


def report(rounds: list[Round]) -> None:
    """Print the table: a row a kind."""
    print("kind | rounds | same tree | nothing to say | lost, median / max | recomputed | until nothing ran, s: max")
    print("-|-|-|-|-|-|-")
    for kind in KINDS:
        of_kind = [one for one in rounds if one.kind == kind]
        if not of_kind:
            continue
        same, fine = sum(one.same for one in of_kind), sum(not one.problems for one in of_kind)
        lost = [one.lost for one in of_kind]
        longest = "-" if "worker" in kind else f"{max(one.ended_s for one in of_kind):.1f}"
        print(
            f"{kind} | {len(of_kind)} | {same} | {fine} | {statistics.median(lost):g} / {max(lost)} | "
            f"{sum(one.recomputed for one in of_kind)} | {longest}"
        )


def main() -> None:
    """Kill, continue, compare and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the next one has the next")
    parser.add_argument("--smoke", action="store_true", help="two rounds of a smaller archive, for tests")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work)
        return
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as scratch:
        reference = undisturbed(Path(scratch), 2 if arguments.smoke else 5)
        took = f"{reference.starts_s:.1f} s to the first region, {reference.works_s:.1f} s from there to the end"
        print(f"undisturbed: {len(reference.regions)} regions, {took}", flush=True)
        for seed in range(arguments.seed, arguments.seed + (2 if arguments.smoke else arguments.rounds)):
            out = Path(scratch) / f"round-{seed}"
            one = disturbed(reference, out, seed)
            rounds.append(one)
            print(f"round {seed}: {one.kind} {one.said}: {'; '.join(one.problems) or 'same tree'}", flush=True)
            if one.problems:
                print(said_in(out).read_text(encoding="utf-8"), flush=True)
    report(rounds)
    raise SystemExit(any(one.problems for one in rounds))


if __name__ == "__main__":  # the workers are processes that import this file
    main()

"""A training run, from settings to a directory that `scan --model` takes.

Hides the order of things: network, images, loop, calibration and threshold on the validation patients, mined negatives,
the validation patients themselves, and the report on the test patients, which nothing is chosen by. Training and mining
are not done again: a run that was stopped, or that ended, goes on from its checkpoints; what is chosen and reported
follows anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from slidescan.commit import commit, made, sweep
from slidescan.detect.card import MODEL_FILES, Card, read_card, write_model
from slidescan.detect.load import load_detector
from slidescan.detect.model import Model
from slidescan.detect.surgery import channels_last, lower_precision, set_anchors
from slidescan.detect.weights import load_network
from slidescan.errors import ConfigError, ModelError
from slidescan.manifest import MANIFEST
from slidescan.ops import accelerate
from slidescan.slides import Slide
from slidescan.train.annotated import SEEN, seen_by, seen_in
from slidescan.train.begun import keep_begun
from slidescan.train.decided import Decided, keep_decided, load_decided
from slidescan.train.evaluate import describe, evaluate, find_all
from slidescan.train.loop import train
from slidescan.train.metrics import Image
from slidescan.train.mine import mine, refuse_annotated, refuse_others
from slidescan.train.mitosis import CropSource
from slidescan.train.network import build_network, pin, relabel
from slidescan.train.operating_point import choose_operating_point
from slidescan.train.own import OwnSource, kind_of, load_annotated
from slidescan.train.patients import read_all
from slidescan.train.report import draw_losses
from slidescan.train.settings import TrainSettings, VariantSettings
from slidescan.train.source import Batches, Source
from slidescan.train.windows import Windows

__all__ = ["open_source", "open_test", "train_detector"]

# Of the variant's rate: enough to unlearn what was mined and too little to forget the rest; and to learn from the
# validation patients, while the calibration, which is theirs, is kept.
_MINE_LR, _FINISH_LR = 0.1, 0.2
_DRAFTS, _MINED = "drafts", "mined-"  # in a run's directory: variants that are not finished, and windows of one
# What the seed begins with: steps are added to it.
_STAGES = {"mined": 1 << 20, "finish": 2 << 20, "half-1": 3 << 20, "half-2": 4 << 20}
# Settings by which annotations are read, told in the card: a measurement reads them so, too.
_READ_WITH = ("slide_mpp", "skip", "crowds")
# Two boxes of 12.5 µm overlap so when their centres are 4 µm apart: nearer than two figures are, and farther than what
# two queries say of one.
_MERGE_IOU = 0.5
# As far as the convolutions of `build_network` see: with 80 px 2 of 69 scores moved by more than 0.05 when the grid was
# shifted, with 112 px none of 68 (assembled fields, 0.25 µm/px). Less 3 %, by which a plane's µm/px may differ.
_HALO_PX = 108
# The nominal box, with a quarter for objects that are larger.
_LARGEST = 1.25


@dataclasses.dataclass(frozen=True)
class _Learned:
    """A variant that is settled."""

    source: Source
    batches: Batches
    average: torch.nn.Module
    card: Card


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all stages of a run share."""

    settings: TrainSettings
    out: Path
    log: Callable[[str], None]

    def learn(
        self,
        variant: VariantSettings,
        source: Source,
        decided: Decided | None,
        mine_slides: Sequence[Slide],
    ) -> _Learned:
        """Train a variant, settle it, and have it unlearn what it finds where nothing is."""
        settings, out, name = self.settings, self.out, f"{variant.mpp:g}"
        self.log(f"{name} µm/px")
        start = None if variant.start_mpp is None else self.draft(variant.start_mpp)
        if start is not None and not start.is_dir():  # of a run before this one
            start = out / start.name
        told, around = dict[str, Any](), None
        if decided is not None:
            told = {"accepted": decided.accepted, "rejected": decided.rejected}
            around = Windows(decided.annotated, variant.mpp, seed=settings.seed)
        begun: Model | None = None if start is None else Model(start)
        if variant.start is not None:
            begun = load_detector(variant.start).at(variant.mpp, allow_coarse=True)
            start = begun.path
        known = seen_by(begun.training) if begun else set[str]()
        again = known & seen_in(source.annotated("validation"))
        if again and begun and (variant.start or begun.training.get("finish_steps")):
            self.log("beware: what it starts from knows images that threshold and calibration are chosen by")
        checkpoint = out / f"losses-{name}.safetensors"
        batches = Batches(source, settings, variant, decided=around)
        network = _network(settings, variant, start)
        average = train(network, batches, settings, variant, checkpoint=checkpoint, log=self.log)
        draw_losses(checkpoint.with_suffix(".csv"), checkpoint.with_suffix(".png"))
        for some in (source.annotated("train"), source.annotated("validation"), decided.annotated if decided else ()):
            known |= seen_in(some)
        told |= {SEEN: sorted(known)} if known else {}
        card = self._settle(average, _card(settings, variant, **told), source)
        detector = Model(self.draft(variant.mpp), device=settings.device)
        windows = mine(detector, mine_slides, out / f"{_MINED}{name}", self.log)
        if windows:  # of this run, or of one before: what was unlearned stays so
            batches = Batches(source, settings, variant, windows, around)
            more = variant.model_copy(update={"steps": variant.mine_steps, "lr": variant.lr * _MINE_LR})
            average = self._go_on(more, batches, average, "mined")
            card = self._settle(average, _card(settings, variant, mined=len(windows), **told), source)
        return _Learned(source, batches, average, card)

    def finish(self, variant: VariantSettings, learned: _Learned) -> None:
        """Train on with the validation patients among the images.

        The weights that this gives have no patients left to choose by. So calibration and threshold are those of two
        trainings that are as near to it as can be: on one half of these patients each, in half the steps, and looking
        at the other. Without two patients they stay.
        """
        name, steps = f"{variant.mpp:g}", variant.finish_steps or 0
        more = variant.model_copy(update={"steps": max(1, steps // 2), "lr": variant.lr * _FINISH_LR})
        kinds: dict[str, list[Image]] = {}
        for i, half in enumerate(learned.source.halves(), 1):
            self.log(f"{name} µm/px, on half of the validation patients too ({i} of 2)")
            average = self._go_on(more, learned.batches.of(half), learned.average, f"half-{i}")
            with TemporaryDirectory(prefix="slidescan-") as scratch:
                for kind, found in self._look(average, learned.card, Path(scratch), half).items():
                    kinds.setdefault(kind, []).extend(found)
        card = choose_operating_point(learned.card, kinds, self.log) if kinds else learned.card
        self.log(f"{name} µm/px, on the validation patients too")
        more = more.model_copy(update={"steps": steps})
        average = self._go_on(more, learned.batches.of(learned.source.whole()), learned.average, "finish")
        training = {**learned.card.training, "finish_steps": steps}
        write_model(average, dataclasses.replace(card, training=training), self.draft(variant.mpp))

    def draft(self, mpp: float) -> Path:
        """Return where a variant is until it is finished: what is already there is not touched before."""
        return self.out / _DRAFTS / f"{mpp:g}"

    def publish(self, variant: VariantSettings) -> Path:
        """Put a finished variant where it is looked for; return where.

        First beside what is there, so that a full disk costs nothing; its configuration, without which there is no
        model, goes first and comes last: never new weights with an old card.
        """
        draft = self.draft(variant.mpp)
        directory = made(self.out / draft.name)
        sweep(directory)
        names = sorted((file.name for file in draft.iterdir()), key=lambda name: (name == MODEL_FILES[0], name))
        for name in names:
            commit(directory / f"{name}.new", lambda partial, name=name: shutil.copyfile(draft / name, partial))  # type: ignore[misc]
        (directory / MODEL_FILES[0]).unlink(missing_ok=True)
        for name in names:
            (directory / f"{name}.new").replace(directory / name)
        return directory

    def _settle(self, average: torch.nn.Module, card: Card, source: Source) -> Card:
        """Write the model with calibration and threshold, both from the validation patients, and return its card."""
        directory = self.draft(card.mpp)
        card = choose_operating_point(card, self._look(average, card, directory, source), self.log)
        write_model(average, card, directory)
        return card

    def _look(self, average: torch.nn.Module, card: Card, directory: Path, source: Source) -> dict[str, list[Image]]:
        """Write the model, uncalibrated, and return what it finds on all that was held out, by kind."""
        write_model(average, dataclasses.replace(card, temperature=1.0, offset=0.0), directory)
        self.log("validation: looking at all that was held out for it")
        return find_all(Model(directory, device=self.settings.device), source.shown("validation"))[1]

    def _go_on(
        self, variant: VariantSettings, batches: Batches, average: torch.nn.Module, stage: str
    ) -> torch.nn.Module:
        """Train on from averaged weights, with random numbers of its own; anew where these are not those of before."""
        name = f"{variant.mpp:g}"
        # Not a copy, which has the precision of another.
        network = _network(self.settings, variant, self.draft(variant.mpp))
        network.load_state_dict(average.state_dict())
        settings = self.settings.model_copy(update={"seed": self.settings.seed + _STAGES[stage]})
        variant = variant.model_copy(update={"minutes": None, "cycles": 1})
        checkpoint = self.out / f"losses-{name}-{stage}-{_digest(average)}.safetensors"
        return train(network, batches, settings, variant, checkpoint=checkpoint, log=self.log)


def train_detector(
    settings: TrainSettings, out: Path, log: Callable[[str], None], *, mine_slides: Sequence[Slide] = ()
) -> dict[str, Any]:
    """Train every variant and write ``out/<mpp>/`` with config.json, model.safetensors and slidescan.json.

    Parameters
    ----------
    settings : TrainSettings
    out : Path
        Also takes checkpoints, ``losses-<mpp>.csv`` and ``.png``, ``decisions.json``, and per variant what `evaluate`
        writes. The directory is a detector for ``--model``; what is not finished is in ``drafts/``.
    log : callable
        Takes one line.
    mine_slides : sequence of Slide
        Tissue taken to be free of objects: what the trained detector finds there, it is then trained not to.

    Returns
    -------
    dict
        Metrics by variant; empty without test data.

    Raises
    ------
    ConfigError
        If data are missing, a patient is in two splits, or the run was begun with other data, settings or decisions.
    ModelError
        If training diverges, or the device is not there.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if (
        settings.precision == "bf16"
        and _device(settings) == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
    ):
        log("beware: this processor has no instructions for bfloat16; precision: fp32 is several times as fast here")
    sweep(made(out))
    if (out / MANIFEST).exists():
        raise ConfigError(f"{out}: expected a directory for a training, found the result of a scan; choose another")
    for i, variant in enumerate(settings.variants):  # before hours of training
        if variant.start_mpp is not None and variant.start_mpp not in [one.mpp for one in settings.variants[:i]]:
            _trained(out / f"{variant.start_mpp:g}")
    decided = None
    if settings.decisions is not None:
        decided = load_decided(settings.decisions, settings.decision_slides, settings)
        log(str(decided))
    keep_decided(decided, out)
    run, learned = _Run(settings, out, log), []
    for variant in settings.variants:
        source = open_source(settings, variant)
        for line in source.told() if variant is settings.variants[0] else ():
            log(line)
        patients = read_all((settings.data, settings.validation, settings.test))
        refuse_annotated(mine_slides, source, patients, decided.annotated if decided else ())
        refuse_others(mine_slides, out / f"{_MINED}{variant.mpp:g}")
        keep_begun(settings, variant, source.identity, out)
        if decided is not None:
            decided.refuse_leaks(validation=source.annotated("validation"), test=source.annotated("test"))
        learned.append(run.learn(variant, source, decided, mine_slides))
    report: dict[str, Any] = {}
    # When all are learned: a variant that begins with another's weights must not know its validation patients.
    for variant, one in zip(settings.variants, learned, strict=True):
        name = f"{variant.mpp:g}"
        if variant.finish_steps:
            run.finish(variant, one)
        directory = run.publish(variant)
        if settings.test is not None or isinstance(one.source, CropSource):
            log(f"test: looking at all of it with {name} µm/px")
            test, assembled = one.source.shown("test"), one.source.assembled("test")
            detector = Model(directory, device=settings.device)
            seen = len(seen_by(detector.training) & seen_in(one.source.annotated("test")))
            report[name] = evaluate(detector, test, directory, assembled=assembled, shifts=settings.shifts, seen=seen)
            for line in describe(report[name]):
                log(line)
    shutil.rmtree(out / _DRAFTS)
    return report


def open_source(settings: TrainSettings, variant: VariantSettings) -> Source:
    """Open what `settings.data` holds: the crops of ``midog21``, a COCO directory, or slides with GeoJSON."""
    if (settings.data / "midog21").is_dir():
        if settings.classes != ["mitotic figure"]:
            raise ConfigError(f"classes: expected [mitotic figure] for the crops of midog21, got {settings.classes}")
        if settings.attributes not in ([], ["atypical"]):
            raise ConfigError(f"attributes: expected none or [atypical] for midog21, got {settings.attributes}")
        for key in ("validation", "test", "slide_mpp"):
            if getattr(settings, key) is not None:
                raise ConfigError(
                    f"{key}: expected none with midog21, which has splits and µm/px of its own; remove it"
                )
        return CropSource(settings.data, settings, variant)
    return OwnSource.open(settings, variant)


def open_test(data: Path, model: Model, images: int, mpp: float | None = None, assumed: float | None = None) -> Source:
    """Open annotated data to measure a model on: all of it, or of ``midog21`` its test patients.

    `mpp` is as `TrainSettings.slide_mpp`; else pictures that do not say theirs are at what those it was trained on were
    taken to be at, or `assumed`.
    """
    variant = VariantSettings(mpp=model.mpp, input_px=model.input_px)
    told = {key: model.training[key] for key in _READ_WITH[1:] if key in model.training}
    settings = TrainSettings(
        **told,
        data=data,
        classes=list(model.classes),
        attributes=list(model.attributes),
        object_um=model.object_um / _LARGEST,
        eval_images=images,
        slide_mpp=mpp,
    )
    if (data / "midog21").is_dir():
        if settings.classes != ["mitotic figure"]:
            raise ConfigError(
                f"{model.name}: expected a detector of mitotic figures for midog21, got {settings.classes}"
            )
        return CropSource(data, settings, variant)
    test = load_annotated(data, settings, model.training.get("slide_mpp", assumed))
    kinds = {"test": kind_of(data)}
    return OwnSource({"test": test}, variant, kinds=kinds, settings=settings)


def _network(settings: TrainSettings, variant: VariantSettings, start: Path | None) -> torch.nn.Module:
    """Return the network ready to be trained, with random weights or those of a model directory."""
    torch.manual_seed(settings.seed)
    if start is None:
        network = build_network(settings.classes, settings.attributes, width=settings.width)
    else:
        network = load_network(_trained(start))
        config: Any = network.config
        if config.model_type != "d_fine":
            raise ModelError(f"{start.name}: expected a D-FINE to start from, got {config.model_type}")
        known = len(read_card(start, config.to_dict(), variant.mpp).classes)
        network = relabel(network, settings.classes, settings.attributes, known_classes=known)
        pin(network)
    accelerate(network)
    set_anchors(network, settings.object_um / variant.mpp)
    device = _device(settings)
    if settings.precision == "bf16":
        lower_precision(network, torch.device(device).type)
    try:
        return channels_last(network.to(device))
    except (RuntimeError, AssertionError) as exc:
        raise ModelError(f"device: expected one of this machine, got {device}; use cpu") from exc


def _device(settings: TrainSettings) -> str:
    return settings.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _trained(start: Path) -> Path:
    if not (start / "model.safetensors").is_file():
        raise ModelError(f"{start.name}: expected trained weights to start from; list that variant first")
    return start


def _card(settings: TrainSettings, variant: VariantSettings, **training: Any) -> Card:
    usual = TrainSettings.model_fields
    told = {key: value for key in _READ_WITH if (value := getattr(settings, key)) != usual[key].default}
    return Card(
        f"{settings.name}-{variant.mpp:g}",
        tuple(settings.classes),
        variant.mpp,
        input_px=variant.input_px,
        object_um=settings.object_um * _LARGEST,
        anchor_px=settings.object_um / variant.mpp,
        merge_iou=_MERGE_IOU,
        halo_um=_HALO_PX * variant.mpp,
        attributes=tuple(settings.attributes),
        training={"steps": variant.steps, "minutes": variant.minutes, "seed": settings.seed, **told, **training},
    )


def _digest(network: torch.nn.Module) -> str:
    """Return a few characters that tell weights from others."""
    whole = hashlib.sha256()
    for tensor in network.state_dict().values():
        whole.update(tensor.cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()[:8]

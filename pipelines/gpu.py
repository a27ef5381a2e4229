"""All that needs a GPU, in ten minutes: ``python pipelines/gpu.py -o runs/gpu``, or ``make gpu``.

tune        the launches of the kernels that are best on this GPU, written into the package
tests       the op and accelerated models, with kernels compiled for this GPU
memcheck    compute-sanitizer: accesses out of bounds, on a small case
racecheck   compute-sanitizer: hazards in shared memory, on the same
ops         the op against transformers' own and the CUDA kernels there are
models      whole detectors, accelerated or not

A step that takes longer than its share is ended; what it printed until then is kept, and the report says so. Beside the
report is launch.json, the table to commit. Name steps to run these alone. Needs a CUDA build of torch, and
pytest, pytest-xdist, hypothesis and transformers; slidescan need not be installed, rivals are measured where they are.
Without git, $SLIDESCAN_COMMIT says what was measured. ``gpu.py case`` is what the sanitizer looks at.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also where it is not installed
from benchmark_ops import where  # noqa: E402

_SUMMARY_S = 8


@dataclass(frozen=True)
class Step:
    """A command, and the seconds it may take."""

    name: str
    command: list[str]
    limit_s: int


def steps(smoke: bool) -> list[Step]:
    """Return the steps in the order in which each profits of those before."""
    python, here = sys.executable, Path(__file__).resolve()
    benchmark = [python, str(here.with_name("benchmark.py")), *(["--smoke"] if smoke else [])]
    sanitizer = [shutil.which("compute-sanitizer") or "compute-sanitizer", "--error-exitcode", "1"]
    sanitizer += ["--report-api-errors", "no", "--tool"]  # what torch and Triton ask for and do without is no access
    tests = [
        str(ROOT / "tests" / "ops"),
        *(["-k", "definition"] if smoke else ["-n", "logical", "--maxprocesses", "12", "--dist", "loadfile"]),
    ]
    case = [python, str(here), "case"]
    return [
        Step("tune", [*benchmark, "tune"], 80),
        Step("tests", [python, "-m", "pytest", "-q", *tests], 140),
        Step("memcheck", [*sanitizer, "memcheck", *case], 45),
        Step("racecheck", [*sanitizer, "racecheck", *case], 45),
        Step("ops", [*benchmark, "ops"], 90),
        Step("models", [*benchmark, "models"], 190),
    ]


def main() -> int:
    """Run the steps, print what they print, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help="steps; default: all")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/gpu"), help="directory of report.md")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, and without a GPU")
    arguments = parser.parse_args()
    if arguments.which == ["case"]:
        return case()
    known = steps(arguments.smoke)
    names = [step.name for step in known]
    for name in arguments.which:
        if name not in names:
            parser.error(f"expected steps of {', '.join(names)}, got {name}")
    if not torch.cuda.is_available() and not arguments.smoke:
        print(f"gpu: expected a CUDA GPU, torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = arguments.out / "report.md"
    report.write_text(f"# {where()}\n", encoding="utf-8")
    ended = {step.name: ran(step, report) for step in known if step.name in (arguments.which or names)}
    problems = [f"{name} {outcome}" for name, outcome in ended.items() if not outcome.startswith("passed")]
    print(f"gpu: {report}; " + ("; ".join(problems) or "all steps passed"))
    return 1 if any(outcome.startswith(("failed", "ended")) for outcome in ended.values()) else 0


def ran(step: Step, report: Path) -> str:
    """Run one step, add what it printed and how it ended to the report, and return how it ended."""
    if step.name.endswith("check") and (not torch.cuda.is_available() or not shutil.which(step.command[0])):
        outcome, text = "left out: it needs compute-sanitizer and a GPU", ""
    else:
        log, started = report.with_name(f"{step.name}.log"), time.monotonic()
        # Without torch's cache of memory each tensor is an allocation of its own, whose end the sanitizer knows.
        environment = {**os.environ, **({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if step.name.endswith("check") else {})}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(step.limit_s)
                ended = "passed" if code == 0 else f"failed, exit {code}"
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)  # pytest then says what failed until now
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_SUMMARY_S)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with its workers, which would disturb the next step
                process.wait()
                ended = "ended before it was through"
        outcome, text = f"{ended} ({time.monotonic() - started:.0f} s)", log.read_text(encoding="utf-8")
    shutil.copy(ROOT / "slidescan" / "ops" / "launch.json", report.parent)  # now: the next step may be the last
    with report.open("a", encoding="utf-8") as file:
        file.write(f"\n## {step.name}: {outcome}\n\n{text}")
    print(f"{text}{step.name}: {outcome}\n", flush=True)
    return outcome


def case() -> int:
    """Run both kernels on odd sizes and places of every kind."""
    from slidescan.ops import deform_attn
    from slidescan.ops.deform_attn import Backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend: Backend = "triton" if device == "cuda" else "torch"
    for dtype, depth in ((torch.float32, 32), (torch.bfloat16, 24), (torch.float16, 5)):
        value = torch.randn(2, 13, 3, depth, device=device).to(dtype).requires_grad_()
        locations = (torch.rand(2, 7, 3, 5, 2, device=device) * 3 - 1).requires_grad_()
        weights = torch.rand(2, 7, 3, 5, device=device).requires_grad_()
        out = deform_attn(value, [(3, 4), (1, 1)], locations, weights, [3, 2], backend=backend)
        torch.autograd.backward(out.float().square().sum())
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"case: {backend} ran on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

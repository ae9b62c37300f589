"""What one GPU proves in ten minutes: that all runs there and repeats, and how fast it is (docs/gpu.md).

Runs steps one after the other, each in processes of its own with a limit of its own; one that fails or takes
too long leaves the others. Prints a line per step, and writes a JSON with date, hardware and versions after
each of them. Without a GPU it says so and exits 0.

    make gpu-check
    make gpu-check ARGS="--steps environment,slice_bf16,slice_fp8"
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --budget 570 --json results.json --wheels FOLDER   # no package registry in reach
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"

BARS = {
    "Moonlight-16B on 16 H100, bf16 (NVIDIA Megatron Bridge)": 0.391,
    "DeepSeek-V3 671B on 1,024 H100, bf16 (NVIDIA Megatron Bridge)": 0.279,
}
"""Published MFU to beat. Those runs communicate, and a slice on one GPU does not."""

LEAST_SECONDS = 10.0
"""A step is not begun with less time than this."""

HOST_WAITS = ROOT / "tests" / "cuda" / "host_waits.json"
"""Where the host may wait, by case and place: what the simulated GPU is held to."""


class CheckFailed(Exception):
    """A step has run, and what it left is not as it must be."""


Check = Callable[[Path], dict[str, Any]]
"""Returns the figures of a step from its folder; raises CheckFailed."""


@dataclass(frozen=True)
class Step:
    """One thing to prove."""

    name: str
    proves: str
    seconds: float
    """Limit of all its commands together."""
    commands: Sequence[Sequence[str]]
    """Arguments of Python; {out} is the folder of the whole check, {own} that of the step."""
    check: Check = lambda own: {}
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""
    after: str | None = None
    """Step whose results it uses: chosen alone, it runs that one first."""


@dataclass
class Outcome:
    """What became of a step."""

    name: str
    status: str
    """ok, failed, timed out, skipped, or no time left."""
    seconds: float = 0.0
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Runner:
    """Starts the steps' processes."""

    out: Path
    launcher: tuple[str, ...] = (sys.executable,)
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, step: Step, limit: float) -> Outcome:
        """Run a step for at most `limit` seconds, and look at what it left."""
        own = self.out / step.name
        own.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        outcome = Outcome(step.name, "ok")
        with (self.out / f"{step.name}.log").open("w") as log:
            for command in step.commands:
                left = limit - (time.monotonic() - started)
                code = self._call([part.format(out=self.out, own=own) for part in command], left, log)
                if code != 0:
                    outcome.status = "timed out" if code is None else "failed"
                    outcome.reason = (
                        f"after {limit:.0f} s" if code is None else self._last_line(log.name, code)
                    )
                    break
        if outcome.status == "ok":
            try:
                outcome.figures = step.check(own)
            except Exception as error:  # a missing file or key is a failure of the step as well
                outcome.status, outcome.reason = "failed", f"{type(error).__name__}: {error}"
        outcome.seconds = round(time.monotonic() - started, 1)
        return outcome

    def _call(self, command: list[str], limit: float, log: Any) -> int | None:
        """Return the exit code of a command, or None where it had to be ended, with all that it started."""
        process = subprocess.Popen(
            [*self.launcher, *command], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
            env=os.environ | self.environment, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(timeout=max(0.1, limit))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself, with its children
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @staticmethod
    def _last_line(log: str, code: int) -> str:
        lines = [line for line in Path(log).read_text(errors="replace").splitlines() if line.strip()]
        return f"exit code {code}: {lines[-1][:200] if lines else 'no output'}"


def training(run: str, *overrides: str) -> list[str]:
    """Return the command of a short run of train.py on one GPU."""
    common = ["logger=none", "train.log_every=1", "train.evaluate_tokens=8192", "launch.nproc=1"]
    return ["train.py", *common, f"run.dir={{out}}/{run}", *overrides]


def slice_of(*options: str) -> list[str]:
    """Return the command of benchmarks/gpu_slice.py."""
    return ["benchmarks/gpu_slice.py", "--json", "{own}/figures.json", *options]


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl of a run; CheckFailed for a loss that is no number."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if not rows or not all(row["loss"] is not None and math.isfinite(row["loss"]) for row in rows):
        raise CheckFailed(f"losses {[row['loss'] for row in rows]}")
    return rows


def learns(run: str, steps: int) -> Check:
    """Check that a run took its steps and its loss fell."""

    def check(own: Path) -> dict[str, Any]:
        rows = rows_of(own.parent / run)
        numbers = [row["step"] for row in rows]
        if numbers != list(range(1, steps + 1)):
            raise CheckFailed(f"steps {numbers}, not 1 to {steps}")
        if rows[-1]["loss"] >= rows[0]["loss"]:
            raise CheckFailed(f"the loss went from {rows[0]['loss']:.4f} to {rows[-1]['loss']:.4f}")
        rates = [row["tokens_per_second"] for row in rows if row["tokens_per_second"] is not None]
        return {
            "first_loss": rows[0]["loss"],
            "last_loss": rows[-1]["loss"],
            "tokens_per_second": median(rates) if rates else None,
            "memory_gib": max(row["memory_gib"] or 0.0 for row in rows),
        }

    return check


def repeats(own: Path) -> dict[str, Any]:
    """Check that two deterministic runs have the same losses and gradient norms, bit for bit."""
    first, second = (
        [(row["loss"], row["grad_norm"]) for row in rows_of(own.parent / name)]
        for name in ("deterministic1", "deterministic2")
    )
    if first != second:
        raise CheckFailed(f"{first} and {second}")
    return {"losses": [loss for loss, _ in first]}


def figures(own: Path) -> dict[str, Any]:
    """Return the figures that a step has written itself."""
    found: dict[str, Any] = json.loads((own / "figures.json").read_text())
    losses = [found.get(name) for name in ("first_loss", "last_loss")]
    if any(loss is not None and not math.isfinite(loss) for loss in losses):
        raise CheckFailed(f"losses {losses}")
    return found


def waits_as_simulated(own: Path) -> dict[str, Any]:
    """Check that the host waits in no function but those in which the simulated GPU saw it wait."""
    found = figures(own)
    if HOST_WAITS.exists():
        allowed = {place.partition(":")[0] for place in json.loads(HOST_WAITS.read_text())["bf16"]}
        new = {place: count for place, count in found["waits"].items() if place not in allowed}
        if new:
            raise CheckFailed(f"the host waits where the simulation has no wait: {new}")
    return found


def profiled(own: Path) -> dict[str, Any]:
    """Check that a trace and a memory snapshot were written."""
    files = sorted((own.parent / "profiled" / "profile").iterdir())
    if {path.suffix for path in files} != {".json", ".pickle"}:
        raise CheckFailed(f"profile/ has {[path.name for path in files]}")
    return {path.name: path.stat().st_size for path in files}


GPU_TESTS = (
    "tests/cuda/test_on_gpu.py",
    "tests/fp8/test_matmul_scaled_mm.py",
    "tests/checkpoint/test_staging.py",
)

SIXTEEN = ("--model", "16b", "--length", "4096", "--microbatch", "2")

# 16 of its 256 experts: more would not fit a GPU with their optimizer state.
LAYERS_671B = (
    *("--model", "671b", "--layers", "2", "--experts", "16", "--length", "4096", "--microbatch", "1"),
    *("--recompute", "full", "model.mtp_depths=0", "model.moe.num_groups=1", "model.moe.top_k_groups=1"),
)

FIGURES = ("--json", "{own}/figures.json")

BF16 = "precision=bf16"

STEPS = [
    Step("tests", "the tests that need a GPU", 90, [["-m", "pytest", *GPU_TESTS]], needs=("pytest",)),
    Step(
        "debug_bf16",
        "a run learns: documents, samples, async save",
        60,
        [training("bf16", BF16, "train.steps=20", "train.checkpoint_every=10", "data.document_mask=true")],
        learns("bf16", 20),
    ),
    Step(
        "resume",
        "the state comes back",
        40,
        [["train.py", "resume={out}/bf16", "train.steps=24"]],
        learns("bf16", 24),
        after="debug_bf16",
    ),
    Step(
        "deterministic",
        "two runs are equal bit for bit",
        70,
        [training(f"deterministic{n}", BF16, "train.steps=5", "train.deterministic=true") for n in (1, 2)],
        repeats,
    ),
    Step(
        "debug_fp8",
        "FP8 as a whole",
        60,
        [training("fp8", "precision=fp8", "train.steps=8")],
        learns("fp8", 8),
    ),
    Step(
        "syncs",
        "the host waits nowhere but where the simulation says",
        45,
        [slice_of("--model", "debug", "--layers", "4", "--length", "256", "--sync-debug")],
        waits_as_simulated,
    ),
    Step(
        "slice_bf16",
        "speed and memory of 16b's layers",
        75,
        [slice_of(*SIXTEEN, "--recompute", "selective")],
        figures,
    ),
    Step(
        "slice_fp8",
        "the same in FP8",
        75,
        [slice_of(*SIXTEEN, "--layers", "4", "--steps", "3", "--precision", "fp8")],
        figures,
    ),
    Step("layers_671b", "two layers of 671b in full width", 75, [slice_of(*LAYERS_671B)], figures),
    Step(
        "attention",
        "attention kernels against one another",
        60,
        [["benchmarks/attention_kernels.py", "--device", "cuda", "--seconds", "0.3", *FIGURES]],
        figures,
    ),
    Step("grouped", "grouped matmuls in bf16, FP8", 45, [["benchmarks/fp8_matmul.py", *FIGURES]], figures),
    Step(
        "compile",
        "compile=on against off",
        100,
        [slice_of(*SIXTEEN, "--layers", "4", "--compile", "both")],
        figures,
    ),
    Step(
        "peer",
        "HF transformers' model of the same shape",
        100,
        [slice_of(*SIXTEEN, "--layers", "4", "--microbatch", "1", "--steps", "4", "--peer")],
        figures,
        needs=("transformers",),
    ),
    Step(
        "profile",
        "a trace and a memory snapshot",
        45,
        [training("profiled", BF16, "train.steps=6", "profile=on")],
        profiled,
    ),
]
"""In the order of their worth: what stands first has run where the time is over."""

MODULES = ("torch", "hydra", "omegaconf", "tokenizers", "wandb", "yaml", "pytest", "transformers")
"""Packages that a machine may lack; the first six are dsv3's own."""


def describe() -> dict[str, Any]:
    """Return the date, this machine's hardware and the versions of what runs on it."""
    import torch

    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "gpu": None,
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "commit": _first_line("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "missing": [name for name in MODULES if importlib.util.find_spec(name) is None],
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
    }
    for name in ("triton", "transformers"):
        if importlib.util.find_spec(name) is not None:
            found["versions"][name] = importlib.import_module(name).__version__
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["memory_gib"] = torch.cuda.mem_get_info()[1] / 2**30
        found["versions"]["cudnn"] = torch.backends.cudnn.version()
    return found


def _first_line(*command: str) -> str | None:
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return told.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def run_steps(
    steps: Sequence[Step], runner: Runner, missing: Sequence[str], deadline: float
) -> Iterator[Outcome]:
    """Run steps until `deadline`, as of time.monotonic; yield what became of each."""
    for step in steps:
        lacks = [name for name in step.needs if name in missing]
        left = deadline - time.monotonic()
        if lacks:
            yield Outcome(step.name, "skipped", reason=f"{', '.join(lacks)} is not installed")
        elif left < min(LEAST_SECONDS, step.seconds):
            yield Outcome(step.name, "no time left", reason=f"--steps {step.name} runs it alone")
        else:
            yield runner.run(step, min(step.seconds, left))


def install_wheels(folder: Path, target: Path) -> None:
    """Unpack the wheels in `folder` into `target`, without a package registry."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(target),
    ]
    subprocess.run([*command, *wheels], check=True)


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the lines that end the check: how many steps went well, and MFU beside the bars."""
    counts = {
        status: sum(one.status == status for one in outcomes) for status in {one.status for one in outcomes}
    }
    lines = [", ".join(f"{count} {status}" for status, count in sorted(counts.items()))]
    for one in outcomes:
        mfu = one.figures.get("mfu") or {}
        if mfu.get("causal") is not None:
            by = ", ".join(f"{value:.1%} ({name.replace('_', ' ')})" for name, value in mfu.items())
            share = one.figures["share_of_matmul_rate"]
            lines.append(f"{one.name}: MFU {by}; {share:.1%} of the rate of a large matmul here")
    return lines + [f"to beat: {mfu:.1%}, {name}" for name, mfu in BARS.items()]


def write(path: Path, told: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write the JSON, whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({**told, "steps": [vars(one) for one in outcomes]}, indent=1) + "\n")
    unfinished.replace(path)


def chosen_steps(names: str | None) -> list[Step]:
    """Return the steps of a comma-separated list, all of them without one.

    They come in the order of STEPS, with those whose results they use. argparse tells of an unknown name.
    """
    known = {step.name: step for step in STEPS}
    wanted = list(known) if not names else [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{','.join(unknown)}: no such step; there are {', '.join(known)}")
    first = {known[name].after for name in wanted} - {None, *wanted}
    return [step for step in STEPS if step.name in {*wanted, *first}]


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--steps", type=chosen_steps, default=STEPS, help="names, comma-separated; all by default"
    )
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all steps together")
    parser.add_argument("--out", type=Path, help="folder of logs and runs; a temporary one by default")
    parser.add_argument(
        "--json", type=Path, help=f"result; {RESULTS.relative_to(ROOT)}/GPU_DATE.json by default"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels of packages that this machine lacks")
    parser.add_argument("--list", action="store_true", help="say what there is to run")
    parser.add_argument("--describe", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--launcher", default=shlex.quote(sys.executable), help=argparse.SUPPRESS)
    return parser


def main(given: Sequence[str] | None = None) -> int:
    """Run the check; 0 where nothing failed, also without a GPU."""
    options = arguments().parse_args(given)
    if options.list:
        print("\n".join(f"{step.name:15}{step.seconds:4.0f} s  {step.proves}" for step in STEPS))
        return 0
    if options.describe:
        options.describe.write_text(json.dumps(describe()))
        return 0
    steps = options.steps
    deadline = time.monotonic() + options.budget
    out: Path = options.out or Path(tempfile.mkdtemp(prefix="gpu-check-"))
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT)]
    if options.wheels:
        install_wheels(options.wheels, out / "packages")
        paths.append(str(out / "packages"))
    environment = {
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": str(min(8, len(os.sched_getaffinity(0)))),
        "WANDB_MODE": "offline",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # train.py sets it by itself
    }
    runner = Runner(out, tuple(shlex.split(options.launcher)), environment)
    here = Step("environment", "", 60, [["benchmarks/gpu.py", "--describe", "{own}/figures.json"]], figures)
    found = runner.run(here, here.seconds)
    if found.status != "ok":
        print(f"this machine cannot be described ({found.reason}); see {out}/environment.log")
        return 1
    told = found.figures
    if told["gpu"] is None:
        print(f"no CUDA GPU here (torch {told['versions']['torch']}): nothing was checked")
        if not options.out:
            shutil.rmtree(out)
        return 0
    slug = "_".join(told["gpu"].lower().split())
    path: Path = options.json or RESULTS / f"{slug}_{told['date'][:10]}.json"
    print(f"{told['gpu']}, {told['versions']}, logs in {out}", flush=True)
    outcomes: list[Outcome] = []
    for outcome in run_steps(steps, runner, told["missing"], deadline):
        outcomes.append(outcome)
        write(path, told, outcomes)
        reason = f"  {outcome.reason}" if outcome.reason else ""
        print(f"{outcome.name:15}{outcome.status:14}{outcome.seconds:6.1f} s{reason}", flush=True)
    print("\n".join([*summary(outcomes), f"written to {path}"]), flush=True)
    return 1 if any(one.status in ("failed", "timed out") for one in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())

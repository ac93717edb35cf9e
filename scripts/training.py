"""What train_char_lm.py and train_shapes.py share: the loop, checkpoints, curves, the report."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rpe_tvm.bench_machine import environment

Loss = Callable[[nn.Module, int], Tensor]
Evaluate = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Schedule:
    """How all contestants are trained: AdamW, linear warm-up, then a cosine down to a tenth.

    ``relative_rate`` multiplies the learning rate of the relative positions (parameters with "relative" in their
    name, zeros at first). Sharp attention needs entries of several units (Luo 2021, footnote 6: with normalised queries
    and keys, sharpness comes from b), and Adam moves a number by about its learning rate in a step.
    """

    steps: int
    learning_rate: float = 2e-3
    relative_rate: float = 10.0
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    evaluate_every: int = 50
    diverged_above: float = 12.0

    def factor(self, step: int) -> float:
        """The learning rate of this step over the highest one."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def train(
    name: str,
    model: nn.Module,
    loss: Loss,
    evaluate: Evaluate,
    schedule: Schedule,
    checkpoint: Path,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Train to the end, or on from `checkpoint` if that exists, and return the curve.

    `loss` takes the model and the step, and draws its batch from the number of the step, so that a run that was
    killed goes on exactly as it would have gone (on a GPU: as far as torch's own gradients are deterministic there).
    """
    relative = [p for each, p in model.named_parameters() if "relative" in each]
    others = [p for each, p in model.named_parameters() if "relative" not in each]
    groups = [
        {"params": others, "scale": 1.0, "weight_decay": schedule.weight_decay},
        {"params": relative, "scale": schedule.relative_rate, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=schedule.learning_rate, betas=(0.9, 0.98))
    curve: dict[str, Any] = {"step": [], "train_loss": [], "validation": [], "diverged_at": None, "seconds": 0.0}
    first = 0
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True)
        if stored["settings"] != settings:
            raise SystemExit(f"error: {checkpoint} is of other settings: leave out --resume, or give another --out.")
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        curve, first = stored["curve"], stored["step"]

    def save(step: int) -> None:
        curve["seconds"] = time.perf_counter() - start
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        content = {"step": step, "curve": curve, "settings": dict(settings), **state}
        _write_and_rename(checkpoint, lambda path: torch.save(content, path))

    start = time.perf_counter() - curve["seconds"]
    losses: list[float] = []
    remaining = range(first, schedule.steps) if curve["diverged_at"] is None else range(0)
    with tqdm(remaining, desc=name, initial=first, total=schedule.steps) as progress:
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * group["scale"] * schedule.factor(step)
            model.train()
            value = loss(model, step)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            optimizer.step()
            losses.append(value.item())
            if not losses[-1] <= schedule.diverged_above:  # a NaN is above, too
                curve["diverged_at"] = step + 1
                save(step + 1)
                break
            if (step + 1) % schedule.evaluate_every == 0 or step + 1 == schedule.steps:
                model.eval()
                with torch.no_grad():
                    result = evaluate(model)
                curve["step"].append(step + 1)
                curve["train_loss"].append(sum(losses) / len(losses))
                curve["validation"].append(result)
                losses = []
                progress.set_postfix({key: f"{number:.3f}" for key, number in result.items()})
                save(step + 1)
    return curve


def add_arguments(parser: argparse.ArgumentParser, contestants: Sequence[str], out: str) -> None:
    """Add the options of both scripts."""
    parser.add_argument("--quick", action="store_true", help="the small run with a check at the end")
    parser.add_argument("--contestants", metavar="A,B,...", help=f"some of: {','.join(contestants)}")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each contestant (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps of each run")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads (default: torch's)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help="results (default: %(default)s)")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with the threads set and old checkpoints removed unless the run is to go on."""
    args = parser.parse_args()
    for option in ("seeds", "steps", "threads"):
        number = getattr(args, option)
        if number is not None and number < 1:
            parser.error(f"--{option}: expected a positive number, got {number}")
    if args.device not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, got {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; leave the option out to train on the CPU")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the curves need matplotlib, which is not installed: pip install matplotlib")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if not args.resume:
        for old in args.out.glob("*.pt"):
            old.unlink()
    return args


def chosen(
    parser: argparse.ArgumentParser, asked: str | None, known: Sequence[str], default: Sequence[str]
) -> list[str]:
    """The contestants that were asked for, checked."""
    names = list(default) if asked is None else asked.split(",")
    for name in names:
        if name not in known:
            parser.error(f"--contestants: expected some of {','.join(known)}, got {name!r}")
    return names


def store(curves: list[dict[str, Any]], settings: Mapping[str, Any], out: Path) -> None:
    """Write ``results.json``: after every run, so that one that is cut off takes no other with it."""
    machine = environment(torch.get_num_threads())
    if settings["device"] == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    document = {"environment": machine, "settings": dict(settings), "runs": curves}
    text = json.dumps(document, indent=1) + "\n"
    _write_and_rename(out / "results.json", lambda path: path.write_text(text, encoding="utf-8"))


def report(curves: list[dict[str, Any]], score: str, out: Path, title: str) -> None:
    """Print the table and write ``curves.png``."""
    _plot(curves, score, out / "curves.png", title)
    print(f"\n| contestant | seed | {score} | train loss | diverged at | minutes |\n|---|---:|---:|---:|---:|---:|")
    for each in curves:
        if each["diverged_at"] is None:
            ends = f"{each['validation'][-1][score]:.3f} | {each['train_loss'][-1]:.3f} | -"
        else:
            ends = f"- | - | step {each['diverged_at']}"
        print(f"| {each['contestant']} | {each['seed']} | {ends} | {each['seconds'] / 60:.1f} |")
    print(f"\nresults: {out / 'results.json'}\ncurves: {out / 'curves.png'}")


def final(curves: list[dict[str, Any]], contestant: str, score: str) -> float:
    """The mean over seeds of a contestant's last score; NaN if a run of it diverged or there is none."""
    ends = [
        each["validation"][-1][score] if each["diverged_at"] is None else math.nan
        for each in curves
        if each["contestant"] == contestant
    ]
    return sum(ends) / len(ends) if ends else math.nan


def _plot(curves: list[dict[str, Any]], score: str, path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(each["contestant"] for each in curves))
    for each in curves:
        colour = f"C{names.index(each['contestant'])}"
        diverged = "" if each["diverged_at"] is None else " (diverged: dotted)"
        label = each["contestant"] + diverged if each["seed"] == 0 else None
        axes.plot(each["step"], [x[score] for x in each["validation"]], color=colour, label=label)
        if each["diverged_at"] is not None:
            axes.axvline(each["diverged_at"], color=colour, linestyle=":")
    axes.set(xlabel="step", ylabel=score, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    _write_and_rename(path, lambda to: figure.savefig(to, dpi=120, format="png"))


def _write_and_rename(path: Path, write: Callable[[Path], object]) -> None:
    # So that a kill leaves the old file or the new one, never half of one.
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.{os.getpid()}")
    write(staged)
    staged.replace(path)


def settings_of(schedule: Schedule, device: str, **others: Any) -> dict[str, Any]:
    """What a run was made with, for the checkpoint and the JSON."""
    return {**asdict(schedule), **others, "device": device, "threads": torch.get_num_threads()}

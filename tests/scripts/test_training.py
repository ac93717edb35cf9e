"""The scripts that train: a few steps on tiny sizes, killed and resumed, diverged, reported."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.compile
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = ("training", "train_char_lm", "train_shapes")
    yield lambda name: importlib.import_module(name)
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def char_lm(script, monkeypatch):
    module = script("train_char_lm")
    sizes = module.Sizes(length=12, batch=2, layers=1, width=16, heads=2, features=8)
    monkeypatch.setattr(module, "QUICK", sizes)
    monkeypatch.setattr(module, "FULL", sizes)
    return module


@pytest.fixture
def shapes(script, monkeypatch):
    module = script("train_shapes")
    sizes = module.Sizes(grid=9, batch=2, layers=1, width=16, heads=2, features=8)
    monkeypatch.setattr(module, "QUICK", sizes)
    monkeypatch.setattr(module, "FULL", sizes)
    return module


def call(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main()


def runs(out):
    """What results.json tells, without the times."""
    content = json.loads((out / "results.json").read_text())
    assert content["environment"].keys() >= {"commit", "cpu", "threads", "versions", "date"}
    return [{key: value for key, value in each.items() if key != "seconds"} for each in content["runs"]]


def test_char_lm_writes_results_for_all_contestants(char_lm, monkeypatch, tmp_path, capsys):
    assert call(char_lm, monkeypatch, "--steps", 1, "--seeds", 2, "--out", tmp_path) == 0
    found = runs(tmp_path)
    assert [(each["contestant"], each["seed"]) for each in found] == [
        (name, seed) for name in char_lm.CONTESTANTS for seed in (0, 1)
    ]
    for each in found:
        assert each["step"] == [1] and each["diverged_at"] is None
        # One step: near the 8 bits of a uniform guess.
        assert 5 < each["validation"][0]["bits per byte"] < 9
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    table = capsys.readouterr().out
    assert all(f"| {name} | 1 |" in table for name in char_lm.CONTESTANTS)


def test_shapes_writes_results_for_all_contestants(shapes, monkeypatch, tmp_path):
    assert call(shapes, monkeypatch, "--steps", 2, "--out", tmp_path) == 0
    found = runs(tmp_path)
    assert [each["contestant"] for each in found] == list(shapes.CONTESTANTS)
    assert all(0.2 < each["validation"][0]["mean recall"] < 0.5 for each in found)
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False")
@pytest.mark.parametrize("name", ["char_lm", "shapes"])
def test_a_gpu_trains_as_the_cpu_does(request, monkeypatch, tmp_path, name):
    module = request.getfixturevalue(name)
    losses = []
    for device in ("cpu", "cuda"):
        call(module, monkeypatch, "--steps", 3, "--device", device, "--out", tmp_path / device)
        losses.append([loss for each in runs(tmp_path / device) for loss in each["train_loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize(("name", "better", "worse"), [("char_lm", 1.0, 2.0), ("shapes", 0.9, 0.3)])
def test_quick_fails_unless_relative_positions_help(request, monkeypatch, tmp_path, name, better, worse):
    module = request.getfixturevalue(name)
    score = module.BITS if name == "char_lm" else module.RECALL

    def code(with_rpe, without, diverged_at=None):
        def run(contestant, seed, *_):
            has_rpe = contestant in ("nprf+rpe", "nprf+rpe-2d")
            return {
                "contestant": contestant,
                "seed": seed,
                "step": [1],
                "train_loss": [1.0],
                "validation": [{score: with_rpe if has_rpe else without}],
                "diverged_at": diverged_at if has_rpe else None,
                "seconds": 1.0,
            }

        monkeypatch.setattr(module, "run", run)
        return call(module, monkeypatch, "--quick", "--out", tmp_path)

    assert code(better, worse) == 0
    assert code(worse, better) == 1
    assert code(better, better) == 1
    assert code(better, worse, diverged_at=1) == 1


class Killed(BaseException):
    pass


def test_finished_runs_are_stored_when_a_later_one_is_killed(shapes, monkeypatch, tmp_path):
    run = shapes.run

    def run_or_die(name, *args):
        if name == "nprf+rpe-2d":
            raise Killed
        return run(name, *args)

    monkeypatch.setattr(shapes, "run", run_or_die)
    with pytest.raises(Killed):
        call(shapes, monkeypatch, "--steps", 1, "--contestants", "nprf,nprf+rpe-2d", "--out", tmp_path)
    assert [each["contestant"] for each in runs(tmp_path)] == ["nprf"]


@pytest.mark.parametrize(
    ("name", "contestant"), [("char_lm", "nprf+rpe"), ("char_lm", "softmax+fastrpb"), ("shapes", "nprf+rpe-2d")]
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(request, script, monkeypatch, tmp_path, name, contestant):
    module, training = request.getfixturevalue(name), script("training")
    clip = training.nn.utils.clip_grad_norm_

    def run(folder, killed_after=None, steps=7):
        done = itertools.count(1)

        def clip_or_die(*args):
            if next(done) == killed_after:
                raise Killed
            return clip(*args)

        monkeypatch.setattr(training.nn.utils, "clip_grad_norm_", clip_or_die)
        schedule = training.Schedule(steps, warmup=3, evaluate_every=2)
        return module.run(
            contestant, 1, module.QUICK, schedule, argparse.Namespace(out=tmp_path / folder, device="cpu")
        )

    whole = run("whole")
    assert whole["step"] == [2, 4, 6, 7]
    for steps in (5, 3):  # dies in step 5 and goes on from 4; dies in step 7 and goes on from 6
        with pytest.raises(Killed):
            run("parts", killed_after=steps)
    resumed = run("parts", killed_after=2)  # one step is left
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    models = [torch.load(tmp_path / folder / f"{contestant}-seed1.pt")["model"] for folder in ("whole", "parts")]
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())
    with pytest.raises(SystemExit, match="is of other settings"):
        run("parts", steps=8)


def test_resume_or_start_again(char_lm, monkeypatch, tmp_path):
    options = ("--steps", 3, "--contestants", "nprf", "--out", tmp_path)
    call(char_lm, monkeypatch, *options)
    first = runs(tmp_path)
    monkeypatch.setattr(char_lm, "cross_entropy", None)
    call(char_lm, monkeypatch, *options, "--resume")  # complete: nothing is computed
    assert runs(tmp_path) == first
    with pytest.raises(TypeError):
        call(char_lm, monkeypatch, *options)


def test_a_diverged_run_is_recorded_and_the_others_go_on(char_lm, monkeypatch, tmp_path, capsys):
    loss, calls = char_lm.cross_entropy, itertools.count()
    monkeypatch.setattr(char_lm, "cross_entropy", lambda *args: loss(*args) * (1.0 if next(calls) else math.nan))
    assert call(char_lm, monkeypatch, "--quick", "--steps", 3, "--out", tmp_path) == 1
    without, with_rpe = runs(tmp_path)
    assert (without["contestant"], without["diverged_at"], without["step"]) == ("nprf", 1, [])
    assert (with_rpe["contestant"], with_rpe["diverged_at"], with_rpe["step"]) == ("nprf+rpe", None, [3])
    assert "| nprf | 0 | - | - | step 1 |" in capsys.readouterr().out


def test_contestants_of_one_seed_start_as_the_same_function(char_lm, shapes):
    x = torch.arange(12)[None]
    kinds = ({"softmax", "softmax+bias", "softmax+fastrpb"}, {"nprf", "nprf+rpe", "nprf+fastrpb"})
    for kind in kinds:
        outputs = [char_lm.LanguageModel(char_lm.CONTESTANTS[name], char_lm.QUICK, 0)(x) for name in sorted(kind)]
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0])
    pixels, _ = shapes.images(2, shapes.QUICK, torch.Generator().manual_seed(0))
    outputs = [shapes.VisionModel(name, shapes.QUICK, 0)(pixels) for name in shapes.CONTESTANTS]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


@torch.no_grad()
def test_models_see_no_later_byte(char_lm):
    x = torch.arange(12)[None]
    later = x.clone()
    later[:, 7:] += 100
    for contestant in char_lm.CONTESTANTS.values():
        model = char_lm.LanguageModel(contestant, char_lm.QUICK, 0)
        for name, each in model.named_parameters():
            if "relative" in name:
                each.normal_(generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model(later)[:, :7], model(x)[:, :7])
        assert not torch.allclose(model(later)[:, 7:], model(x)[:, 7:])


def kinds(shapes, image, at):
    """Which shape each whole cell is, row by row, None for another one, if cells begin at `at`."""
    cells = image[at[0] :, at[1] :].unfold(0, 3, 3).unfold(1, 3, 3).flatten(0, 1).tolist()
    known = [[list(row) for row in shape] for shape in shapes.SHAPES]
    return [known.index(cell) if cell in known else None for cell in cells]


@pytest.mark.parametrize("grid", [15, 16, 17])
def test_images_and_answers(shapes, grid):
    sizes = replace(shapes.QUICK, noise=0.0, grid=grid)
    pixels, answers = shapes.images(8, sizes, torch.Generator().manual_seed(0))
    assert set(pixels.flatten().tolist()) == {0, 1} and set(answers.flatten().tolist()) == {0, 1, 2}
    for image, answer in zip(pixels, answers, strict=True):
        # The cells lie where every whole cell of 3 x 3 pixels is one of the shapes.
        ((row, column),) = [at for at in itertools.product(range(3), repeat=2) if None not in kinds(shapes, image, at)]
        cells = iter(kinds(shapes, image, (row, column)))
        for r in range(row, grid - 2, 3):
            for c in range(column, grid - 2, 3):
                kind = next(cells)
                if r >= 3 and c >= 6:
                    seen = answer[r - 3 : r, c - 6 : c - 3]
                    assert torch.equal(seen, kind * torch.tensor(shapes.SHAPES[kind]))
        assert not answer[-3:].any() and not answer[:, -6:].any()
        assert torch.equal(answer[:-3, :-6] > 0, image[3:, 6:] > 0)
    noisy, _ = shapes.images(8, replace(sizes, noise=0.1), torch.Generator().manual_seed(0))
    assert 0.05 < (noisy != pixels).float().mean() < 0.15


def test_bad_options(char_lm, monkeypatch, tmp_path, capsys):
    for options, message in (
        (("--contestants", "nprf,elu"), "got 'elu'"),
        (("--steps", "0"), "--steps: expected a positive number, got 0"),
        (("--seeds", "-1"), "--seeds: expected a positive number, got -1"),
        (("--device", "gpu"), "--device: expected cpu or cuda, got 'gpu'"),
    ):
        with pytest.raises(SystemExit):
            call(char_lm, monkeypatch, *options, "--out", tmp_path)
        assert message in capsys.readouterr().err

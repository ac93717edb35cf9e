"""Every Python example of README.md and docs/ runs, a file's blocks in one namespace, and every command exists."""

import argparse
import doctest
import functools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
# What these modules do may compile kernels.
COMPILES = re.compile(r"rpe_tvm\.(torch|build|tune|runtime)")


def blocks(page):
    """The line number of each block's first line, and the block."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    return [(text.count("\n", 0, found.start(1)) + 1, found[1]) for found in BLOCK.finditer(text)]


def run_block(source, path, line, namespace):
    if re.search(r"^>>> ", source, re.MULTILINE):
        session = doctest.DocTestParser().get_doctest(source, namespace, path.name, str(path), line - 1)
        report = []
        results = doctest.DocTestRunner(verbose=False).run(session, out=report.append, clear_globs=False)
        namespace.update(session.globs)
        assert results.failed == 0, "".join(report)
    else:
        # Empty lines in front make a traceback show the line of the page.
        exec(compile("\n" * (line - 1) + source, str(path), "exec"), namespace)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=page.name,
            marks=[pytest.mark.compile] * any(COMPILES.search(source) for _, source in blocks(page)),
        )
        for page in PAGES
    ],
)
def test_examples_run(page, tmp_path, monkeypatch):
    if not blocks(page):
        pytest.skip(f"{page.name} has no Python example")
    monkeypatch.chdir(tmp_path)  # an example may write files
    namespace = {"__name__": "__main__"}
    for line, source in blocks(page):
        run_block(source, page, line, namespace)


def test_a_failing_example_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n```python\nx = 1\n```\n```sh\nfalse\n```\n```python\n>>> x + 1\n2\n```\n")
    (first, plain), (second, session) = blocks(page)
    assert (first, second) == (3, 9)
    namespace = {}
    run_block(plain, page, first, namespace)
    run_block(session, page, second, namespace)
    with pytest.raises(AssertionError, match=r"line 9[\s\S]*Expected:\s+3"):
        run_block(session.replace("2", "3"), page, second, namespace)
    with pytest.raises(ZeroDivisionError) as error:
        run_block("\n1 / 0\n", page, first, namespace)
    assert error.traceback[-1].lineno + 1 == first + 1


# A command of a page: an indented line, with those that continue it.
COMMAND = re.compile(r"^    (python (?:-m rpe_tvm\b|scripts/)[^\\\n]*(?:\\\n[^\\\n]*)*)", re.MULTILINE)
COMMANDS = {
    " ".join(found.replace("\\\n", " ").partition("#")[0].split())
    for page in PAGES
    for found in COMMAND.findall(page.read_text(encoding="utf-8"))
}


class UnderstoodError(Exception):
    """Raised in the place of what a command does."""


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands_are_understood(command, monkeypatch):
    """Every command of a page has a script or module, and options that it takes."""
    pytest.importorskip("torch")
    understand = argparse.ArgumentParser.parse_args

    def parse(parser, given=None, namespace=None):
        understand(parser, given, namespace)
        raise UnderstoodError

    program, *options = shlex.split(command)[1:]
    if program == "-m":
        program, *options = options
        run = functools.partial(runpy.run_module, program, run_name="__main__")
    else:
        run = functools.partial(runpy.run_path, str(ROOT / program), run_name="__main__")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [program, *options])
    with pytest.raises(UnderstoodError):
        run()

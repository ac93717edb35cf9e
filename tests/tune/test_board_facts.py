"""What a board is, from what `board.cc` reports."""

import pytest

from rpe_tvm.machine import AARCH64, X86
from rpe_tvm.plan import wisdom
from rpe_tvm.tune.board_facts import parse

CORTEX_A72 = "processor: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\n\n"
EPYC = "processor: 0\nmodel name\t: AMD EPYC\nflags\t\t: fma avx2\n\n"


def text(cpuinfo, server="/usr/bin/python3.11", model="", machine="aarch64"):
    head = f"machine: {machine}\nmodel: {model}\nhwcap: 3\nhwcap2: 0\nserver: {server}"
    return f"{head}\ncpuinfo:\n{cpuinfo}"


def test_a_board_is_named_by_model_and_cores():
    board = parse(text(4 * CORTEX_A72, model="Raspberry Pi 4 Model B Rev 1.4"), AARCH64)
    assert board.name == "Raspberry Pi 4 Model B Rev 1.4, 4 x Cortex-A72"
    assert board.flags == {"fp", "asimd"} and not board.is_emulated


def test_unknown_cores_keep_their_numbers():
    mixed = CORTEX_A72 + CORTEX_A72.replace("0x41", "0x61").replace("0xd08", "0x022")
    assert parse(text(mixed), AARCH64).name == "1 x Cortex-A72, 1 x 0x61/0x022"


def test_an_x86_machine_is_named_by_its_cpu():
    board = parse(text(2 * EPYC, machine="x86_64"), X86)
    assert board.name == "2 x AMD EPYC" and board.flags == {"fma", "avx2"} and not board.is_emulated


@pytest.mark.parametrize(
    "described",
    [
        text(CORTEX_A72, server="/usr/bin/qemu-aarch64-static"),  # newer QEMU makes up a /proc/cpuinfo
        text(EPYC),  # older ones show that of the machine that emulates
        text(""),  # a root without /proc
    ],
)
def test_an_emulator_is_found_out(described):
    board = parse(described, AARCH64)
    assert board.is_emulated and board.name == "emulated aarch64"


def test_no_shipped_logs_are_of_an_emulator():
    manifests = list(wisdom.LOGS.glob("*/*/manifest.json"))
    assert manifests and not any(wisdom.is_emulated(path.parent) for path in manifests)

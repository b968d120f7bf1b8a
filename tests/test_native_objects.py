"""Checks the object files that are compiled once per instruction set, with the binutils.

They are checked before linking: in the linked module, code that leaked from one instruction set
into another can no longer be identified.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

BUILD = (
    Path(__file__).resolve().parent.parent
    / f"build/native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
)
# By their entry points: those of the attention and of the decoder.
OBJECTS = {
    path.parents[3].name.removesuffix(".dir"): path
    for path in sorted(BUILD.glob("CMakeFiles/fused_attn_*.dir/csrc/cpu/per_isa/*kernels.cpp.o"))
}
PREFIXES = {"attention": "fused_attn_kernels_", "decoder": "fused_attn_decoder_kernels_"}
X86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
WIDER_REGISTERS = {
    prefix + isa: registers
    for prefix in PREFIXES.values()
    for isa, registers in (
        {"generic": r"%[yz]mm\d", "avx2": r"%zmm\d", "avx2_vnni": r"%zmm\d"} if X86 else {}
    ).items()
}

pytestmark = [
    pytest.mark.skipif(not OBJECTS, reason="no native build of this checkout under build/"),
    pytest.mark.skipif(not shutil.which("objdump"), reason="binutils are not installed"),
]


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def defined_symbols(path: Path) -> dict[str, str]:
    """Name and type (nm's letter) of the symbols that are visible to other objects."""
    lines = run("nm", "--extern-only", "--defined-only", path).splitlines()
    return {name: kind for _, kind, name in map(str.split, lines)}


def test_every_instruction_set_of_this_machine_was_compiled() -> None:
    native = pytest.importorskip("fused_attn._C", exc_type=ImportError)
    attention, decoder = native.attention_isas_supported(), native.cpu_isas_supported()
    assert set(attention) <= set(decoder)
    assert {PREFIXES["attention"] + isa for isa in attention} <= set(OBJECTS)
    assert {PREFIXES["decoder"] + isa for isa in decoder} <= set(OBJECTS)


@pytest.mark.parametrize("entry", OBJECTS)
def test_an_object_defines_its_entry_point_and_no_weak_symbol(entry: str) -> None:
    # The linker merges weak symbols of the same name, such as inline functions of the standard
    # library: the generic path could then run code compiled for AVX-512.
    assert defined_symbols(OBJECTS[entry]) == {entry: "T"}


@pytest.mark.parametrize("entry", sorted(WIDER_REGISTERS.keys() & OBJECTS.keys()))
def test_an_object_uses_no_wider_registers_than_its_own(entry: str) -> None:
    code = run("objdump", "--disassemble", "--no-show-raw-insn", OBJECTS[entry])
    assert not re.findall(f".*{WIDER_REGISTERS[entry]}.*", code)[:3]


@pytest.mark.parametrize(
    "source",
    ["module", "decoder_checks", "tensor_exchange", "cpu/driver", "cpu/isa", "cpu/decoder/pack"],
)
def test_code_that_runs_before_the_choice_needs_no_vector_extension(source: str) -> None:
    if not X86:
        pytest.skip("only x86-64 has several instruction sets")
    path = BUILD / f"CMakeFiles/_C.dir/csrc/{source}.cpp.o"
    code = run("objdump", "--disassemble", "--no-show-raw-insn", path)
    assert not re.findall(r".*%[yz]mm\d.*", code)[:3]

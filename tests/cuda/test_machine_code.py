"""What the prebuilt machine code is made of: the instructions the kernels were written for, and nothing spilled."""

import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="its disassembler is used, and it has no build for this system")

PREBUILT = Path(__file__).resolve().parents[2] / "cuda" / "prebuilt"
COMPILED = [entry for entry in json.loads((PREBUILT / "manifest.json").read_text())["files"] if entry["kind"] == "sass"]
FILES = [entry for entry in COMPILED if entry["name"] == "near_field_fa2"]
# What one program may have on a GPU of each architecture, beside the 1 KiB that the system keeps.
MOST_SHARED = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99}  # KiB


def disassembled(entry) -> dict[str, str]:
    """The text of each kernel of a file."""
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([disassembler, "-sass", PREBUILT / entry["file"]], capture_output=True, text=True, check=True)
    return {part.split()[0]: part for part in done.stdout.split("Function : ")[1:]}


def test_every_architecture_is_there():
    assert sorted(entry["arch"] for entry in FILES) == sorted(MOST_SHARED)


@pytest.mark.parametrize("entry", FILES, ids=lambda entry: "sm_" + entry["arch"])
def test_instructions(entry):
    """As many as the loop over keys is written with, once each: nothing is multiplied, loaded or exponentiated again."""
    bodies = disassembled(entry)
    assert len(bodies) == 8
    for name, body in bodies.items():
        dtype, head_dim, rows = re.fullmatch(r"svg2_near_field_(\w+?)_(\d+)_(\d+)", name).groups()
        d, m = int(head_dim), int(rows) // 64  # m: how many blocks of 16 rows a warp has
        keys = 32 if m * d > 128 else 64  # whose logits are held at once
        kinds = Counter(re.findall(r"\b(?:HMMA|LDGSTS|LDSM|MUFU\.EX2)[\w.]*", body))
        copies = {kind: kinds.pop(kind) for kind in list(kinds) if kind.startswith("LDGSTS")}
        assert set(copies) == {"LDGSTS.E.BYPASS.128"}, f"{name}: 16 bytes a copy, past L1"
        assert kinds == {
            "HMMA.16816.F32" + (".BF16" if dtype == "bf16" else ""): 2 * m * d // 16 * keys // 8,  # logits, and weights by values
            "LDSM.16.MT88.4": d // 16 * keys // 16,  # values, transposed
            "LDSM.16.M88.4": d // 16 * keys // 16 + m * d // 16,  # keys, and queries
            "MUFU.EX2": m * 16 * keys // 32 + 2 * m,  # a lane's weights, and what the sums before are rescaled by
        }, name
        assert "LDL" not in body and "STL" not in body, f"{name}: local memory"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rows", [64, 128])
def test_shared_memory_fits_every_gpu(head_dim, rows):
    from svg2_pack.svg2_core.ops.near_field.cuda import LAUNCHERS

    assert LAUNCHERS["cuda"].shared_bytes(head_dim, rows) <= min(MOST_SHARED.values()) * 1024


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rows", [64, 128])
def test_the_launcher_asks_for_the_shared_memory_that_the_kernel_lays_out(head_dim, rows):
    import ctypes

    import emulated_cuda
    from svg2_pack.svg2_core.ops.near_field.cuda import LAUNCHERS
    from svg2_pack.svg2_core.ops.near_field.packing import Params

    library = emulated_cuda.library()
    assert LAUNCHERS["cuda"].shared_bytes(head_dim, rows) == library.shared_bytes(head_dim, rows)
    assert ctypes.sizeof(Params) == library.parameter_bytes()


# The kernels for Hopper.


@pytest.fixture(scope="module")
def hopper():
    (entry,) = (entry for entry in COMPILED if entry["name"] == "near_field_fa3")
    assert entry["arch"] == "90a"
    return entry, disassembled(entry)


def roles(body: str) -> dict[str, list[str]]:
    """The instructions that can be reached from where the producer gives registers away, and from where consumers take them."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.+?) ;", body)
    lines = {int(address, 16): text for address, text in found}
    following = dict(zip(lines, list(lines)[1:], strict=False))

    def reached(start: int) -> list[str]:
        todo, seen = [start], set()
        while todo:
            at = todo.pop()
            if at is None or at in seen:
                continue
            seen.add(at)
            jump = re.search(r"\b(BRA|CALL|BRX|JMP|RET)\b(.*)", lines[at])
            if jump:
                assert jump[1] == "BRA", f"another role's code may be reached: {lines[at]}"
                todo.append(int(re.search(r"0x([0-9a-f]+)$", jump[2])[1], 16))
            always = not lines[at].startswith("@") and ".DIV" not in lines[at] and ".CONV" not in lines[at]
            if not (always and re.search(r"\b(BRA|EXIT)\b", lines[at])):
                todo.append(following.get(at))
        return [lines[at] for at in sorted(seen)]

    starts = {role: at for at, text in lines.items() for role in ("DEALLOC", "TRY_ALLOC") if f"USETMAXREG.{role}" in text}
    return {"producer": reached(starts["DEALLOC"]), "consumer": reached(starts["TRY_ALLOC"])}


def highest_register(instructions: list[str]) -> int:
    """Of those named; a matrix instruction names the first of its sums, 32 or 64, and of the four it reads."""
    highest = 0
    for text in instructions:
        sums = re.search(r"HGMMA\.64x(\d+)x16\S* R(\d+)", text)
        wide = {".64": 1, ".128": 3}.get(next(iter(re.findall(r"\b(?:LDS|STS|LDG|STG|LD|ST)\b\S*?(\.64|\.128)\b", text)), None), 0)
        named = [int(number) + wide for number in re.findall(r"\bR(\d+)", text)]
        highest = max([highest, *named, *([int(sums[2]) + int(sums[1]) // 2 - 1] if sums else [])])
    return highest


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_hopper_instructions(hopper, dtype, head_dim):
    body = hopper[1][f"svg2_near_field_{dtype}_{head_dim}"]
    by_role = roles(body)
    products = re.findall(r"HGMMA\S+ .*?;", body)
    kind = ".BF16" if dtype == "bf16" else ""
    of_keys = [text for text in products if "tnspB" not in text]
    of_values = [text for text in products if "tnspB" in text]
    # Once before and once in the loop over tiles of keys, in steps of 16; values likewise in the loop and after it.
    assert len(of_keys) == 2 * head_dim // 16 and all(f"64x128x16.F32{kind} " in text for text in of_keys)
    assert len(of_values) == 2 * 128 // 16 and all(f"64x{head_dim}x16.F32{kind} " in text for text in of_values)
    assert all(re.search(r"F32\S* R\d+, gdesc", text) for text in of_keys), "queries are read from shared memory"
    assert all(re.search(r"F32\S* R\d+, R\d+, gdesc", text) for text in of_values), "weights stay in registers"
    expected = {
        "producer": {"LDGSTS.E.BYPASS.128", "LDGDEPBAR", "DEPBAR.LE SB0, 0x2", "FENCE.VIEW.ASYNC", "SYNCS.PHASECHK", "SYNCS.ARRIVE"},
        "consumer": {"HGMMA", "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "SYNCS.PHASECHK", "SYNCS.ARRIVE", "MUFU.EX2",
                     "BAR.ARV", "BAR.SYNC", "STG.E.128"},
    }  # fmt: skip
    for role, wanted in expected.items():
        text = "\n".join(by_role[role])
        assert {name for name in wanted if name not in text} == set(), role
    assert not any("HGMMA" in text or "MUFU.EX2" in text for text in by_role["producer"])
    assert not any("LDGSTS" in text for text in by_role["consumer"])
    for name in ("LDL", "STL", "CALL", "HMMA.16816"):
        assert name not in body, name


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_hopper_registers_of_each_role(hopper, dtype, head_dim):
    """What the roles ask for is what they use at most, and all of it together is what the launch got."""
    entry, bodies = hopper
    name = f"svg2_near_field_{dtype}_{head_dim}"
    by_role = roles(bodies[name])
    asked = {role: [int(x, 16) for x in re.findall(r"USETMAXREG\S+ (?:UP\d, )?0x([0-9a-f]+)", "\n".join(by_role[role]))] for role in by_role}
    assert all(len(numbers) == 1 for numbers in asked.values()), "a role's code leads into the other's"
    asked = {role: numbers[0] for role, numbers in asked.items()}
    launched = entry["kernels"][name]["registers"]
    assert 128 * asked["producer"] + 256 * asked["consumer"] <= 384 * launched <= 65_536
    assert asked["producer"] < launched < asked["consumer"]
    for role in by_role:
        assert highest_register(by_role[role]) < asked[role], role
    assert highest_register(by_role["consumer"]) >= 160  # sums, logits and weights: the roles were told apart


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_hopper_registers_are_left_alone_until_waited_for(hopper, dtype, head_dim):
    """Sums and weights of matrix instructions under way, which the compiler must not move anything to or from."""
    body = hopper[1][f"svg2_near_field_{dtype}_{head_dim}"]
    waits, groups, last = 0, [], set()
    for text in re.findall(r"/\*[0-9a-f]{4,5}\*/ +(.+?) ;", body):
        product = re.search(r"HGMMA\.64x(\d+)x16\S* R(\d+), (?:R(\d+), )?gdesc", text)
        wait = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", text)
        if product:
            last |= set(range(int(product[2]), int(product[2]) + int(product[1]) // 2))
            last |= set(range(int(product[3]), int(product[3]) + 4)) if product[3] else set()
            if "gsb0" in text:
                groups, last = [*groups, last], set()
        elif wait:
            waits += 1
            groups = groups[len(groups) - int(wait[1]) :]
        else:
            assert not {int(number) for number in re.findall(r"\bR(\d+)", text)} & last.union(*groups), text
    assert waits == 4 and not groups and not last


@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_shared_memory(hopper, head_dim):
    import ctypes

    import emulated_cuda
    from svg2_pack.svg2_core.ops.near_field.cuda import LAUNCHERS
    from svg2_pack.svg2_core.ops.near_field.packing import Params

    library = emulated_cuda.library("near_field_fa3")
    assert LAUNCHERS["cuda_fa3"].shared_bytes(head_dim) == library.shared_bytes(head_dim, 0) <= MOST_SHARED["90"] * 1024
    assert ctypes.sizeof(Params) == library.parameter_bytes()
    assert all(kernel["shared"] == 0 for kernel in hopper[0]["kernels"].values()), "it would move the swizzle's boundaries"

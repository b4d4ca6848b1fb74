"""Compile every Triton kernel of a sparse call for one architecture, without a GPU, and report what it uses.

    python tests/kernels/compile_ahead.py 90 [--all | --once]      (not under TRITON_INTERPRET)

Kernels are taken from the launch path itself, with the specialisation of a run: 16-byte alignment of pointers, integers
divisible by 16, ones; of sizes nothing. One JSON line per kernel and configuration; with --once, per kernel and height of its tiles.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# What differs in the compiled code: dtype, head dim, text, what stands in. The first is the models' own; the second has the paper's
# way, clusters in the tokens' own space and pairs by mass. The rest go to sm_86 alone, which has the least shared memory.
CALLS = [
    {"dtype": torch.bfloat16, "d": 128, "text": 256, "bias": True},
    {"dtype": torch.float16, "d": 64, "density": None, "top_p": 0.5, "metric_directions": 0, "compensation": "off"},
]
CALLS_86 = [
    {"dtype": torch.float16, "d": 64, "compensation": "off"},
    {"dtype": torch.bfloat16, "d": 80},
    {"dtype": torch.float16, "d": 96, "text": 256},
]
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64", torch.int8: "*i8"}


def load_pack():
    spec = importlib.util.spec_from_file_location("svg2_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules["svg2_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["svg2_pack"])


def source(launch) -> ASTSource:
    """The kernel with the signature and specialisation that this launch would give it."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        if parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.dtype):
            signature[parameter.name], attributes[(i,)] = POINTERS[value], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_for(launch, arch: int) -> dict:
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        loops = loops_of(subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout)
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage.stdout)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {
        "kernel": launch.kernel.fn.__name__, "arch": arch, "options": launch.options,
        "rows": launch.args.get("BLOCK_M"), "registers": registers, "stack": stack, "local": local,
        "shared": compiled.metadata.shared, "loop": max(loops, key=lambda loop: loop["products"], default=None),
        "tiles": [size for name, size in launch.args.items() if name in ("D", "M") or name.startswith(("BLOCK_", "CHUNK", "ROWS", "GRANULE", "TILE", "SPLITS", "NEXT"))],
        "factors_32": factors_of_narrow_products(compiled.asm["ttir"]),
    }  # fmt: skip


def loops_of(sass: str) -> list[dict]:
    """The loops of a kernel's machine code: instructions, products on tensor cores, copies to shared memory that nothing waits for at
    once (`copies`), and how many groups of these may be under way where the loop waits (`in_flight`)."""
    lines = sass.splitlines()
    at = {line.strip()[:-1]: i for i, line in enumerate(lines) if re.match(r"\s*\.L_x_\d+:", line)}
    found = []
    for i, line in enumerate(lines):
        back = re.search(r"BRA\S*\s.*`\((\.L_x_\d+)\)", line)
        if back and at.get(back[1], i) < i:
            body = [x for x in lines[at[back[1]] : i] if re.match(r"\s*/\*[0-9a-f]{4,}\*/", x)]
            waits = [int(number, 16) for x in body for number in re.findall(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)", x)]
            found.append({
                "instructions": len(body), "products": sum(bool(re.search(r"\b(HMMA|HGMMA|UTCHMMA|OMMA|QMMA)\b", x)) for x in body),
                "copies": sum("LDGSTS" in x for x in body), "in_flight": max(waits, default=0),
            })  # fmt: skip
    return found


def factors_of_narrow_products(ttir: str) -> list[int | None]:
    """Of each 32-bit product in a kernel, the factor that is known when it is compiled; None if there is none."""
    known = {name: int(value) for name, value in re.findall(r"(%\S+) = arith.constant (?:dense<)?(-?\d+)\b", ttir)}
    products = re.findall(r"arith.muli (%\S+), (%\S+) .*: (?:i32|tensor<[\dx]+xi32>)", ttir)
    return [known.get(a, known.get(b)) for a, b in products]


def main() -> None:
    arch = int(sys.argv[1])
    load_pack()
    sys.path.insert(0, str(Path(__file__).parent))
    import launches
    from svg2_pack.svg2_core.ops import triton_common

    seen = set()
    for call in CALLS + (CALLS_86 if arch == 86 and "--all" in sys.argv else []):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(triton_common, "capability_of", lambda _: (arch // 10, arch % 10))
            with launches.record(monkeypatch) as recording:
                launches.sparse_call(recording, **call)
        for launch in recording.launches:
            src = source(launch)
            key = (launch.kernel.fn.__name__, str(src.signature), str(src.constants), str(src.attrs), str(launch.options))
            if "--once" in sys.argv:
                key = key[0], launch.args.get("BLOCK_M")
            if key not in seen:
                seen.add(key)
                print(json.dumps(compile_for(launch, arch)), flush=True)


if __name__ == "__main__":
    main()

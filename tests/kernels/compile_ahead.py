"""Compile every Triton kernel of a sparse call for one architecture, without a GPU, and report what it uses.

    python tests/kernels/compile_ahead.py 90      (not under TRITON_INTERPRET)

Kernels are taken from the launch path itself, with the specialisation of a run: 16-byte alignment of pointers, integers
divisible by 16, ones. One JSON line per kernel and configuration.
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

# What differs in the compiled code: dtype, head dim, text, compensation. Every architecture takes the first two, which
# are the models' own; the rest go to sm_86 alone, which has the least shared memory.
CALLS = [
    {"dtype": torch.bfloat16, "d": 128, "text": 256, "bias": True},
    {"dtype": torch.float16, "d": 64, "compensation": "off"},
]
CALLS_86 = [
    {"dtype": torch.bfloat16, "d": 80},
    {"dtype": torch.float16, "d": 96, "text": 256},
]
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int8: "*i8"}


def load_pack():
    spec = importlib.util.spec_from_file_location("svg2_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules["svg2_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["svg2_pack"])


def source(launch) -> ASTSource:
    """The kernel with the signature and specialisation that this launch would give it."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        if parameter.is_constexpr or value == 1:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.dtype):
            signature[parameter.name], attributes[(i,)] = POINTERS[value], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_for(launch, arch: int) -> dict:
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage.stdout)[1]) for name in ("REG", "STACK", "LOCAL"))
    ptx = compiled.asm["ptx"]
    return {
        "kernel": launch.kernel.fn.__name__, "arch": arch, "options": launch.options,
        "rows": launch.args.get("BLOCK_M"), "registers": registers, "stack": stack, "local": local,
        "shared": compiled.metadata.shared, "cp_async": ptx.count("cp.async.c"),
        "wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync"),
        "tiles": [size for name, size in launch.args.items() if name.startswith(("BLOCK_", "CHUNK", "FULL"))],
        "factors_32": factors_of_narrow_products(compiled.asm["ttir"]),
    }  # fmt: skip


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
    from svg2_pack.svg2_core.ops.dynamic_attention import configs
    from svg2_pack.svg2_core.ops.dynamic_attention import triton as dynamic_attention

    seen = set()
    for call in CALLS + (CALLS_86 if arch == 86 else []):
        with pytest.MonkeyPatch.context() as monkeypatch:
            config = configs.config_for((arch // 10, arch % 10))
            monkeypatch.setattr(dynamic_attention, "config_for_device", lambda *_, config=config: config)
            with launches.record(monkeypatch) as recording:
                launches.sparse_call(recording, **call)
        for launch in recording.launches:
            src = source(launch)
            key = (launch.kernel.fn.__name__, str(src.signature), str(src.constants), str(src.attrs), str(launch.options))
            if key not in seen:
                seen.add(key)
                print(json.dumps(compile_for(launch, arch)), flush=True)


if __name__ == "__main__":
    main()

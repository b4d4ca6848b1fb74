"""Raylight's own worker and models with SVG2 in them, in processes on a CPU: a check by hand, since Raylight is not ours to ship.

    python tests/engines/raylight_sources.py FOLDER [--xfuser FOLDER] [--shared heads keys guidance ...] [VARIANT ...]

FOLDER: a checkout of Raylight; --xfuser: a folder with that xFuser, if it is not to be the installed one; VARIANT: names of
tests/models/tiny_models.py, in place of those that this script goes through. It needs the tests' own environment, and ray, yunchang and
xfuser (`pip install --no-deps xfuser==0.4.5`). What is faked stands in raylight_process.py; Ray itself is in
tests/nodes/test_sparse_attention_ray.py. Not here: NCCL, FSDP, PipeFusion.

One row a variant, of relative differences. dense: Raylight without SVG2, from one process without Raylight: where it is large, they
differ (Raylight attends to padding, leaves masks out, or its model is of another version than the host's). With everything selected,
density_1: from Raylight without SVG2; to_one: from one process. With little selected, sparse: from SVG2 in one process, and rounding:
by how much that moves where its noise does by one in a million; error: from everything selected, and error_alone: the same in one
process. The exit code counts what is not as it has to be.
"""

import argparse
import math
import sys
import tempfile
import traceback
from functools import partial

import torch
import torch.distributed
import torch.multiprocessing
from raylight_checks import COLUMNS, Check, guidance, no_room_on_one, ring
from raylight_process import TESTS, version, worker_of

NAMES = (
    "wan2.1 t2v", "wan2.1 t2v, odd", "wan2.1 i2v", "wan2.1 vace", "wan2.2 14b t2v", "hunyuan_video t2v", "hunyuan_video, even text",
    "hunyuan_video 1.5 t2v", "hunyuan_video 1.5, even text", "cosmos predict2 v2w", "cosmos predict2 v2w, odd", "cosmos t2v", "ltxv t2v",
    "ltxav t2v", "ltx 2.3 t2v", "minimax t2v", "minimax r2v references",
)  # fmt: skip
# Sizes that two GPUs do not divide: 315 tokens a video; 7 rows a frame.
ODD = {"wan2.1 t2v": (1, 16, 5, 18, 14), "cosmos predict2 v2w": (1, 16, 5, 14, 16)}
# How the processes share the work, by name.
SHARED = {
    "heads": {"ulysses_degree": 2},
    "keys": {"ring_degree": 2},
    "guidance": {"cfg_degree": 2},
    "guidance and heads": {"ulysses_degree": 2, "cfg_degree": 2},
}


def variant_of(name: str):
    """-> the variant and how it is sampled: at its own size, or at one that two GPUs do not divide."""
    import tiny_models

    more = {
        "hunyuan_video, even text": tiny_models._hunyuan("hunyuan_video, even text", text=12),
        "hunyuan_video 1.5, even text": tiny_models._hunyuan15("hunyuan_video 1.5, even text", extra={"conditioning_byt5small": (1, 5, 1472)}, more_text=5),
    }
    plain = name.removesuffix(", odd")
    variant = {**{v.name: v for v in tiny_models.VARIANTS}, **more}[plain]
    shape = {"shape": torch.zeros(ODD[plain])} if name != plain else {}
    return variant, partial(tiny_models.sample, variant, **shape)


def process(rank: int, store: str, options, shared: str) -> None:
    torch.set_num_threads(1)
    worker = worker_of(rank, store, options.folder, options.xfuser, **SHARED[shared])
    sys.path.insert(0, str(TESTS))
    import conftest  # noqa: F401  loads the pack

    rows, wrong = [], []
    with torch.no_grad():
        for name in options.variants if shared == "heads" else NAMES[:1]:
            check = Check(rank, worker)
            try:
                check.load(*variant_of(name))
            except Exception as error:
                rows.append([name, f"Raylight itself, without SVG2: {type(error).__name__}: {error}"])
                continue
            try:
                rows += of_variant(check, name, shared)
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}")
                traceback.print_exc()
            wrong += [f"{name}: {what}" for what in check.wrong]
    if rank == 0:
        print(f"\nRaylight {version()}, {SHARED[shared]}", *(" | ".join(map(str, cells)) for cells in (COLUMNS, *rows)), sep="\n")
        print(*(wrong or ["all as it has to be"]), sep="\n", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.exit(min(len(wrong), 100))


def of_variant(check: Check, name: str, shared: str) -> list[list]:
    """Its rows of the table."""
    if shared == "keys":
        return [ring(check)]
    if shared != "heads":
        check.worker.patch_cfg()
        return [guidance(check, 2**50, shared)]
    rows = [check.run(name)]
    if name == NAMES[0]:
        rows += [guidance(check, 2**50, "guidance, in one batch"), guidance(check, 0, "guidance, one after the other"), no_room_on_one(check)]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--xfuser")
    parser.add_argument("--shared", nargs="+", choices=SHARED, default=list(SHARED))
    parser.add_argument("variants", nargs="*", default=NAMES)
    options, wrong = parser.parse_intermixed_args(), 0
    with tempfile.TemporaryDirectory() as place:
        for number, shared in enumerate(options.shared):
            values, count = (f"{place}/{number}", options, shared), math.prod(SHARED[shared].values())
            running = torch.multiprocessing.spawn(process, values, nprocs=count, join=False)
            try:
                while not running.join():
                    pass
            except torch.multiprocessing.ProcessExitedException as error:
                wrong += error.exit_code
    return wrong


if __name__ == "__main__":
    sys.exit(main())

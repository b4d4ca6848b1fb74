"""One of two processes in which yunchang's Ulysses attention runs on the CPU, with SVG2 between its collectives.

`python gloo_worker.py RANK STORE OUT CASE ...`: writes what came of each case to OUT. Run by test_ulysses.py.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # noqa: F401  loads the pack
from engine_cases import BLOCKS, CASES, CONFIG, SIGMAS, full, session_of, token_order
from svg2_pack.svg2_core import session as session_module
from svg2_pack.svg2_core.adapters import Evaluation, Sequence
from svg2_pack.svg2_core.adapters.ulysses import ring_attention

PROCESSES = 2


def yunchang_attention():
    """Its hybrid of Ulysses, over both processes, and a ring of one. What it asks CUDA at import, it is told."""
    there, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        import yunchang
    finally:
        torch.cuda.is_available = there
    rank = torch.distributed.get_rank()
    yunchang.set_seq_parallel_pg(PROCESSES, 1, rank, PROCESSES)
    return yunchang.LongContextAttention(attn_type=yunchang.kernels.AttnType.TORCH_MATH)


def main(rank: int, store: str, out: str, *names: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    torch.save({name: run(name, rank) for name in names}, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(name: str, rank: int) -> dict:
    """name: a case, and after a colon what is different in this run of it."""
    case, attention = CASES[name.partition(":")[0]], yunchang_attention()
    seen, dense = [], attention.ring_attn_fn
    attention.ring_attn_fn = lambda *args, **named: seen.append(tuple(args[0].shape)) or dense(*args, **named)
    attention.ring_attn_fn = ring_attention(attention.ring_attn_fn, group=attention.ulysses_pg)
    config, causal, short_of_memory = CONFIG, False, None
    if name.endswith(":everything"):
        config = replace(CONFIG, density=1.0)
    if name.endswith(":causal"):
        causal = True
    short = {"memory": (session_module, "svg2_attention"), "gather": (Sequence, "gather"), "scatter": (Sequence, "scatter")}
    if (place := short.get(name.partition(":")[2])) and rank == 1:
        short_of_memory = place
    session, outs = session_of(config), []
    with torch.no_grad():
        for step, sigma in enumerate(SIGMAS[:-1]):
            with Evaluation(session, lambda block: token_order(case, block, PROCESSES), sigma=sigma, conditioning="positive", blocks=BLOCKS):
                for block in range(BLOCKS):
                    mine = [_share(token_order(case, block, PROCESSES), x, rank) for x in full(case, step, block)]
                    cross = torch.randn(1, 8, *mine[0].shape[2:], generator=torch.Generator().manual_seed(1))
                    attention(mine[0], cross, cross)  # over a text: not for SVG2, and it does not count as a block
                    outs.append(_with(short_of_memory, lambda mine=mine: attention(*mine, causal=causal)))
    return {"outs": outs, "dense": seen, "report": session.report(completed=True).to_dict()}


def _share(order, x: torch.Tensor, rank: int) -> torch.Tensor:
    """This process' part `[B, N / P, H, D]` of `[B, H, N, D]`, which the order's `scatter` has put where the engine wants it."""
    return order.scatter(x).transpose(1, 2).chunk(PROCESSES, 1)[rank].contiguous()


def _with(place: tuple | None, call):
    """The call, made where this function has no room."""
    if place is None:
        return call()
    there = getattr(*place)
    setattr(*place, _no_room)
    try:
        return call()
    finally:
        setattr(*place, there)


def _no_room(*_, **__):
    raise torch.OutOfMemoryError("no room")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])

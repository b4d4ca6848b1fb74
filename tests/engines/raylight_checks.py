"""What raylight_sources.py holds a model in Raylight's workers to: everything selected, little selected, with guidance, in a ring."""

import sys

import torch
import torch.distributed
from raylight_process import faked

KNOBS = {
    "density": 0.3, "min_tokens": 0, "dense_blocks": "", "warmup_steps": 0, "q_clusters": 6, "k_clusters": 12, "kmeans_init_iters": 2,
    "kmeans_iters": 1,
}  # fmt: skip
STEPS = 2
# Where everything selected is one process' attention: padding, if there is any, is left out.
AS_ONE_PROCESS = ("wan2.1 t2v", "wan2.1 t2v, odd", "wan2.1 i2v", "wan2.1 vace", "wan2.2 14b t2v", "hunyuan_video, even text",
                  "hunyuan_video 1.5 t2v", "hunyuan_video 1.5, even text", "cosmos predict2 v2w", "cosmos predict2 v2w, odd",
                  "cosmos t2v")  # fmt: skip
# Where it is Raylight's, which attends to padding: there is none.
AS_RAYLIGHT = ("wan2.1 t2v", "wan2.1 i2v", "wan2.1 vace", "wan2.2 14b t2v", "hunyuan_video, even text", "hunyuan_video 1.5, even text",
               "cosmos predict2 v2w", "ltxv t2v", "ltxav t2v", "ltx 2.3 t2v", "minimax t2v", "minimax r2v references")  # fmt: skip

FIGURES = ("dense", "density_1", "to_one", "sparse", "rounding", "error", "error_alone")
COLUMNS = ("variant", *FIGURES, "calls", "tokens", "density of each, of one", "blocks", "dense calls")


def row(name: str, reports: list[dict], of_alone: dict | None = None, **values: float) -> list:
    figures = [f"{values[x]:.0e}" if x in values else "" for x in FIGURES]
    densities = [x["density"] for x in (*reports, of_alone) if x and x["density"] is not None]
    return [
        name, *figures, "+".join(str(x["sparse_calls"]) for x in reports), reports[0]["tokens"], " ".join(f"{x:.3f}" for x in densities),
        ",".join(reports[0]["block_labels"]),
        " | ".join(", ".join(f"{reason} {n}" for reason, n in x["dense_calls"].items()) or "none" for x in reports),
    ]  # fmt: skip


def remote_call(name: str, **values):
    """What the node would send, in the name of one node."""
    from svg2_pack.nodes.raylight import actors

    return actors.remote_call(name, **values, **({} if name == "unpatch" else {"token": "check"}))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Check:
    """One process: a variant's models, with and without Raylight, and what came of them."""

    def __init__(self, rank: int, worker):
        self.rank, self.worker, self.wrong = rank, worker, []
        self.gpus = worker.parallel_dict["ulysses_degree"]

    def expect(self, so: bool, what: str) -> None:
        """It has to be so in each process."""
        found = gathered(bool(so))
        if not all(found):
            self.wrong.append(f"NOT SO on {[rank for rank, is_so in enumerate(found) if not is_so]}: {what}")

    def load(self, variant, sampled) -> None:
        """The variant into the worker, and a sample without SVG2."""
        self.variant, self.sampled = variant, sampled
        self.worker.model = variant.build()
        if self.gpus * self.worker.parallel_dict["ring_degree"] > 1:  # as Raylight's loader does
            self.worker.patch_usp()
        self.dense = self.sample()

    def sample(self, model=None, **more) -> torch.Tensor:
        """The same in all processes, if it is Raylight's."""
        out = self.sampled(self.worker.model if model is None else model, steps=STEPS, **more)
        self.expect(model is not None or all(torch.equal(out, x) for x in gathered(out)), "all processes have the same video")
        return out

    def patch(self, **knobs) -> None:
        for _ in range(2):  # a graph that runs again patches what is patched
            call = remote_call("patch", preset="auto", backend="auto", knobs={**KNOBS, **knobs}, gpus=self.gpus)
            self.worker.model_function_runner(call)

    def report(self) -> list[dict]:
        """Of each process."""
        return gathered({**self.worker.model_function_runner_get_values(remote_call("report"))[1], "overlays": None})

    def alone(self, **more) -> tuple[torch.Tensor, dict]:
        """SVG2 in this process alone, and that run's report."""
        model = remote_call("patch", preset="auto", backend="auto", knobs=KNOBS, gpus=1)(self.variant.build())
        return self.sample(model, **more), remote_call("report")(model)[1]

    def disturbed(self) -> torch.Tensor:
        """SVG2 in this process alone, on noise that differs by one in a million: as far away as rounding may lead."""
        import comfy.sample

        noise = comfy.sample.prepare_noise(self.sampled.keywords.get("shape", self.variant.latent()), 1)
        parts = noise.unbind() if noise.is_nested else [noise]
        for part in parts:
            part.mul_(1 + 1e-6 * torch.randn(part.shape, generator=torch.Generator().manual_seed(5)))
        return self.alone(noise=noise)[0]

    def run(self, name: str) -> list:
        """-> the variant's row: everything selected, then little of it, then without SVG2 again."""
        one_process, dense = self.sample(self.variant.build()), self.dense
        self.patch(density=1.0)
        everything = self.sample()
        full = self.report()
        self.patch()
        sparse, (alone, of_alone) = self.sample(), self.alone()
        reports = self.report()
        self.worker.model_function_runner(remote_call("unpatch"))
        self.expect(torch.equal(self.sample(), dense), "without SVG2 it is as before, bit for bit")

        calls, labels = of_alone["sparse_calls"], of_alone["block_labels"]
        for report in (*full, *reports):
            self.expect(report["completed"] and report["sparse_calls"] == calls > 0, f"{report['sparse_calls']} sparse calls are {calls}")
            self.expect(report["block_labels"] == labels, f"blocks {report['block_labels']} are {labels}")
            odd = set(report["dense_calls"]) - {"not_video_self_attention"}
            self.expect(not odd, f"no call is dense for {odd}: {report['notices']}")
            self.expect(report["cold_calls"] == 0, f"{report['cold_calls']} calls of the second step without a past")
            self.expect(report["tokens"] == of_alone["tokens"], f"{report['tokens']} tokens are {of_alone['tokens']}")
        figures = {
            "dense": relative(dense, one_process), "density_1": relative(everything, dense),
            "to_one": relative(everything, one_process), "sparse": relative(sparse, alone),
            "rounding": relative(self.disturbed(), alone),
            "error": relative(sparse, everything), "error_alone": relative(alone, one_process),
        }  # fmt: skip
        if name in AS_ONE_PROCESS:
            self.expect(figures["to_one"] < 1e-4, f"everything selected is one process' attention: {figures}")
        if name in AS_RAYLIGHT:
            self.expect(figures["density_1"] < 1e-4, f"everything selected is Raylight's attention: {figures}")
        if name in AS_ONE_PROCESS and "predict2" not in name:  # whose tokens stand in another order, and are clustered in it
            self.expect(figures["sparse"] < max(1e-4, 10 * figures["rounding"]), f"sparse is sparse in one process: {figures}")
        self.expect(figures["error"] < 1.2 * figures["error_alone"], f"no worse than in one process: {figures}")
        return row(name, reports, of_alone=of_alone, **figures)


def gathered(value) -> list:
    """What each process has."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def at_density(check: Check, density: float, **more) -> tuple[torch.Tensor, list[dict]]:
    """SVG2 put in, a sample and its reports, SVG2 taken out."""
    check.patch(density=density)
    out, reports = check.sample(**more), check.report()
    check.worker.model_function_runner(remote_call("unpatch"))
    return out, reports


def guidance(check: Check, memory: int, kind: str) -> list:
    """Two conditionings, in one batch if there is memory for it: each keeps its own past."""
    from comfy.model_patcher import ModelPatcher

    with faked(ModelPatcher, get_free_memory=lambda *_: memory):
        dense = check.sample(cfg=4.0)
        out, full = at_density(check, 1.0, cfg=4.0)
        _, reports = at_density(check, 0.3, cfg=4.0)
    figure = relative(out, dense)
    check.expect(figure < 1e-4, f"{kind}: everything selected is dense attention")
    for report in (*full, *reports):
        check.expect(report["cold_calls"] == 0 < report["sparse_calls"], f"{kind}: {report['cold_calls']} calls without a past")
        check.expect(set(report["dense_calls"]) <= {"not_video_self_attention"}, f"{kind}: {report['dense_calls']} {report['notices']}")
    return row(kind, reports, density_1=figure)


def no_room_on_one(check: Check) -> list:
    """The second process runs out of memory in each call: it alone computes dense attention, and nobody waits for ever."""
    there = sys.modules["svg2_of_raylight.svg2_core.session"]

    def no_room(*_, **__):
        raise torch.OutOfMemoryError("no room")

    with faked(there, svg2_attention=no_room if check.rank else there.svg2_attention):
        out, reports = at_density(check, 1.0)
    check.expect(reports[0]["sparse_calls"] > 0 == reports[1]["sparse_calls"], "the first is sparse, the second is not")
    check.expect(reports[1]["dense_calls"].get("out_of_memory"), f"the second says why: {reports[1]['dense_calls']}")
    return row("no memory on GPU 1", reports, density_1=relative(out, check.dense))


def ring(check: Check) -> list:
    """None sees all keys: Raylight's own attention, and the reason."""
    out, reports = at_density(check, 0.3)
    check.expect(torch.equal(out, check.dense), "ring: bit for bit Raylight's")
    for report in reports:
        check.expect(report["sparse_calls"] == 0, "ring: nothing is sparse")
        check.expect(any("ring attention over 2 GPUs" in notice for notice in report["notices"]), f"ring: {report['notices']}")
    return row("ring", reports, density_1=relative(out, check.dense))

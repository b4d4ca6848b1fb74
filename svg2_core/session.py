"""One sampling run of any engine: its settings, the state that lives and dies with it, and the answer to each attention call.

Knows no engine: ComfyUI's patch (nodes/patching) and the adapters to others (adapters/) tell it where a call comes from, and get
the sparse answer or why the call is to be computed as it would have been without SVG2.
"""

import logging
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from .attention import AttentionResult, Keys, default_heads, svg2_attention
from .cache import DEFAULT_LIMIT_BYTES, CentroidCache, Key
from .config import SVG2Config
from .layout import Layout
from .ops import registry
from .reasons import Reason, Refusal
from .schedule import Schedule
from .stats import RunReport, RunStats

# Of a part of the video: what is made of the keys costs as much as some hundred queries' dense attention.
LEAST_QUERIES = 256

# Dense calls that would have been sparse in another step or block: their time can be compared with the sparse ones'.
COMPARABLE = {Reason.WARMUP, Reason.PAST_END, Reason.DENSE_BLOCK}

log = logging.getLogger("svg2")


@dataclass(frozen=True)
class CallSite:
    """Where an attention call comes from: what its past is kept by, and its cell in the report.

    step: of the sampler; block: 0-based number over the whole network, of `total`, None where that is not known;
    nth: how many such attentions of this block came before in this evaluation of the network (VACE repeats a number);
    rows: of each batch row, its conditioning and its place among that conditioning's rows; empty where that is not known: then
    clusters start from nothing at each call; window: of a context window;
    part: which part of the video asks (`Layout.queries`), None: the whole;
    grid: frames, rows and columns of the video's tokens, for the picture of clusters;
    first_head: number of the call's first head in the network's attention, where its heads are shared out among devices.
    """

    step: int
    block: int
    total: int | None = None
    nth: int = 0
    rows: tuple[tuple[Hashable, int], ...] = ()
    window: Hashable = None
    part: int | None = None
    grid: tuple[int, int, int] = (0, 0, 0)
    first_head: int = 0

    @property
    def label(self) -> str:
        """The block's name in the report."""
        return f"{self.block}.{self.nth}" if self.nth and self.part is None else str(self.block)


@dataclass(frozen=True)
class Answer:
    """out `[B, H, N, D]` in q's dtype and memory order; keys: see AttentionResult."""

    out: torch.Tensor
    keys: Keys | None


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran short, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Session:
    """A sampling run, from its first step to its last. Threads may share it, one per GPU.

    schedule: the sampler's, with the settings; backend: a name, or "auto"; preset: what the report calls the settings;
    out_of_memory: whether an error is a shortage of memory: the call is then tried with fewer heads at a time, then refused;
    cache_bytes: the most that the centroids of all blocks may take; keeping: entered around what makes tensors that outlive a call.
    """

    def __init__(
        self, schedule: Schedule, *, backend: str = "auto", preset: str = "auto",
        out_of_memory: Callable[[Exception], bool] = is_out_of_memory, cache_bytes: int = DEFAULT_LIMIT_BYTES,
        keeping: Callable[[], AbstractContextManager] = nullcontext,
    ):  # fmt: skip
        registry.check_name(backend)
        self.schedule = schedule
        self.config: SVG2Config = schedule.config
        self.backend = backend
        self.preset = preset
        self.step = 0  # of the latest evaluation of the network
        self.cache = CentroidCache(cache_bytes)
        self.stats = RunStats()
        self.heads_at_a_time: dict[torch.device, int] = {}  # where memory ran short
        self.out_of_memory = out_of_memory
        self._keeping = keeping

    def at(self, sigma: torch.Tensor | float | None) -> int:
        """Open an evaluation of the network at a sigma (0-d tensor or number): -> its step. A tensor's value is read, which waits
        for the device: the only wait in an evaluation. None: the evaluation belongs to the step that the sampler is in."""
        if sigma is not None:
            value = self.stats.read_with(sigma) if isinstance(sigma, torch.Tensor) else sigma
            self.step = self.schedule.step_of(value, since=self.step)
        self.cache.now = self.step
        return self.step

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, site: CallSite, *,
        scale: float | None = None, keys: Keys | None = None,
    ) -> Answer | Refusal:  # fmt: skip
        """The sparse answer to q `[B, H, Nq, D]` over k, v `[B, H, N, D]`, or the reason, counted, why this call is to be dense.

        Any strides: for tensors kept `[B, N, H, D]` hand over `x.transpose(1, 2)`; the answer, transposed back, lies as q does.
        keys: as in `svg2_attention`. Nothing of q, k, v is held on to.
        """
        refusal = self._why_dense(q, k, v, layout, site)
        if refusal is not None:
            return self.refuse(refusal, site.label, site.step)
        with self._keeping():
            return self._attend(q, k, v, layout, site, scale, keys)

    def _attend(self, q, k, v, layout: Layout, site: CallSite, scale, keys: Keys | None) -> Answer | Refusal:
        """Answer a call that nothing speaks against, and keep what it leaves for the next step and the report."""
        tokens = layout.video_len, q.device, site.window, site.part
        past = [Key(conditioning, (site.label, row, *tokens)) for conditioning, row in site.rows]
        watch = self.stats.sparse_watch(q.device)
        result = self._try_backends(q, k, v, layout, site, past, scale, keys)
        if isinstance(result, Refusal):
            return self.refuse(result, site.label, site.step)
        watch.stop()
        result, backend, cold = result
        for key, entry in zip(past, result.centroids, strict=False):
            self.cache.put(key, entry)
        self.stats.sparse_call(
            site.step, site.label, layout.video_len, result.density, backend,
            error=result.error, expected_error=result.expected_error, text_share=result.text_share, cold=cold,
        )  # fmt: skip
        self._remark_on(backend, q.device.type)
        if site.step == self.schedule.last_sparse_step:
            self.stats.clusters(site.label, result.groups, site.grid)
        return Answer(result.out, result.keys)

    def compare(self, device: torch.device, step: int, dense: Callable[[], object]) -> None:
        """Where a run has no dense call of its own to be compared with, time one: `dense`, whose answer is not used."""
        watch = self.stats.reference_watch(device, step)
        if watch is None:
            return
        try:
            dense()
        except Exception as error:
            if not self.out_of_memory(error):  # no room for a comparison: the answer is there already
                raise
        else:
            watch.stop()

    def refuse(self, refusal: Refusal, block: str | None, step: int | None = None) -> Refusal:
        """Count a dense call; the first of each reason the user should know about goes to the log."""
        if self.stats.dense_call(refusal.reason, block, refusal.detail, step) and not refusal.reason.expected:
            log.warning("SVG2: dense attention: %s", self.stats.notices[refusal.reason])
        return refusal

    def remark(self, what: str, sentence: str, **values: str) -> None:
        """Note what runs otherwise than the settings ask or the user hopes; the first time it goes to the log as well."""
        if self.stats.remark(what, sentence, **values):
            log.warning("SVG2: %s", sentence)

    def report(self, completed: bool) -> RunReport:
        """What ran and why; waits for the device. A run that saw no attention over the video says so. Ends the session's state."""
        self.cache.clear()
        if completed and self.schedule.steps and self.stats.explain_none():
            self.refuse(Refusal(Reason.NEVER_CAME), None)
        return self.stats.report(completed, self.effective_settings())

    def effective_settings(self) -> dict[str, object]:
        """What this run goes by, by the names of the node's inputs: knobs at auto resolved, clusters for its longest sequence."""
        config, tokens = self.config, self.stats.tokens
        q_clusters, k_clusters = config.cluster_counts(tokens) if tokens else (config.q_clusters, config.k_clusters)
        return {
            "preset": self.preset,
            "q_clusters": q_clusters,
            "k_clusters": k_clusters,
            "density": config.density,
            "top_p": config.top_p if config.density is None else None,
            "warmup_steps": self.schedule.warmup_steps,
            "min_k_ratio": config.min_k_ratio,
            "kmeans_init_iters": config.kmeans_init_iters,
            "kmeans_iters": config.kmeans_iters,
            "end_percent": config.end_percent,
            "dense_blocks": config.dense_blocks,
            "min_tokens": config.min_tokens,
            "compensation": config.compensation,
            "backend": self.stats.backend or self.backend,
        }

    def _why_dense(self, q, k, v, layout: Layout, site: CallSite) -> Refusal | None:
        """What the settings or the call itself speak against."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            return Refusal(Reason.GRADIENTS)
        reason = self.schedule.dense_step(site.step) or self.schedule.dense_block(site.block, site.total)
        if reason is not None:
            return Refusal(reason)
        video, queries = layout.video_len, layout.queries_len
        least = max(self.config.min_tokens, *self.config.cluster_counts(video, queries))
        if video < least:
            return Refusal(Reason.SHORT_SEQUENCE, f"{video:,} < {least:,} tokens")
        if queries < min(LEAST_QUERIES, self.config.min_tokens):
            return Refusal(Reason.SHORT_SEQUENCE, f"{queries:,} < {LEAST_QUERIES:,} queries over {video:,} tokens")
        if not (q.dtype == k.dtype == v.dtype):
            return Refusal(Reason.UNSUPPORTED_DTYPE, f"{q.dtype}, {k.dtype}, {v.dtype}")
        return None

    def _try_backends(
        self, q, k, v, layout: Layout, site: CallSite, past: list[Key], scale, keys: Keys | None
    ) -> tuple[AttentionResult, str, bool] | Refusal:
        """Try backends until one answers: -> result, its backend, whether any row started cold. Memory shortage is retried with
        fewer heads at a time."""
        config = self.schedule.config_of(site.block, site.total)
        while True:
            warm = [self.cache.get(key) for key in past] or None
            backend = registry.choose(self.backend, registry.Call(q.device, q.dtype, q.shape[-1]))
            if isinstance(backend, Refusal):
                if backend.reason is Reason.OUT_OF_MEMORY and self.cache.drop(q.device):  # in the self-test before its first call
                    continue
                return backend
            heads = self.heads_at_a_time.get(q.device)
            try:
                result = svg2_attention(
                    q, k, v, layout, config, warm,
                    scale=scale, backend=backend, heads_at_a_time=heads, first_head=site.first_head, keys=keys,
                )  # fmt: skip
                return result, backend, warm is None or any(row is None for row in warm)
            except Exception as error:
                if self.out_of_memory(error):
                    if self.cache.drop(q.device):
                        continue
                    heads = heads or default_heads(q, layout, config, backend)
                    if heads == 1:
                        return Refusal(Reason.OUT_OF_MEMORY, str(error).partition("\n")[0])
                    # Another thread may have halved it meanwhile: that it did so is no reason to give up.
                    self.heads_at_a_time[q.device] = min(self.heads_at_a_time.get(q.device, heads), heads // 2)
                    continue
                # Retired for the life of the process; the next backend, or dense attention, answers this same call.
                log.exception("SVG2: backend %s failed and is retired", backend)
                registry.retire(backend, error)

    def _remark_on(self, backend: str, device: str) -> None:
        """Say what runs, but not as one would expect."""
        if backend == "sdpa" and device != "cpu":
            sentence = (
                f"backend sdpa reads sizes from the {device} device several times in every call, which waits for them; "
                "how fast that is has been measured on CPUs only"
            )
            self.remark("sdpa_waits", sentence)
        if self.cache.refused:
            sentence = (
                f"not all clusters fit into the {self.cache.limit_bytes / 2**20:.0f} MiB kept between steps: "
                "the blocks left out start anew at each step, which takes longer"
            )
            self.remark("cache_full", sentence)

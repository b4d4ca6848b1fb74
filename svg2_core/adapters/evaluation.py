"""One evaluation of a network, for engines that tell its attention nothing of step, block or conditioning."""

import threading
from collections.abc import Callable, Hashable

import torch

from ..reasons import Reason, Refusal
from ..session import CallSite, Session
from .sequence import Sequence

_now = threading.local()


class Evaluation:
    """Open while the network runs, by `with`: attention calls on this thread then belong to it.

        session = Session(Schedule(tuple(sigmas), preset_config("balanced", "wan_t2v")))
        for sigma in sigmas[:-1]:
            with Evaluation(session, Sequence.of(("video", tokens), multiple=devices), sigma=sigma, blocks=40):
                noise = transformer(latents, timestep, ...)
        print(session.report(completed=True).summary)

    sequence: of the self-attention, or a function of the block's number that gives it; sigma: of this evaluation, None: that of the
    one before; conditioning: under which name its past is kept, such as "positive" and "negative"; blocks: how many
    self-attentions over the video an evaluation has, None: not known (then dense_blocks cannot count from the last).

    Blocks are numbered by the calls over the whole sequence, in the order they come.
    """

    def __init__(
        self, session: Session, sequence: Sequence | Callable[[int], Sequence], *, sigma: torch.Tensor | float | None = None,
        conditioning: Hashable = None, blocks: int | None = None,
    ):  # fmt: skip
        self.session = session
        self.sequence = sequence
        self.sigma = sigma
        self.conditioning = conditioning
        self.blocks = blocks
        self._block = 0

    def __enter__(self) -> "Evaluation":
        self._step = self.session.at(self.sigma)
        self._block = 0
        self._before, _now.evaluation = current(), self
        self._watch = None
        return self

    def __exit__(self, *_) -> None:
        _now.evaluation = self._before
        if self._watch is not None:
            self._watch.stop()

    def answer(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, first_head: int = 0):
        """The sparse answer to q, k, v `[B, H, N, D]`, padding included, or a `Refusal`. Keys may have lost the padding at their end.
        first_head: number of head 0 among all."""
        if self._watch is None:
            self._watch = self.session.stats.model_call(self._step, self.session.schedule.sigmas[self._step], q.device)
        sequence = self.sequence(self._block) if callable(self.sequence) else self.sequence
        expected = (*q.shape[:2], sequence.tokens, q.shape[3])
        cut = (*q.shape[:2], sequence.tokens - sequence.padding_behind, q.shape[3])
        if not (q.shape == expected and k.shape == v.shape and k.shape in (expected, cut)):
            return self.session.refuse(Refusal(Reason.NOT_VIDEO_SELF_ATTENTION), None)
        rows = tuple((self.conditioning, row) for row in range(q.shape[0]))
        site = CallSite(self._step, self._block, self.blocks, rows=rows, first_head=first_head)
        self._block += 1
        return attend(self.session, sequence, q, k, v, site, scale)


def attend(session: Session, sequence: Sequence, q, k, v, site: CallSite, scale: float | None) -> torch.Tensor | Refusal:
    """The session's answer to q, k, v `[B, H, N, D]` in an engine's order of tokens, in that order; zero at the padding."""
    answer = session.attend(*(sequence.gather(x) for x in (q, k, v)), sequence.layout, site, scale=scale)
    return answer if isinstance(answer, Refusal) else sequence.scatter(answer.out)


def current() -> Evaluation | None:
    """The evaluation that is open on this thread."""
    return getattr(_now, "evaluation", None)


def answer_of_the_current(q, k, v, *, scale: float | None, first_head: int, why_not: Refusal | None):
    """What the adapters ask: the answer of the evaluation that is open, None where none is. why_not: this call's kind, counted."""
    evaluation = current()
    if evaluation is None:
        return None
    return evaluation.session.refuse(why_not, None) if why_not else evaluation.answer(q, k, v, scale=scale, first_head=first_head)

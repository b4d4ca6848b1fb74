"""One evaluation of a network, for engines that tell its attention nothing of step, block or conditioning."""

import contextlib
import threading
from collections.abc import Callable, Hashable

import torch

from ..reasons import Reason, Refusal
from ..session import COMPARABLE, CallSite, Session
from ..stopwatch import Stopwatch, timed
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
    self-attentions over the video an evaluation has, None: not known (then all blocks have the same density, where the presets give the
    first one more, and dense_blocks cannot count from the last).

    Raises ValueError where the sequence is a function and blocks is not given.

    Blocks are numbered by the calls over the whole sequence, in the order they come.
    """

    def __init__(
        self, session: Session, sequence: Sequence | Callable[[int], Sequence], *, sigma: torch.Tensor | float | None = None,
        conditioning: Hashable = None, blocks: int | None = None,
    ):  # fmt: skip
        if callable(sequence) and blocks is None:
            raise ValueError("blocks: must be given where the sequence is a function of the block's number")
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
            with contextlib.suppress(RuntimeError):  # after a device fault; the fault itself is the error to show
                self._watch.stop()

    def answer(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, first_head: int = 0,
        why_not: Refusal | None = None, dense: Callable[[], object] | None = None,
    ) -> torch.Tensor | Refusal | Stopwatch:  # fmt: skip
        """The answer to q, k, v `[B, H, N, D]`, padding included: see `attend`. Keys may have lost the padding at their end.

        first_head: number of head 0 among all; why_not: why a call of this kind is dense in any case.
        """
        if self._watch is None:
            self._watch = self.session.stats.model_call(self._step, self.session.schedule.sigmas[self._step], q.device)
        sequence = None
        if self._block != self.blocks:
            sequence = self.sequence(self._block) if callable(self.sequence) else self.sequence
        if sequence is None or not _is_over(sequence, q, k, v):
            return self.session.refuse(why_not or Refusal(Reason.NOT_VIDEO_SELF_ATTENTION), None)
        rows = tuple((self.conditioning, row) for row in range(q.shape[0]))
        site = CallSite(self._step, self._block, self.blocks, rows=rows, first_head=first_head)
        self._block += 1
        if why_not is not None:
            return self.session.refuse(why_not, site.label, site.step)
        return attend(self.session, sequence, q, k, v, site, scale, dense)


def _is_over(sequence: Sequence, q, k, v) -> bool:
    """Whether a call is over the whole sequence; its keys may come without the padding at the end."""
    whole = (*q.shape[:2], sequence.tokens, q.shape[3])
    cut = (*q.shape[:2], sequence.tokens - sequence.padding_behind, q.shape[3])
    return q.shape == whole and k.shape == v.shape and k.shape in (whole, cut)


def attend(
    session: Session, sequence: Sequence, q, k, v, site: CallSite, scale: float | None, dense: Callable[[], object] | None = None
) -> torch.Tensor | Refusal | Stopwatch:
    """The session's answer to q, k, v `[B, H, N, D]` in an engine's order of tokens, in that order; zero at the padding. Without one, why,
    or the watch that is to be stopped when the dense answer is there. dense: makes it, for a time to compare with.

    A shortage of memory is a reason here, too, where tokens are put in order: one device that raised would leave the others waiting.
    """
    try:
        answer = session.attend(*(sequence.gather(x) for x in (q, k, v)), sequence.layout, site, scale=scale)
        out = answer if isinstance(answer, Refusal) else sequence.scatter(answer.out)
    except Exception as error:
        if not session.out_of_memory(error):
            raise
        out = session.refuse(Refusal(Reason.OUT_OF_MEMORY, str(error).partition("\n")[0]), site.label, site.step)
    if isinstance(out, Refusal):
        return (session.stats.dense_watch(q.device) if out.reason in COMPARABLE else None) or out
    if dense is not None:
        session.compare(q.device, site.step, dense)
    return out


def current() -> Evaluation | None:
    """The evaluation that is open on this thread."""
    return getattr(_now, "evaluation", None)


def answer_of_the_current(q, k, v, *, scale: float | None, first_head: int, why_not: Refusal | None, dense: Callable[[], object]):
    """What the adapters ask: the answer of the evaluation that is open, None where none is. why_not: this call's kind, counted."""
    evaluation = current()
    if evaluation is None:
        return None
    return evaluation.answer(q, k, v, scale=scale, first_head=first_head, why_not=why_not, dense=dense)


def or_dense(answer: object, dense: Callable[[], object]) -> object:
    """Make the dense answer, where `answer` is none; stop the watch, if that is what it is."""
    return timed(answer if isinstance(answer, Stopwatch) else None, dense)

"""SVG2 under other engines than ComfyUI: what they call for attention, answered by a `Session`.

`sequence.py`: the tokens as an engine of several GPUs orders them; `evaluation.py`: one evaluation of a network, for the attention
calls inside it; `ulysses.py`: in place of `ring_attn_fn` of yunchang, xFuser and Raylight; `xdit.py`: for xDiT's registry of
attention functions. No engine is imported here.
"""

from .evaluation import Evaluation
from .sequence import Sequence

__all__ = ["Evaluation", "Sequence"]

"""The least Triton version by compute capability, known beforehand: an older one aborts the process at its first kernel."""

import re
from functools import lru_cache

# From this compute capability on, up to the next line's: the least Triton. All lines are by compiling a product on tensor
# cores (tl.dot), which most of the kernels have, for the architecture with releases of every minor version from 3.1 to 3.8.
LEAST = {
    (8, 0): (3, 2, 0),  # of torch 2.6. 3.1 compiles too, and is of the one torch that ComfyUI supports "minimally"
    (10, 0): (3, 3, 0),  # 3.2: SIGABRT ("computeCapability not supported")
    (10, 3): (3, 5, 1),  # 3.3.1, 3.5.0: SIGABRT ("Cannot select" in LLVM); triton-lang/triton#8485. 11.0 (3.2: SIGABRT) goes with it
    (12, 0): (3, 3, 1),  # 3.2: SIGABRT; 3.3.0: a failed pass; triton-lang/triton#6771. 12.1 is the same
}
# Not in the table: an assembler (ptxas) that is too old, as for 10.3 and 12.1 before Triton 3.6 and for 11.0 before 3.7. That is
# an ordinary error, which the self-test answers and TRITON_PTXAS_PATH mends.


@lru_cache(None)
def too_old(version: str, capability: tuple[int, int]) -> tuple[int, int, int] | None:
    """The least Triton for a GPU of this compute capability (8.0 and up) where `version` is older; None where it will do.

    A version that says nothing ("", "unknown") will do: then the self-test is the one that finds out.
    """
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)  # of "3.3.0+git1a2b3c", "3.2.0.post11" and "3.3.0a0" the first three
    least = LEAST[max(line for line in LEAST if line <= capability)]
    if numbers is None or tuple(int(number or 0) for number in numbers.groups()) >= least:
        return None
    return least

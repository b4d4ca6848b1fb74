"""The order in which "auto" tries backends on a device, with the record of the measurement that it follows.

An order here stands for a measurement by tests/benchmarks/run.py, which its entry names. Where nothing has been measured, the
prebuilt near field ("cuda": all other stages are Triton's) comes first, where the head dimension allows: the kernel that takes
longest then needs no compiler. "cuda_fa3" is in no order: nothing of it has run on a GPU yet, so it serves only who asks for it by name.
"""

import torch

# By major compute capability: (order, the record it follows).
MEASURED: dict[int, tuple[tuple[str, ...], str]] = {}
UNMEASURED = ("cuda", "triton")


def order_for(device: torch.device) -> tuple[str, ...]:
    """Names of backends for "auto", the first that supports the call is taken.

    On a CPU it is torch's own attention and products ("sdpa"), and should that fail their definition in plain torch. On other
    devices, and on an NVIDIA GPU, nobody has measured "sdpa": there it runs only where it is asked for by name.
    """
    if device.type != "cuda":
        return ("sdpa", "torch") if device.type == "cpu" else ("torch",)
    return MEASURED.get(torch.cuda.get_device_capability(device)[0], (UNMEASURED, ""))[0]

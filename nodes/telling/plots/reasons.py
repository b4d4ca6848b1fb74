"""How a dense call looks and what it is called, by its reason: hatching, so that colour is left to the density."""

from ....svg2_core.reasons import Reason

_LOOKS = {
    Reason.WARMUP: ("rising", "warm-up"),
    Reason.DENSE_BLOCK: ("falling", "block kept dense"),
    Reason.SHORT_SEQUENCE: ("level", "short sequence"),
    Reason.PAST_END: ("upright", "past the end"),
}
FALLBACK = "crossed"  # what the settings did not ask for


def pattern(name: str) -> str:
    """The hatching of a reason's name."""
    return _LOOKS[name][0] if name in _LOOKS else FALLBACK


def words(name: str) -> str:
    """A reason's name for a legend."""
    return _LOOKS[name][1] if name in _LOOKS else name.replace("_", " ")


def is_fallback(name: str) -> bool:
    return name not in _LOOKS

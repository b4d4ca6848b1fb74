"""The dense_blocks setting: what it accepts, what it means, what it says about the rest."""

import pytest
from svg2_pack.svg2_core.config import in_block_ranges, parse_block_ranges


@pytest.mark.parametrize(
    ("spec", "total", "dense"),
    [
        ("", 6, []),
        ("  ", 6, []),
        ("0", 6, [0]),
        ("3", 6, [3]),
        ("0-2,-1", 6, [0, 1, 2, 5]),
        ("-3--1", 6, [3, 4, 5]),
        (" 1 , 2 ", 6, [1, 2]),
        (" 1 - 3 ", 6, [1, 2, 3]),
        ("2--2", 6, [2, 3, 4]),
        ("0--1", 6, [0, 1, 2, 3, 4, 5]),
        ("2-2", 6, [2]),
        ("1-3,2-4,0", 6, [0, 1, 2, 3, 4]),
        ("7", 6, []),
        ("4-99", 6, [4, 5]),
        ("-9", 6, []),
        ("-9--5", 6, [0, 1]),
        ("39", 40, [39]),
    ],
)
def test_meaning(spec, total, dense):
    ranges = parse_block_ranges(spec)
    assert [block for block in range(total) if in_block_ranges(ranges, block, total)] == dense


@pytest.mark.parametrize(
    ("spec", "dense"), [("0-2,-1", [0, 1, 2]), ("-1", []), ("-3--1", []), ("-3-5", []), ("0--1", [])]
)
def test_blocks_counted_from_an_unknown_end_match_none(spec, dense):
    """Where the model does not say how many blocks it has, a range with a negative bound selects nothing."""
    ranges = parse_block_ranges(spec)
    assert [block for block in range(10) if in_block_ranges(ranges, block, None)] == dense


@pytest.mark.parametrize(
    "spec", ["3-x", "x", "5-2", ",", "1,", ",1", "1,,2", "1-", "--1", "1 2", "1.5", "0x1", "auto", "-1--3", "1-2-3"]
)
def test_errors_name_the_setting_and_the_part(spec):
    with pytest.raises(ValueError, match="dense_blocks") as error:
        parse_block_ranges(spec)
    assert spec in str(error.value)


def test_the_error_points_at_the_wrong_part():
    with pytest.raises(ValueError, match='dense_blocks: "3-x"'):
        parse_block_ranges("0-2, 3-x ,-1")

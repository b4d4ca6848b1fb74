"""The words of each language have the keys of the English ones, and these those of the code."""

import json
import re
from pathlib import Path

import pytest
from svg2_pack.svg2_core.reasons import Reason

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = sorted(folder.name for folder in (ROOT / "locales").iterdir())


def read(language: str, name: str) -> dict:
    return json.loads((ROOT / "locales" / language / name).read_text(encoding="utf-8"))


def flat(tree: dict, path: str = "") -> dict[str, str]:
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return leaves


def places(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


def test_languages():
    assert LANGUAGES == ["en", "ja", "ko", "zh"]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["main.json", "nodeDefs.json"])
def test_every_language_has_every_text(language, name):
    english, theirs = flat(read("en", name)), flat(read(language, name))
    assert theirs.keys() == english.keys()
    for key, text in theirs.items():
        assert text.strip(), key
        assert places(text) == places(english[key]), key
        if language != "en" and len(english[key]) > 30:
            assert re.search(r"[^\x00-\u024f\u2000-\u2bff]", text), f"{key} is not translated"


def test_every_reason_has_its_words():
    words = read("en", "main.json")["svg2"]
    assert words["reasons"] == {reason.value: reason.sentence for reason in Reason}
    assert words["short"].keys() == words["reasons"].keys()
    assert words["advice"].keys() <= words["reasons"].keys()


def test_every_remark_has_its_words():
    files = [*sorted((ROOT / "nodes").rglob("*.py")), *sorted((ROOT / "svg2_core").glob("*.py"))]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r'(?:\.remark\(|\.remarks\[|_remark\(\s*run, )"(\w+)"', code))
    words = read("en", "main.json")["svg2"]
    assert words["remarks"].keys() == named != set() and words["remark_advice"].keys() <= named


def test_every_word_the_front_end_asks_for_exists_and_is_used():
    known = {key.removeprefix("svg2.") for key in flat(read("en", "main.json"))}
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "web/js").glob("*.js"))
    asked = set(re.findall(r'"((?:panel|preset|report)\.\w+)"', code))
    asked |= {f"preset.compensation_{name}" for name in ("off", "centroid", "first_order")}  # put together from a value
    assert asked == {key for key in known if key.startswith(("panel.", "preset.", "report."))}

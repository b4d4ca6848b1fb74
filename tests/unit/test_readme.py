"""What the documents say that can be checked: links, commands, names, and the settings that auto comes to."""

import re
from pathlib import Path

import pytest
from svg2_pack.svg2_core.ops import registry
from svg2_pack.svg2_core.presets import preset_config
from svg2_pack.svg2_core.reasons import Reason

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(path for pattern in ("*.md", "cuda/*.md", "web/docs/*.md", "tests/**/*.md") for path in ROOT.glob(pattern))
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Each command of the documents, by its script, and the test that runs it.
COMMANDS = {
    "scripts/demo.py": "tests/demo/test_demo.py",
    "scripts/test.py": ".ci/run",
    "scripts/build_workflows.py": "tests/workflows/test_in_the_host.py",
    "scripts/build_thumbnails.py": "tests/browser/test_scripts.py",
    "tests/benchmarks/run.py": "tests/unit/test_benchmark.py",
    "tests/benchmarks/fused.py": "tests/unit/test_benchmark_fused.py",
    "tests/benchmarks/attention_error.py": "tests/models/test_attention_error.py",
    "tests/benchmarks/method_figure.py": "tests/models/test_attention_error.py",
    "cuda/build.py": ".ci/run",
}


def anchor(heading: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if "://" in target:
            continue
        name, _, part = target.partition("#")
        path = (document.parent / name) if name else document
        assert path.exists(), target
        if part:
            assert part in {anchor(line.lstrip("#")) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")}, target


def test_every_command_is_run_by_a_test():
    found = {script for text in (README, (ROOT / "cuda/README.md").read_text(encoding="utf-8")) for script in re.findall(r"python ([\w/]+\.py)", text)}
    assert found == set(COMMANDS)
    for script, runner in COMMANDS.items():
        assert (ROOT / script).is_file()
        source = (ROOT / runner).read_text(encoding="utf-8")
        assert Path(script).name in source or Path(script).stem in source, f"{runner} does not run {script}"


def test_recommended_settings():
    """The table's clusters and warm-up are those of the preset."""
    rows = [line.split("|")[1:-1] for line in README.splitlines() if re.match(r"\| [^|]+ frames \|", line)]
    assert len(rows) == 6
    for model, tokens, clusters, steps, _ in rows:
        family = "hunyuan_video" if "Hunyuan" in model else "cosmos" if "Cosmos" in model else "other" if "5B" in model else "wan_t2v"
        config, count = preset_config("auto", family), int(tokens.replace(",", ""))
        assert "{} / {}".format(*config.cluster_counts(count)) == clusters.strip(), model
        total, warmup = map(int, steps.split(","))
        assert max(1, round(config.warmup_fraction * total)) == warmup, model
        width, height, frames = map(int, re.search(r"(\d+) x (\d+), (\d+) frames", model).groups())
        side = 32 if "5B" in model else 16
        assert ((frames - 1) // 4 + 1) * (width // side) * (height // side) == count, model


def test_names():
    """Backends and reasons are called what the program calls them."""
    assert set(re.findall(r"^\| `(\w+)` \| \w+(?: \w+)? \| ", README, re.MULTILINE)) >= set(registry.NAMES)
    row = next(line for line in README.splitlines() if line.startswith("| `SVG2_BACKEND`"))
    assert all(f"`{name}`" in row for name in registry.NAMES)
    reasons = {reason.value for reason in Reason}
    for name in ("warmup", "dense_block", "short_sequence", "unsupported_mask", "unknown_layout"):
        assert f"`{name}`" in README and name in reasons

"""What the documents say that can be checked: links, commands, names, and the settings that auto comes to."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from svg2_pack.svg2_core.ops import registry
from svg2_pack.svg2_core.presets import FAMILIES, PRESETS, preset_config
from svg2_pack.svg2_core.reasons import Reason

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(path for pattern in ("*.md", "cuda/*.md", "web/docs/*.md", "tests/**/*.md") for path in ROOT.glob(pattern))
README, HELP, MODELS, TROUBLESHOOTING, ARCHITECTURE = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", *(f"web/docs/{page}.md" for page in ("SVG2SparseAttention", "models", "troubleshooting", "architecture")))
)
# Each command of the documents, by its script, and where it is run: the test that does, or the record of a run by hand.
COMMANDS = {
    "scripts/demo.py": "tests/demo/test_demo.py",
    "scripts/test.py": ".ci/run",
    "scripts/host.py": "tests/demo/test_demo.py",
    "scripts/launch.py": "scripts/comfy_server.py",  # of every server that the tests start
    "scripts/build_locales.py": "tests/nodes/test_translations.py",  # that what it wrote is what the schemas say
    "scripts/build_workflows.py": "tests/workflows/test_in_the_host.py",
    "scripts/build_thumbnails.py": "tests/browser/test_scripts.py",
    "tests/benchmarks/run.py": "tests/unit/test_benchmark.py",
    "tests/benchmarks/fused.py": "tests/unit/test_benchmark_fused.py",
    "tests/benchmarks/attention_error.py": "tests/models/test_attention_error.py",
    "tests/benchmarks/method_figure.py": "tests/models/test_attention_error.py",
    "cuda/build.py": ".ci/run",
    "scripts/torch_matrix.py": "tests/hosts/TORCH.md",  # by hand: its table
    "tests/engines/raylight_sources.py": "tests/engines/RAYLIGHT.md",  # by hand: its table
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


def test_every_command_exists_and_is_listed():
    """A new one has to say here what runs it. That it runs is that one's to test."""
    pages = [path for path in DOCUMENTS if path.parent in (ROOT, ROOT / "cuda", ROOT / "web/docs")]
    found = {script for path in pages for script in re.findall(r"python ([\w/]+\.py)", path.read_text(encoding="utf-8"))}
    assert found == set(COMMANDS)
    for script, runner in COMMANDS.items():
        assert (ROOT / script).is_file()
        source = (ROOT / runner).read_text(encoding="utf-8")
        named = Path(script).name in source or f'script("{Path(script).stem}")' in source
        assert named, f"{runner} does not run {script}"


def recommended() -> list[list[str]]:
    """The rows of the table of recommended settings."""
    return [line.split("|")[1:-1] for line in MODELS.splitlines() if re.match(r"\| [^|]+ frames \|", line)]


def tokens_of(model: str, width: int, height: int, frames: int) -> int:
    """Of the video as the models cut it up."""
    if "MiniMax" in model:
        return ((frames - 5) // 17 * 5 + 2) * (width // 32) * (height // 32)
    if "LTX" in model:
        return ((frames - 1) // 8 + 1) * (width // 32) * (height // 32)
    side = 32 if "5B" in model else 16
    return ((frames - 1) // 4 + 1 + ("Animate" in model)) * (width // side) * (height // side)


def size_and_steps(prompt: dict) -> tuple[tuple[int, int, int], int]:
    """Of a workflow: width, height and frames, and the steps of its first sampler, or of the last stage's where two stages differ in size."""
    inputs = [node["inputs"] for node in prompt.values()]
    titles = {node["_meta"]["title"]: node["inputs"] for node in prompt.values()}
    if whole := titles.get("Start image, whole size"):  # LTX
        sigmas = [values["sigmas"] for values in inputs if isinstance(values.get("sigmas"), str)]
        return (whole["width"], whole["height"], titles["Frames"]["value"]), sigmas[-1].count(",")
    size = next(tuple(i[key] for key in ("width", "height", "length")) for i in inputs if "length" in i)
    first = titles.get("of these, high noise")
    return size, first["value"] if first else next(i["steps"] for i in inputs if "steps" in i)


def test_recommended_settings():
    """The table's clusters and warm-up are those of the preset."""
    assert len(recommended()) == 15
    for model, tokens, clusters, steps, note in recommended():
        others = any(name in model for name in ("5B", "MiniMax", "LTX"))
        family = "hunyuan_video" if "Hunyuan" in model else "cosmos" if "Cosmos" in model else "other" if others else "wan_t2v"
        config, count = preset_config("auto", family), int(tokens.replace(",", ""))
        assert "{} / {}".format(*config.cluster_counts(count)) == clusters.strip(), model
        total = int(steps)
        assert config.warmup_fraction == 0 and config.dense_blocks == "", "the text below the table says so"
        width, height, frames = map(int, re.search(r"(\d+) x (\d+), (\d+) frames", model).groups())
        assert tokens_of(model, width, height, frames) == count, model
        if "Wan 2.2 14B" in model:  # warm-up is counted in the sampler that begins
            first, in_all = map(int, re.search(r"the first sampler has (\d+) of the (\d+) steps", note).groups())
            assert first == total and in_all == 2 * first, model


@pytest.mark.parametrize("path", sorted((ROOT / "workflows/api").glob("*.json")), ids=lambda path: path.stem)
def test_recommended_settings_have_every_workflow(path):
    """Its size, and the steps of its first sampler."""
    prompt = json.loads(path.read_text(encoding="utf-8"))
    size, steps = size_and_steps(prompt)
    assert any("{} x {}, {} frames".format(*size) in model and int(row[1]) == steps for model, _, *row in recommended())


def test_presets():
    """The help page's table is what the presets are."""
    section = HELP.split("## Presets")[1].split("With `paper`")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    assert [re.findall(r"`(\w+)`", row[0]) for row in rows] == [["auto", "balanced"], ["quality"], ["turbo"], ["paper"]]
    for names, pairs, warmup, kmeans, skipped in rows:
        for name in re.findall(r"`(\w+)`", names):
            for family in FAMILIES if name != "paper" else ("wan_t2v", "other"):
                config = preset_config(name, family)
                rule = f"top_p {config.top_p:g}, min_k_ratio {config.min_k_ratio:g}" if config.density is None else f"density {config.density:.0%}"
                assert rule == pairs, name
                assert (f"{config.warmup_fraction:.0%} of the steps" if config.warmup_fraction else "none") == warmup, name
                assert f"{config.kmeans_init_iters} + {config.kmeans_iters}" == kmeans, name
                assert {"off": "dropped", "first_order": "first order"}[config.compensation] == skipped, name
    text = " ".join(HELP.split())
    paper = {family: preset_config("paper", family) for family in FAMILIES}
    shares = [f"{paper[family].warmup_fraction:.0%}" for family in ("wan_i2v", "hunyuan_video", "cosmos")]
    assert "warm-up is {} for Wan checkpoints with image channels, {} for HunyuanVideo and {} for Cosmos".format(*shares) in text
    assert all(preset_config(name, family).dense_blocks == ("0" if name == "paper" else "") for name in PRESETS for family in FAMILIES)
    clusters = {(name, family): preset_config(name, family).cluster_counts(75_600) for name in PRESETS for family in FAMILIES}
    others = {key: clusters.pop(key) for key in (("paper", "hunyuan_video"), ("paper", "cosmos"))}
    assert set(clusters.values()) == {(300, 1000)} and "300 of queries and 1000 of keys at 75,600 tokens" in text
    assert "`paper` has {} of queries for HunyuanVideo and {} for Cosmos".format(*(q for q, _ in others.values())) in text


def test_the_snippet_runs():
    """From the checkout's root, with nothing but what the text says is given."""
    text, snippet = re.search(r"(The core alone[^\n]*\n[^`]*(?:`[^`\n]+`[^`]*)+)```python\n(.+?)```", ARCHITECTURE, re.DOTALL).groups()
    given = ("q", "k", "v", "q2", "k2", "v2")
    assert all(f"`{name}`" in text for name in given)
    inputs = f"import torch\n{', '.join(given)} = torch.randn(6, 1, 2, 320, 64, generator=torch.Generator().manual_seed(0))\n"
    check = "\nassert step2.out.shape == q.shape and step2.out.isfinite().all() and 0 < result.density < 1"
    done = subprocess.run([sys.executable, "-c", inputs + snippet + check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names():
    """Backends and reasons are called what the program calls them."""
    assert set(re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| ", ARCHITECTURE, re.MULTILINE)) >= set(registry.NAMES)
    row = next(line for line in ARCHITECTURE.splitlines() if line.startswith("| `SVG2_BACKEND`"))
    assert all(f"`{name}`" in row for name in registry.NAMES)
    never_shown = {Reason.NOT_VIDEO_SELF_ATTENTION, Reason.NO_RUN, Reason.DISABLED}
    shown = {reason.value for reason in Reason} - {reason.value for reason in never_shown}
    explained = {name for line in TROUBLESHOOTING.splitlines() if line.count("|") == 4 for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert shown <= explained
    assert all(f"`{name}`" in HELP for name in shown)


def test_the_readme_is_short():
    """What it does, a picture and how to get it; all else is a page of its own, which it names."""
    assert len(README.splitlines()) <= 250
    pages = {path.name for path in (ROOT / "web/docs").glob("*.md")}
    assert pages == set(re.findall(r"\(web/docs/(\w+\.md)[#)]", README))
    assert "**Not run on a GPU yet.**" in README and "None has been run with its real weights yet" in README


LAWS = [line for line in (ROOT / "tests/LAWS.md").read_text(encoding="utf-8").splitlines() if re.match(r"\| (?!law |-)", line)]


@pytest.mark.parametrize("law", LAWS, ids=lambda line: line.split("|")[1].strip()[:60])
def test_each_law_has_its_test(law):
    """The files and functions that hold it are there."""
    _, _, held, _ = law.split("|")
    files = re.findall(r"\]\(([\w/]+\.py)\)", held)
    defined = {name for file in files for name in re.findall(r"def (test_\w+)", (ROOT / "tests" / file).read_text(encoding="utf-8"))}
    named = re.findall(r"`(test_\w+)`", held)
    assert files and named and set(named) <= defined, set(named) - defined

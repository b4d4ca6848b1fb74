"""Each workflow against the host's description of its nodes, read from the files as a user's editor reads them."""

import re
from collections import Counter
from itertools import combinations

import pytest
from PIL import Image
from shipped import BUILT, FOLDER, NOTE, PRIMITIVES, ROOT, api, declared_inputs, editor

pytestmark = [pytest.mark.xdist_group("workflows"), pytest.mark.parametrize("name", BUILT)]

TITLE = 30  # height of the title above a node
TWO_EXPERTS = {"wan2.2_t2v_14B", "wan2.2_i2v_14B", "wan2.2_t2v_14B_4steps"}  # a model for each stage, with an SVG2 of its own
TWO_STAGES = {"ltx2.3_i2v", "ltx2.5_i2v"}  # one model samples twice


def nodes_of(graph: dict) -> dict:
    """The graph's nodes that the server knows."""
    return {node["id"]: node for node in graph["nodes"] if node["type"] != NOTE}


def test_ids_are_unique_and_counted(name):
    graph = editor(name)
    nodes, links = [node["id"] for node in graph["nodes"]], [link[0] for link in graph["links"]]
    assert max(Counter(nodes).values()) == 1 and max(nodes) == graph["last_node_id"]
    assert max(Counter(links).values()) == 1 and max(links) == graph["last_link_id"]
    assert not graph.get("definitions"), "plain graphs: users see everything"


def test_links_fit_at_both_ends(queue, name):
    graph = editor(name)
    nodes = nodes_of(graph)
    for number, origin, slot, target, socket, kind in graph["links"]:
        leaving, arriving = nodes[origin]["outputs"][slot], nodes[target]["inputs"][socket]
        assert number in leaving["links"] and arriving["link"] == number
        assert queue.info[nodes[origin]["type"]]["output"][slot] == kind == leaving["type"]
        assert declared_inputs(queue.info[nodes[target]["type"]])[arriving["name"]][0] == kind == arriving["type"]
    # Nothing else claims to be linked, and nothing that has to be linked is not.
    numbers = {link[0] for link in graph["links"]}
    for node in nodes.values():
        info = queue.info[node["type"]]
        assert {n for output in node["outputs"] for n in output["links"]} <= numbers
        assert [output["type"] for output in node["outputs"]] == info["output"]
        linked = {entry["name"] for entry in node["inputs"] if entry["link"] in numbers}
        assert linked == {entry["name"] for entry in node["inputs"] if entry["link"] is not None}
        required = info["input"].get("required", {})
        needed = {
            key for key, (kind, *_) in declared_inputs(info).items() if key in required and kind not in PRIMITIVES
        }
        assert needed <= linked, node["type"]


def test_widget_values(queue, name):
    """As many as the editor expects, of the right types, within range, and among the choices."""
    for node in nodes_of(editor(name)).values():
        values = list(node["widgets_values"])
        for key, (kind, options, choices) in declared_inputs(queue.info[node["type"]]).items():
            if kind not in PRIMITIVES:
                continue
            where = f"{node['type']}.{key}"
            assert values, f"{where}: no value"
            value = values.pop(0)
            if choices is not None:
                assert value in choices, where
            elif kind in ("INT", "FLOAT"):
                assert type(value) in ((int,) if kind == "INT" else (int, float)), where
                assert options.get("min", value) <= value <= options.get("max", value), where
                if kind == "INT" and key in ("width", "height", "length", "temporal_size"):
                    steps = (value - options["min"]) / options["step"]
                    assert steps == int(steps), f"{where}: not one of the sizes that the editor offers"
            else:
                assert type(value) is {"STRING": str, "BOOLEAN": bool}[kind], where
            if options.get("control_after_generate"):
                assert values.pop(0) == "fixed", "so that two runs can be compared"
            if options.get("image_upload") or options.get("video_upload"):
                assert values.pop(0) == "image"
        assert values == [], node["type"]


def test_nothing_overlaps(name):
    graph = editor(name)
    boxes = {n["id"]: (n["pos"][0], n["pos"][1] - TITLE, n["size"][0], n["size"][1] + TITLE) for n in graph["nodes"]}
    groups = {group["title"]: tuple(group["bounding"]) for group in graph["groups"]}
    for things in (boxes, groups):
        for (a, one), (b, other) in combinations(things.items(), 2):
            apart = [one[i] + one[i + 2] <= other[i] or other[i] + other[i + 2] <= one[i] for i in (0, 1)]
            assert any(apart), f"{a} and {b} overlap"
    for number, box in boxes.items():
        around = [
            title
            for title, group in groups.items()
            if all(group[i] <= box[i] and box[i] + box[i + 2] <= group[i] + group[i + 2] for i in (0, 1))
        ]
        assert len(around) == 1, f"node {number} is in the groups {around}"


def test_each_file_can_be_downloaded_from_its_loader(queue, name):
    """And the notes list exactly those files."""
    graph, wanted = editor(name), set()
    for node in nodes_of(graph).values():
        chosen = [value for value in node["widgets_values"] if str(value).endswith(".safetensors")]
        entries = node["properties"].get("models", [])
        assert [entry["name"] for entry in entries] == chosen, node["type"]
        for entry in entries:
            assert re.fullmatch(r"https://huggingface\.co/[^?\s]+/resolve/main/[^?\s]+", entry["url"])
            assert entry["url"].rpartition("/")[2] == entry["name"]
            wanted.add((entry["name"], entry["url"], entry["directory"]))
    [note] = [n["widgets_values"][0] for n in graph["nodes"] if n.get("title") == "Files to download"]
    listed, directory = set(), None
    for line in note.splitlines():
        if found := re.fullmatch(r"\*\*models/(\w+)\*\*", line):
            directory = found[1]
        elif found := re.fullmatch(r"- \[(.+)\]\((.+)\)", line):
            listed.add((found[1], found[2], directory))
    assert listed == wanted


def test_nodes_say_which_pack_they_are_from(queue, name):
    import host

    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    pack = re.search(r'^name = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    for node in nodes_of(editor(name)).values():
        ours = node["type"].startswith("SVG2")
        assert node["properties"]["cnr_id"] == (pack if ours else "comfy-core")
        assert node["properties"]["ver"] == (version if ours else host.VERSION)
        assert node["properties"]["Node name for S&R"] == node["type"]


def test_notes_promise_no_speed(name):
    """Nothing has been measured on a GPU yet."""
    promise = re.compile(r"\bfast|speed|\bquick|\d ?x\b(?! \d)|\bseconds?\b|\bminutes?\b", re.IGNORECASE)
    notes = [node["widgets_values"][0] for node in editor(name)["nodes"] if node["type"] == NOTE]
    assert len(notes) >= 3 and not any(map(promise.search, notes))


def test_svg2_stands_last_before_a_sampler_and_is_reported(name):
    prompt = api(name)

    def behind(number: str, key: str | None = None) -> list[str]:
        """The nodes fed by a node, at the input `key` if given."""
        fed = [(i, k, v) for i, node in prompt.items() for k, v in node["inputs"].items() if isinstance(v, list)]
        return [i for i, k, v in fed if v[0] == number and key in (None, k)]

    def before(number: str) -> set[str]:
        """The nodes that a node waits for."""
        direct = {v[0] for v in prompt[number]["inputs"].values() if isinstance(v, list)}
        return direct.union(*map(before, direct))

    patched = [i for i, node in prompt.items() if node["class_type"] == "SVG2SparseAttention"]
    assert len(patched) == (2 if name in TWO_EXPERTS else 1)
    for number in patched:
        samplers = behind(number, "model")
        while len(samplers) == 1 and prompt[samplers[0]]["class_type"] in ("BasicGuider", "CFGGuider"):
            samplers = behind(samplers[0])
        assert len(samplers) == (2 if name in TWO_STAGES else 1)
        assert all("Sampler" in prompt[i]["class_type"] for i in samplers)
        [last] = [i for i in samplers if set(samplers) - {i} <= before(i)]
        [report] = behind(number, "stats")
        assert prompt[report]["class_type"] == "SVG2Report"
        assert prompt[report]["inputs"]["samples"] == [last, 0], "the report is made after this very sampler"
        source = prompt[number]["inputs"]["model"][0]
        assert prompt[source]["class_type"] in ("ModelSamplingSD3", "UNETLoader", "LoraLoaderModelOnly")


def test_a_newer_host_is_asked_for_where_one_is_needed(name):
    from workflows.recipes_with_sound import NEEDS

    notes = "\n".join(node["widgets_values"][0] for node in editor(name)["nodes"] if node["type"] == NOTE)
    assert re.findall(r"ComfyUI (\S+) or newer", notes) == ([NEEDS[name]] if name in NEEDS else [])


def test_its_picture_fits_the_template_browser(name):
    path = FOLDER / f"{name}.jpg"
    assert path.stat().st_size < 150_000
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "JPEG" and picture.width == 1280 and 400 < picture.height < 1280

"""Workflow files: from what the ComfyUI editor saves to what its server's /prompt takes, and the demo's changes to them."""

from host import SetupError

PATCH, SAVE = "SVG2SparseAttention", "SVG2DemoSave"
WIDGETS = {"COMFY_DYNAMICCOMBO_V3", "INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
CONTROLS = {"fixed", "increment", "increment-wrap", "decrement", "randomize"}
MUTED, BYPASSED = 2, 4


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """Turn a saved workflow into the API format; one that is in it already is returned as it is.

    `object_info` is the server's own description of its nodes. Raises SetupError on what the server could not run.
    """
    if "nodes" not in workflow:
        return workflow
    return _Converter(workflow, object_info).prompt()


class _Converter:
    def __init__(self, workflow: dict, object_info: dict):
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
        self.info = object_info

    def prompt(self) -> dict:
        return {
            str(i): self.node(n)
            for i, n in self.nodes.items()
            if n.get("mode") not in (MUTED, BYPASSED) and not self.editor_only(n)
        }

    def editor_only(self, node: dict) -> bool:
        return node["type"] in ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")

    def node(self, node: dict) -> dict:
        if node["type"] not in self.info:
            raise SetupError(
                f"The workflow uses the node {node['type']}, which this ComfyUI does not have: remove it, or install what brings it."
            )
        spec = self.info[node["type"]]["input"]
        inputs = _widget_values(
            node.get("widgets_values") or [], {**spec.get("required", {}), **spec.get("optional", {})}
        )
        for entry in node.get("inputs", []):
            if entry.get("link") is not None and (source := self.source(entry["link"])) is not None:
                inputs[entry["name"]] = source
        return {"class_type": node["type"], "inputs": inputs}

    def source(self, link: int):
        """What feeds a link: `[node id, output slot]`, a value, or None; sees through reroutes and bypassed nodes."""
        origin, slot = self.links[link]
        node = self.nodes.get(origin, {"type": None, "mode": MUTED})
        if node["type"] == "PrimitiveNode":
            return node["widgets_values"][0]
        if node["type"] == "Reroute" or node.get("mode") == BYPASSED:
            kind = node["outputs"][slot]["type"]
            for entry in node.get("inputs", []):
                if entry.get("link") is not None and (node["type"] == "Reroute" or entry["type"] == kind):
                    return self.source(entry["link"])
            return None
        return None if node.get("mode") == MUTED else [str(origin), slot]


def _widget_values(saved: list | dict, spec: dict) -> dict:
    """Name a node's saved values, which follow the order of its inputs; one that was not saved is at its default."""
    if isinstance(saved, dict):
        return dict(saved)
    saved, values = list(saved), {}
    for name, (kind, *rest) in spec.items():
        options = rest[0] if rest else {}
        if options.get("forceInput") or not (isinstance(kind, list) or kind.split(",")[0] in WIDGETS):
            continue  # of several types, "FLOAT,INT", the first one has the widget
        if not saved:
            if "default" in options:
                values[name] = options["default"]
            continue
        values[name] = saved.pop(0)
        # The editor keeps a second widget beside seeds and uploads, which the server knows nothing of.
        upload = any(option.endswith("_upload") for option in options)
        if saved and ((kind == "INT" and str(saved[0]) in CONTROLS) or (upload and saved[0] == "image")):
            saved.pop(0)
    return values


def prepare(prompt: dict, object_info: dict, enabled: bool, name: str) -> dict:
    """Copy `prompt` with SVG2 switched on or off, its save and preview nodes replaced by one that hands the frames to the demo."""
    prompt = {i: {**node, "inputs": dict(node["inputs"])} for i, node in prompt.items()}
    patches = [i for i, node in prompt.items() if node["class_type"] == PATCH]
    if not 1 <= len(patches) <= 2:
        raise SetupError(
            f"The workflow has {len(patches)} SVG2 Sparse Attention nodes: it needs one between each model and its sampler, two at most."
        )
    for i in patches:
        prompt[i]["inputs"]["enabled"] = enabled
    outputs = [i for i, node in prompt.items() if object_info.get(node["class_type"], {}).get("output_node")]
    images = next((source for i in outputs if (source := _image_behind(prompt, object_info, i))), None)
    if images is None:
        raise SetupError("The workflow saves no pictures: give it a save or preview node fed from its decoder.")
    save = {"images": images, "name": name}
    save.update({key: [i, 1] for key, i in zip(("stats", "stats_2"), patches, strict=False)})
    for i in outputs:
        del prompt[i]
    return {**prompt, "svg2_demo_save": {"class_type": SAVE, "inputs": save}}


def _image_behind(prompt: dict, object_info: dict, start: str):
    """The nearest IMAGE output upstream of a node, e.g. the decoder behind SaveVideo and CreateVideo."""
    queue, seen = [start], set()
    while queue:
        i = queue.pop(0)
        if i in seen or i not in prompt:
            continue
        seen.add(i)
        for source in prompt[i]["inputs"].values():
            if isinstance(source, list) and len(source) == 2 and source[0] in prompt:
                kinds = object_info[prompt[source[0]]["class_type"]]["output"]
                if kinds[source[1]] == "IMAGE":
                    return source
                queue.append(source[0])
    return None


def frame_rate(prompt: dict) -> float:
    """Frames per second the workflow asks for; Wan's 16 if it does not say."""
    rates = [node["inputs"].get(key) for node in prompt.values() for key in ("fps", "frame_rate")]
    return next((float(rate) for rate in rates if isinstance(rate, (int, float))), 16.0)

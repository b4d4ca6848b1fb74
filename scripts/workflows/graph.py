"""A small builder of graphs: nodes go into columns, top to bottom; links follow from how their inputs are given.

    g = Graph("name", object_info)
    g.column(width=360)
    g.group("Load")
    loader = g.add("UNETLoader", unet_name=file, weight_dtype="default")
    shift = g.add("ModelSamplingSD3", model=loader["MODEL"], shift=8.0)
    g.editor(), g.api()

An input is either the output of another node or a widget's value; a ModelFile stands for its name and leaves a download
entry on the node. Everything is checked against the host's object_info while it is built: a wrong name or a wrong type
of link is an error here, not in the user's browser.
"""

import re
from dataclasses import dataclass, field

import host

from .files import ModelFile

PACK = "svg2-sparse-attention"
VALUES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}  # kinds of input that are widgets
BYPASSED = 4
UPLOADS = ("image_upload", "video_upload")  # options beside whose widget the editor keeps another one

# Heights in the editor: a row of sockets, a row with a widget, what surrounds them, and the title above a node.
SLOT, WIDGET, FRAME, TITLE = 20, 24, 6, 30
NODE_GAP, GROUP_GAP, COLUMN_GAP, PADDING, HEADING = 26, 30, 64, 14, 44


def is_widget(kind: str) -> bool:
    """Whether the editor shows an input of this type as a widget. Of several types, "FLOAT,INT", the first one counts."""
    return kind.split(",")[0] in VALUES


@dataclass(frozen=True)
class Output:
    node: "Node"
    slot: int
    type: str


@dataclass
class Node:
    id: int
    type: str
    title: str | None
    mode: int
    info: dict
    values: dict = field(default_factory=dict)  # input name -> value or Output
    files: list = field(default_factory=list)
    pos: tuple = (0, 0)
    size: tuple = (0, 0)

    def __getitem__(self, name: str) -> Output:
        slot = self.info["output_name"].index(name)
        return Output(self, slot, self.info["output"][slot])

    def specs(self) -> dict:
        """Input name -> (type, options), in the order in which the editor keeps widget values."""
        given = {**self.info["input"].get("required", {}), **self.info["input"].get("optional", {})}
        found = {}
        for name, (kind, *rest) in given.items():
            found[name] = ("COMBO" if isinstance(kind, list) else kind, rest[0] if rest else {})
        return found

    def widgets(self) -> list:
        """The saved values: those of the inputs, and the editor's own widgets beside seeds and uploads."""
        values = []
        for name, (kind, options) in self.specs().items():
            if not is_widget(kind):
                continue
            given = self.values.get(name, options.get("default"))
            values.append(options.get("default", 0) if isinstance(given, Output) else given)
            if options.get("control_after_generate"):
                values.append("fixed")
            if any(map(options.get, UPLOADS)):
                values.append("image")
        return values

    def sockets(self) -> list[tuple[str, str, bool, bool]]:
        """(name, type, is it a widget, is it optional): the inputs that links can end in, as the editor saves them."""
        rows = []
        for name, (kind, _) in self.specs().items():
            if not is_widget(kind) or isinstance(self.values.get(name), Output):
                optional = name in self.info["input"].get("optional", {})
                rows.append((name, kind, is_widget(kind), optional))
        return sorted(rows, key=lambda row: row[2])  # sockets before widgets, otherwise in order

    def least_height(self) -> int:
        """Of the node in the editor's classic renderer."""
        sockets = sum(not widget for _, _, widget, _ in self.sockets())
        widgets = len(self.widgets())
        return max(sockets, len(self.info["output"])) * SLOT + (widgets * WIDGET + 8 if widgets else 0) + FRAME


NOTE = {"input": {}, "output": [], "output_name": [], "display_name": "Note"}


class Graph:
    def __init__(self, name: str, object_info: dict):
        self.name, self.info = name, object_info
        self.nodes: list[Node] = []
        self.links: list[tuple] = []  # id, from, slot, to, input name, type
        self.groups: list[dict] = []
        self.x, self.y, self.width, self.heads = 0, 0, 0, 0

    # --- layout ---

    def column(self, width: int) -> None:
        """What follows goes into a new column, right of the last one."""
        if self.width:
            self.x += self.width + COLUMN_GAP
        self.width, self.y, self.current = width, 0, None

    def group(self, title: str, color: str = "#3f789e") -> None:
        """What follows in this column is framed under a title."""
        if self.current:
            self.y = self.current["bounding"][1] + self.current["bounding"][3] + GROUP_GAP
        self.current = {"id": len(self.groups) + 1, "title": title, "color": color, "font_size": 24, "flags": {}}
        self.current["bounding"] = [self.x - PADDING, self.y, self.width + 2 * PADDING, 0]
        self.groups.append(self.current)
        self.y += HEADING

    def place(self, node: Node, height: int) -> None:
        if self.current["bounding"][3]:
            self.y += NODE_GAP
        self.y += TITLE
        node.pos, node.size = (self.x, self.y), (self.width, height)
        self.y += height
        # Twice the padding below: some nodes are a little taller in Nodes 2.0.
        self.current["bounding"][3] = self.y + 2 * PADDING - self.current["bounding"][1]

    def room(self, height: int) -> None:
        """Left free under the last node, which grows when it has something to show: a video, a run's progress."""
        self.y += height
        self.current["bounding"][3] += height

    # --- nodes ---

    def add(self, kind: str, title: str | None = None, tall: int = 0, bypassed: bool = False, **inputs) -> Node:
        """A node of the host's type `kind`. tall: its height where it wants more than it needs, for text or pictures."""
        node = Node(len(self.nodes) + 1, kind, title, BYPASSED if bypassed else 0, self.info[kind])
        specs = node.specs()
        for name, value in inputs.items():
            wanted = specs[name][0]
            if isinstance(value, Output):
                if value.type != wanted:
                    raise TypeError(f"{self.name}: {kind}.{name} takes {wanted}, not {value.type}")
                self.links.append((len(self.links) + 1, value.node.id, value.slot, node.id, name, value.type))
            elif isinstance(value, ModelFile):
                node.files.append(value)
                value = value.name
            node.values[name] = value
        self.nodes.append(node)
        self.place(node, max(tall, node.least_height()))
        return node

    def note(self, title: str, text: str, height: int) -> None:
        node = Node(len(self.nodes) + 1, "MarkdownNote", title, 0, NOTE, {"text": text})
        self.nodes.append(node)
        self.place(node, height)

    def files(self) -> list[ModelFile]:
        return list(dict.fromkeys(file for node in self.nodes for file in node.files))

    # --- what is written ---

    def editor(self) -> dict:
        """As the editor saves it, and as users drag it in; without an id, so that one opened twice is two graphs."""
        return {
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": [self._editor_node(node, order) for order, node in enumerate(self.nodes)],
            "links": [self._editor_link(link) for link in self.links],
            "groups": self.groups,
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _editor_link(self, link: tuple) -> list:
        number, origin, slot, target, name, kind = link
        names = [row[0] for row in self.nodes[target - 1].sockets()]
        return [number, origin, slot, target, names.index(name), kind]

    def _editor_node(self, node: Node, order: int) -> dict:
        into = {name: number for number, _, _, target, name, _ in self.links if target == node.id}
        inputs = []
        for name, kind, widget, optional in node.sockets():
            entry = {"name": name, "type": kind, "link": into.get(name)}
            if optional and not widget:
                entry["shape"] = 7  # drawn hollow
            if widget:
                entry["widget"] = {"name": name}
            inputs.append(entry)
        outputs = []
        for slot, (name, kind) in enumerate(zip(node.info["output_name"], node.info["output"], strict=True)):
            leaving = [number for number, origin, s, *_ in self.links if (origin, s) == (node.id, slot)]
            outputs.append({"name": name, "type": kind, "links": leaving})
        saved = {
            "id": node.id,
            "type": node.type,
            "pos": list(node.pos),
            "size": list(node.size),
            "flags": {},
            "order": order,
            "mode": node.mode,
            "inputs": inputs,
            "outputs": outputs,
            "properties": self._properties(node),
            "widgets_values": [node.values["text"]] if node.type == "MarkdownNote" else node.widgets(),
        }
        if node.title:
            saved["title"] = node.title
        if node.type == "MarkdownNote":
            saved.update(color="#432", bgcolor="#653")
        return saved

    def _properties(self, node: Node) -> dict:
        if node.type == "MarkdownNote":
            return {}
        pack, version = (PACK, pack_version()) if node.type.startswith("SVG2") else ("comfy-core", host.VERSION)
        properties = {"cnr_id": pack, "ver": version, "Node name for S&R": node.type}
        if node.files:
            properties["models"] = [file.entry() for file in node.files]
        return properties

    def api(self) -> dict:
        """As the server's /prompt takes it: what the editor's Export (API) gives."""
        run = [node for node in self.nodes if node.type != "MarkdownNote" and not node.mode]
        return {str(node.id): self._api_node(node) for node in run}

    def _api_node(self, node: Node) -> dict:
        inputs = {}
        for name, (kind, options) in node.specs().items():
            value = node.values.get(name, options.get("default") if is_widget(kind) else None)
            if isinstance(value, Output):
                if value.node.mode == BYPASSED:  # nothing comes out of it: it has no input of that type to pass on
                    continue
                value = [str(value.node.id), value.slot]
            if value is not None:
                inputs[name] = value
        title = node.title or node.info["display_name"] or node.type
        return {"class_type": node.type, "inputs": inputs, "_meta": {"title": title}}


def pack_version() -> str:
    text = (host.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1]

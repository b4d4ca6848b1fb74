// The pack's front-end extension: live status in the SVG2 node, text in the others. The server's side is nodes/live.py.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { Panel } from "./panel.js";
import { nodeOf } from "./places.js";
import { showOutput } from "./text.js";
import { loadWords } from "./words.js";

const EVENT = "svg2.status";
const PATCH = "SVG2SparseAttention";
const TEXT = new Set(["SVG2Report", "SVG2Compare", "SVG2Doctor", "SVG2FusedOps"]);

const latest = new Map(); // by graph and node: panels come and go with tabs, undo and subgraphs, what a run said stays
let presets;

function show(message) {
  nodeOf(message)?.svg2Panel?.show(message);
}

function receive(message) {
  const key = `${message.graph}|${message.node}`;
  latest.delete(key); // the newest last
  latest.set(key, message);
  if (latest.size > 256) latest.delete(latest.keys().next().value);
  show(message);
}

/** A reloaded tab, or one that lost its connection, asks once for what it missed. */
async function catchUp() {
  const client = api.clientId ?? api.initialClientId;
  if (!client) return;
  try {
    const response = await api.fetchApi(`/svg2/status?client_id=${encodeURIComponent(client)}`);
    for (const message of await response.json()) receive(message);
  } catch (error) {
    console.warn("SVG2: no status of earlier runs", error);
  }
}

app.registerExtension({
  name: "svg2.status",
  async init() {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("svg2.css", import.meta.url).href;
    document.head.append(style);
    api.addEventListener(EVENT, ({ detail }) => receive(detail));
    api.addEventListener("reconnected", catchUp);
    await loadWords();
  },
  async setup() {
    await catchUp();
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name === PATCH) presets = nodeData.input?.optional?.preset?.[1]?.svg2_presets;
    if (!TEXT.has(nodeData.name)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      showOutput(this, output);
    };
  },
  nodeCreated(node) {
    if (node.comfyClass === PATCH) node.svg2Panel = new Panel(node, presets);
    if (TEXT.has(node.comfyClass)) node.setSize([Math.max(node.size[0], 240), node.size[1]]); // a node without inputs is too narrow for its title
  },
  loadedGraphNode(node) {
    if (node.comfyClass === PATCH) node.svg2Panel?.idle(); // its knobs have their saved values now
  },
  afterConfigureGraph() {
    for (const message of latest.values()) show(message);
  },
});

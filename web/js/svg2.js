// The pack's front-end extension: live status in the SVG2 node, text in the others. The server's side is nodes/telling/live.py.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { Panel } from "./panel.js";
import { nodeOf } from "./places.js";
import { receiveOutput, restoreOutputs } from "./text.js";
import { loadWords } from "./words.js";

const EVENT = "svg2.status";
const PATCH = "SVG2SparseAttention";
const TEXT = new Set(["SVG2Report", "SVG2Compare", "SVG2Doctor", "SVG2FusedOps"]);

const latest = new Map(); // by graph and node: panels come and go with tabs, undo and subgraphs, what a run said stays
let presets;

function show(message) {
  const node = nodeOf(message);
  // Instances of a subgraph share their nodes.
  const shared = node && [...latest.values()].some((other) => other.node !== message.node && nodeOf(other) === node);
  node?.svg2Panel?.show(message, shared ? message.node : "");
}

const keyOf = ({ graph, node }) => `${graph}|${node}`;

function receive(message) {
  const key = keyOf(message);
  if (latest.get(key)?.serial > message.serial) return; // an answer that was on its way for longer
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
    const asked = [...latest.values()];
    const response = await api.fetchApi(`/svg2/status?client_id=${encodeURIComponent(client)}`);
    const known = await response.json();
    for (const message of known) receive(message);
    // A run that the server no longer knows: it was started again meanwhile.
    const keys = new Set(known.map(keyOf));
    for (const message of asked) if (message.state === "sampling" && !keys.has(keyOf(message))) receive({ ...message, state: "lost" });
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
      receiveOutput(this, output);
    };
  },
  nodeCreated(node) {
    if (node.comfyClass === PATCH) node.svg2Panel = new Panel(node, presets);
    if (TEXT.has(node.comfyClass)) node.setSize([Math.max(node.size[0], 420), node.size[1]]); // wide enough for its text
  },
  onNodeOutputsUpdated() {
    restoreOutputs(TEXT);
  },
  afterConfigureGraph() {
    for (const message of latest.values()) show(message);
    restoreOutputs(TEXT);
  },
});

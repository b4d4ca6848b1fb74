// The text, and the file to download, that the pack's other nodes show after a run.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { say } from "./words.js";

const STORE = "svg2.text";
const MOST = 32; // outputs kept
const MARGIN = 10; // the classic renderer's, above and below the element
const HEIGHT = 120; // at least, margins included

const kept = new Map(Object.entries(stored())); // by graph and node: nodes come and go with tabs, undo and reloads, what a run said stays

/** A node ran. -> whether it said anything */
export function receiveOutput(node, output) {
  if (!output?.text?.join) return false;
  keep(keyOf(node), { text: output.text, svg2_json: output.svg2_json });
  show(node, output);
  return true;
}

/** The graph's nodes were made anew (undo, another tab, a file, a reload), or the host recalled the outputs of the tab it opened. */
export function restoreOutputs(types) {
  const root = app.rootGraph ?? app.graph;
  if (!root) return;
  for (const graph of [root, ...(root.subgraphs?.values() ?? [])]) {
    for (const node of graph.nodes) if (types.has(node.comfyClass)) restore(node);
  }
}

/** The host may know of a run that ended while its tab was in the background; what was kept outlives the host's store. */
function restore(node) {
  if (receiveOutput(node, app.nodeOutputs?.[locatorOf(node)])) return;
  const output = kept.get(keyOf(node));
  if (output) show(node, output);
}

function show(node, output) {
  const box = node.svg2Text ?? addBox(node);
  box.pre.textContent = output.text.join("\n");
  const [file] = output.svg2_json ?? [];
  box.link.hidden = !file;
  if (file) {
    box.link.href = api.apiURL(`/view?${new URLSearchParams(file)}`);
    box.link.download = file.filename;
    box.link.textContent = say("report.download");
  }
}

/** Made at the first text: a node that never ran has no empty box. */
function addBox(node) {
  const element = document.createElement("div");
  element.className = "svg2-text";
  element.style.minHeight = `${HEIGHT - 2 * MARGIN}px`; // Nodes 2.0 asks the element, not the widget
  const pre = element.appendChild(document.createElement("pre"));
  const link = element.appendChild(document.createElement("a"));
  const widget = node.addDOMWidget("svg2_text", "svg2_text", element, { serialize: false, hideOnZoom: false, margin: MARGIN, getMinHeight: () => HEIGHT });
  widget.serialize = false;
  makeRoom(node);
  return (node.svg2Text = { pre, link });
}

/** Only as much as is missing: the size is saved, and a node loaded from a file has had its box before. */
function makeRoom(node) {
  if (window.LiteGraph?.vueNodesMode) return; // there a node grows with its contents
  const [width, height] = node.size;
  const least = node.computeSize()[1];
  if (height < least) node.setSize([width, least]);
}

/** The node's key in the host's own store of outputs: all instances of a subgraph share it. */
function locatorOf({ graph, id }) {
  return graph && graph !== graph.rootGraph ? `${graph.id}:${id}` : String(id);
}

function keyOf(node) {
  return `${node.graph?.rootGraph?.id}|${locatorOf(node)}`;
}

/** What the tab knew before the page was reloaded. */
function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(STORE)) ?? {};
  } catch {
    return {};
  }
}

function keep(key, output) {
  kept.delete(key); // the newest last
  kept.set(key, output);
  if (kept.size > MOST) kept.delete(kept.keys().next().value);
  try {
    sessionStorage.setItem(STORE, JSON.stringify(Object.fromEntries(kept)));
  } catch (error) {
    console.warn("SVG2: the texts will not outlive a reload", error); // no room, or not allowed
  }
}

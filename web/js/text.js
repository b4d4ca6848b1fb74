// The text, and the file to download, that the pack's other nodes show after a run.
import { api } from "../../../scripts/api.js";
import { say } from "./words.js";

export function showOutput(node, output) {
  const text = output?.text?.join?.("\n");
  if (text === undefined) return;
  const box = node.svg2Text ?? addBox(node);
  box.pre.textContent = text;
  const [file] = output.svg2_json ?? [];
  box.link.hidden = !file;
  if (file) {
    box.link.href = api.apiURL(`/view?${new URLSearchParams(file)}`);
    box.link.download = file.filename;
    box.link.textContent = say("report.download");
  }
}

function addBox(node) {
  const element = document.createElement("div");
  element.className = "svg2-text";
  const pre = element.appendChild(document.createElement("pre"));
  const link = element.appendChild(document.createElement("a"));
  const widget = node.addDOMWidget("svg2_text", "svg2_text", element, { serialize: false, hideOnZoom: false, getMinHeight: () => 120 });
  widget.serialize = false;
  const [width, height] = node.size;
  node.setSize([Math.max(width, 420), height + 130]);
  return (node.svg2Text = { pre, link });
}

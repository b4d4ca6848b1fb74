// A help page of the pack in the host's own dialog.
import { app } from "../../../scripts/app.js";

const DOCS = new URL("../docs/", import.meta.url);

export async function openHelp(page) {
  const address = new URL(`${page}.md`, DOCS).href;
  const box = document.createElement("div");
  box.className = "svg2-help";
  try {
    fill(box, await read(address), address);
  } catch (error) {
    console.warn("SVG2: no help page", error);
    fillPlain(box, error.message, address);
  }
  app.ui.dialog.show(box);
}

async function read(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${response.status} ${response.statusText}`);
  return response.text();
}

function fill(box, text, address) {
  const render = app.extensionManager?.renderMarkdownToHtml;
  if (render) box.innerHTML = render(text, DOCS.href.replace(/\/$/, ""));
  else fillPlain(box, text, address); // another front end than the one the pack was made with
}

/** The address, to open elsewhere, and what there is to say: the page as it was written, or why it did not come. */
function fillPlain(box, text, address) {
  const link = document.createElement("a");
  link.href = link.textContent = address;
  link.target = "_blank";
  const pre = document.createElement("pre");
  pre.style.whiteSpace = "pre-wrap";
  pre.textContent = text;
  box.replaceChildren(link, pre);
}

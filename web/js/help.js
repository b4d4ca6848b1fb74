// A help page of the pack in the host's own dialog.
import { app } from "../../../scripts/app.js";

const DOCS = new URL("../docs/", import.meta.url);

export async function openHelp(page) {
  const text = await (await fetch(new URL(`${page}.md`, DOCS))).text();
  const box = document.createElement("div");
  box.className = "svg2-help";
  box.innerHTML = app.extensionManager.renderMarkdownToHtml(text, DOCS.href.replace(/\/$/, ""));
  app.ui.dialog.show(box);
}

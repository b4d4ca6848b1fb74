// The panel in the SVG2 node: one line, a bar per block, totals and warnings. A DOM widget, so that both renderers show it.
import { app } from "../../../scripts/app.js";
import { openHelp } from "./help.js";
import { describe, describePreset } from "./status.js";
import { percent, say } from "./words.js";

const NAME = "svg2_status";
const MARGIN = 6; // the classic renderer's, above and below the element

export class Panel {
  constructor(node, presets) {
    this.node = node;
    this.presets = presets;
    this.element = document.createElement("div");
    this.element.className = "svg2-panel";
    this.inner = this.element.appendChild(document.createElement("div"));
    this.height = 20;
    this.widget = node.addDOMWidget(NAME, "svg2_status", this.element, {
      serialize: false,
      hideOnZoom: false,
      margin: MARGIN,
      getMinHeight: () => this.height,
      getMaxHeight: () => this.height,
    });
    this.widget.serialize = false; // neither in the workflow's file nor in the prompt
    // Text wraps differently at another width, and the sizes are known only once the element is on the page.
    new ResizeObserver(() => this.fit()).observe(this.inner);
    for (const widget of node.widgets) this.watch(widget);
    this.watchConfigure();
    this.idle();
  }

  /** When a knob is turned, what an earlier run said is of other settings: back to what the preset stands for. */
  watch(widget) {
    if (widget.name === NAME) return;
    const callback = widget.callback;
    widget.callback = (...args) => {
      const result = callback?.apply(widget, args);
      if (this.message?.state !== "sampling") this.idle();
      return result;
    };
  }

  /** Loaded, pasted, or moved into a subgraph: its knobs have their saved values only now. */
  watchConfigure() {
    const { node } = this;
    const configured = node.onConfigure;
    node.onConfigure = (...args) => {
      configured?.apply(node, args);
      if (!this.message) this.idle();
    };
  }

  idle() {
    this.message = null;
    const values = Object.fromEntries(this.node.widgets.map((widget) => [widget.name, widget.value]));
    this.element.dataset.state = "idle";
    this.inner.replaceChildren(part("svg2-more", values.enabled === false ? say("panel.off") : describePreset(this.presets, values)));
  }

  /** place: which of several instances of a subgraph the message is of; "" where there is one. */
  show(message, place = "") {
    this.message = message;
    const { tone, line, more, bars, warnings } = describe(message);
    this.element.dataset.state = tone;
    const children = [part("svg2-line", place ? `#${place} · ${line}` : line)];
    if (bars.length) children.push(barsOf(bars));
    children.push(...more.map((text) => part("svg2-more", text)), ...warnings.map(warningOf));
    this.inner.replaceChildren(...children);
  }

  fit() {
    const height = Math.max(20, Math.ceil(this.inner.offsetHeight) + 2 * MARGIN);
    if (!this.inner.isConnected || height === this.height) return;
    this.height = height;
    app.canvas?.setDirty(true, true);
    if (window.LiteGraph?.vueNodesMode) return; // there a node grows with its contents; the size below counts folded inputs too
    const [width, now] = this.node.size;
    const least = this.node.computeSize()[1];
    if (now < least) this.node.setSize([width, least]);
  }
}

function part(name, text) {
  const element = document.createElement("div");
  element.className = name;
  element.textContent = text;
  return element;
}

/** A bar per block, against the smallest of these scales that holds the highest. */
function barsOf(bars) {
  const highest = Math.max(...bars.map(({ share }) => share ?? 0));
  const scale = [0.25, 0.5, 1].find((top) => highest <= top) ?? 1;
  const row = part("svg2-bars", "");
  row.append(
    ...bars.map(({ share, dense, title }) => {
      const bar = part(dense ? "svg2-bar svg2-dense" : "svg2-bar", "");
      bar.title = title;
      const fill = bar.appendChild(document.createElement("i"));
      fill.style.height = share === null ? "0" : `${Math.max(4, (100 * share) / scale)}%`;
      return bar;
    }),
    part("svg2-scale", percent(scale)),
  );
  return row;
}

function warningOf({ text, advice }) {
  const box = part("svg2-warning", `⚠ ${text} ${advice} `);
  const link = box.appendChild(document.createElement("a"));
  link.textContent = say("panel.help");
  link.href = "#";
  link.addEventListener("click", (event) => {
    event.preventDefault();
    openHelp("SVG2SparseAttention");
  });
  return box;
}

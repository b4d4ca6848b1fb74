// The pack's own words in the language of the editor. They come from locales/<language>/main.json, through the host.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

let words = {};
let english = {};

/** Fetch the words once. Where that fails, the keys themselves are shown. */
export async function loadWords() {
  try {
    const all = await (await api.fetchApi("/i18n")).json();
    english = all.en?.svg2 ?? {};
    words = all[app.extensionManager.setting.get("Comfy.Locale")]?.svg2 ?? english;
  } catch (error) {
    console.warn("SVG2: no translations", error);
  }
}

function find(tree, key) {
  return key.split(".").reduce((branch, name) => branch?.[name], tree);
}

/** The text under `key` ("panel.step"), its {name}s replaced by `values`. */
export function say(key, values = {}) {
  const text = find(words, key) ?? find(english, key) ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** Whether there is a text under `key`. */
export function has(key) {
  return typeof (find(words, key) ?? find(english, key)) === "string";
}

export const percent = (share) => `${share < 0.0995 && share > 0 ? (100 * share).toFixed(1) : Math.round(100 * share)}%`;
export const count = (number) => Number(number).toLocaleString("en-US");

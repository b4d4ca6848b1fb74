// From a message of the server (nodes/telling/live.py) to the words and bars of the panel. No DOM here.
import { count, has, percent, say } from "./words.js";

/** A run's message -> { tone, line, more: [text], bars: [{ share, title }], warnings: [{ text, advice }] }. */
export function describe(message) {
  const alone = { off: "panel.off", lost: "panel.lost" }[message.state];
  if (alone) return { tone: message.state, line: say(alone), more: [], bars: [], warnings: [] };
  const lines = message.state === "sampling" ? [progressLine(message)] : totalLines(message);
  return {
    tone: message.state,
    line: lines[0],
    more: lines.slice(1),
    bars: bars(message.blocks),
    warnings: [...message.reasons.filter((reason) => !reason.expected).map(warning), ...(message.remarks ?? []).map(remark)],
  };
}

function progressLine(message) {
  const step = say("panel.step", { step: message.step, steps: message.steps });
  if (message.dense) return join(say("panel.dense", { why: reasonShort(message, message.dense) }), step);
  const known = message.blocks.filter(([, density, reason]) => density !== null || reason !== null);
  const sparse = known.filter(([, density]) => density !== null);
  if (sparse.length) {
    const density = sparse.reduce((sum, [, share]) => sum + share, 0) / sparse.length;
    return join(
      say("panel.sparse", { density: percent(density) }),
      say("panel.blocks", { sparse: sparse.length, blocks: message.blocks.length }),
      message.backend,
      step,
    );
  }
  // The step before was dense too: because of something the user should know, or by the settings, which say nothing of this one.
  const surprise = message.reasons.find((reason) => !reason.expected && known.some(([, , name]) => name === reason.name));
  return surprise ? join(say("panel.dense", { why: reasonShort(message, surprise.name) }), step) : step;
}

function totalLines(message) {
  const head = message.state === "done" ? [] : [say("panel.stopped")];
  const { density, backend, settings } = message;
  if (density === null) {
    const why = Object.keys(message.dense_calls).map((name) => reasonShort(message, name));
    if (head.length && !why.length) return [say("panel.stopped_early")];
    return [join(...head, say("panel.all_dense", { why: why.join(", ") || say("panel.nothing_ran") }))];
  }
  const lines = [
    join(
      ...head,
      say("panel.density", { density: percent(density) }),
      message.error == null ? "" : say("panel.error", { error: percent(message.error) }),
      say("panel.share", { share: percent(message.sparse_share) }),
      backend,
      say("panel.sparse_steps", { sparse: message.sparse_steps, steps: message.steps }),
    ),
  ];
  const speed = speedLine(message);
  if (speed) lines.push(speed);
  lines.push(
    say("panel.went_by", {
      tokens: count(message.tokens),
      q_clusters: count(settings.q_clusters),
      k_clusters: count(settings.k_clusters),
      rule: settings.density == null ? say("panel.top_p", { top_p: settings.top_p }) : say("panel.density", { density: percent(settings.density) }),
      warmup_steps: settings.warmup_steps,
      dense_blocks: settings.dense_blocks || say("panel.none"),
    }),
  );
  return lines;
}

function speedLine({ attention_speedup: attention, step_speedup: step }) {
  if (!attention) return null;
  const times = (ratio) => say(ratio >= 1 ? "panel.faster" : "panel.slower", { times: (ratio >= 1 ? ratio : 1 / ratio).toFixed(1) });
  const text = say("panel.attention_speed", { speed: times(attention) });
  const whole = step ? `; ${say("panel.step_speed", { speed: times(step) })}` : "";
  return text + whole;
}

function bars(blocks) {
  return blocks.map(([label, density, reason]) => {
    const what = density !== null ? percent(density) : reason ? say("panel.dense", { why: short(reason) }) : "";
    return { share: density, dense: density === null && reason !== null, title: say("panel.block", { block: label, what }) };
  });
}

/** A few words for a reason; with its numbers where there are any ("short sequence: 3,120 < 8,192 tokens"). */
function reasonShort(message, name) {
  const detail = message.reasons.find((reason) => reason.name === name)?.detail;
  return short(name) + (detail ? `: ${detail}` : "");
}

const short = (name) => (has(`short.${name}`) ? say(`short.${name}`) : name);

function warning({ name, sentence, detail }) {
  const text = has(`reasons.${name}`) ? say(`reasons.${name}`) : sentence;
  const why = detail ? `${text} (${detail})` : text;
  return { text: say("panel.ran_dense", { why }), advice: has(`advice.${name}`) ? say(`advice.${name}`) : "" };
}

/** What ran sparse, but not as the settings ask, or not faster. */
function remark({ name, sentence, values }) {
  const advice = has(`remark_advice.${name}`) ? say(`remark_advice.${name}`) : "";
  return { text: has(`remarks.${name}`) ? say(`remarks.${name}`, values) : `${sentence}.`, advice };
}

const join = (...parts) => parts.filter(Boolean).join(" · ");

/** What the preset stands for, of the knobs that are at auto: shown while no run is known. `values`: name -> widget's value. */
export function describePreset(presets, values) {
  const preset = presets?.[values.preset];
  if (!preset) return "";
  const auto = { density: 0, top_p: 0, min_k_ratio: -1, kmeans_init_iters: 0, kmeans_iters: 0, warmup_steps: -1, dense_blocks: "auto", compensation: "auto", q_clusters: 0, k_clusters: 0 };
  const isAuto = (name) => values[name] === undefined || values[name] === auto[name];
  const parts = [];
  const byMass = !isAuto("top_p") || (preset.density == null && isAuto("density"));
  if (isAuto("top_p") && isAuto("density")) parts.push(byMass ? say("panel.top_p", { top_p: preset.top_p }) : say("panel.density", { density: percent(preset.density) }));
  if (isAuto("warmup_steps") && !preset.by_model) parts.push(preset.warmup_fraction ? say("preset.warmup", { share: percent(preset.warmup_fraction) }) : say("preset.no_warmup"));
  if (isAuto("q_clusters") && isAuto("k_clusters") && !preset.by_model) parts.push(say("preset.clusters", { q: preset.q_clusters, k: preset.k_clusters, tokens: count(preset.tokens) }));
  if (isAuto("min_k_ratio") && byMass) parts.push(say("preset.min_k_ratio", { share: percent(preset.min_k_ratio) }));
  if (isAuto("kmeans_init_iters") && isAuto("kmeans_iters")) parts.push(say("preset.kmeans", { first: preset.kmeans_init_iters, later: preset.kmeans_iters }));
  if (preset.by_model) parts.push(say("preset.by_model"));
  if (isAuto("dense_blocks")) parts.push(preset.dense_blocks ? say("preset.dense_blocks", { blocks: preset.dense_blocks }) : say("preset.no_dense_blocks"));
  if (isAuto("compensation")) parts.push(say(`preset.compensation_${preset.compensation}`));
  return parts.length ? say("preset.implies", { preset: preset.name, values: parts.join(" · ") }) : "";
}

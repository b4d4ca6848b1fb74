// Which node of the graph on the screen a message is for. An id such as "12:5" is node 5 inside subgraph node 12.
import { app } from "../../../scripts/app.js";

/** The node a message names, or undefined: deleted meanwhile, or another workflow is open. */
export function nodeOf({ graph, node }) {
  const root = app.rootGraph ?? app.graph;
  if (!root || (graph && root.id && graph !== root.id)) return undefined;
  const path = String(node).split(":");
  let place = root;
  for (const id of path.slice(0, -1)) {
    place = place.getNodeById(id)?.subgraph;
    if (!place) return undefined;
  }
  return place.getNodeById(path.at(-1)) ?? undefined;
}

// Which rank holds which tokens: a strip per rank, and the curve on its grid.

/** A colour for each rank, told apart by lightness as well as hue. */
const rankColour = (rank, world) => `hsl(${Math.round((rank * 137.5) % 360)} 55% ${[46, 60, 36][rank % 3]}%)`;

panels.tokens = (graph, panel) => {
  if (!graph?.axes?.length) { panel.append(missing("No sequence of this graph is divided over ranks.")); return; }
  for (const axis of graph.axes) {
    panel.append(element("h3", {}, `Axis ${axis.index}: ${count(axis.tokens)} tokens, ${axis.layout}`), element("p", {}, axis.why || ""));
    if (!axis.ranks) { panel.append(missing("Which tokens each rank holds is listed up to 64 ranks, and up to 16,384 runs of tokens in all.")); continue; }
    panel.append(strips(axis));
    if (axis.curve) panel.append(curveOn(axis));
  }
};

function strips(axis) {
  const tokens = Math.max(1, axis.tokens), world = axis.ranks.length, box = element("div", { class: "strip" });
  axis.ranks.forEach((runs, rank) => {
    const rects = runs.map(([start, stop]) => drawn("rect", { x: start, y: 0, width: stop - start, height: 1, fill: rankColour(rank, world) }, titled(`rank ${rank}: tokens ${start} to ${stop}`)));
    const held = runs.reduce((sum, [start, stop]) => sum + stop - start, 0);
    const label = `rank ${rank} holds ${runs.map(([a, b]) => `${a}:${b}`).join(", ")}`;
    box.append(element("span", {}, `rank ${rank}`), drawn("svg", { viewBox: `0 0 ${tokens} 1`, preserveAspectRatio: "none", role: "img", "aria-label": label }, ...rects), element("span", { class: "number" }, count(held)));
  });
  return box;
}

function curveOn(axis) {
  const { grid, prefix = 0 } = axis.curve;
  const cells = grid.reduce((a, b) => a * b, 1), world = axis.ranks.length;
  const order = axis.curve.order.length > cells ? axis.curve.order.slice(prefix).map((x) => x - prefix) : axis.curve.order;
  const owner = [];
  axis.ranks.forEach((runs, rank) => runs.forEach(([start, stop]) => { for (let i = start; i < stop; i += 1) owner[i - prefix] = rank; }));
  const [h, w] = grid.slice(-2), frames = cells / (h * w);
  const picture = drawn("svg", { viewBox: `-0.2 -0.2 ${w + 0.4} ${h + 0.4}`, role: "img", "aria-label": `the curve on the grid ${grid.join(" x ")}, cells in the colours of their ranks`, style: `width:min(100%, ${Math.min(520, 26 * w)}px)` });
  const show = (frame) => {
    const inside = order.map((cell, i) => [cell - frame * h * w, i]).filter(([cell]) => cell >= 0 && cell < h * w);
    const rects = inside.map(([cell, i]) => drawn("rect", { x: cell % w, y: Math.floor(cell / w), width: 1, height: 1, fill: rankColour(owner[i] ?? 0, world) }, titled(`cell ${Math.floor(cell / w)}, ${cell % w}: position ${i + prefix} on the curve, rank ${owner[i]}`)));
    const path = inside.map(([cell, i], n) => `${n && inside[n - 1][1] === i - 1 ? "L" : "M"}${(cell % w) + 0.5} ${Math.floor(cell / w) + 0.5}`).join("");
    picture.replaceChildren(...rects, drawn("path", { d: path, fill: "none", stroke: "#fff", "stroke-width": 0.16, "stroke-linejoin": "round", "stroke-linecap": "round", "pointer-events": "none" }));
  };
  show(0);
  const slider = frames > 1 ? labelled("frame", element("input", { type: "range", min: 0, max: frames - 1, value: 0, "aria-label": "frame", input: (e) => show(Number(e.target.value)) })) : null;
  const words = `The curve on its grid of ${grid.join(" × ")}${prefix ? `, after ${prefix} other ${prefix === 1 ? "token" : "tokens"}` : ""}: neighbours on the curve are neighbours on the grid, so the cells of a rank lie together.`;
  return element("div", {}, element("p", { class: "quiet" }, words), slider, picture);
}

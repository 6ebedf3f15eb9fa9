// The tile map of a schedule: by ranks, or by tokens; and the steps of a chosen rank.

const KINDS = ["full", "causal", "mirrored", "partial"];
const triangle = (kind) => kind === "causal" || kind === "mirrored";
const pairsOf = ([q0, q1, k0, k1, kind]) => (triangle(kind) ? ((q1 - q0) * (q1 - q0 + 1)) / 2 : (q1 - q0) * (k1 - k0));

/** Pairs by kind of each (rank of queries, rank of keys). */
function owners(schedule) {
  const cells = new Map();
  for (const { rank, steps } of schedule.ranks) {
    for (const step of steps) {
      const source = step.receive ? step.receive.from : rank;
      for (const tile of step.tiles) {
        const key = `${rank} ${source}`;
        if (!cells.has(key)) cells.set(key, { rank, source, step: step.step, kinds: {} });
        const kinds = cells.get(key).kinds;
        kinds[tile[4]] = (kinds[tile[4]] || 0) + pairsOf(tile);
      }
    }
  }
  return [...cells.values()];
}

/** The ranks of a schedule, and those that they receive from: of a Ulysses degree, each share has its own. */
const ranksOf = (schedule) => [...new Set(schedule.ranks.flatMap((r) => [r.rank, ...r.steps.filter((s) => s.receive).map((s) => s.receive.from)]))].sort((a, b) => a - b);

/** Rows start:stop of the tokens `runs`, as [first token, last token + 1, first row]. */
function spans(runs, start, stop) {
  if (!runs) return [[start, stop, start]];
  const found = [];
  let row = 0;
  for (const [a, b] of runs) {
    const low = Math.max(start, row), high = Math.min(stop, row + b - a);
    if (low < high) found.push([a + low - row, a + high - row, low]);
    row += b - a;
  }
  return found;
}

/** Each tile as rectangles in tokens: {rank, step, kind, q: [a, b], k: [a, b], triangle}. */
function rectangles(schedule) {
  const found = [];
  for (const { rank, steps, queries } of schedule.ranks) {
    for (const { step, tiles, keys } of steps) {
      for (const [q0, q1, k0, k1, kind] of tiles) {
        for (const [qa, qb, row] of spans(queries, q0, q1)) {
          for (const [ka, kb, column] of spans(keys, k0, k1)) {
            const i = row - q0, j = column - k0;
            if (kind === "causal" && j > i + qb - qa - 1) continue;
            if (kind === "mirrored" && j + kb - ka - 1 < i) continue;
            found.push({ rank, step, kind, q: [qa, qb], k: [ka, kb], triangle: triangle(kind) && i === j });
          }
        }
      }
    }
  }
  return found;
}

panels.tiles = (graph, panel) => {
  if (!graph?.schedules?.length) { panel.append(missing("No schedule is in this report: none of its attentions is divided, or there are more than 64 ranks.")); return; }
  let view = "ranks", cells, parts, world, names, row, sizes, located;
  const details = element("div", { "aria-live": "polite" });
  const site = () => graph.sites[graph.schedules[chosen.schedule].site];

  const picture = canvas(panel, "Tile map: rows are queries, columns are keys", (width) => Math.min(width, 560) - 14, draw, {
    click: (e) => { const hit = under(e); if (hit) choose(hit.rank); },
    mousemove: (e) => { const hit = under(e); showTip(hit && describe(hit), e.clientX, e.clientY); },
    mouseleave: () => showTip(null),
    keydown: (e) => {
      const way = { ArrowDown: 1, ArrowUp: -1, Home: -world, End: world }[e.key];
      if (way) { e.preventDefault(); choose(names[Math.max(0, Math.min(world - 1, (row.get(chosen.rank) ?? -1) + way))]); }
      if (e.key === "Escape") choose(null);
    },
  });
  const buttons = [["ranks", "by rank"], ["tokens", "by token"]].map(([name, text]) =>
    element("button", { type: "button", "aria-pressed": String(name === view), click: () => { view = name; buttons.forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.view === view))); picture.paint(); }, "data-view": name }, text));
  const pick = element("select", { "aria-label": "rank", change: (e) => choose(e.target.value === "" ? null : Number(e.target.value)) });

  function choose(rank) { chosen.rank = rank; onSchedule.forEach((show) => show()); }
  function prepare() {
    const schedule = graph.schedules[chosen.schedule];
    cells = owners(schedule);
    parts = null;
    names = ranksOf(schedule);
    row = new Map(names.map((rank, i) => [rank, i]));
    world = names.length;
    sizes = [schedule.queries || site().queries || 1, schedule.keys || site().keys || 1];
    located = schedule.ranks.every((r) => r.queries && r.steps.every((s) => s.keys));
    if (!located) view = "ranks";
    buttons[1].disabled = !located;
    buttons[1].title = located ? "" : "which tokens the rows of tiles are is listed up to 64 runs of tokens on a rank";
    options(pick, [["", "all"], ...schedule.ranks.map(({ rank }) => [rank, `rank ${rank}`])], chosen.rank ?? "");
  }
  function box(width, height) {
    const left = 34, top = 18, size = Math.min(width - left - 2, height - top - 2);
    return { left, top, size };
  }
  function draw(context, width, height) {
    const { left, top, size } = box(width, height);
    context.clearRect(0, 0, width, height);
    context.fillStyle = hatch(context);
    context.fillRect(left, top, size, size);
    const inks = Object.fromEntries(KINDS.map((kind) => [kind, colour(kind)]));
    if (view === "ranks") drawRanks(context, left, top, size / world, inks);
    else drawTokens(context, left, top, size, inks);
    context.strokeStyle = colour("line");
    context.strokeRect(left, top, size, size);
    context.fillStyle = colour("quiet");
    context.fillText(view === "ranks" ? "rank of keys →" : "keys →", left, 12);
    context.save();
    context.translate(12, top + size / 2);
    context.rotate(-Math.PI / 2);
    context.textAlign = "center";
    context.fillText(view === "ranks" ? "← rank of queries" : "← queries", 0, 0);
    context.restore();
  }
  function drawRanks(context, left, top, edge, inks) {
    for (const cell of cells) {
      const total = Object.values(cell.kinds).reduce((a, b) => a + b, 0);
      let x = left + row.get(cell.source) * edge;
      context.globalAlpha = 1;
      context.fillStyle = colour("card");
      context.fillRect(x, top + row.get(cell.rank) * edge, edge, edge);
      context.globalAlpha = chosen.rank === null || chosen.rank === cell.rank ? 1 : 0.3;
      for (const kind of KINDS) {
        const part = ((cell.kinds[kind] || 0) / total) * edge;
        context.fillStyle = inks[kind];
        context.fillRect(x, top + row.get(cell.rank) * edge, part, edge);
        x += part;
      }
      if (edge > 26) {
        context.fillStyle = cell.kinds.full ? "#fff" : "#1d2226";
        context.fillText(`${cell.step}`, left + row.get(cell.source) * edge + 5, top + row.get(cell.rank) * edge + 15);
      }
    }
    context.globalAlpha = 1;
    context.strokeStyle = colour("card");
    context.lineWidth = edge > 8 ? 1 : 0.4;
    context.beginPath();
    for (let i = 1; i < world; i += 1) {
      context.moveTo(left + i * edge, top); context.lineTo(left + i * edge, top + world * edge);
      context.moveTo(left, top + i * edge); context.lineTo(left + world * edge, top + i * edge);
    }
    context.stroke();
    context.fillStyle = colour("quiet");
    const each = Math.ceil(16 / edge);
    for (let i = 0; i < world; i += each) context.fillText(String(names[i]), left - 17, top + i * edge + edge / 2 + 4);
  }
  function drawTokens(context, left, top, size, inks) {
    parts = parts || rectangles(graph.schedules[chosen.schedule]);
    for (const part of parts) {
      const x = left + (part.k[0] / sizes[1]) * size, y = top + (part.q[0] / sizes[0]) * size;
      const w = Math.max(0.5, ((part.k[1] - part.k[0]) / sizes[1]) * size), h = Math.max(0.5, ((part.q[1] - part.q[0]) / sizes[0]) * size);
      context.globalAlpha = chosen.rank === null || chosen.rank === part.rank ? 1 : 0.25;
      context.fillStyle = inks[part.kind] || colour("other");
      if (!part.triangle) context.fillRect(x, y, w, h);
      else {
        context.beginPath();
        context.moveTo(x, y);
        if (part.kind === "causal") context.lineTo(x, y + h); else context.lineTo(x + w, y);
        context.lineTo(x + w, y + h);
        context.fill();
      }
      if (w > 6 && h > 6) { context.strokeStyle = colour("card"); context.lineWidth = 0.7; context.strokeRect(x, y, w, h); }
    }
    context.globalAlpha = 1;
  }
  function under(event) {
    const [x, y] = at(event), width = picture.clientWidth, { left, top, size } = box(width, picture.clientHeight);
    const u = (x - left) / size, v = (y - top) / size;
    if (u < 0 || v < 0 || u >= 1 || v >= 1) return null;
    if (view === "ranks") {
      const rank = names[Math.floor(v * world)], source = names[Math.floor(u * world)];
      return cells.find((c) => c.rank === rank && c.source === source) || { rank, source, kinds: {} };
    }
    const q = v * sizes[0], k = u * sizes[1];
    return (parts || []).find((p) => p.q[0] <= q && q < p.q[1] && p.k[0] <= k && k < p.k[1]) || null;
  }
  function describe(hit) {
    if (hit.q) return `rank ${hit.rank}, step ${hit.step}: ${hit.kind}, queries ${hit.q.join(":")}, keys ${hit.k.join(":")}`;
    const kinds = Object.entries(hit.kinds).map(([kind, n]) => `${count(n)} pairs ${kind}`);
    return `queries of rank ${hit.rank}, keys of rank ${hit.source}: ${kinds.length ? `step ${hit.step}, ${kinds.join(", ")}` : "empty"}`;
  }
  function detail() {
    const schedule = graph.schedules[chosen.schedule];
    if (chosen.rank === null) {
      const work = schedule.ranks.map((r) => [r.rank, r.steps.flatMap((s) => s.tiles).reduce((sum, t) => sum + pairsOf(t), 0)]);
      const most = Math.max(...work.map(([, n]) => n)), mean = work.reduce((sum, [, n]) => sum + n, 0) / work.length;
      const busiest = work.find(([, n]) => n === most)[0];
      const words = most > 1.02 * mean ? `Rank ${busiest} computes ${figures(most / mean)} times the mean number of pairs.` : "All ranks compute the same number of pairs, within 2 %.";
      details.replaceChildren(element("h3", {}, "Pairs computed by each rank"), element("p", {}, words),
        element("div", { class: "strip" }, ...work.flatMap(([rank, n]) => [element("span", {}, `rank ${rank}`), drawn("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", role: "img", "aria-label": `${count(n)} pairs` }, drawn("rect", { width: most ? n / most : 0, height: 1, fill: "var(--tile)" })), element("span", { class: "number" }, count(n))])));
      return;
    }
    const mine = schedule.ranks.find((r) => r.rank === chosen.rank);
    const lines = mine.steps.map((s) => ({ ...s, pairs: s.tiles.reduce((sum, t) => sum + pairsOf(t), 0) }));
    const list = (tiles) => {
      const shown = tiles.slice(0, 6).map(([q0, q1, k0, k1, kind]) => `${kind} q${q0}:${q1} k${k0}:${k1}`);
      return [...shown, ...(tiles.length > 6 ? [`and ${tiles.length - 6} more`] : [])].join("; ") || "no tile";
    };
    details.replaceChildren(element("h3", {}, `Rank ${chosen.rank}, step by step`),
      element("p", { class: "quiet" }, `Tiles in rows of its own queries and of the keys that arrive. Not computed: ${count((mine.empty || []).length)} rectangles.`),
      table([
        { name: "step", of: (s) => s.step, kind: "number" },
        { name: "from", of: (s) => s.receive?.from ?? -1, text: (_, s) => (s.receive ? `rank ${s.receive.from}` : s.step ? "" : "its own") },
        { name: "received", of: (s) => s.receive?.bytes ?? 0, kind: "number", text: (n) => (n ? bytes(n) : "") },
        { name: "sends to", of: (s) => s.send?.to ?? -1, text: (_, s) => (s.send ? `rank ${s.send.to}` : "") },
        { name: "pairs", of: (s) => s.pairs, kind: "number", text: count },
        { name: "tiles", of: (s) => s.tiles.length, kind: "long", text: (_, s) => list(s.tiles) },
      ], lines, { filter: false, caption: `steps of rank ${chosen.rank}` }));
  }
  onSchedule.set("tiles", () => { prepare(); picture.paint(); detail(); });
  prepare();
  detail();
  const where = element("div", {}, picture);
  panel.append(element("div", { class: "controls" }, scheduleSelect(graph), ...buttons, labelled("rank", pick)),
    legend([...KINDS.map((kind) => [kind, kind]), ["empty", "empty: not computed, not sent"]]), element("div", { class: "side" }, where, details));
};

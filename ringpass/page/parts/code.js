// Two stages side by side, with their differences, search, and links between a line of the model and its nodes.

const ROW = 18; // pixels of a line

/** Lines of which only those in sight are elements. */
function pane(stage, choose) {
  const box = element("div", { class: "lines", tabindex: 0, role: "listbox", "aria-label": `lines of ${stage.name}` });
  const inside = element("div", { style: `height:${stage.lines.length * ROW}px; position:relative` });
  const state = { differs: new Set(), source: null, here: -1, found: new Set() };
  let widest = 0;
  function paint() {
    const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 20), last = Math.min(stage.lines.length, first + Math.ceil(box.clientHeight / ROW) + 40);
    const rows = [];
    for (let i = first; i < last; i += 1) {
      const marks = ["row", state.differs.has(i) && "differs", state.source !== null && stage.sources[i] === state.source && "chosen", state.found.has(i) && "found", i === state.here && "here"].filter(Boolean);
      const row = element("div", { class: marks.join(" "), style: `position:absolute; top:${i * ROW}px`, role: "option", "aria-selected": String(i === state.here), "data-line": i });
      row.innerHTML = stage.lines[i] || " ";
      rows.push(row);
    }
    inside.replaceChildren(...rows);
    widest = Math.max(widest, ...rows.map((r) => r.scrollWidth));
    inside.style.minWidth = `${widest}px`;
  }
  function reveal(i) {
    if (i < 0) return;
    const top = i * ROW;
    if (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 2 * ROW) box.scrollTop = Math.max(0, top - box.clientHeight / 3);
  }
  function select(i) { state.here = i; reveal(i); paint(); choose(i); }
  box.addEventListener("scroll", () => requestAnimationFrame(paint));
  box.addEventListener("click", (e) => { const row = e.target.closest(".row"); if (row) select(Number(row.dataset.line)); });
  box.addEventListener("keydown", (e) => {
    const way = { ArrowDown: 1, ArrowUp: -1, PageDown: 20, PageUp: -20, Home: -1e9, End: 1e9 }[e.key];
    if (!way) return;
    e.preventDefault();
    select(Math.max(0, Math.min(stage.lines.length - 1, state.here + way)));
  });
  box.append(inside);
  requestAnimationFrame(paint);
  return { box, state, paint, reveal, stage };
}

panels.code = async (graph, panel) => {
  const data = (await more).code[chosen.graph];
  if (!data?.stages.length) { panel.append(missing("No text of a stage was given to this page; a dump directory has them.")); return; }
  const names = data.stages.map((s) => s.name), sides = [], status = element("span", { class: "quiet", role: "status" });
  const picks = [names[0], names[Math.min(1, names.length - 1)]];
  const holders = [element("div"), element("div")];
  const plain = new Map();
  const textOf = (stage) => {
    if (!plain.has(stage)) plain.set(stage, stage.lines.map((line) => line.replace(/<[^>]*>/g, "").replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&").toLowerCase()));
    return plain.get(stage);
  };
  function link(from, line) {
    const source = sides[from].stage.sources[line];
    const named = data.sources[source];
    sides.forEach((side, i) => {
      side.state.source = named ? source : null;
      if (i !== from && named) side.reveal(side.stage.sources.indexOf(source));
      side.paint();
    });
    const found = sides.map((side) => side.stage.sources.filter((s) => s === source).length);
    status.textContent = named ? `${named}: ${found.map((n, i) => `${n} ${n === 1 ? "line" : "lines"} of ${sides[i].stage.name}`).join(", ")}` : "this line comes from no line of the model";
  }
  function place(i) {
    const stage = data.stages.find((s) => s.name === picks[i]);
    sides[i] = pane(stage, (line) => link(i, line));
    holders[i].querySelector(".lines")?.remove();
    holders[i].append(sides[i].box);
  }
  function compare() {
    const forward = data.differences[picks.join(" ")], back = data.differences[[...picks].reverse().join(" ")];
    const parts = forward || (back || []).map(([a, b, c, d]) => [c, d, a, b]);
    sides.forEach((side, i) => {
      side.state.differs = new Set();
      for (const part of parts) for (let n = part[2 * i]; n < part[2 * i + 1]; n += 1) side.state.differs.add(n);
      side.paint();
    });
    changes = parts;
    at = -1;
    next.disabled = !parts.length;
    status.textContent = forward || back ? `${parts.length} ${parts.length === 1 ? "place differs" : "places differ"}` : "choose a line to see where it went";
  }
  let changes = [], at = -1, wanted = "", hit = -1;
  const next = element("button", { type: "button", click: () => {
    at = (at + 1) % changes.length;
    sides.forEach((side, i) => { side.box.scrollTop = Math.max(0, changes[at][2 * i] * ROW - 90); });
    status.textContent = `difference ${at + 1} of ${changes.length}`;
  } }, "next difference");
  function search(step) {
    const found = [];
    sides.forEach((side, i) => {
      side.state.found = new Set();
      if (wanted) textOf(side.stage).forEach((line, n) => { if (line.includes(wanted)) { side.state.found.add(n); found.push([i, n]); } });
    });
    if (found.length) {
      hit = step ? (hit + 1) % found.length : 0;
      const [i, n] = found[hit];
      sides[i].reveal(n);
    }
    sides.forEach((side) => side.paint());
    status.textContent = wanted ? (found.length ? `${hit + 1} of ${found.length} lines found` : "no line found") : "";
  }
  const find = element("input", { type: "search", placeholder: "search both", "aria-label": "Search both stages", input: (e) => { wanted = e.target.value.toLowerCase(); search(false); }, keydown: (e) => { if (e.key === "Enter") search(true); } });
  holders.forEach((holder, i) => {
    holder.append(labelled(i ? "right" : "left", options(element("select", { "aria-label": `${i ? "right" : "left"} stage`, change: (e) => { picks[i] = e.target.value; place(i); compare(); } }), names.map((n) => [n, n]), picks[i])));
  });
  panel.append(element("div", { class: "controls" }, find, next, status), element("div", { class: "panes" }, ...holders));
  [0, 1].forEach(place);
  compare();
};

// Attention sites, equal ones folded.

panels.sites = (graph, panel) => {
  const sites = graph?.sites || [];
  if (!sites.length) { panel.append(missing("This graph has no attention.")); return; }
  const kinds = (tiles) => Object.entries(tiles || {}).filter(([, n]) => n).map(([kind, n]) => `${kind} ${count(n)}`).join(", ");
  panel.append(table([
    { name: "site", of: (s) => s.indices[0], text: (_, s) => element("span", {}, `${s.path || s.name}${s.indices.length > 1 ? ` × ${s.indices.length}` : ""}`) },
    { name: "source", of: (s) => s.source, kind: "code", text: (x, s) => element("span", {}, x || "", s.line ? element("br") : null, s.line || "") },
    { name: "heads", of: (s) => s.heads?.[0], kind: "number", text: (_, s) => (s.heads ? s.heads.join(" / ") : "") },
    { name: "mask", of: (s) => s.mask, text: (mask) => element("code", {}, mask || "") },
    { name: "density", of: (s) => s.density, kind: "number", text: (x) => (x === null || x === undefined ? "" : `${figures(100 * x)} %`) },
    { name: "tiles", of: (s) => kinds(s.tiles), kind: "long" },
    { name: "how", of: (s) => (s.partitioned === false ? "as the model wrote it" : s.split ? "split" : `${s.comm}${s.degree > 1 ? `, degree ${s.degree}` : ""}`) },
    { name: "received, most", of: (s) => Math.max(0, ...(s.received_bytes || [])), kind: "number", text: bytes },
    { name: "needed, most", of: (s) => Math.max(0, ...(s.needed_bytes || [])), kind: "number", text: bytes },
    { name: "balance", of: (s) => s.balance, kind: "number", text: (x) => (x ? figures(x) : "") },
    { name: "why", of: (s) => s.why, kind: "long" },
  ], sites, {
    caption: "attention sites",
    choose: (site) => {
      const found = (graph.schedules || []).findIndex((s) => graph.sites[s.site] === site);
      if (found >= 0) { chooseSchedule(found); document.getElementById("tiles").scrollIntoView(); }
    },
  }));
};

/** What a schedule is called. */
function scheduleName(graph, i) {
  const schedule = graph.schedules[i], site = graph.sites[schedule.site];
  const folded = site.indices.length > 1 ? ` × ${site.indices.length}` : "";
  return [`${site.path || site.name || `site ${site.indices[0]}`}${folded}`, schedule.share, schedule.group].filter(Boolean).join(", ");
}

const onSchedule = new Map(); // panel's name -> function that shows the chosen schedule and rank
function chooseSchedule(i, rank = null) {
  chosen.schedule = i;
  chosen.rank = rank;
  document.querySelectorAll("select.schedule").forEach((select) => { select.value = i; });
  onSchedule.forEach((show) => show());
}

function scheduleSelect(graph) {
  return labelled("attention", options(element("select", { class: "schedule", change: (e) => chooseSchedule(Number(e.target.value)) }),
    graph.schedules.map((_, i) => [i, scheduleName(graph, i)]), chosen.schedule));
}

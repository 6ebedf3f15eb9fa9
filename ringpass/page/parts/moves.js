// Gathers and boundaries, with their source lines.

const where = { name: "source", of: (x) => x.source, kind: "code", text: (source, x) => element("span", {}, source || "", x.line && source ? element("br") : null, x.line || "") };

panels.gathers = (graph, panel) => {
  const rows = graph?.gathers || [];
  if (!rows.length) { panel.append(element("p", { class: "good" }, "Nothing is gathered inside this graph.")); return; }
  panel.append(table([
    { name: "op", of: (g) => g.op, kind: "code" },
    { name: "bytes", of: (g) => g.bytes, kind: "number", text: bytes },
    { name: "FLOPs on every rank", of: (g) => g.flops, kind: "number", text: count },
    where,
    { name: "why", of: (g) => g.why, kind: "long" },
    { name: "what avoids it", of: (g) => g.remedy, kind: "long" },
  ], rows, { caption: "gathers" }));
};

panels.boundaries = (graph, panel) => {
  const rows = graph?.boundaries || [];
  if (!rows.length) { panel.append(missing("Ranks communicate in no other place of this graph, or the report does not list it.")); return; }
  panel.append(table([
    { name: "kind", of: (b) => b.kind },
    { name: "name", of: (b) => b.name, kind: "code" },
    { name: "bytes", of: (b) => b.bytes, kind: "number", text: bytes },
    { name: "direction", of: (b) => b.direction },
    where,
  ], rows, { caption: "boundaries" }));
};

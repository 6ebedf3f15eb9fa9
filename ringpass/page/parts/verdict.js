// The verdict, key figures, graph breaks and recompiles.

panels.verdict = (graph, panel) => {
  const v = report.verdict || {};
  panel.append(...(v.lines || []).map((line) => element("p", { class: "headline" }, line)));
  if (!v.lines?.length) panel.append(missing("No verdict was made for this report."));
  const cards = element("div", { class: "cards" });
  const card = (title, value, note, style = "") => cards.append(element("div", { class: `card ${style}` }, title, element("b", {}, value), note ? element("span", { class: "quiet" }, note) : null));
  if (v.peak_bytes) {
    const device = v.device ? `${v.fits ? "fits" : "does not fit"} ${v.device.name}, ${bytes(v.device.bytes)}` : "no device was named";
    card("Peak memory of a rank", bytes(v.peak_bytes), device, v.fits === false ? "bad" : v.fits ? "good" : "");
  }
  if (v.efficiency !== null && v.efficiency !== undefined) card("Efficiency, estimated", `${figures(100 * v.efficiency)} %`, "attention's computing over its whole time");
  const longest = report.longest, known = longest && longest.tokens !== null;
  if (longest) card("Longest sequence that fits", known ? `${count(longest.tokens)} tokens` : "not known", `${longest.device}${known && longest.verified ? "" : `: ${longest.why}`}`);
  if (cards.childElementCount) panel.append(cards);
  if (v.peak_bytes && !v.device) panel.append(element("p", { class: "quiet" }, "Whether that fits a device, and the longest sequence that would: ringpass.explain(.., device=\"H100\")."));
  if (v.change) panel.append(element("div", { class: "card" }, "The one thing to change", element("b", {}, v.change)));
  if (graph?.whole) panel.append(element("p", {}, `Nothing of graph ${graph.index ?? 0} is divided over ranks: ${graph.whole}.`));
  const told = [...(graph?.warnings || []), ...(graph?.remarks || [])];
  if (told.length) panel.append(element("h3", {}, "Warnings"), element("ul", {}, ...told.map((text) => element("li", {}, text))));
  for (const [name, rows] of [["Graph breaks", report.breaks], ["Recompiles", report.recompiles]]) {
    if (!rows?.length) continue;
    panel.append(element("h3", {}, name), table([
      { name: "reason", of: (r) => r.reason, kind: "long" },
      { name: "source", of: (r) => r.source, kind: "code" },
      { name: "times", of: (r) => r.count, kind: "number" },
    ], rows, { filter: false, caption: name }));
  }
};

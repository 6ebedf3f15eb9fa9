// What was weighed: layouts, and the ways of each attention, as bars.

const PARTS = [["compute", "tile"], ["calls", "other"], ["merges", "mirrored"], ["exposed", "wait"], ["all_to_all", "transfer"]];

panels.alternatives = (graph, panel) => {
  const groups = [["Layouts", graph?.layouts || []], ...(graph?.sites || []).map((s) => [`Ways of ${s.path || s.name}${s.indices.length > 1 ? ` × ${s.indices.length}` : ""}`, s.ways || []])].filter(([, list]) => list.length);
  if (!groups.length) { panel.append(missing("Nothing was weighed: the options, or the lack of a described machine, left one choice.")); return; }
  panel.append(legend([["tile", "compute"], ["other", "kernel calls"], ["mirrored", "merges"], ["wait", "exposed transfers"], ["transfer", "all-to-alls"]]));
  for (const [title, list] of groups) {
    const most = Math.max(...list.map((x) => x.seconds || 0)) || 1;
    panel.append(element("h3", {}, title), element("div", { class: "bars" }, ...list.flatMap((x) => {
      const parts = x.parts ? PARTS.map(([name, ink]) => [x.parts[name] || 0, ink, name]) : [[x.seconds || 0, "tile", "in all"]];
      const words = parts.filter(([n]) => n).map(([n, , name]) => `${name.replaceAll("_", "-")} ${seconds(n)}`).join(", ");
      return [
        element("span", { "data-tip": x.why || words }, `${x.name}${x.chosen ? " — chosen" : ""}`),
        element("div", { class: "bar", role: "img", "aria-label": `${x.name}: ${words}`, "data-tip": words }, ...parts.map(([n, ink]) => element("div", { style: `width:${(100 * n) / most}%; background:var(--${ink}); opacity:${x.chosen ? 1 : 0.55}` }))),
        element("span", { class: "number" }, x.seconds ? seconds(x.seconds) : ""),
      ];
    })));
    for (const x of list) if (x.why) panel.append(element("p", { class: "quiet" }, `${x.name}: ${x.why}`));
  }
};

// Proof, versions, options, and the command that makes the report again.

panels.about = (graph, panel) => {
  const proof = graph?.proof;
  panel.append(element("p", {}, proof ? proof.text : "This report holds no proof."));
  if (proof) panel.append(element("p", { class: "quiet" }, `${count(proof.tiles)} tiles of ${count(proof.problems)} ${proof.problems === 1 ? "problem" : "problems"}, with the order of exchanges of ${(proof.orders || []).join(" and ")}.`));
  const rows = [...Object.entries(report.made_by || {}), ...Object.entries(report.options || {}).map(([k, v]) => [`option ${k}`, v]), ["rank shown", report.rank], ["fingerprint", report.fingerprint]];
  panel.append(element("dl", {}, ...rows.filter(([, v]) => v !== undefined && v !== null && v !== "").flatMap(([k, v]) => [element("dt", {}, k), element("dd", {}, element("code", {}, String(v)))])));
  if (report.command) {
    const copy = element("button", { type: "button", click: async () => {
      try { await navigator.clipboard.writeText(report.command); copy.textContent = "copied"; }
      catch { getSelection().selectAllChildren(code); copy.textContent = "selected: press Ctrl+C"; }
    } }, "copy");
    const code = element("pre", {}, report.command);
    panel.append(element("h3", {}, "The command that makes this report"), code, copy);
  }
};

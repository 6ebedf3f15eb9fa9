// Tables that are sorted by a click on a column's name and filtered by text.

/**
 * columns: {name, of: row -> value, text: value -> text (or element), kind: "number" | "code" | "long"}
 * choose: called with a row that is chosen by click or Enter.
 */
function table(columns, rows, { filter = true, choose = null, caption = "" } = {}) {
  let by = null, descending = false, wanted = "";
  const body = element("tbody");
  const shown = element("span", { class: "quiet", role: "status" });
  const cells = (row) => columns.map((c) => {
    const value = c.of(row);
    return c.text ? c.text(value, row) : value === null || value === undefined ? "" : String(value);
  });
  const words = rows.map((row) => cells(row).map((x) => (x instanceof Node ? x.textContent : x)).join(" ").toLowerCase());
  const heads = columns.map((c) => element("th", { scope: "col", class: c.kind === "number" ? "number" : null },
    element("button", { type: "button", click: () => { descending = by === c ? !descending : c.kind === "number"; by = c; fill(); } }, c.name)));

  function fill() {
    let order = rows.map((_, i) => i).filter((i) => words[i].includes(wanted));
    if (by) {
      const key = order.map((i) => by.of(rows[i]) ?? "");
      const at = new Map(order.map((i, n) => [i, key[n]]));
      order.sort((a, b) => (at.get(a) < at.get(b) ? -1 : at.get(a) > at.get(b) ? 1 : 0));
      if (descending) order.reverse();
    }
    heads.forEach((head, i) => head.setAttribute("aria-sort", columns[i] === by ? (descending ? "descending" : "ascending") : "none"));
    body.replaceChildren(...order.map((i) => {
      const line = element("tr", choose ? { class: "choice", tabindex: 0, click: () => choose(rows[i]), keydown: (e) => { if (e.key === "Enter") choose(rows[i]); } } : {},
        ...cells(rows[i]).map((x, n) => element("td", { class: columns[n].kind || null }, x)));
      return line;
    }));
    shown.textContent = wanted ? `${order.length} of ${rows.length}` : `${rows.length} ${rows.length === 1 ? "row" : "rows"}`;
  }

  const find = element("input", { type: "search", placeholder: "filter", "aria-label": `Filter ${caption}`, input: (e) => { wanted = e.target.value.trim().toLowerCase(); fill(); } });
  fill();
  return element("div", {},
    filter && rows.length > 1 ? element("div", { class: "controls" }, find, shown) : null,
    element("div", { class: "scroll", tabindex: filter ? 0 : null, role: filter ? "region" : null, "aria-label": filter ? caption : null },
      element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body)));
}

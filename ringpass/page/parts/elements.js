// Elements, numbers as text, tooltips: what all panels use.

const report = JSON.parse(document.getElementById("report").textContent);
const terms = JSON.parse(document.getElementById("terms").textContent);
const panels = {}; // name -> function (graph, element) that draws the panel
const redrawn = new Map(); // panel's element -> functions that draw its canvases again
const chosen = { graph: 0, schedule: 0, rank: null };

/** An element; attributes that are functions are listeners. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** An element of SVG. */
function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const titled = (text) => { const t = drawn("title"); t.textContent = text; return t; };
const count = (n) => (n === null || n === undefined ? "" : Math.round(n).toLocaleString("en"));
const figures = (x) => Number(x.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 });

function bytes(n) {
  if (n === null || n === undefined) return "";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (Math.abs(n) >= 1000 && i < units.length - 1) { n /= 1000; i += 1; }
  return `${i ? figures(n) : n} ${units[i]}`;
}

function seconds(s) {
  if (s === null || s === undefined) return "";
  return s >= 1 ? `${figures(s)} s` : s >= 1e-3 ? `${figures(s * 1e3)} ms` : `${figures(s * 1e6)} µs`;
}

function amount(x, unit) {
  if (unit === "s") return seconds(x);
  const steps = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const [scale, prefix] = steps.find(([least]) => x >= least) || [1, ""];
  return `${figures(x / scale)} ${prefix}${unit}`;
}

/** Text in which `[term]` is explained by the glossary. */
function explained(text) {
  return text.split(/(\[[^\]]+\])/).map((part) => {
    const term = part.startsWith("[") ? part.slice(1, -1) : null;
    return term && terms[term] ? element("span", { class: "term", tabindex: 0, "data-tip": `${term}: ${terms[term]}` }, term) : part;
  });
}

const missing = (what) => element("p", { class: "quiet" }, what);
const labelled = (text, control) => element("label", {}, text, control);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const legend = (entries) => element("div", { class: "legend" }, ...entries.map(([name, text]) =>
  element("span", {}, element("i", name === "empty" ? { class: "hatched" } : { style: `background:var(--${name})` }), text)));

function options(select, names, value) {
  select.replaceChildren(...names.map(([key, text]) => element("option", { value: key, selected: key === value }, text)));
  return select;
}

const tip = document.getElementById("tip");
function showTip(text, x, y) {
  if (!text) { tip.hidden = true; return; }
  tip.textContent = text;
  tip.hidden = false;
  const left = Math.min(x + 12, document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(4, left) + scrollX}px`;
  tip.style.top = `${y + 16 + scrollY}px`;
}
for (const name of ["mouseover", "focusin"]) {
  document.addEventListener(name, (event) => {
    const target = event.target.closest?.("[data-tip]");
    const box = target?.getBoundingClientRect();
    showTip(target?.dataset.tip, box?.left ?? 0, box ? box.bottom - 12 : 0);
  });
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") showTip(null); });

/** The part of the data that is kept compressed: texts and timelines. */
const more = (async () => {
  const packed = Uint8Array.from(atob(document.getElementById("more").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
})();

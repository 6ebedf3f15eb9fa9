// Starts the page: draws each panel when it comes near, and again when another graph is chosen.

const holders = [...document.querySelectorAll(".panel")];
const waiting = new Set(holders);

function draw(holder) {
  waiting.delete(holder);
  redrawn.delete(holder.firstElementChild);
  const place = element("div"); // a new one each time: a drawing that is still under way keeps its own
  holder.replaceChildren(place);
  const graph = (report.graphs || [])[chosen.graph];
  delete holder.dataset.drawn;
  const done = () => requestAnimationFrame(() => { if (holder.firstElementChild === place) holder.dataset.drawn = "yes"; }); // after its canvases, which are painted in the same frame
  Promise.resolve(panels[holder.dataset.panel](graph, place)).then(done, (error) => { place.append(missing(`This panel cannot be drawn: ${error.message}`)); console.error(error); });
}

const near = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) if (isIntersecting && waiting.has(target)) draw(target);
}, { rootMargin: "600px" });
holders.forEach((holder) => { holder.style.minHeight = "4rem"; near.observe(holder); });

const links = [...document.querySelectorAll("nav a")];
const current = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) {
    const link = links.find((a) => a.hash === `#${target.id}`);
    if (isIntersecting) { links.forEach((a) => a.removeAttribute("aria-current")); link?.setAttribute("aria-current", "true"); }
  }
}, { rootMargin: "-20% 0px -70% 0px" });
document.querySelectorAll("section").forEach((section) => current.observe(section));

document.querySelectorAll(".about").forEach((p) => p.replaceChildren(...explained(p.textContent)));
const made = report.made_by || {};
document.getElementById("made").textContent = [made.torch && `torch ${made.torch}`, made.ringpass && `ringpass ${made.ringpass}`, report.rank !== undefined && `program of rank ${report.rank}`].filter(Boolean).join(" · ");

const graphs = report.graphs || [];
if (graphs.length > 1) {
  document.getElementById("graphs").hidden = false;
  const select = options(document.getElementById("graph"), graphs.map((g, i) => [i, `${g.index ?? i}`]), 0);
  select.addEventListener("change", () => {
    Object.assign(chosen, { graph: Number(select.value), schedule: 0, rank: null });
    onSchedule.clear();
    holders.filter((holder) => !waiting.has(holder)).forEach(draw);
  });
}

const themes = ["system", "light", "dark"];
const themeButton = document.getElementById("theme");
function setTheme(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  themeButton.textContent = `Colours: ${name}`;
  themeButton.dataset.now = name;
  try { localStorage.setItem("ringpass-theme", name); } catch { /* a file without storage */ }
  repaint();
}
themeButton.addEventListener("click", () => setTheme(themes[(themes.indexOf(themeButton.dataset.now) + 1) % 3]));
let saved = null;
try { saved = localStorage.getItem("ringpass-theme"); } catch { /* a file without storage */ }
setTheme(themes.includes(saved) ? saved : "system");
document.documentElement.dataset.ready = String(Math.round(performance.now()));

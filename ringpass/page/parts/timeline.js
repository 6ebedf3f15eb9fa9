// The timeline of each rank: planned, and measured where the page was given profiles.

function measuredWords(now) {
  const left = now.found - now.rank.length;
  return `Measured: ${seconds(now.span)}, all attentions, forward and backward${left ? `, without the last ${count(left)} of ${count(now.found)} ranges: profile fewer steps to see all` : ""}.`;
}

panels.timeline = async (graph, panel) => {
  const data = await more;
  const plans = data.timelines[chosen.graph] || [];
  if (!plans.length && !data.measured) { panel.append(missing("No schedule is in this report, and no profile was given.")); return; }
  let which = plans.length ? "planned" : "measured", zoom = 1;
  const words = element("p"), sums = element("div");
  const events = () => (which === "measured" ? data.measured : plans[chosen.schedule]);
  const ranks = () => [...new Set(events().rank)].sort((a, b) => a - b);
  const row = () => Math.max(9, Math.min(26, 640 / ranks().length));
  const scroller = element("div", { class: "scroll", style: "max-height: none" });
  const wide = element("div");
  const picture = canvas(panel, "Timeline of each rank", () => ranks().length * row() + 22, draw, {
    mousemove: (e) => { const i = under(e); showTip(i === null ? null : describe(i), e.clientX, e.clientY); },
    mouseleave: () => showTip(null),
    keydown: (e) => {
      const way = { "+": 2, "-": 0.5 }[e.key];
      if (way) setZoom(zoom * way);
    },
  });
  function setZoom(x) {
    zoom = Math.max(1, Math.min(16, x));
    slider.value = Math.log2(zoom);
    wide.style.width = `${100 * zoom}%`;
    picture.paint();
  }
  const slider = element("input", { type: "range", min: 0, max: 4, step: 0.5, value: 0, "aria-label": "zoom", input: (e) => setZoom(2 ** Number(e.target.value)) });
  const buttons = [["planned", plans.length], ["measured", data.measured]].map(([name, there]) =>
    element("button", { type: "button", disabled: !there, "aria-pressed": String(name === which), "data-which": name, title: there ? null : "no profile was given", click: () => { which = name; show(); } }, name));

  function show() {
    buttons.forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.which === which)));
    const now = events(), scale = now.span / 1e6, of = {};
    now.rank.forEach((rank, i) => {
      of[rank] = of[rank] || { rank, tile: 0, transfer: 0, wait: 0, end: 0 };
      of[rank][now.lane[i]] += (now.stop[i] - now.start[i]) * scale;
      of[rank].end = Math.max(of[rank].end, now.stop[i] * scale);
    });
    words.textContent = which === "planned" ? `${(report.slowest?.[chosen.graph] || [])[chosen.schedule] || ""} The last rank ends at ${amount(now.span, now.unit)}${now.unit === "s" ? "" : ": work is counted in FLOPs, and a byte as 100 of them"}.` : measuredWords(now);
    sums.replaceChildren(table([
      { name: "rank", of: (r) => r.rank, kind: "number" },
      ...["tile", "transfer", "wait", "end"].map((lane) => ({ name: { tile: "in tiles", transfer: "in transfers", wait: "waits", end: "ends at" }[lane], of: (r) => r[lane], kind: "number", text: (x) => amount(x, now.unit) })),
    ], Object.values(of), { caption: "time of each rank" }));
    picture.paint();
  }
  function draw(context, width, height) {
    const now = events(), list = ranks(), tall = row(), left = 46, span = width - left - 6;
    context.clearRect(0, 0, width, height);
    const inks = { tile: colour("tile"), transfer: colour("transfer"), wait: colour("wait") };
    list.forEach((rank, i) => {
      context.fillStyle = colour(rank === chosen.rank ? "mark" : i % 2 ? "card" : "shade");
      context.fillRect(0, i * tall, width, tall);
      if (tall >= 13 || i % 4 === 0) { context.fillStyle = colour("quiet"); context.fillText(`rank ${rank}`, 2, i * tall + Math.min(tall - 1, 13)); }
    });
    const line = new Map(list.map((rank, i) => [rank, i * tall]));
    for (let i = 0; i < now.rank.length; i += 1) {
      const x = left + (now.start[i] / 1e6) * span, w = Math.max(0.4, ((now.stop[i] - now.start[i]) / 1e6) * span), y = line.get(now.rank[i]);
      context.fillStyle = inks[now.lane[i]];
      if (now.lane[i] === "transfer") context.fillRect(x, y + tall * 0.72, w, tall * 0.2);
      else {
        context.fillRect(x, y + 1, w, tall * 0.64);
        if (w > 3) { context.fillStyle = colour("card"); context.fillRect(x + w - 0.6, y + 1, 0.6, tall * 0.64); }
      }
    }
    context.fillStyle = colour("quiet");
    for (const part of [0, 0.25, 0.5, 0.75, 1]) {
      context.textAlign = part === 1 ? "right" : part ? "center" : "left";
      context.fillText(amount(part * now.span, now.unit), left + part * span, height - 5);
    }
    context.textAlign = "left";
  }
  function under(event) {
    const [x, y] = at(event), now = events(), rank = ranks()[Math.floor(y / row())], t = ((x - 46) / (picture.clientWidth - 52)) * 1e6;
    const below = (y % row()) / row() > 0.7;
    for (let i = 0; i < now.rank.length; i += 1) {
      if (now.rank[i] === rank && now.start[i] <= t && t < now.stop[i] && (now.lane[i] === "transfer") === below) return i;
    }
    return null;
  }
  function describe(i) {
    const now = events(), took = ((now.stop[i] - now.start[i]) / 1e6) * now.span;
    return `rank ${now.rank[i]}, step ${now.step[i]}: ${now.lane[i]}, ${amount(took, now.unit)}, ${now.detail[i]}`;
  }
  onSchedule.set("timeline", show);
  wide.append(picture);
  scroller.append(wide);
  panel.append(element("div", { class: "controls" }, plans.length ? scheduleSelect(graph) : "", ...buttons, labelled("zoom", slider)), words,
    legend([["tile", "tile: computing"], ["transfer", "transfer, beside it"], ["wait", "wait for keys"]]), scroller, sums);
  show();
};

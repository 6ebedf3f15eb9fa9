// Who sends how many bytes to whom, step by step.

panels.exchanges = (graph, panel) => {
  if (!graph?.schedules?.length) { panel.append(missing("No schedule is in this report.")); return; }
  let step = 0, moves = [], names = [], row = new Map(), world = 1, last = 0, most = 1;
  const words = element("p", { role: "status" }), below = element("div");
  const slider = element("input", { type: "range", min: 0, value: 0, "aria-label": "step", input: (e) => { step = Number(e.target.value); show(); } });
  const name = element("span", {});
  const picture = canvas(panel, "Bytes from each rank to each rank", (width) => Math.min(width, 460), draw, {
    mousemove: (e) => { const hit = under(e); showTip(hit, e.clientX, e.clientY); },
    mouseleave: () => showTip(null),
    keydown: (e) => {
      const way = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
      if (way) { e.preventDefault(); step = Math.max(0, Math.min(last, step + way)); slider.value = step; show(); }
    },
  });
  function prepare() {
    const schedule = graph.schedules[chosen.schedule];
    names = ranksOf(schedule);
    row = new Map(names.map((rank, i) => [rank, i]));
    world = names.length;
    moves = schedule.ranks.flatMap(({ rank, steps }) => steps.filter((s) => s.receive).map((s) => ({ step: s.step, from: s.receive.from, to: rank, rows: s.receive.rows, bytes: s.receive.bytes })));
    last = Math.max(0, ...moves.map((m) => m.step));
    most = Math.max(1, ...moves.map((m) => m.bytes));
    slider.max = last;
    step = Math.min(step, last);
    slider.value = step;
  }
  const shown = () => moves.filter((m) => !step || m.step === step);
  function show() {
    const now = shown(), sum = now.reduce((total, m) => total + m.bytes, 0), top = now.reduce((a, b) => (b.bytes > (a?.bytes ?? -1) ? b : a), null);
    name.textContent = step ? `step ${step} of ${last}` : "all steps together";
    words.textContent = now.length ? `${count(now.length)} transfers, ${bytes(sum)} in all; the largest has ${bytes(top.bytes)}, from rank ${top.from} to rank ${top.to}.` : "Nothing is sent.";
    picture.paint();
    below.replaceChildren(table([
      { name: "step", of: (m) => m.step, kind: "number" }, { name: "from", of: (m) => m.from, kind: "number" }, { name: "to", of: (m) => m.to, kind: "number" },
      { name: "rows", of: (m) => m.rows, kind: "number", text: count }, { name: "bytes", of: (m) => m.bytes, kind: "number", text: bytes },
    ], now.length > 400 ? [...now].sort((a, b) => b.bytes - a.bytes).slice(0, 400) : now, { caption: "transfers" }), now.length > 400 ? missing("The 400 largest are listed.") : "");
  }
  const box = (width, height) => ({ left: 34, top: 18, size: Math.min(width - 36, height - 20) });
  function draw(context, width, height) {
    const { left, top, size } = box(width, height), edge = size / world;
    context.clearRect(0, 0, width, height);
    context.fillStyle = colour("shade");
    context.fillRect(left, top, size, size);
    context.fillStyle = colour("full");
    for (const m of shown()) {
      context.globalAlpha = 0.25 + 0.75 * (m.bytes / most);
      context.fillRect(left + row.get(m.to) * edge, top + row.get(m.from) * edge, edge, edge);
    }
    context.globalAlpha = 1;
    context.strokeStyle = colour("card");
    context.lineWidth = edge > 8 ? 1 : 0.4;
    context.beginPath();
    for (let i = 1; i < world; i += 1) {
      context.moveTo(left + i * edge, top); context.lineTo(left + i * edge, top + size);
      context.moveTo(left, top + i * edge); context.lineTo(left + size, top + i * edge);
    }
    context.stroke();
    context.fillStyle = colour("quiet");
    context.fillText("to rank →", left, 12);
    for (let i = 0; i < world; i += Math.ceil(16 / edge)) context.fillText(String(names[i]), left - 17, top + i * edge + edge / 2 + 4);
    context.save();
    context.translate(12, top + size / 2);
    context.rotate(-Math.PI / 2);
    context.textAlign = "center";
    context.fillText("← from rank", 0, 0);
    context.restore();
  }
  function under(event) {
    const [x, y] = at(event), { left, top, size } = box(picture.clientWidth, picture.clientHeight);
    const to = names[Math.floor(((x - left) / size) * world)], from = names[Math.floor(((y - top) / size) * world)];
    if (to === undefined || from === undefined) return null;
    const sum = shown().filter((m) => m.from === from && m.to === to).reduce((total, m) => total + m.bytes, 0);
    return `from rank ${from} to rank ${to}: ${sum ? bytes(sum) : "nothing"}`;
  }
  onSchedule.set("exchanges", () => { prepare(); show(); });
  prepare();
  const gathered = graph.sites.some((s) => s.comm === "allgather");
  panel.append(element("div", { class: "controls" }, scheduleSelect(graph), labelled("step", slider), name), words,
    gathered ? missing("Where an attention says allgather, its keys come by one all-gather, and the steps say which of them are used.") : "",
    element("div", { class: "side" }, element("div", {}, picture), below));
  show();
};

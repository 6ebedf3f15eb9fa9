// Bytes alive on a rank over its program, and what they are.

panels.memory = (graph, panel) => {
  const memory = graph?.memory;
  if (!memory?.program?.length) { panel.append(missing("This report has no estimate of memory.")); return; }
  const program = memory.program, peak = Math.max(...program.map((p) => p.live)), top = program.findIndex((p) => p.live === peak);
  const always = Math.max(0, (memory.peak || peak) - peak);
  const turn = program.findIndex((p) => p.phase === "backward");
  panel.append(element("p", {}, `At most ${bytes(memory.peak || peak)}, at ${program[top].node} of the ${program[top].phase}: the dashed line.`));
  const named = Object.entries(memory.kinds || {}).filter(([, n]) => n);
  const most = Math.max(1, ...named.map(([, n]) => n));
  panel.append(element("div", { class: "bars" }, ...named.sort((a, b) => b[1] - a[1]).flatMap(([kind, n]) => [
    element("span", {}, kind), element("span", { class: "number" }, bytes(n)), element("div", { class: "bar", role: "img", "aria-label": `${kind} ${bytes(n)}` }, element("div", { style: `width:${(100 * n) / most}%; background:var(--tile)` })),
  ]).map((x, i, all) => (i % 3 === 1 ? all[i + 1] : i % 3 === 2 ? all[i - 1] : x))));
  const readout = element("p", { class: "readout" }, "Move over the line, or use the arrow keys, to read it.");
  let here = -1;
  const picture = canvas(panel, "Bytes alive over the program", () => 200, (context, width, height) => {
    const base = height - 20, tall = base - 16;
    context.clearRect(0, 0, width, height);
    const x = (i) => (i / program.length) * width, y = (n) => base - (n / peak) * tall;
    if (turn >= 0) {
      context.fillStyle = colour("shade");
      context.fillRect(x(turn), 0, width - x(turn), base);
      context.fillStyle = colour("quiet");
      context.fillText("backward", Math.min(x(turn) + 4, width - 60), height - 6);
    }
    context.fillStyle = colour("quiet");
    context.fillText("forward", 2, height - 6);
    context.beginPath();
    context.moveTo(0, base);
    program.forEach((p, i) => { context.lineTo(x(i), y(p.live)); context.lineTo(x(i + 1), y(p.live)); });
    context.lineTo(width, base);
    context.globalAlpha = 0.25;
    context.fillStyle = colour("tile");
    context.fill();
    context.globalAlpha = 1;
    context.strokeStyle = colour("tile");
    context.lineWidth = 1.4;
    context.stroke();
    context.strokeStyle = colour("wait");
    context.setLineDash([4, 3]);
    context.beginPath();
    context.moveTo(0, y(peak));
    context.lineTo(width, y(peak));
    context.stroke();
    context.setLineDash([]);
    if (here >= 0) { context.fillStyle = colour("wait"); context.fillRect(x(here), 0, 1.5, base); }
  }, {
    mousemove: (e) => read(Math.floor((at(e)[0] / picture.clientWidth) * program.length)),
    keydown: (e) => {
      const way = { ArrowRight: 1, ArrowLeft: -1, PageDown: 20, PageUp: -20 }[e.key];
      if (way) { e.preventDefault(); read(Math.max(0, here) + way); }
    },
  });
  function read(i) {
    here = Math.max(0, Math.min(program.length - 1, i));
    const p = program[here];
    readout.textContent = `${p.phase}, ${p.node}: ${bytes(p.live)} alive${always ? `, and ${bytes(always)} that are there all the time, such as parameters and inputs` : ""}`;
    picture.paint();
  }
  panel.append(element("h3", {}, "Over the program"), element("div", {}, picture), readout);
};

// Canvases that are sharp on any screen, and drawn again when the size or the colours change.

/** A canvas as wide as its place, of a height that `height(width)` gives; `draw(context, width, height)`. */
function canvas(panel, label, height, draw, listeners = {}) {
  const made = element("canvas", { role: "img", tabindex: 0, "aria-label": label, ...listeners });
  const paint = () => {
    const width = Math.floor(made.parentElement?.clientWidth || 0);
    if (!width) return;
    const tall = Math.round(height(width)), scale = window.devicePixelRatio || 1;
    made.width = width * scale;
    made.height = tall * scale;
    made.style.width = `${width}px`;
    made.style.height = `${tall}px`;
    const context = made.getContext("2d");
    context.scale(scale, scale);
    context.font = "12px system-ui, sans-serif";
    draw(context, width, tall);
  };
  redrawn.set(panel, [...(redrawn.get(panel) || []), paint]);
  made.paint = paint;
  requestAnimationFrame(paint);
  return made;
}

let resized = 0;
function repaint() {
  cancelAnimationFrame(resized);
  resized = requestAnimationFrame(() => { for (const all of redrawn.values()) all.forEach((paint) => paint()); });
}
addEventListener("resize", repaint);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

/** Diagonal lines, for what is left out. */
function hatch(context) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const pen = tile.getContext("2d");
  pen.strokeStyle = colour("empty");
  pen.lineWidth = 1;
  pen.beginPath();
  for (const x of [-6, 0, 6]) { pen.moveTo(x, 6); pen.lineTo(x + 6, 0); }
  pen.stroke();
  return context.createPattern(tile, "repeat");
}

/** Where an event is, in the canvas's own pixels. */
function at(event) {
  const box = event.target.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

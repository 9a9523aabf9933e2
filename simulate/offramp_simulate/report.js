"use strict";
// Drawing: axes, lines, marks and cells as SVG. Colours are Okabe and Ito's, which those who are colour-blind tell
// apart; every series has a dash and a mark of its own besides, and cells carry letters.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7a00", "#7a7a7a"];
const DASHES = ["", "7 4", "2 3", "10 3 2 3", "1 4", "5 2 5 6", "12 4", "3 6"];
const MARKS = ["circle", "square", "up", "diamond", "cross", "down", "plus", "ring"];
const LEFT = 74, RIGHT = 14, TOP = 10, BOTTOM = 44;

function style(index) {
  return { colour: COLOURS[index % 8], dash: DASHES[index % 8], mark: MARKS[index % 8] };
}

function text(value) {
  return String(value).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/"/g, "&quot;");
}

function number(value) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size >= 100) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

function axis(low, high, log) {
  if (!(high > low)) { low = low * 0.9 - (low ? 0 : 1); high = high * 1.1 + (high ? 0 : 1); }
  const ticks = [];
  if (log) {
    low = Math.max(low, 1e-9);
    const few = Math.log10(high / low) > 2.2;
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
      for (const m of few ? [1] : [1, 2, 5]) {
        const tick = m * 10 ** e;
        if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
      }
    }
  } else {
    const raw = (high - low) / 5, base = 10 ** Math.floor(Math.log10(raw));
    const step = base * (raw / base < 1.5 ? 1 : raw / base < 3.5 ? 2 : raw / base < 7.5 ? 5 : 10);
    for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) ticks.push(Number(t.toPrecision(12)));
  }
  const place = log ? v => (Math.log(Math.max(v, low)) - Math.log(low)) / (Math.log(high) - Math.log(low)) : v => (v - low) / (high - low);
  return { low, high, ticks, place };
}

function frame(options) {
  const width = options.width || 560, height = options.height || 330;
  const x = axis(options.x[0], options.x[1], options.logX), y = axis(options.y[0], options.y[1], options.logY);
  const px = v => LEFT + (width - LEFT - RIGHT) * x.place(v), py = v => height - BOTTOM - (height - TOP - BOTTOM) * y.place(v);
  const parts = [];
  for (const tick of x.ticks) {
    parts.push(`<line class="gridline" x1="${px(tick).toFixed(1)}" x2="${px(tick).toFixed(1)}" y1="${TOP}" y2="${height - BOTTOM}"/>`);
    parts.push(`<text text-anchor="middle" x="${px(tick).toFixed(1)}" y="${height - BOTTOM + 16}">${(options.formatX || number)(tick)}</text>`);
  }
  for (const tick of y.ticks) {
    parts.push(`<line class="gridline" x1="${LEFT}" x2="${width - RIGHT}" y1="${py(tick).toFixed(1)}" y2="${py(tick).toFixed(1)}"/>`);
    parts.push(`<text text-anchor="end" x="${LEFT - 6}" y="${(py(tick) + 4).toFixed(1)}">${(options.formatY || number)(tick)}</text>`);
  }
  parts.push(`<text class="soft" text-anchor="middle" x="${(width + LEFT - RIGHT) / 2}" y="${height - 8}">${text(options.titleX)}</text>`);
  if (options.titleY) {
    const middle = (height - BOTTOM + TOP) / 2;
    parts.push(`<text class="soft" text-anchor="middle" transform="rotate(-90 14 ${middle})" x="14" y="${middle}">${text(options.titleY)}</text>`);
  }
  return { width, height, px, py, parts, label: options.label || options.titleX };
}

function finish(f) {
  return `<svg viewBox="0 0 ${f.width} ${f.height}" role="img" aria-label="${text(f.label)}">${f.parts.join("")}</svg>`;
}

function line(f, points, how, wide) {
  const path = points.map(p => `${f.px(p[0]).toFixed(1)},${f.py(p[1]).toFixed(1)}`).join(" ");
  f.parts.push(`<polyline points="${path}" fill="none" stroke="${how.colour}" stroke-width="${wide || 2}" stroke-dasharray="${how.dash}"><title>${text(how.name || "")}</title></polyline>`);
}

function mark(f, x, y, how, title, size, hollow) {
  f.parts.push(shape(f.px(x), f.py(y), how, size || 5, title, hollow));
}

function shape(x, y, how, r, title, hollow) {
  const at = points => points.map(p => `${(x + p[0] * r).toFixed(1)},${(y + p[1] * r).toFixed(1)}`).join(" ");
  const paint = `fill="${hollow ? "none" : how.colour}" stroke="${how.colour}" stroke-width="1.6"`;
  const tip = `<title>${text(title || "")}</title>`;
  const polygons = {
    square: [[-1, -1], [1, -1], [1, 1], [-1, 1]], up: [[0, -1.2], [1.1, 0.9], [-1.1, 0.9]],
    down: [[0, 1.2], [1.1, -0.9], [-1.1, -0.9]], diamond: [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]],
  };
  if (polygons[how.mark]) return `<polygon points="${at(polygons[how.mark])}" ${paint}>${tip}</polygon>`;
  if (how.mark === "cross") return `<path d="M${x - r},${y - r}L${x + r},${y + r}M${x - r},${y + r}L${x + r},${y - r}" stroke="${how.colour}" stroke-width="2.4">${tip}</path>`;
  if (how.mark === "plus") return `<path d="M${x - r},${y}L${x + r},${y}M${x},${y + r}L${x},${y - r}" stroke="${how.colour}" stroke-width="2.4">${tip}</path>`;
  const open = how.mark === "ring" ? `fill="none" stroke="${how.colour}" stroke-width="2"` : paint;
  return `<circle cx="${x.toFixed(1)}" cy="${y.toFixed(1)}" r="${r}" ${open}>${tip}</circle>`;
}

function legend(id, entries) {
  document.getElementById(id).innerHTML = entries.map(e => `<span><svg viewBox="0 0 34 12"><line x1="1" x2="33" y1="6" y2="6" stroke="${e.colour}" stroke-width="2.2" stroke-dasharray="${e.dash}"/>${shape(17, 6, e, 4)}</svg> ${text(e.name)}</span>`).join("");
}

function extent(values, log) {
  const good = values.filter(v => Number.isFinite(v) && (!log || v > 0));
  let low = Math.min(...good), high = Math.max(...good);
  if (!good.length) return log ? [1, 10] : [0, 1];
  if (log) return [low / 1.12, high * 1.12];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.02 || 1;
  return [low - room, high + room];
}

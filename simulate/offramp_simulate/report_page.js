"use strict";
// What is drawn where, and drawn again when something is moved.
const R = DATA.result, $ = id => document.getElementById(id);
const NAMES = [...new Set(R.cells.map(c => c.plan))];
const HOW = Object.fromEntries(NAMES.map((name, i) => [name, { ...style(i), name }]));
const AXES = Object.keys(R.axes);
const percent = v => `${number(100 * v)} %`;

// The simulation's own results.
function chosenCells() {
  const wanted = Object.fromEntries(AXES.map((key, i) => [key, R.axes[key][Number($(`axis${i}`).value)]]));
  return R.cells.filter(cell => AXES.every(key => JSON.stringify(cell.values[key]) === JSON.stringify(wanted[key])));
}

const COLUMNS = [
  ["p50 ms", c => c.ms.p50, -1], ["p95 ms", c => c.ms.p95, -1], ["p99 ms", c => c.ms.p99, -1], ["right", c => c.right, 1, percent],
  ["bytes up", c => c.bytes_up, -1], ["sent", c => c.sent, 0, percent], ["fallback", c => c.where.fallback, -1, percent],
  ["missed", c => c.missed, -1, percent], ["cloud ms", c => c.cloud_ms, -1], ["device mJ", c => c.device_mj, -1],
  ["$ / million", c => c.usd_per_million, -1],
];

function drawTable(cells) {
  const head = COLUMNS.map(c => `<th>${c[0]}</th>`).join("");
  const best = COLUMNS.map(c => c[2] ? Math.max(...cells.map(cell => c[2] * c[1](cell))) : null);
  const rows = cells.map(cell => `<tr><td>${text(cell.plan)}</td>` + COLUMNS.map((c, i) => {
    const value = c[1](cell);
    return `<td class="${c[2] && c[2] * value === best[i] ? "best" : ""}">${(c[3] || number)(value)}</td>`;
  }).join("") + "</tr>").join("");
  $("table").innerHTML = `<table><tr><th>plan</th>${head}</tr>${rows}</table>`;
}

function drawSimulated() {
  const cells = chosenCells();
  drawTable(cells);
  const all = cells.flatMap(c => c.cdf_ms.map(p => p[1]));
  const f = frame({ x: extent(all, true), y: [0, 1], logX: true, titleX: "ms", titleY: "share of answers", formatY: percent, label: "latency of each plan" });
  for (const cell of cells) {
    line(f, cell.cdf_ms.map(p => [p[1], p[0]]), HOW[cell.plan]);
    const half = cell.cdf_ms[Math.floor(cell.cdf_ms.length / 2)];
    mark(f, half[1], half[0], HOW[cell.plan], cell.plan);
  }
  $("simCdf").innerHTML = finish(f);
  const pick = { p50: [c => c.ms.p50, "median latency, ms"], p95: [c => c.ms.p95, "95th percentile of latency, ms"], up: [c => c.bytes_up, "bytes sent a request"], usd: [c => c.usd_per_million, "cloud and traffic, $ a million requests"], mj: [c => c.device_mj, "device, mJ a request"] }[$("simX").value];
  $("simPareto").innerHTML = scatter(cells.map(c => ({ x: pick[0](c), y: c.right, how: HOW[c.plan], title: `${c.plan}: ${number(pick[0](c))}, ${percent(c.right)}`, solid: true })), pick[1]);
}

// Right answers (up) against something that should be small (left); the front in grey.
function scatter(points, titleX) {
  const log = points.every(p => p.x > 0);
  const f = frame({ x: extent(points.map(p => p.x), log), y: extent(points.map(p => p.y)), logX: log, titleX, titleY: "right answers", formatY: percent, label: `right answers against ${titleX}` });
  const front = [];
  let best = -1;
  for (const p of [...points].sort((a, b) => a.x - b.x || b.y - a.y)) if (p.y > best) { front.push([p.x, p.y]); best = p.y; }
  if (front.length > 1) {
    const steps = front.flatMap((p, i) => i ? [[p[0], front[i - 1][1]], p] : [p]);
    line(f, steps, { colour: "var(--soft)", dash: "", name: "no plan is better in both" }, 1.2);
  }
  for (const p of points) mark(f, p.x, p.y, p.how, p.title, p.solid ? 6 : 3.2, !p.solid);
  return finish(f);
}

// The explorer.
const at = id => Number($(id).value);
const setting = () => ({ mbps: 10 ** at("mbps"), rtt: 10 ** at("rtt"), slow: 2 ** at("slow"), point: at("point"), metric: $("metric").value });
const allowed = plan => plan.k > 0 || !$("noInput").checked;

function drawExplorer() {
  const s = setting();
  $("mbpsOut").textContent = `${number(s.mbps)} Mbit/s`;
  $("rttOut").textContent = `${number(s.rtt)} ms`;
  $("slowOut").textContent = `× ${number(s.slow)}`;
  const point = E.points[s.point];
  $("pointOut").textContent = `${point.name} (depth ${number(point.meanDepth)})`;
  const list = PLANS.filter(allowed).map(plan => {
    const rows = parts(plan, s.slow, s.point);
    return { plan, rows, bytes: mean(rows, r => r.up) };
  });
  const best = winner(list, e => judged(e.rows, s.mbps, s.rtt, s.metric));
  $("verdict").innerHTML = `Here <b>${text(best.entry.plan.name)}</b> answers fastest: ${number(best.v)} ms, ${number(best.entry.bytes)} bytes up a request, ${percent(point.right[best.entry.plan.k][best.entry.plan.c])} right.`;
  drawCdf(list, s, best);
  drawHeat(list, s);
  drawPareto(s);
  drawBars(list, s, best);
}

function drawCdf(list, s, best) {
  const shown = list.filter(e => e.plan.c === 0 || e === best.entry).map(e => ({ ...e, steps: distribution(e.rows, s.mbps, s.rtt) }));
  const f = frame({ x: extent(shown.flatMap(e => [e.steps[0][0], e.steps[e.steps.length - 1][0]]), true), y: [0, 1], logX: true, titleX: "ms", titleY: "share of answers", formatY: percent, label: "latency by plan" });
  for (const e of shown) {
    let before = 0;
    const path = [];
    for (const [ms, share] of e.steps) { path.push([ms, before], [ms, share]); before = share; }
    line(f, path, { ...e.plan }, e === best.entry || e.plan === best.entry.plan ? 3.6 : 1.6);
    const middle = e.steps.find(step => step[1] >= 0.5);
    mark(f, middle[0], middle[1], e.plan, e.plan.name, 4);
  }
  $("cdf").innerHTML = finish(f);
}

const GRID_X = Array.from({ length: 22 }, (_, i) => 10 ** (-1 + 3 * (i + 0.5) / 22));
const GRID_Y = Array.from({ length: 16 }, (_, i) => 10 ** (3 * (i + 0.5) / 16));

function drawHeat(list, s) {
  const f = frame({ x: [0.1, 100], y: [1, 1000], logX: true, logY: true, titleX: "bandwidth up, Mbit/s", titleY: "round trip, ms", label: "the fastest plan by bandwidth and round trip" });
  const dx = (f.px(100) - f.px(0.1)) / GRID_X.length, dy = (f.py(1) - f.py(1000)) / GRID_Y.length;
  const cells = [];
  GRID_X.forEach((mbps, i) => GRID_Y.forEach((rtt, j) => {
    const best = winner(list, e => judged(e.rows, mbps, rtt, s.metric)), plan = best.entry.plan;
    const x = f.px(0.1) + i * dx, y = f.py(1) - (j + 1) * dy;
    cells.push(`<rect x="${x.toFixed(1)}" y="${y.toFixed(1)}" width="${(dx + 0.4).toFixed(1)}" height="${(dy + 0.4).toFixed(1)}" fill="${plan.colour}" fill-opacity="0.78"><title>${number(mbps)} Mbit/s, ${number(rtt)} ms: ${text(plan.name)}, ${number(best.v)} ms</title></rect>`);
    if ((i + j) % 2 === 0) cells.push(`<text x="${(x + dx / 2).toFixed(1)}" y="${(y + dy / 2 + 4).toFixed(1)}" text-anchor="middle" style="fill:#fff;font-size:11px">${plan.letter}</text>`);
  }));
  f.parts.push(...cells);
  f.parts.push(`<circle cx="${f.px(s.mbps).toFixed(1)}" cy="${f.py(s.rtt).toFixed(1)}" r="8" fill="none" stroke="#fff" stroke-width="4"/><circle cx="${f.px(s.mbps).toFixed(1)}" cy="${f.py(s.rtt).toFixed(1)}" r="8" fill="none" stroke="#000" stroke-width="2"><title>the sliders</title></circle>`);
  $("heat").innerHTML = finish(f);
}

function drawPareto(s) {
  const kind = $("paretoX").value, points = [];
  for (let p = 0; p < E.points.length; p++) {
    for (const plan of PLANS.filter(allowed)) {
      const rows = parts(plan, s.slow, p);
      const x = kind === "ms" ? judged(rows, s.mbps, s.rtt, s.metric) : mean(rows, r => kind === "up" ? r.up : r.cloud);
      points.push({ x, y: E.points[p].right[plan.k][plan.c], how: plan, solid: p === s.point, title: `${plan.name}, threshold ${E.points[p].name}: ${number(x)}, ${percent(E.points[p].right[plan.k][plan.c])}` });
    }
  }
  const title = { ms: `latency, ms (${s.metric})`, up: "bytes sent a request", cloud: "cloud compute, ms a request" }[kind];
  $("pareto").innerHTML = scatter(points, title);
}

function drawBars(list, s, best) {
  const values = list.map(e => judged(e.rows, s.mbps, s.rtt, s.metric));
  const height = 40 + 21 * list.length, most = Math.max(...values) * 1.25, left = 150;
  const bars = list.map((e, i) => {
    const y = 6 + 21 * i, wide = Math.max((560 - left - 14) * values[i] / most, 1);
    return `<text text-anchor="end" x="${left - 8}" y="${y + 13}" style="font-weight:${e === best.entry ? 700 : 400}">${text(e.plan.name)}</text><rect x="${left}" y="${y}" width="${wide.toFixed(1)}" height="16" fill="${e.plan.colour}"/><text x="${(left + wide + 5).toFixed(1)}" y="${y + 13}">${number(values[i])}</text>`;
  }).join("");
  $("bars").innerHTML = `<svg viewBox="0 0 560 ${height}" role="img" aria-label="latency of each plan">${bars}<text class="soft" text-anchor="middle" x="${(560 + left) / 2}" y="${height - 8}">ms (${s.metric})</text></svg>`;
}

// One device over time.
const WHERE = ["answered on the device", "answered in the cloud", "fallback"];

function drawTimeline() {
  const rows = R.timelines[$("linePlan").value] || [];
  if (!rows.length) { $("timelineSection").hidden = true; return; }
  const end = Math.max(rows[rows.length - 1][0], 1e-6), kinds = new Map();
  const f = frame({ width: 1080, height: 340, x: [0, end], y: extent(rows.map(r => r[1]), true), logY: true, titleX: "seconds", titleY: "ms", label: "latency of each answer of one device" });
  for (const fault of DATA.faults) {
    const from = f.px(Math.min(fault.at_s, end)), to = f.px(Math.min(fault.at_s + fault.for_s, end));
    if (to > from) f.parts.push(`<rect x="${from}" y="${TOP}" width="${to - from}" height="${340 - TOP - BOTTOM}" fill="#7a7a7a" fill-opacity="0.2"><title>${text(fault.what)} fault</title></rect>`);
  }
  if (DATA.trace.length) {
    const most = Math.max(...DATA.trace.map(p => p[1])) || 1, floor = 340 - BOTTOM, room = (340 - TOP - BOTTOM) / 3;
    const path = DATA.trace.filter(p => p[0] <= end).map(p => `${f.px(p[0]).toFixed(1)},${(floor - room * p[1] / most).toFixed(1)}`).join(" ");
    f.parts.push(`<polygon points="${f.px(0)},${floor} ${path} ${f.px(end)},${floor}" fill="var(--grid)"/><text class="soft" x="${LEFT + 6}" y="${(floor - room - 4).toFixed(1)}">grey: uplink, up to ${number(most)} Mbit/s</text>`);
  }
  for (const [when, ms, where, cut, exit, up] of rows) {
    const sent = cut < 0 ? "" : cut === 0 ? ", input sent" : `, sent after ${cut} layers`;
    const key = WHERE[where] + (where === 0 ? "" : sent);
    if (!kinds.has(key)) kinds.set(key, { ...style(where === 0 ? 0 : where === 2 ? 7 : cut === 0 ? 1 : 1 + cut), name: key });
    mark(f, when, ms, kinds.get(key), `${number(when)} s: ${key}${where === 0 ? sent : ""}, exit ${exit}, ${number(ms)} ms, ${number(up)} bytes`, 3);
  }
  $("timeline").innerHTML = finish(f);
  legend("legendTimeline", [...kinds.values()]);
}

// Set-up.
$("cells").innerHTML = AXES.map((key, i) => `<label>${text(key)} <select id="axis${i}">${R.axes[key].map((v, j) => `<option value="${j}">${text(v)}</option>`).join("")}</select></label>`).join("");
AXES.forEach((_, i) => $(`axis${i}`).addEventListener("change", drawSimulated));
$("simX").addEventListener("change", drawSimulated);
legend("legendPlans", Object.values(HOW));
legend("legendSplits", PLANS.filter(p => p.c === 0));
$("mbps").value = Math.log10(E.start.mbps);
$("rtt").value = Math.log10(E.start.rtt);
$("slow").value = Math.log2(E.start.slow);
$("point").max = E.points.length - 1;
$("point").value = E.own;
let waiting = false;
for (const id of ["mbps", "rtt", "slow", "point", "metric", "noInput", "paretoX"]) {
  $(id).addEventListener("input", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; drawExplorer(); });
  });
}
$("linePlan").innerHTML = Object.keys(R.timelines).map(name => `<option>${text(name)}</option>`).join("");
// First the plan with the most to see.
const variety = name => new Set(R.timelines[name].map(row => `${row[2]} ${row[3]}`)).size;
$("linePlan").value = Object.keys(R.timelines).reduce((best, name) => (variety(name) > variety(best) ? name : best));
$("linePlan").addEventListener("change", drawTimeline);
drawSimulated();
drawExplorer();
drawTimeline();

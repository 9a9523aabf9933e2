"use strict";
// The sliders' arithmetic: the record's groups of samples, one request at a time, without queues.
const E = DATA.explorer;
const NEXT = Array.from({ length: E.layers }, (_, k) => E.exits.find(d => d > k));
const PLANS = [];
for (let k = 0; k <= E.layers; k++) {
  for (let c = 0; c < (k === 0 || k === E.layers ? 1 : E.codecs.length); c++) {
    PLANS.push({ k, c, letter: k === E.layers ? "L" : k === 0 ? "I" : String(k), name: planName(k, c), ...style(k === E.layers ? 0 : k === 0 ? 1 : 1 + k) });
  }
}

function planName(k, c) {
  if (k === E.layers) return "all on the device";
  return k === 0 ? "send the input" : `split ${k}, ${E.codecs[c]}`;
}

// What a plan costs each group, apart from the link: milliseconds fixed, bytes up, whether it is sent.
function parts(plan, slow, point) {
  const rows = [];
  for (const [t, leaves, cloudLeaves, count] of E.points[point].groups) {
    const layers = E.deviceMs[t], stop = Math.min(plan.k, leaves);
    let ms = E.beforeMs;
    for (let d = 0; d < stop; d++) ms += layers[d];
    ms *= slow;
    if (leaves <= plan.k) { rows.push({ ms, up: 0, cloud: 0, count }); continue; }
    const exit = Math.max(cloudLeaves, NEXT[plan.k]);
    const cloud = E.engineFixedMs + (exit - plan.k) * E.engineMs[t];
    const encode = plan.k ? E.encodeMs[plan.c][t] * slow : 0;
    rows.push({ ms: ms + encode + E.gatewayMs + cloud, up: E.bytes[plan.k][plan.c][t], cloud, count });
  }
  return rows;
}

function latency(row, mbps, rtt) {
  return row.up ? row.ms + rtt + row.up * 0.008 / mbps + E.down * 0.008 / (mbps * E.downPerUp) : row.ms;
}

function distribution(rows, mbps, rtt) {
  const values = rows.map(row => [latency(row, mbps, rtt), row.count]).sort((a, b) => a[0] - b[0]);
  const total = values.reduce((sum, v) => sum + v[1], 0);
  let seen = 0;
  return values.map(v => [v[0], (seen += v[1]) / total]);
}

function quantile(steps, share) {
  const found = steps.find(step => step[1] >= share - 1e-9);
  return (found || steps[steps.length - 1])[0];
}

function judged(rows, mbps, rtt, metric) {
  if (metric !== "mean") return quantile(distribution(rows, mbps, rtt), metric === "p50" ? 0.5 : 0.95);
  return mean(rows, row => latency(row, mbps, rtt));
}

function mean(rows, of) {
  let sum = 0, total = 0;
  for (const row of rows) { sum += of(row) * row.count; total += row.count; }
  return sum / total;
}

// The winner among plans: the fastest; of those within a thousandth the one with fewer bytes sent.
function winner(list, value) {
  let best = null;
  for (const entry of list) {
    const v = value(entry);
    if (best === null || v < best.v * 0.999 || (v <= best.v * 1.001 && entry.bytes < best.entry.bytes)) best = { entry, v };
  }
  return best;
}

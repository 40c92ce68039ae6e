"use strict";
/* Reads values off the charts: with the pointer, a finger or the arrow keys. */
const pageData = JSON.parse(document.getElementById("data").textContent);

function showNumber(value, isShare) {
  if (isShare) return (100 * value).toPrecision(3) + "%";
  const size = Math.abs(value);
  return size && (size < 1e-3 || size >= 1e7) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function nearestIndex(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
}

function valuesAt(chart, step) {
  const parts = [];
  for (const curve of chart.curves) {
    const i = nearestIndex(curve.steps, step);
    if (curve.steps[i] !== step || curve.values[i] === null) continue;
    const hasRange = curve.low[i] !== undefined && curve.low[i] !== null;
    const range = hasRange ? ` (${showNumber(curve.low[i], chart.isShare)} to ${showNumber(curve.high[i], chart.isShare)})` : "";
    parts.push(`${curve.label} ${showNumber(curve.values[i], chart.isShare)}${range}`);
  }
  return `step ${Number(step.toPrecision(6))}: ${parts.join(", ") || "nothing recorded"}`;
}

function setUpChart(plot) {
  const chart = pageData.charts[Number(plot.dataset.chart)];
  const steps = [...new Set(chart.curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
  const readout = plot.parentElement.querySelector(".readout");
  const cursor = plot.querySelector(".cursor");
  let at = -1;

  function show(index) {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const share = (steps[at] - chart.low) / (chart.high - chart.low);
    const x = chart.left + share * (chart.right - chart.left);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    readout.textContent = valuesAt(chart, steps[at]);
  }

  function hide() {
    at = -1;
    cursor.setAttribute("visibility", "hidden");
    readout.textContent = readout.dataset.note;
  }

  plot.addEventListener("pointermove", (event) => {
    const box = plot.querySelector("svg").getBoundingClientRect();
    const x = (event.clientX - box.left) * chart.width / box.width;
    const step = chart.low + (x - chart.left) / (chart.right - chart.left) * (chart.high - chart.low);
    show(nearestIndex(steps, step));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: at + 1, ArrowLeft: at < 0 ? steps.length - 1 : at - 1, Home: 0, End: steps.length - 1 };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
}

document.querySelectorAll(".plot").forEach(setUpChart);

// The last hour: what was resident on each GPU, the time to the first token, tokens per second and the queue.

import { html, useEffect, useRef } from "./vendor-preact-htm.js";
import { duration, gib } from "./format.js";
import { Section } from "./parts.js";

const HOUR = 3600;
const SHORTEST = 300; // of what is shown after a start
const ROW_HEIGHT = 44;
const ROW_GAP = 8;
const LEFT = 52;
const AXIS = 20;
const COLOURS = 10;
const STEPS = [60, 120, 300, 600, 900, 1200]; // seconds between two lines

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function Hour({ state, theme }) {
  const points = Object.entries(state.points)
    .map(([at, point]) => [Number(at), point])
    .sort(([a], [b]) => a - b);
  const latest = points.at(-1)?.[1];
  const since = Math.max(state.at - HOUR, Math.min(points[0]?.[0] ?? state.at, state.at - SHORTEST));
  const range = [since, state.at];
  return html`<${Section} id="hour" title="Last hour" wide>
    <div class="hour">
      <${Residency} state=${state} range=${range} theme=${theme} />
      <div class="charts">
        <${Chart} title="Tokens per second" points=${points} range=${range} theme=${theme} series=${[["tokens_per_second", "tokens/s", "--c0"]]} words=${latest && `${latest.tokens_per_second} tokens per second now`} />
        <${Chart} title="Time to first token, seconds" points=${points} range=${range} theme=${theme} series=${[["ttft_p95_seconds", "p95", "--c1"], ["ttft_p50_seconds", "median", "--c0"]]}
          words=${latest?.ttft_p50_seconds !== undefined && `median ${duration(latest.ttft_p50_seconds)} now`} gaps />
        <${Chart} title="Requests" points=${points} range=${range} theme=${theme} series=${[["running", "running", "--c2"], ["waiting", "waiting", "--c1"]]} words=${latest && `${latest.running} running, ${latest.waiting} waiting now`} whole />
      </div>
    </div>
  </${Section}>`;
}

// --- lines --------------------------------------------------------------------------------------------------------

function Chart({ title, points, range, theme, series, words, gaps, whole }) {
  const box = useRef(null);
  const plot = useRef(null);
  useEffect(() => {
    const options = optionsOf(series, box.current.clientWidth, { gaps, whole });
    const chart = (plot.current = new window.uPlot(options, dataOf(points, series), box.current));
    const observer = new ResizeObserver(() => chart.setSize({ width: box.current.clientWidth, height: options.height }));
    observer.observe(box.current);
    return () => {
      observer.disconnect();
      chart.destroy();
    };
  }, [theme]);
  useEffect(() => {
    plot.current.batch(() => {
      plot.current.setData(dataOf(points, series), false);
      plot.current.setScale("x", { min: range[0], max: range[1] });
    });
  });
  return html`<figure class="chart">
    <figcaption>${title}<span class="legend">${series.length > 1 && series.map(([, name, colour]) => html`<span><i class=${`key line ${colour.slice(2)}`}></i>${name}</span>`)}</span></figcaption>
    <div ref=${box} role="img" aria-label=${`${title} over the last hour${words ? `: ${words}` : ""}`}></div>
  </figure>`;
}

function dataOf(points, series) {
  return [points.map(([at]) => at), ...series.map(([key]) => points.map(([, point]) => point[key] ?? null))];
}

function optionsOf(series, width, { gaps, whole }) {
  const axis = { stroke: () => style("--dim"), grid: { stroke: () => style("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  return {
    width,
    height: 132,
    padding: [8, 8, 0, 0],
    legend: { show: false },
    cursor: { drag: { x: false, y: false }, sync: { key: "hour" }, points: { size: 5 } },
    scales: { x: { time: true }, y: { range: (_, __, most) => [0, Math.max(1, most * 1.1)] } },
    axes: [
      { ...axis, size: 24, space: 80, values: (_, times) => times.map((at) => new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false })) },
      { ...axis, size: LEFT - 8, space: 28, values: (_, values) => values.map((value) => (whole && !Number.isInteger(value) ? "" : String(value))) },
    ],
    series: [
      {},
      ...series.map(([, name, colour]) => ({
        label: name,
        stroke: () => style(colour),
        width: 1.5,
        spanGaps: false,
        points: { show: gaps ? undefined : false, size: 4 },
        fill: series.length === 1 ? () => `${style(colour)}22` : undefined,
      })),
    ],
  };
}

// --- residency ----------------------------------------------------------------------------------------------------

function Residency({ state, range, theme }) {
  const canvas = useRef(null);
  const box = useRef(null);
  const gpus = Object.entries(state.gpus).sort(([, a], [, b]) => a.index - b.index);
  const spans = Object.values(state.spans).filter((span) => Object.keys(span.per_gpu_bytes).length);
  const colours = coloursOf(spans);
  const draw = () => box.current && paint(canvas.current, box.current.clientWidth, gpus, spans, range, colours);
  const latest = useRef(draw);
  latest.current = draw;
  useEffect(() => {
    const observer = new ResizeObserver(() => latest.current());
    observer.observe(box.current);
    return () => observer.disconnect();
  }, []);
  useEffect(draw, [state.spans, Math.floor(state.at / 5), theme]);
  return html`<figure class="residency">
    <figcaption>What was resident on each GPU
      <ul class="legend">${[...colours].map(([name, index]) => html`<li key=${name}><i class=${`key c${index}`}></i>${name}</li>`)}</ul>
    </figcaption>
    <div ref=${box}><canvas ref=${canvas} role="img" aria-label=${described(gpus, spans, state.at)}></canvas></div>
  </figure>`;
}

// A colour for each model, kept while the page is open.
const known = new Map();

function coloursOf(spans) {
  const names = [...new Set(spans.map((span) => span.model))].sort();
  for (const name of names) if (!known.has(name)) known.set(name, known.size % COLOURS);
  return new Map(names.map((name) => [name, known.get(name)]));
}

function described(gpus, spans, at) {
  const words = gpus.map(([uuid, gpu]) => {
    const here = spans.filter((span) => uuid in span.per_gpu_bytes && span.until === undefined);
    const models = here.map((span) => `${span.model} for ${duration(at - span.since)}${span.is_loading ? ", loading" : ""}`);
    return `GPU ${gpu.index}: ${models.join("; ") || "nothing"}`;
  });
  return `Residency of models over the last hour. Now: ${words.join(". ")}`;
}

function paint(canvas, width, gpus, spans, [from, to], colours) {
  const height = gpus.length * (ROW_HEIGHT + ROW_GAP) + AXIS;
  const scale = window.devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  const inner = width - LEFT - 8;
  const x = (at) => LEFT + (Math.min(to, Math.max(from, at)) - from) / (to - from) * inner;
  paintAxis(pen, x, [from, to], height);
  gpus.forEach(([uuid, gpu], row) => {
    const top = row * (ROW_HEIGHT + ROW_GAP);
    pen.fillStyle = style("--well");
    pen.fillRect(LEFT, top, inner, ROW_HEIGHT);
    pen.fillStyle = style("--dim");
    pen.fillText(`GPU ${gpu.index}`, 0, top + ROW_HEIGHT / 2 - 7);
    pen.fillText(`${gib(gpu.memory_total_bytes)}G`, 0, top + ROW_HEIGHT / 2 + 7);
    const here = spans.filter((span) => uuid in span.per_gpu_bytes && (span.until ?? to) > from).sort((a, b) => a.since - b.since);
    const blocks = [];
    for (const span of here) {
      const until = span.until ?? to;
      const tall = Math.max(2, (span.per_gpu_bytes[uuid] / gpu.memory_total_bytes) * ROW_HEIGHT);
      const bottom = lowest(blocks, span.since, until, tall);
      blocks.push([span.since, until, bottom, bottom + tall]);
      paintSpan(pen, span, x(span.since), x(until), top + ROW_HEIGHT - bottom - tall, tall, style(`--c${colours.get(span.model)}`));
    }
  });
}

// The lowest position at which the block overlaps no other.
function lowest(blocks, since, until, tall) {
  let bottom = 0;
  const over = blocks.filter(([start, end]) => start < until && since < end).sort((a, b) => a[2] - b[2]);
  for (const [, , low, high] of over) {
    if (low - bottom >= tall) break;
    bottom = Math.max(bottom, high);
  }
  return bottom;
}

function paintSpan(pen, span, left, right, top, tall, colour) {
  const wide = Math.max(1, right - left);
  pen.globalAlpha = span.is_loading ? 0.35 : 0.9;
  pen.fillStyle = colour;
  pen.fillRect(left, top, wide, Math.max(1, tall - 1));
  pen.globalAlpha = 1;
  if (!span.is_loading && tall >= 13 && pen.measureText(span.model).width + 10 < wide) {
    pen.fillStyle = style("--on-colour");
    pen.fillText(span.model, left + 5, top + tall / 2);
  }
}

function paintAxis(pen, x, [from, to], height) {
  const step = STEPS.find((each) => (each / (to - from)) * (x(to) - x(from)) > 70) ?? 1200;
  pen.strokeStyle = style("--line");
  pen.fillStyle = style("--dim");
  pen.textAlign = "center";
  for (let at = Math.ceil(from / step) * step; at < to; at += step) {
    pen.beginPath();
    pen.moveTo(Math.round(x(at)) + 0.5, 0);
    pen.lineTo(Math.round(x(at)) + 0.5, height - AXIS + 3);
    pen.stroke();
    if (x(at) > LEFT + 16 && x(at) < x(to) - 16) {
      pen.fillText(new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false }), x(at), height - 8);
    }
  }
  pen.textAlign = "left";
}

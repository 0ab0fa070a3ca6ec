// What is loaded, being loaded or downloaded, on which instances, with the commands for it.

import { html } from "./vendor-preact-htm.js";
import { age, bytes, context, duration, gib, percent, rate } from "./format.js";
import { Bar, Button, Section, Slots, State, Table } from "./parts.js";

const LEVELS = { ready: "good", loading: "busy", planned: "busy", unloading: "warning" };
const INSTANCE_LEVELS = { ready: "good", starting: "busy", draining: "warning", stopping: "warning", backoff: "error", fatal: "error", stopped: "idle" };

function speedOf(state, rates, model) {
  let sum = 0;
  for (const [id, row] of Object.entries(state.running)) {
    if (row.instance === model.instance && row.model === model.name) sum += rates.of(id) ?? 0;
  }
  return sum;
}

const speedWords = (speed) => (speed > 0 ? rate(speed) : "–");

export function Models({ state, rates, act }) {
  const rows = Object.entries(state.models).sort(([, a], [, b]) => a.name.localeCompare(b.name) || a.instance.localeCompare(b.instance));
  const columns = [
    { label: "model" },
    { label: "on" },
    { label: "state" },
    { label: "slots" },
    { label: "tok/s", class: "number" },
    { label: "context", class: "number" },
    { label: "GiB", class: "number" },
    { label: "idle", class: "number" },
    { label: "", class: "action" },
  ];
  const missing = Object.values(state.warm_missing ?? []);
  return html`<${Section} id="models" title="Models" note=${rows.length ? `${rows.length} loaded` : ""}
    actions=${html`<${Button} label="Load a model…" onClick=${act.load} />`}>
    <${Table} label="Loaded models" columns=${columns} isEmpty=${!rows.length} empty="No model is loaded.">
      ${rows.map(([id, model]) => html`<tr key=${id}>
        <td title=${model.reason}><button type="button" class="link" aria-label=${`Explain ${model.name}`} onClick=${() => act.explain(model.name)}>${model.name}</button>
          ${model.pin && html` <span class="tag" title=${pinWords(model.pin)}>pinned</span>`}
          ${model.is_ejected && html` <span class="tag error" title="takes no new request for a while, because it failed some">ejected</span>`}
          ${model.cpu_ratio > 0 && html` <span class="tag error">${percent(model.cpu_ratio)} on the CPU</span>`}</td>
        <td>${model.instance}</td>
        <td>${model.state === "loading" ? html`<${Progress} model=${model} at=${state.at} />` : html`<${State} name=${model.state} level=${LEVELS[model.state]} title=${model.reason} />`}</td>
        <td class="nowrap"><${Slots} used=${model.in_flight} total=${model.slots} /></td>
        <td class="number">${speedWords(speedOf(state, rates, model))}</td>
        <td class="number">${context(model.context_length)}</td>
        <td class="number" title=${`weights ${gib(model.weights_bytes)} GiB, KV cache ${gib(model.kv_cache_bytes)} GiB`}>${gib(model.per_gpu_bytes.reduce((a, b) => a + b, 0) || model.size_bytes)}</td>
        <td class="number" title=${model.expires_at ? `unloaded in ${duration(model.expires_at - state.at)} if it stays idle` : ""}>${model.state === "ready" && !model.in_flight ? age(state.at - model.used_at) : "–"}</td>
        <td class="action"><${Button} label="Unload" name=${`Unload ${model.name}`} disabled=${model.state !== "ready"} onClick=${() => act.unload(model)} /></td>
      </tr>`)}
    </${Table}>
    ${missing.map((row) => html`<p class="alarm warning"><b>not loaded</b> ${row.model} should be kept warm: ${row.reason}</p>`)}
  </${Section}>`;
}

function pinWords(pin) {
  const where = pin.gpus.length ? `GPU ${pin.gpus.join(", ")}` : pin.layout;
  return `pinned: ${where}${pin.keep_warm ? ", kept warm" : ""}`;
}

function Progress({ model, at }) {
  const seconds = model.load_started_at ? at - model.load_started_at : 0;
  const all = model.load_expected_seconds;
  const words = `loading, ${age(seconds)}${all ? ` of about ${duration(all)}` : ""}`;
  return html`<span class="progress" title=${words}><${Bar} ratio=${all ? Math.min(0.98, seconds / all) : 0.5} level="busy" label=${words} />
    <span class="figure dim" aria-hidden="true">${age(seconds)}${all ? ` / ~${duration(all)}` : ""}</span></span>`;
}

export function Instances({ state, act }) {
  const rows = Object.values(state.instances).sort((a, b) => a.name.localeCompare(b.name));
  const indexes = Object.fromEntries(Object.entries(state.gpus).map(([uuid, gpu]) => [uuid, gpu.index]));
  const columns = [{ label: "instance" }, { label: "state" }, { label: "GPUs" }, { label: "models" }, { label: "slots" }, { label: "version" }, { label: "", class: "action" }];
  const restarting = state.restart.instance;
  const note = restarting ? `restarting ${restarting}` : state.drained.all ? "everything is drained" : "";
  const all = state.drained.all
    ? html`<${Button} label="Resume all" onClick=${() => act.resume({ all: true }, "everything")} />`
    : html`<${Button} label="Drain all" onClick=${() => act.drain({ all: true }, "everything")} />`;
  return html`<${Section} id="instances" title="Instances" note=${note} actions=${all}>
    <${Table} label="Instances" columns=${columns} isEmpty=${!rows.length} empty="No instance.">
      ${rows.map((row) => {
        const models = Object.values(state.models).filter((model) => model.instance === row.name);
        const used = models.reduce((sum, model) => sum + model.in_flight, 0);
        const slots = models.reduce((sum, model) => sum + model.slots, 0);
        const isDrained = state.drained.instances.includes(row.name);
        return html`<tr key=${row.name}>
          <td>${row.name}${row.attached && html` <span class="tag">attached</span>`}${row.ejected && html` <span class="tag error" title=${row.ejected}>ejected</span>`}</td>
          <td><${State} name=${isDrained ? "drained" : row.state} level=${isDrained ? "warning" : INSTANCE_LEVELS[row.state]} title=${row.reason} />${row.reason && row.state !== "ready" && html` <span class="dim clip" title=${row.reason}>${row.reason}</span>`}</td>
          <td>${row.gpus.map((uuid) => indexes[uuid]).join(", ") || "CPU"}</td>
          <td class="number-left">${models.length}</td>
          <td class="nowrap">${slots ? html`<${Slots} used=${used} total=${slots} />` : html`<span class="dim">–</span>`}</td>
          <td class="dim">${row.version ?? ""}</td>
          <td class="action">${
            isDrained
              ? html`<${Button} label="Resume" name=${`Resume ${row.name}`} onClick=${() => act.resume({ instance: row.name }, row.name)} />`
              : html`<${Button} label="Drain" name=${`Drain ${row.name}`} onClick=${() => act.drain({ instance: row.name }, row.name)} />`
          }</td>
        </tr>`;
      })}
    </${Table}>
  </${Section}>`;
}

export function Pulls({ state }) {
  const rows = Object.values(state.pulls);
  if (!rows.length) return null;
  const columns = [{ label: "model" }, { label: "step" }, { label: "progress" }, { label: "clients", class: "number" }];
  return html`<${Section} id="pulls" title="Downloads" note=${`${rows.length} in progress`}>
    <${Table} label="Downloads" columns=${columns}>
      ${rows.map((row) => {
        const ratio = row.total_bytes ? row.completed_bytes / row.total_bytes : 0;
        const words = row.total_bytes ? `${bytes(row.completed_bytes)} of ${bytes(row.total_bytes)}` : "";
        return html`<tr key=${row.model}>
          <td>${row.model}</td>
          <td class="clip" title=${row.status}>${row.status}</td>
          <td><span class="progress"><${Bar} ratio=${ratio} level="busy" label=${`${percent(ratio)}, ${words}`} /><span class="figure dim">${words}</span></span></td>
          <td class="number">${row.clients}</td>
        </tr>`;
      })}
    </${Table}>
  </${Section}>`;
}

// The GPUs: what their memory holds, how they are, and what is wrong.

import { html } from "./vendor-preact-htm.js";
import { gib, percent, shortGpu } from "./format.js";
import { Bar, Button, Section } from "./parts.js";

const PARTS = [
  ["weights_bytes", "weights", "weights"],
  ["kv_cache_bytes", "kv", "KV cache"],
  ["buffers_bytes", "buffers", "buffers"],
  ["reserved_bytes", "reserved", "reserved"],
  ["external_bytes", "external", "external"],
];

export function Gpus({ state, act }) {
  const gpus = Object.entries(state.gpus).sort(([, a], [, b]) => a.index - b.index);
  const legend = html`<ul class="legend" aria-label="Colours of the memory bars">
    ${[...PARTS, ["free_bytes", "free", "free"]].map(([, name, text]) => html`<li><i class=${`key ${name}`}></i>${text}</li>`)}
  </ul>`;
  if (!gpus.length) {
    return html`<${Section} id="gpus" title="GPUs" wide><p class="empty">No GPU: models run on the CPU.</p></${Section}>`;
  }
  return html`<${Section} id="gpus" title="GPUs" note=${legend} wide>
    <ul class="gpus">
      ${gpus.map(([uuid, gpu]) => html`<${Gpu} key=${uuid} uuid=${uuid} gpu=${gpu} models=${modelsOn(state, uuid)} act=${act} />`)}
    </ul>
  </${Section}>`;
}

function modelsOn(state, uuid) {
  const names = Object.values(state.models)
    .filter((model) => (state.instances[model.instance]?.gpus ?? []).includes(uuid))
    .map((model) => (model.state === "ready" ? model.name : `${model.name} (${model.state})`));
  return [...new Set(names)].sort();
}

function Gpu({ uuid, gpu, models, act }) {
  const total = gpu.memory_total_bytes;
  const used = total - gpu.free_bytes;
  const described = PARTS.filter(([key]) => gpu[key] > 0).map(([key, , text]) => `${text} ${gib(gpu[key])}`);
  const words = `${described.join(", ") || "nothing"}, free ${gib(gpu.free_bytes)} of ${gib(total)} GiB`;
  const target = { gpu: gpu.index };
  return html`<li class=${`gpu ${gpu.lost ? "lost" : ""}`}>
    <div class="gpu-head">
      <h3>GPU ${gpu.index} <span class="dim">${shortGpu(gpu.name)}</span></h3>
      <span class="figure"><b>${gib(used)}</b> <span class="dim">/ ${gib(total)} GiB</span></span>
      ${
        gpu.drained
          ? html`<${Button} label="Resume" name=${`Resume GPU ${gpu.index}`} onClick=${() => act.resume(target, `GPU ${gpu.index}`)} />`
          : html`<${Button} label="Drain" name=${`Drain GPU ${gpu.index}`} onClick=${() => act.drain(target, `GPU ${gpu.index}`)} />`
      }
    </div>
    <div class="stack" role="img" aria-label=${`Memory of GPU ${gpu.index}: ${words}`} title=${words}>
      ${PARTS.map(([key, name]) => gpu[key] > 0 && html`<span class=${name} style=${{ width: `${(gpu[key] / total) * 100}%` }}></span>`)}
    </div>
    <p class="gpu-models" title=${models.join(", ")}>${models.join(", ") || html`<span class="dim">no model</span>`}</p>
    <div class="gpu-figures">
      <${Gauge} label="util" value=${gpu.utilization_ratio} text=${percent} ratio=${gpu.utilization_ratio} />
      <${Gauge} label="power" value=${gpu.power_draw_watts} text=${(watts) => `${Math.round(watts)} W`} ratio=${gpu.power_draw_watts / gpu.power_limit_watts} />
      <${Gauge} label="temp" value=${gpu.temperature_celsius} text=${(celsius) => `${celsius} °C`} ratio=${gpu.temperature_celsius / 100} level=${heat(gpu.temperature_celsius)} />
    </div>
    ${gpu.alarms.map((alarm) => html`<p class=${`alarm ${alarm.level}`}><b>${alarm.level}</b> ${alarm.text}</p>`)}
  </li>`;
}

const heat = (celsius) => (celsius >= 90 ? "error" : celsius >= 85 ? "warning" : "");

function Gauge({ label, value, text, ratio, level }) {
  if (value === undefined) return html`<span class="gauge"><span class="dim">${label}</span> <span class="figure">–</span></span>`;
  return html`<span class="gauge">
    <span class="dim">${label}</span>
    <${Bar} ratio=${Number.isFinite(ratio) ? ratio : 0} level=${level} label=${`${label} ${text(value)}`} />
    <span class="figure" aria-hidden="true">${text(value)}</span>
  </span>`;
}

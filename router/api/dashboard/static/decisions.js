// What the scheduler did last, with its reasons.

import { html, useState } from "./vendor-preact-htm.js";
import { clock } from "./format.js";
import { Section, State, Table } from "./parts.js";

const SHOWN = 12;
const LEVELS = { load: "busy", loaded: "good", unload: "warning", "load failed": "error" };

export function Decisions({ state, act }) {
  const [all, setAll] = useState(false);
  const rows = Object.entries(state.decisions).sort(([, a], [, b]) => b.at - a.at);
  const shown = all ? rows : rows.slice(0, SHOWN);
  const columns = [{ label: "time" }, { label: "decision" }, { label: "model" }, { label: "on" }, { label: "reason" }];
  const more = rows.length > SHOWN && html`<button type="button" class="small quiet" aria-expanded=${all} onClick=${() => setAll(!all)}>${all ? "Show fewer" : `Show all ${rows.length}`}</button>`;
  return html`<${Section} id="decisions" title="Decisions" note="newest first" actions=${more} wide>
    <${Table} label="Decisions" columns=${columns} isEmpty=${!rows.length} empty="Nothing was loaded or unloaded yet.">
      ${shown.map(([id, row]) => html`<tr key=${id}>
        <td class="figure nowrap">${clock(row.at)}</td>
        <td><${State} name=${row.event} level=${LEVELS[row.event] ?? "idle"} /></td>
        <td>${row.model && html`<button type="button" class="link" aria-label=${`Explain ${row.model}`} onClick=${() => act.explain(row.model)}>${row.model}</button>`}</td>
        <td>${row.instance}</td>
        <td class="reason">${row.reason}</td>
      </tr>`)}
    </${Table}>
  </${Section}>`;
}

// Small pieces that several sections share.

import { html } from "./vendor-preact-htm.js";

export function Section({ id, title, note, actions, children, wide }) {
  return html`<section class=${`panel ${wide ? "wide" : ""}`} aria-labelledby=${`${id}-title`} id=${id}>
    <header class="panel-head">
      <h2 id=${`${id}-title`}>${title}</h2>
      <span class="note">${note}</span>
      <span class="actions">${actions}</span>
    </header>
    ${children}
  </section>`;
}

// `columns`: [{label, class?}]; the rows are the children.
export function Table({ label, columns, children, empty, isEmpty }) {
  if (isEmpty) return html`<p class="empty">${empty}</p>`;
  return html`<div class="scroll" tabindex="0" role="group" aria-label=${label}>
    <table>
      <thead>
        <tr>
          ${columns.map((column) => html`<th scope="col" class=${column.class ?? ""}>${column.label || html`<span class="unseen">commands</span>`}</th>`)}
        </tr>
      </thead>
      <tbody>
        ${children}
      </tbody>
    </table>
  </div>`;
}

export function State({ name, level, title }) {
  return html`<span class=${`state ${level}`} title=${title}>${name}</span>`;
}

export function Bar({ ratio, level, label }) {
  return html`<span class="bar" role="img" aria-label=${label}>
    <span class=${`bar-fill ${level ?? ""}`} style=${{ width: `${Math.min(100, Math.max(0, ratio * 100))}%` }}></span>
  </span>`;
}

export function Slots({ used, total }) {
  const shown = Math.min(total, 16);
  const filled = total ? Math.round((used / total) * shown) : 0;
  const boxes = [...Array(shown)].map((_, index) => html`<i class=${index < filled || (used && !index) ? "on" : ""}></i>`);
  return html`<span class="slots" role="img" aria-label=${`${used} of ${total} slots in use`}>${boxes}</span>
    <span class="figure dim" aria-hidden="true">${used}/${total}</span>`;
}

export function Button({ label, name, onClick, kind, disabled }) {
  return html`<button type="button" class=${`small ${kind ?? ""}`} aria-label=${name ?? label} disabled=${disabled} onClick=${onClick}>${label}</button>`;
}

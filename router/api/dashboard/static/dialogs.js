// Dialogs: confirmations, explanations, the key.

import { html, useEffect, useRef, useState } from "./vendor-preact-htm.js";
import { call } from "./events.js";
import { clock, duration, gib } from "./format.js";
import { Slots, State, Table } from "./parts.js";

export function Dialog({ title, children, onClose, wide }) {
  const ref = useRef(null);
  useEffect(() => {
    const dialog = ref.current;
    if (!dialog.open) dialog.showModal();
    return () => dialog.open && dialog.close();
  }, []);
  return html`<dialog ref=${ref} class=${wide ? "wide" : ""} aria-labelledby="dialog-title" onClose=${onClose} onCancel=${onClose}
    onClick=${(event) => event.target === ref.current && onClose()}>
    <div class="dialog-body">
      <header><h2 id="dialog-title">${title}</h2><button type="button" class="small quiet" aria-label="Close" onClick=${onClose}>✕</button></header>
      ${children}
    </div>
  </dialog>`;
}

// `action`: {title, words, label, tone, run, field}; `run(value)` returns a promise of what to report.
export function Confirm({ action, onClose, onDone }) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState("");
  const [value, setValue] = useState("");
  const open = useRef(true); // a load goes on when its dialog is closed
  useEffect(() => () => (open.current = false), []);
  const submit = async (event) => {
    event.preventDefault();
    setBusy(true);
    setError("");
    try {
      onDone(await action.run(value.trim()), open.current);
    } catch (problem) {
      if (!open.current) onDone(problem.message, false);
      setError(problem.message);
      setBusy(false);
    }
  };
  return html`<${Dialog} title=${action.title} onClose=${onClose}>
    <form onSubmit=${submit}>
      ${action.words.map((words) => html`<p>${words}</p>`)}
      ${action.field && html`<label>${action.field}<input name="value" required autofocus autocomplete="off" spellcheck=${false} list="names" value=${value} onInput=${(event) => setValue(event.target.value)} /></label>
        <datalist id="names">${(action.names ?? []).map((name) => html`<option value=${name}></option>`)}</datalist>`}
      ${error && html`<p class="alarm error" role="alert"><b>error</b> ${error}</p>`}
      <footer>
        <button type="button" onClick=${onClose}>${busy ? "Close" : "Cancel"}</button>
        <button type="submit" class=${action.tone ?? "primary"} disabled=${busy}>${busy ? "Working…" : action.label}</button>
      </footer>
    </form>
  </${Dialog}>`;
}

function useAnswer(key, path) {
  const [answer, setAnswer] = useState({});
  useEffect(() => {
    let current = true;
    call(key, "GET", path).then(
      (found) => current && setAnswer({ found }),
      (problem) => current && setAnswer({ error: problem.message }),
    );
    return () => (current = false);
  }, [path]);
  return answer;
}

export function Explain({ model, accessKey, onClose }) {
  const { found, error } = useAnswer(accessKey, `llamayard/explain?model=${encodeURIComponent(model)}`);
  return html`<${Dialog} title=${`A request for ${model}, now`} onClose=${onClose} wide>
    ${error && html`<p class="alarm error" role="alert"><b>error</b> ${error}</p>`}
    ${!error && !found && html`<p class="dim">Asking the scheduler…</p>`}
    ${found && html`<${Explanation} found=${found} />`}
  </${Dialog}>`;
}

function Explanation({ found }) {
  const facts = [
    ["outcome", found.outcome],
    ["on", found.instance],
    ["context", found.context_length],
    ["expected wait", found.expected_wait_seconds !== null && `~${duration(found.expected_wait_seconds)}`],
    ["a load takes", found.load_seconds !== null && `~${duration(found.load_seconds)}`],
  ].filter(([, value]) => value);
  return html`<p class="lead">${found.reason}</p>
    <dl class="facts">${facts.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
    ${found.leaving.length > 0 && html`<h3>Would leave</h3><ul>${found.leaving.map((each) => html`<li>${each.model} on ${each.instance}${each.moves_to ? `, moves to ${each.moves_to}` : ""}${each.in_flight ? `, after ${each.in_flight} running` : ""}</li>`)}</ul>`}
    ${found.replicas.length > 0 && html`<h3>Replicas</h3>
      <${Table} label="Replicas" columns=${[{ label: "instance" }, { label: "state" }, { label: "slots" }, { label: "context", class: "number" }, { label: "can serve it" }]}>
        ${found.replicas.map((row) => html`<tr><td>${row.instance}</td><td>${row.state}</td><td><${Slots} used=${row.in_flight} total=${row.slots} /></td><td class="number">${row.context_length}</td><td>${row.serves ? "yes" : "no"}</td></tr>`)}
      </${Table}>`}
    ${found.candidates.length > 0 && html`<h3>Where it could be loaded</h3>
      <${Table} label="Candidates" columns=${[{ label: "instance" }, { label: "GPUs" }, { label: "verdict" }, { label: "price", class: "number" }, { label: "GiB", class: "number" }, { label: "reason" }]}>
        ${found.candidates.map((row) => html`<tr>
          <td>${row.instance}${row.is_new && html` <span class="tag">new</span>`}</td><td>${row.gpus.join(", ") || "CPU"}</td><td>${row.verdict}</td>
          <td class="number">${row.price_seconds === null ? "–" : duration(row.price_seconds)}</td><td class="number">${row.per_gpu_bytes.map(gib).join(" + ")}</td>
          <td class="reason">${row.reason}${row.evicts.length ? ` (evicts ${row.evicts.join(", ")})` : ""}</td></tr>`)}
      </${Table}>`}`;
}

export function Why({ requestId, accessKey, onClose }) {
  const { found, error } = useAnswer(accessKey, `llamayard/why?request_id=${encodeURIComponent(requestId)}`);
  return html`<${Dialog} title=${`Request ${requestId}`} onClose=${onClose} wide>
    ${error && html`<p class="alarm error" role="alert"><b>error</b> ${error}</p>`}
    ${!error && !found && html`<p class="dim">Asking the scheduler…</p>`}
    ${found && !found.attempts.length && html`<p>The router does not remember it.</p>`}
    ${(found?.attempts ?? []).map((attempt) => html`<${Attempt} attempt=${attempt} />`)}
  </${Dialog}>`;
}

function Attempt({ attempt }) {
  const facts = [
    ["model", attempt.model],
    ["outcome", attempt.outcome],
    ["on", attempt.instance],
    ["waited", duration(attempt.waited_seconds)],
    ["position", attempt.position],
    ["expected wait", attempt.expected_wait_seconds !== null && `~${duration(attempt.expected_wait_seconds)}`],
    ["first token after", attempt.time_to_first_token_seconds !== null && duration(attempt.time_to_first_token_seconds)],
    ["took", attempt.duration_seconds !== null && duration(attempt.duration_seconds)],
    ["tokens", attempt.output_tokens],
  ].filter(([, value]) => value);
  return html`<p class="lead">${attempt.reason}</p>
    <dl class="facts">${facts.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
    ${attempt.placement && html`<p class="dim">Its model was placed: ${attempt.placement.reason}</p>`}
    ${attempt.meanwhile.length > 0 && html`<h3>Done while it waited</h3>
      <${Table} label="Done while it waited" columns=${[{ label: "time" }, { label: "decision" }, { label: "model" }, { label: "on" }, { label: "reason" }]}>
        ${attempt.meanwhile.map((step) => html`<tr><td class="figure nowrap">${clock(Date.parse(step.at) / 1000)}</td><td><${State} name=${step.event} level="idle" /></td><td>${step.model}</td><td>${step.instance}</td><td class="reason">${step.reason}</td></tr>`)}
      </${Table}>`}`;
}

export function KeyForm({ message, onKey }) {
  const [value, setValue] = useState("");
  return html`<main class="key-form">
    <form onSubmit=${(event) => (event.preventDefault(), onKey(value.trim()))}>
      <h1>llamayard</h1>
      <p>This router has access keys. The dashboard needs one of the class <code>admin</code>.</p>
      ${message && html`<p class="alarm error" role="alert"><b>refused</b> ${message}</p>`}
      <label>Access key<input type="password" name="key" required autofocus autocomplete="off" value=${value} onInput=${(event) => setValue(event.target.value)} /></label>
      <button type="submit" class="primary">Open the dashboard</button>
      <p class="dim">It is kept in this tab until you close it or sign out.</p>
    </form>
  </main>`;
}

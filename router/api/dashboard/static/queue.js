// Who waits, for what and how long; and who is being served.

import { html, useState } from "./vendor-preact-htm.js";
import { age, client, duration, plural, rate, tokens } from "./format.js";
import { Button, Section, State, Table } from "./parts.js";

const TICKETS_SHOWN = 25;
const RUNNING_SHOWN = 40;

// Tickets by model and client: the model that is served next comes first, and so do its clients.
export function groupsOf(waiting) {
  const groups = new Map();
  const rows = Object.entries(waiting).sort(([, a], [, b]) => a.position - b.position || a.arrived_at - b.arrived_at);
  for (const [id, ticket] of rows) {
    const key = `${ticket.model}\n${ticket.client}`;
    const group = groups.get(key) ?? { key, model: ticket.model, client: ticket.client, tickets: [] };
    group.tickets.push([id, ticket]);
    groups.set(key, group);
  }
  const turns = new Map([...groups.values()].reverse().map((group) => [group.model, group.tickets[0][1].position]));
  return [...groups.values()].sort((a, b) => turns.get(a.model) - turns.get(b.model) || a.model.localeCompare(b.model));
}

export function Waiting({ state, act }) {
  const groups = groupsOf(state.waiting);
  const count = state.queue.waiting;
  const shown = Object.keys(state.waiting).length;
  const note = count ? `${count} of at most ${state.queue.limit}${shown < count ? `, the first ${shown} shown` : ""}` : "";
  const columns = [
    { label: "model" },
    { label: "client" },
    { label: "waiting", class: "number" },
    { label: "longest", class: "number" },
    { label: "expected", class: "number" },
    { label: "why" },
  ];
  return html`<${Section} id="waiting" title="Waiting" note=${note}>
    <${Table} label="Waiting requests" columns=${columns} isEmpty=${!groups.length} empty="Nothing waits.">
      ${groups.map((group) => html`<${Group} key=${group.key} group=${group} at=${state.at} act=${act} />`)}
    </${Table}>
  </${Section}>`;
}

function Group({ group, at, act }) {
  const [open, setOpen] = useState(false);
  const tickets = group.tickets.map(([, ticket]) => ticket);
  const longest = at - Math.min(...tickets.map((ticket) => ticket.arrived_at));
  const name = `${group.model} of ${client(group.client)}`;
  return html`<tr>
      <td><button type="button" class="link" aria-expanded=${open} aria-label=${`Requests for ${name}`} onClick=${() => setOpen(!open)}>
        <span class="twist" aria-hidden="true">${open ? "▾" : "▸"}</span>${group.model}</button></td>
      <td class="clip" title=${group.client}>${client(group.client)}</td>
      <td class="number"><b>${tickets.length}</b></td>
      <td class="number">${age(longest)}</td>
      <td class="number">${expected(tickets)}</td>
      <td class="why" title=${tickets[0].reason}>${tickets[0].reason}</td>
    </tr>
    ${open && group.tickets.slice(0, TICKETS_SHOWN).map(([id, ticket]) => html`<tr class="sub" key=${id}>
      <td colspan="2"><button type="button" class="link" aria-label=${`Why request ${ticket.request_id} waits`} onClick=${() => act.why(ticket.request_id)}>${ticket.request_id}</button></td>
      <td class="number dim">#${ticket.position}</td>
      <td class="number">${age(at - ticket.arrived_at)}</td>
      <td class="number">${wait(ticket.expected_wait_seconds)}</td>
      <td class="why" title=${ticket.reason}>${ticket.reason}</td>
    </tr>`)}
    ${open && group.tickets.length > TICKETS_SHOWN && html`<tr class="sub"><td colspan="6" class="dim">and ${group.tickets.length - TICKETS_SHOWN} more</td></tr>`}`;
}

const wait = (seconds) => (seconds === undefined ? "unknown" : `~${duration(seconds)}`);

function expected(tickets) {
  const known = tickets.map((ticket) => ticket.expected_wait_seconds).filter((seconds) => seconds !== undefined);
  if (!known.length) return "unknown";
  const [least, most] = [Math.min(...known), Math.max(...known)];
  return most - least < 1 ? wait(most) : `~${Math.round(least)}–${duration(most)}`;
}

export function Running({ state, rates, act }) {
  const rows = Object.entries(state.running).sort(([, a], [, b]) => a.granted_at - b.granted_at);
  const clients = new Set(rows.map(([, row]) => row.client)).size;
  const note = rows.length ? `${plural(rows.length, "request")} of ${plural(clients, "client")}` : "";
  const columns = [
    { label: "client" },
    { label: "model" },
    { label: "on" },
    { label: "doing" },
    { label: "for", class: "number" },
    { label: "tokens", class: "number" },
    { label: "tok/s", class: "number" },
    { label: "", class: "action" },
  ];
  return html`<${Section} id="running" title="Running" note=${note}>
    <${Table} label="Running requests" columns=${columns} isEmpty=${!rows.length} empty="Nothing runs.">
      ${rows.slice(0, RUNNING_SHOWN).map(([id, row]) => {
        const speed = rates.of(id);
        const begun = row.first_byte_at !== undefined;
        return html`<tr key=${id}>
          <td class="clip" title=${row.key ? `${row.client}, key ${row.key}` : row.client}>${client(row.client)}</td>
          <td>${row.model}</td>
          <td>${row.instance}</td>
          <td><${State} name=${begun ? "streaming" : "prompt"} level=${begun ? "good" : "busy"} title=${row.route} /></td>
          <td class="number">${age(state.at - row.granted_at)}</td>
          <td class="number">${begun ? tokens(row.tokens) : "–"}</td>
          <td class="number">${speed === null ? "–" : rate(speed)}</td>
          <td class="action"><${Button} label="why" kind="quiet" name=${`Why request ${row.request_id} runs there`} onClick=${() => act.why(row.request_id)} /></td>
        </tr>`;
      })}
      ${rows.length > RUNNING_SHOWN && html`<tr class="sub"><td colspan="8" class="dim">and ${rows.length - RUNNING_SHOWN} more</td></tr>`}
    </${Table}>
  </${Section}>`;
}

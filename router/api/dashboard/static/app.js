// The page: its key, its stream of events, and its sections.

import { html, render, useEffect, useMemo, useRef, useState } from "./vendor-preact-htm.js";
import { Decisions } from "./decisions.js";
import { Confirm, Explain, KeyForm, Why } from "./dialogs.js";
import { Feed, call } from "./events.js";
import { age, duration, plural, rate } from "./format.js";
import { Gpus } from "./gpus.js";
import { Hour } from "./hour.js";
import { Instances, Models, Pulls } from "./models.js";
import { Running, Waiting } from "./queue.js";
import { Rates } from "./rates.js";

const KEY = "llamayard-key";
const THEME = "llamayard-theme";
const THEMES = ["auto", "light", "dark"];
const TOAST_MS = 6000;

function App() {
  const [key, setKey] = useState(sessionStorage.getItem(KEY) ?? "");
  const [feed, setFeed] = useState({ status: "connecting" });
  const [theme, setTheme] = useTheme();
  const rates = useMemo(() => new Rates(), [key]);
  const stream = useRef(null);
  useEffect(() => {
    const opened = new Feed("llamayard/events", key, (next) => {
      if (next.document && next.status === "live") rates.update(next.document);
      setFeed(next);
    });
    stream.current = opened;
    return () => opened.close();
  }, [key]);
  const signIn = (entered) => {
    sessionStorage.setItem(KEY, entered);
    setFeed({ status: "connecting" });
    if (entered === key) stream.current.retryNow();
    setKey(entered);
  };
  const signOut = () => {
    sessionStorage.removeItem(KEY);
    setFeed({ status: "connecting" });
    setKey("");
  };
  if (feed.status === "refused") return html`<${KeyForm} message=${key && feed.message} onKey=${signIn} />`;
  if (!feed.document) {
    return html`<main class="key-form"><p role="status">${feed.status === "lost" ? `${feed.message}; trying again…` : "Connecting…"}</p></main>`;
  }
  return html`<${Page} feed=${feed} rates=${rates} accessKey=${key} theme=${theme} setTheme=${setTheme} signOut=${key ? signOut : null} retry=${() => stream.current.retryNow()} />`;
}

function useTheme() {
  const [theme, setTheme] = useState(localStorage.getItem(THEME) ?? "auto");
  const [system, setSystem] = useState(matchMedia("(prefers-color-scheme: dark)").matches);
  useEffect(() => {
    const query = matchMedia("(prefers-color-scheme: dark)");
    const changed = () => setSystem(query.matches);
    query.addEventListener("change", changed);
    return () => query.removeEventListener("change", changed);
  }, []);
  const isDark = theme === "auto" ? system : theme === "dark";
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  const choose = (next) => {
    localStorage.setItem(THEME, next);
    setTheme(next);
  };
  return [{ choice: theme, isDark }, choose];
}

function Page({ feed, rates, accessKey, theme, setTheme, signOut, retry }) {
  const [dialog, setDialog] = useState(null);
  const [toast, setToast] = useState("");
  const state = feed.document;
  const close = () => setDialog(null);
  useEffect(() => {
    if (!toast) return undefined;
    const timer = setTimeout(() => setToast(""), TOAST_MS);
    return () => clearTimeout(timer);
  }, [toast]);
  const act = useMemo(() => actionsOf(accessKey, setDialog), [accessKey]);
  act.state = state;
  const shade = `${theme.choice}/${theme.isDark}`;
  return html`<${Header} state=${state} feed=${feed} rates=${rates} theme=${theme} setTheme=${setTheme} signOut=${signOut} />
    <main class=${feed.status === "lost" ? "stale" : ""}>
      ${feed.status === "lost" && html`<p class="banner" role="alert"><b>Connection lost.</b> ${feed.message}; this is the state of ${age((Date.now() - feed.at) / 1000)} ago. Trying again.
        <button type="button" class="small" onClick=${retry}>Try now</button></p>`}
      <${Gpus} state=${state} act=${act} />
      <div class="column">
        <${Waiting} state=${state} act=${act} />
        <${Running} state=${state} rates=${rates} act=${act} />
      </div>
      <div class="column">
        <${Models} state=${state} rates=${rates} act=${act} />
        <${Pulls} state=${state} />
        <${Instances} state=${state} act=${act} />
      </div>
      <${Hour} state=${state} theme=${shade} />
      <${Decisions} state=${state} act=${act} />
    </main>
    <div class="toast" role="status" aria-live="polite">${toast && html`<p>${toast}</p>`}</div>
    ${dialog?.kind === "confirm" && html`<${Confirm} key=${dialog.title} action=${dialog} onClose=${close} onDone=${(words, isOpen) => (isOpen && close(), setToast(words))} />`}
    ${dialog?.kind === "explain" && html`<${Explain} model=${dialog.model} accessKey=${accessKey} onClose=${close} />`}
    ${dialog?.kind === "why" && html`<${Why} requestId=${dialog.requestId} accessKey=${accessKey} onClose=${close} />`}`;
}

function Header({ state, feed, rates, theme, setTheme, signOut }) {
  const running = Object.keys(state.running);
  const speed = running.reduce((sum, id) => sum + (rates.of(id) ?? 0), 0);
  const gpus = Object.values(state.gpus);
  const alarms = gpus.flatMap((gpu) => gpu.alarms.map((alarm) => alarm.level));
  const down = Object.values(state.instances).filter((row) => ["backoff", "fatal"].includes(row.state)).length;
  const latest = Object.entries(state.points).sort(([a], [b]) => b - a).map(([, point]) => point).find((point) => point.ttft_p50_seconds !== undefined);
  const waiting = state.queue.waiting;
  const next = THEMES[(THEMES.indexOf(theme.choice) + 1) % THEMES.length];
  return html`<header class="top">
    <h1>llamayard <span class="dim">${state.version}</span></h1>
    ${state.emulated && html`<span class="emulated" title="No real GPU and no real model: everything here is simulated">${state.emulated}</span>`}
    <dl class="summary">
      <div><dt>running</dt><dd>${running.length}</dd></div>
      <div class=${waiting ? "notable" : ""}><dt>waiting</dt><dd>${waiting}</dd></div>
      <div><dt>tokens/s</dt><dd>${rate(speed)}</dd></div>
      <div><dt>first token</dt><dd>${latest ? duration(latest.ttft_p50_seconds) : "–"}</dd></div>
      <div class=${alarms.includes("error") || down ? "bad" : alarms.length ? "notable" : ""}><dt>alarms</dt><dd>${alarms.length + down}</dd></div>
    </dl>
    <span class="tools">
      <span class=${`live ${feed.status}`} role="status">${feed.status === "live" ? "live" : "not live"}</span>
      <button type="button" class="small quiet" aria-label=${`Colours: ${theme.choice}; change to ${next}`} onClick=${() => setTheme(next)}>◐ ${theme.choice}</button>
      ${signOut && html`<button type="button" class="small quiet" onClick=${signOut}>Sign out</button>`}
    </span>
  </header>`;
}

// What the buttons do. Each command is confirmed first.
function actionsOf(key, setDialog) {
  const act = { state: null };
  const confirm = (action) => setDialog({ kind: "confirm", ...action });
  act.explain = (model) => setDialog({ kind: "explain", model });
  act.why = (requestId) => setDialog({ kind: "why", requestId });
  act.load = () =>
    confirm({
      title: "Load a model",
      words: ["It is loaded as a client's first request would: in its turn, where the scheduler puts it. Idle models may have to leave."],
      field: "Model",
      names: [...new Set(Object.values(act.state.decisions).map((row) => row.model).filter(Boolean))].sort(),
      label: "Load",
      run: async (model) => {
        const answer = await call(key, "POST", "llamayard/load", { model });
        return `${answer.model} is loaded on ${answer.instance}.`;
      },
    });
  act.unload = (model) => {
    const replicas = Object.values(act.state.models).filter((each) => each.name === model.name);
    const running = replicas.reduce((sum, each) => sum + each.in_flight, 0);
    const words = [`It leaves ${replicas.map((each) => each.instance).join(", ")}. The next request for it loads it again.`];
    if (running) words.push(`Its ${plural(running, "running request")} finish first.`);
    if (replicas.some((each) => each.pin?.keep_warm)) words.push("The configuration keeps it warm: it stays.");
    confirm({
      title: `Unload ${model.name}?`,
      words,
      label: "Unload",
      tone: "danger",
      run: async () => {
        await call(key, "POST", "llamayard/unload", { model: model.name });
        return `${model.name} is being unloaded.`;
      },
    });
  };
  act.drain = (target, name) =>
    confirm({
      title: `Drain ${name}?`,
      words: ["Nothing new starts there and its models leave. Running requests finish. It stays out of service until it is resumed."],
      label: "Drain",
      tone: "danger",
      run: async () => {
        await call(key, "POST", "llamayard/drain", target);
        return `${name}: drained.`;
      },
    });
  act.resume = (target, name) =>
    confirm({
      title: `Resume ${name}?`,
      words: ["It takes requests and models again."],
      label: "Resume",
      run: async () => {
        await call(key, "POST", "llamayard/resume", target);
        return `${name}: back in service.`;
      },
    });
  return act;
}

render(html`<${App} />`, document.getElementById("app"));

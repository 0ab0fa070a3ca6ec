// Reads server-sent events with fetch, because an EventSource cannot send a key. Reconnects until it is closed.

import { applyPatch } from "./merge_patch.js";

const SILENCE_MS = 6000; // an event comes every second
const RETRY_MS = [500, 1000, 2000, 4000, 8000];
const HIDDEN_MS = 60000; // a page that nobody sees lets its stream go

export class Feed {
  // `onState({document, status, message, since})`: status is connecting, live, lost or refused.
  constructor(url, key, onState) {
    this.url = url;
    this.key = key;
    this.onState = onState;
    this.document = null;
    this.failures = 0;
    this.closed = false;
    this.lastAt = 0;
    this.onVisibility = () => this.visibilityChanged();
    document.addEventListener("visibilitychange", this.onVisibility);
    this.connect();
  }

  close() {
    this.closed = true;
    document.removeEventListener("visibilitychange", this.onVisibility);
    clearTimeout(this.timer);
    clearTimeout(this.hideTimer);
    this.abort?.abort();
  }

  retryNow() {
    clearTimeout(this.timer);
    this.connect();
  }

  visibilityChanged() {
    clearTimeout(this.hideTimer);
    if (document.hidden) this.hideTimer = setTimeout(() => this.pause(), HIDDEN_MS);
    else if (this.paused) this.retryNow();
  }

  pause() {
    this.paused = true;
    clearTimeout(this.timer);
    this.abort?.abort();
  }

  emit(status, message = "") {
    if (!this.closed) this.onState({ document: this.document, status, message, retryAt: this.retryAt, at: this.lastAt });
  }

  async connect() {
    this.paused = false;
    this.abort?.abort();
    const abort = (this.abort = new AbortController());
    if (!this.document) this.emit("connecting");
    let message = "the router cannot be reached";
    try {
      const watchdog = new Watchdog(SILENCE_MS, abort);
      const response = await fetch(this.url, { headers: headersOf(this.key, "text/event-stream"), signal: abort.signal, cache: "no-store" });
      if (response.status === 401 || response.status === 403) {
        watchdog.stop();
        this.emit("refused", await errorOf(response));
        return;
      }
      if (!response.ok) {
        message = await errorOf(response);
      } else {
        await this.read(response.body, watchdog);
        message = "the router has ended the connection";
      }
      watchdog.stop();
    } catch (error) {
      if (abort !== this.abort) return; // another attempt has taken over
      if (error.name === "AbortError") message = "the router is silent";
    }
    if (this.closed || this.paused || abort !== this.abort) return;
    this.retryLater(message);
  }

  retryLater(message) {
    const wait = RETRY_MS[Math.min(this.failures, RETRY_MS.length - 1)];
    this.failures += 1;
    this.retryAt = Date.now() + wait;
    // A stream that has run its time is replaced without a word.
    if (this.failures > 1 || Date.now() - this.lastAt > 2500) this.emit("lost", message);
    this.timer = setTimeout(() => this.connect(), wait);
  }

  async read(body, watchdog) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      watchdog.reset();
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) this.take(part);
      if (parts.length) {
        this.failures = 0;
        this.lastAt = Date.now();
        this.emit("live");
      }
    }
  }

  take(text) {
    let event = "message";
    let data = "";
    for (const line of text.split("\n")) {
      if (line.startsWith("event: ")) event = line.slice(7);
      else if (line.startsWith("data: ")) data += line.slice(6);
    }
    if (event === "document") this.document = JSON.parse(data);
    else if (event === "patch" && this.document) this.document = applyPatch(this.document, JSON.parse(data));
  }
}

class Watchdog {
  constructor(milliseconds, abort) {
    this.milliseconds = milliseconds;
    this.abort = abort;
    this.reset();
  }

  reset() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.abort.abort(), this.milliseconds);
  }

  stop() {
    clearTimeout(this.timer);
  }
}

// With `Accept` the router does not make the browser ask for a password.
export function headersOf(key, accept) {
  return key ? { Accept: accept, Authorization: `Bearer ${key}` } : { Accept: accept };
}

export async function errorOf(response) {
  try {
    const body = await response.json();
    return body.error?.message ?? body.error ?? `the router answers ${response.status}`;
  } catch {
    return `the router answers ${response.status}`;
  }
}

// Asks the router; throws an Error with its words.
export async function call(key, method, path, body) {
  const headers = headersOf(key, "application/json");
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store" });
  } catch {
    throw new Error("the router cannot be reached");
  }
  if (!response.ok) throw new Error(await errorOf(response));
  return response.json();
}

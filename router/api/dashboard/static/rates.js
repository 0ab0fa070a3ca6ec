// Tokens per second of each stream, from how its count of tokens grows between two updates.

const SMOOTHING_SECONDS = 4;

export class Rates {
  constructor() {
    this.streams = new Map();
  }

  update(document) {
    const at = document.at;
    const kept = new Map();
    for (const [id, row] of Object.entries(document.running)) {
      const before = this.streams.get(id);
      kept.set(id, before ? moved(before, row.tokens, at) : begun(row, at));
    }
    this.streams = kept;
  }

  of(id) {
    return this.streams.get(id)?.rate ?? null;
  }
}

function begun(row, at) {
  const seconds = row.first_byte_at === undefined ? 0 : at - row.first_byte_at;
  return { at, tokens: row.tokens, rate: seconds >= 0.4 && row.tokens > 1 ? row.tokens / seconds : null };
}

function moved(before, tokens, at) {
  const seconds = at - before.at;
  if (seconds <= 0) return before;
  const now = Math.max(0, tokens - before.tokens) / seconds;
  const weight = 1 - Math.exp(-seconds / SMOOTHING_SECONDS);
  const rate = before.rate === null ? (tokens > 1 ? now : null) : before.rate + (now - before.rate) * weight;
  return { at, tokens, rate };
}

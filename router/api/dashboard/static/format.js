// Figures as people read them.

const GIB = 1024 ** 3;

export const gib = (bytes) => (bytes / GIB).toFixed(bytes >= 100 * GIB ? 0 : 1);

export function bytes(count) {
  if (count >= GIB) return `${gib(count)} GiB`;
  if (count >= 1024 ** 2) return `${Math.round(count / 1024 ** 2)} MiB`;
  return `${Math.round(count / 1024)} KiB`;
}

export function duration(seconds) {
  if (seconds === undefined || seconds === null) return "–";
  const s = Math.max(0, seconds);
  if (s > 0 && s < 0.995) return `${Math.round(s * 1000)} ms`;
  if (s < 9.95) return `${s.toFixed(1)} s`;
  if (s < 120) return `${Math.round(s)} s`;
  if (s < 7200) return `${Math.floor(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h`;
  return `${Math.floor(s / 86400)} d`;
}

// Whole seconds, for what grows while one looks.
export function age(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  return s < 120 ? `${s} s` : duration(s);
}

export const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hour12: false });

export const tokens = (count) => (count >= 10000 ? `${(count / 1000).toFixed(1)}k` : String(count));

export const rate = (perSecond) => (perSecond >= 100 ? perSecond.toFixed(0) : perSecond.toFixed(1));

export const percent = (ratio) => `${Math.round(ratio * 100)} %`;

export const context = (count) => (count >= 1024 && count % 1024 === 0 ? `${count / 1024}k` : String(count));

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

// A key's user, a user or an address, without the kind in front of it.
export const client = (name) => name.replace(/^(key|user):/, "") || "–";

export const shortGpu = (name) => name.replace(/^NVIDIA (GeForce )?/, "").replace(/ \(emulated\)$/, "");

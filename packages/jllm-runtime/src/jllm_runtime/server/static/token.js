// Token data: probabilities, entropy, and display of bytes.

const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** The text of these bytes, or null where they are not whole characters. */
export function decode(bytes) {
  try {
    return strict.decode(Uint8Array.from(bytes));
  } catch {
    return null;
  }
}

/** An entry of the API's `logprobs.content`, made small: bytes only where the text does not tell them. */
export function token(entry) {
  return { ...alternative(entry), top: (entry.top_logprobs ?? []).map(alternative) };
}

function alternative({ token: text, logprob, bytes }) {
  const rounded = Math.round(logprob * 1e4) / 1e4;
  const whole = bytes ? decode(bytes) : text;
  return whole === null ? { text, logprob: rounded, bytes } : { text: whole, logprob: rounded };
}

export function probability({ logprob }) {
  return Math.min(1, Math.exp(logprob));
}

/** 0.12345 -> "12.3 %", 0.0012 -> "0.12 %". */
export function percent(share) {
  if (share >= 0.9995) return "100 %";
  if (share >= 0.01) return `${(100 * share).toFixed(1)} %`;
  return share >= 0.0001 ? `${(100 * share).toFixed(2)} %` : "< 0.01 %";
}

/** The entropy of the alternatives that are shown, in bits, their probabilities scaled to sum to 1. */
export function entropy({ top }) {
  const shares = top.map(probability);
  const sum = shares.reduce((a, b) => a + b, 0);
  if (!(sum > 0)) return 0;
  return shares.reduce((bits, share) => (share > 0 ? bits - (share / sum) * Math.log2(share / sum) : bits), 0);
}

const LEVELS = [0.95, 0.8, 0.5, 0.2, 0.05];

/** The step of the scale, 0 (sure) to 5 (surprising), that a probability is on. */
export function level(share) {
  const step = LEVELS.findIndex((least) => share >= least);
  return step < 0 ? LEVELS.length : step;
}

/** What the steps of the scale mean, for a legend. */
export function levelNames() {
  const edges = [1, ...LEVELS, 0].map((share) => 100 * share);
  return edges.slice(1).map((low, i) => `${Math.round(low)}–${Math.round(edges[i])} %`);
}

const SIGNS = { "\n": "↵", "\r": "␍", "\t": "⇥" };

/** The text of a token with everything in it to be seen; bytes that are no text in hexadecimal. */
export function visible({ text, bytes }) {
  if (bytes) return bytes.map((byte) => (byte > 32 && byte < 127 ? String.fromCharCode(byte) : hex(byte))).join(" ");
  if (text === "") return "(no text)";
  const signs = text.replace(/[\n\r\t]/g, (sign) => SIGNS[sign]);
  return signs.replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}

function hex(byte) {
  return byte.toString(16).toUpperCase().padStart(2, "0");
}

const MOST_SHARED = 32; // tokens of bytes in a row that are looked at together

/**
 * Tokens in groups that are whole characters: most are alone, those that share a character are together.
 *
 * @returns {{start: number, tokens: object[], text: string | null}[]} `text` is null where the bytes never become one.
 */
export function characters(tokens, from = 0) {
  const groups = [];
  let start = from;
  const close = (end, text) => {
    if (end > start) groups.push({ start, tokens: tokens.slice(start, end), text });
    start = end;
  };
  for (let i = from; i < tokens.length; i++) {
    if (!tokens[i].bytes) close(i, null);
    const text = tokens[i].bytes ? decode(tokens.slice(start, i + 1).flatMap((one) => one.bytes)) : tokens[i].text;
    if (text !== null) close(i + 1, text);
    else if (i + 1 - start === MOST_SHARED) close(i + 1, null);
  }
  close(tokens.length, null);
  return groups;
}

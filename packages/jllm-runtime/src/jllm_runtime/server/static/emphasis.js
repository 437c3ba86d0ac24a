// Markdown emphasis: runs of * _ ~ in a line, and the text that they enclose.

import { element } from "./element.js";

const PUNCTUATION = /[\p{P}\p{S}]/u;

/**
 * A run of marks between two characters: what it may open and close. Null where the run means nothing.
 *
 * @param {string} run marks of one kind
 */
export function newMark(run, before, after) {
  const mark = run[0];
  if (mark === "~" && run.length !== 2) return null;
  const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
  const [signBefore, signAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
  const left = !spaceAfter && (!signAfter || spaceBefore || signBefore);
  const right = !spaceBefore && (!signBefore || spaceAfter || signAfter);
  const word = mark === "_"; // inside of a word, an underscore is one
  const opens = left && (!word || !right || signBefore);
  const closes = right && (!word || !left || signAfter);
  return { mark, count: run.length, size: run.length, opens, closes };
}

/** A mark that turned out to be none as the characters it is of; anything else as it is. */
export function asText(part) {
  return part.mark ? part.mark.repeat(part.count) : part;
}

/** Turn pairs of marks from `from` on into elements, in place. The method is CommonMark's, with its "rule of three". */
export function emphasise(parts, from, open) {
  const bottoms = {}; // below these, no mark opens what such a mark would close
  for (let close = from; close < parts.length; close++) {
    const closer = parts[close];
    if (!closer.mark || !closer.closes) continue;
    const kind = `${closer.mark}${closer.size % 3}${closer.opens}`;
    let begin = close - 1;
    const bottom = bottoms[kind] ?? from;
    while (begin >= bottom && !pairs(parts[begin], closer)) begin--;
    if (begin < bottom) {
      bottoms[kind] = close;
      continue;
    }
    close = wrap(parts, begin, close, closer) - 1;
    for (const name of Object.keys(bottoms)) bottoms[name] = Math.min(bottoms[name], begin);
  }
  if (!open) return;
  for (let begin = parts.length - 2; begin >= from; begin--) {
    const { mark, opens, count } = parts[begin];
    if (mark && opens) wrap(parts, begin, parts.length, { mark, count });
  }
}

function pairs(opener, closer) {
  if (opener.mark !== closer.mark || !opener.opens) return false;
  const either = opener.closes || closer.opens;
  return !either || (opener.size + closer.size) % 3 !== 0 || (opener.size % 3 === 0 && closer.size % 3 === 0);
}

/** Put what is between two marks into an element, and tell where to go on. */
function wrap(parts, begin, close, closer) {
  const opener = parts[begin];
  const used = opener.mark === "~" ? 2 : Math.min(2, opener.count, closer.count);
  const inside = parts.slice(begin + 1, close).map(asText);
  const tag = opener.mark === "~" ? "del" : used === 2 ? "strong" : "em";
  const left = [opener, element(tag, {}, ...inside)];
  opener.count -= used;
  closer.count -= used;
  if (!opener.count) left.shift();
  if (!closer.count && close < parts.length) close++;
  parts.splice(begin, close - begin, ...left);
  return begin + left.length;
}

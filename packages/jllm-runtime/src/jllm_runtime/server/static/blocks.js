// Markdown block parser: lines of text to a tree of plain objects.

const DEEPEST = 12; // blocks in blocks; what is deeper is a paragraph

const FENCE = /^( *)(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)(.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|(\d{1,9})[.)])( +|$)/;

/**
 * @param {string[]} lines
 * @param {boolean} open whether more lines may follow
 * @returns {object[]} blocks, each with its type and the lines it is made of: `lines.slice(from, to)`
 */
export function blocks(lines, open = false, depth = 0) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const readers = depth < DEEPEST ? [code, heading, rule, quote, list, table] : [code];
    let block = null;
    for (const read of readers) if ((block = read(lines, at, open, depth))) break;
    block ??= paragraph(lines, at);
    found.push({ ...block, from: at });
    at = block.to;
  }
  return found;
}

function code(lines, at) {
  const fence = FENCE.exec(lines[at]);
  if (!fence) return null;
  const [, indent, marks, info] = fence;
  const end = new RegExp(`^ {0,${indent.length + 3}}${marks[0]}{${marks.length},}\\s*$`);
  let to = at + 1;
  while (to < lines.length && !end.test(lines[to])) to++;
  const text = lines.slice(at + 1, to).map((line) => dedent(line, indent.length));
  return {
    type: "code",
    language: info.trim().split(/\s/)[0],
    text: text.join("\n"),
    to: Math.min(to + 1, lines.length),
  };
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  return (
    found && { type: "heading", level: found[1].length, text: found[2].trim().replace(/(^|[ \t])#+$/, ""), to: at + 1 }
  );
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? { type: "rule", to: at + 1 } : null;
}

function quote(lines, at, open, depth) {
  if (!QUOTE.test(lines[at])) return null;
  let to = at + 1;
  while (to < lines.length && (QUOTE.test(lines[to]) || continues(lines, to))) to++;
  const inside = lines.slice(at, to).map((line) => line.replace(QUOTE, ""));
  return { type: "quote", children: blocks(inside, open, depth + 1), to };
}

function list(lines, at, open, depth) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const [, indent, marker, start] = first;
  const items = [];
  let loose = false;
  let to = at;
  while (to < lines.length) {
    const item = ITEM.exec(lines[to]);
    if (!item || item[2].at(-1) !== marker.at(-1) || item[1].length > indent.length + 1 || RULE.test(lines[to])) break;
    const end = itemEnd(lines, to, item);
    const width = item[0].length - Math.max(0, item[4].length - 4); // a wide gap is the item's own
    const rest = lines.slice(to + 1, end);
    // Models often indent by less than the marker is wide.
    const deeper = rest.map(indentOf).find((indent) => indent > item[1].length + 1);
    const inside = [lines[to].slice(width), ...rest.map((line) => dedent(line, Math.min(width, deeper ?? width)))];
    items.push(blocks(inside, open, depth + 1));
    to = end;
    while (to < lines.length && !lines[to].trim()) to++;
    if (to > end && ITEM.test(lines[to] ?? "")) loose = true;
    if (to === lines.length || !ITEM.test(lines[to])) {
      to = end;
      break;
    }
  }
  loose ||= items.some((item) => item.some((block, i) => i > 0 && block.from > item[i - 1].to));
  return { type: "list", start: start === undefined ? null : Number(start), items, loose, to };
}

/** The line after an item: its lines are indented past its marker, or blank, or go on with its paragraph. */
function itemEnd(lines, at, item) {
  let end = at + 1;
  for (let line = at + 1; line < lines.length; line++) {
    if (!lines[line].trim()) continue;
    const deeper = indentOf(lines[line]) > item[1].length + 1;
    if (!deeper && !(line === end && !ITEM.test(lines[line]) && continues(lines, line))) break;
    end = line + 1;
  }
  return end;
}

function table(lines, at, open) {
  if (!lines[at].includes("|")) return null;
  const below = lines[at + 1];
  // While the line below is being written, a line that begins with a bar is taken for a head.
  const coming = open && at + 2 >= lines.length && /^ *\|/.test(lines[at]) && /^[ |:-]*$/.test(below ?? "");
  const head = cells(lines[at]);
  if (!coming) {
    if (!delimits(below) || cells(below).length !== head.length) return null;
  }
  const align = cells(below ?? "").map((cell) => (/:$/.test(cell) ? (/^:/.test(cell) ? "center" : "right") : null));
  let to = Math.min(at + 2, lines.length);
  const rows = [];
  while (to < lines.length && lines[to].includes("|")) rows.push(cells(lines[to++]));
  return { type: "table", head, align, rows: rows.map((row) => head.map((_, i) => row[i] ?? "")), to };
}

/** Whether a line is the one between the head of a table and its body. */
function delimits(line) {
  return line?.includes("-") && /^[ |:-]+$/.test(line) && cells(line).every((cell) => /^:?-+:?$/.test(cell));
}

function cells(line) {
  const inside = line
    .trim()
    .replace(/^\|/, "")
    .replace(/(?<!\\)\|$/, "");
  return inside.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, at) {
  let to = at + 1;
  while (to < lines.length && continues(lines, to)) to++;
  const text = lines.slice(at, to).map((line) => line.trim().replace(/\\$/, ""));
  return { type: "paragraph", text: text.join("\n"), to };
}

/** Whether a line goes on with the paragraph before it. */
function continues(lines, at) {
  const line = lines[at];
  if (!line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return false;
  const item = ITEM.exec(line);
  if (item && item[4] && (item[3] === undefined || item[3] === "1")) return false;
  return !(line.includes("|") && delimits(lines[at + 1]));
}

function indentOf(line) {
  return /^ */.exec(line)[0].length;
}

function dedent(line, width) {
  return line.slice(Math.min(width, indentOf(line)));
}

// Text of others, as nodes of the page. It is never parsed as HTML, and no address is followed but by a click.

const ODD = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;

/** Text with what would steer its order, or is not to be seen, written out. */
export const clean = (text) => String(text).replaceAll("\r\n", "\n").replace(ODD, (it) => `\\u{${it.codePointAt(0).toString(16)}}`);

/** JSON with that written as JSON does. */
export const escaped = (json) => json.replace(ODD, (it) => `\\u${it.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** An element with classes, text and children. */
export function element(name, classes = "", ...children) {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  for (const each of children) made.append(typeof each === "string" ? document.createTextNode(clean(each)) : each);
  return made;
}

/** A JSON value for people: text as it is. */
export const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 1) ?? "");

// ---- markdown

const DEEPEST = 12;
// What is matched comes from models: no expression may take more than linear time.
const FENCE = /^ {0,3}(`{3,}(?!`)|~{3,}(?!~))([^`]*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)(.*)$/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const HEADING = /^ {0,3}(#{1,6})(?: (.*))?$/;
const HEADING_END = /(^| )#+$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const CELLS = /^ {0,3}\|.*\| *$/;
const isUnderHead = (line) => line !== undefined && /^[ |:-]+$/.test(line) && line.includes("-");

/** Markdown as nodes. */
export function markdown(text, depth = 0) {
  const made = document.createDocumentFragment();
  const lines = depth ? text.split("\n") : clean(text).split("\n");
  for (let at = 0; at < lines.length; ) at = block(lines, at, made, depth);
  return made;
}

function block(lines, at, to, depth) {
  const line = lines[at];
  if (!line.trim()) return at + 1;
  let found;
  if ((found = FENCE.exec(line))) return fenced(lines, at, to, found[1]);
  if ((found = HEADING.exec(line))) return put(to, inline(document.createElement(`h${found[1].length}`), (found[2] ?? "").trim().replace(HEADING_END, "").trimEnd()), at + 1);
  if (RULE.test(line)) return put(to, document.createElement("hr"), at + 1);
  if (QUOTE.test(line) && depth < DEEPEST) return quoted(lines, at, to, depth);
  if (ITEM.test(line) && depth < DEEPEST) return listed(lines, at, to, depth);
  if (CELLS.test(line) && isUnderHead(lines[at + 1])) return tabled(lines, at, to);
  return paragraph(lines, at, to);
}

function put(to, node, next) {
  to.append(node);
  return next;
}

function fenced(lines, at, to, mark) {
  const end = new RegExp(`^ {0,3}${mark[0] === "`" ? "`" : "~"}{${mark.length},} *$`);
  const inside = [];
  for (at += 1; at < lines.length && !end.test(lines[at]); at += 1) inside.push(lines[at]);
  const code = document.createElement("code");
  code.textContent = inside.join("\n");
  const pre = element("pre", "", code);
  pre.tabIndex = 0;
  return put(to, pre, at + 1);
}

function quoted(lines, at, to, depth) {
  const inside = [];
  for (let found; at < lines.length && (found = QUOTE.exec(lines[at])); at += 1) inside.push(found[1]);
  return put(to, element("blockquote", "", markdown(inside.join("\n"), depth + 1)), at);
}

function listed(lines, at, to, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const isNumbered = /\d/.test(mark);
  const list = document.createElement(isNumbered ? "ol" : "ul");
  if (isNumbered && parseInt(mark, 10) !== 1) list.start = parseInt(mark, 10);
  while (at < lines.length) {
    const found = ITEM.exec(lines[at]);
    if (!found || found[1].length > indent.length + 1 || found[1].length < indent.length || /\d/.test(found[2]) !== isNumbered) break;
    const inner = found[1].length + found[2].length + 1;
    const inside = [found[4]];
    for (at += 1; at < lines.length; at += 1) {
      const line = lines[at];
      const own = line.length - line.trimStart().length;
      if (line.trim() && own < inner && (ITEM.test(line) || lines[at - 1].trim() === "" || FENCE.test(line) || HEADING.test(line))) break;
      if (!line.trim() && !(lines[at + 1] ?? "").startsWith(" ".repeat(Math.min(inner, 2)))) {
        if (ITEM.test(lines[at + 1] ?? "")) at += 1;
        break;
      }
      inside.push(line.slice(Math.min(own, inner)));
    }
    const item = element("li", "", markdown(inside.join("\n"), depth + 1));
    const only = item.children.length === 1 || item.children[1]?.matches("ul, ol") ? item.firstElementChild : null;
    if (only?.tagName === "P") only.replaceWith(...only.childNodes);
    list.append(item);
  }
  return put(to, list, at);
}

function tabled(lines, at, to) {
  const row = (line, cell) => element("tr", "", ...line.trim().slice(1, -1).split(/(?<!\\)\|/).map((text) => inline(document.createElement(cell), text.trim().replaceAll("\\|", "|"))));
  const table = element("table", "", element("thead", "", row(lines[at], "th")));
  const body = document.createElement("tbody");
  for (at += 2; at < lines.length && CELLS.test(lines[at]); at += 1) body.append(row(lines[at], "td"));
  table.append(body);
  return put(to, element("div", "wide", table), at);
}

function paragraph(lines, at, to) {
  const inside = [lines[at].trim()];
  for (at += 1; at < lines.length && lines[at].trim(); at += 1) {
    const line = lines[at];
    if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line)) break;
    if (CELLS.test(line) && isUnderHead(lines[at + 1])) break;
    inside.push(line.trimStart());
  }
  return put(to, inline(document.createElement("p"), inside.join("\n")), at);
}

const MARKS = ["***", "**", "*", "__", "_", "~~"];
const NAMES = { "***": ["strong", "em"], "**": ["strong"], __: ["strong"], "*": ["em"], _: ["em"], "~~": ["del"] };

/** Put text with its emphasis, code and links into an element. */
function inline(to, text, depth = 0) {
  const missing = new Set();  // marks without another one behind: looked for once
  let plain = "";
  const flush = () => { if (plain) to.append(plain); plain = ""; };
  for (let at = 0; at < text.length; ) {
    const rest = depth < DEEPEST ? special(text, at, depth, missing) : null;
    if (!rest) { plain += text[at]; at += 1; continue; }
    if (rest.text !== undefined) plain += rest.text;
    else { flush(); to.append(rest.node); }
    at = rest.end;
  }
  flush();
  return to;
}

function special(text, at, depth, missing) {
  switch (text[at]) {
    case "\\": return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? { text: text[at + 1], end: at + 2 } : null;
    case "`": return code(text, at, missing);
    case "\n": return { node: document.createElement("br"), end: at + 1 };  // in a chat a line is meant as one
    case "!": return text[at + 1] === "[" ? link(text, at + 1, depth, missing, true) : null;
    case "[": return link(text, at, depth, missing, false);
    case "<": return angled(text, at);
    case "h": return bare(text, at);
    case "*": case "_": case "~": return emphasis(text, at, depth, missing);
  }
  return null;
}

function behind(text, mark, from, missing) {
  if (missing.has(mark)) return -1;
  const found = text.indexOf(mark, from);
  if (found < 0) missing.add(mark);
  return found;
}

function code(text, at, missing) {
  const mark = /^`+/.exec(text.slice(at, at + 16))[0];
  const end = behind(text, mark, at + mark.length, missing);
  if (end < 0) return { text: mark, end: at + mark.length };
  const inside = text.slice(at + mark.length, end);
  const node = document.createElement("code");
  node.textContent = /^ .*\S.* $/s.test(inside) ? inside.slice(1, -1) : inside;
  return { node, end: end + mark.length };
}

function emphasis(text, at, depth, missing) {
  const mark = MARKS.find((each) => text.startsWith(each, at));
  if (!mark || /^\s?$/.test(text[at + mark.length] ?? "")) return null;
  if (mark[0] === "_" && /\w/.test(text[at - 1] ?? "")) return null;
  let end = behind(text, mark, at + mark.length, missing);
  while (end > 0 && (/\s/.test(text[end - 1]) || (mark.length === 1 && text[end + 1] === mark) || (mark[0] === "_" && /\w/.test(text[end + mark.length] ?? "")))) {
    end = behind(text, mark, end + mark.length + (text[end + 1] === mark ? 1 : 0), missing);
  }
  if (end < 0) return { text: mark, end: at + mark.length };
  const [outer, ...others] = NAMES[mark].map((name) => document.createElement(name));
  let inner = outer;
  for (const each of others) { inner.append(each); inner = each; }
  inline(inner, text.slice(at + mark.length, end), depth + 1);
  return { node: outer, end: end + mark.length };
}

function link(text, at, depth, missing, isImage) {
  const middle = behind(text, "](", at + 1, missing);
  if (middle < 0) return null;
  const end = behind(text, ")", middle + 2, missing);
  if (end < 0 || text.slice(at + 1, middle).includes("[")) return null;
  const address = text.slice(middle + 2, end).trim().split(/\s/)[0];
  const label = text.slice(at + 1, middle);
  const node = anchor(address, isImage ? `picture: ${label || address}` : null);
  if (!node) return { text: text.slice(isImage ? at - 1 : at, end + 1), end: end + 1 };
  if (!isImage) inline(node, label, DEEPEST);
  return { node, end: end + 1 };
}

function angled(text, at) {
  const found = /^<(https?:\/\/[^\s<>]{1,2000})>/.exec(text.slice(at, at + 2010));
  return found ? { node: anchor(found[1], found[1]), end: at + found[0].length } : null;
}

function bare(text, at) {
  if (/\w/.test(text[at - 1] ?? "")) return null;
  const found = /^https?:\/\/[^\s<>"'`*\\]{1,2000}/.exec(text.slice(at, at + 2010));
  if (!found) return null;
  const address = found[0].replace(/[.,;:!?)\]]+$/, "");
  const node = anchor(address, address);
  return node ? { node, end: at + address.length } : null;
}

/** A link to an address of the web, which opens in a tab of its own; null for any other address. */
function anchor(address, label) {
  let url;
  try { url = new URL(address); } catch { return null; }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  const made = document.createElement("a");
  made.href = url.href;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  made.title = url.href;
  if (label !== null) made.textContent = label;
  return made;
}

/** Markdown that grows: what is whole is drawn once, and what may still change again and again. */
export class Growing {
  constructor() {
    this.node = element("div", "said");
    this.text = "";
    this.done = 0;
    this.tail = this.node.appendChild(document.createElement("div"));
    this.waits = 0;
  }

  add(text) {
    this.text += text;
    // What is long is drawn less often, so that drawing does not take all of the time.
    this.waits ||= setTimeout(() => { this.waits = 0; this.draw(); }, 30 + (this.text.length - this.done) / 100);
  }

  set(text) {
    this.text = "";
    this.done = 0;
    this.node.replaceChildren(this.tail);
    this.add(text);
    this.draw();
  }

  draw() {
    clearTimeout(this.waits);
    this.waits = 0;
    const whole = lastEnd(this.text, this.done);
    if (whole > this.done) {
      this.tail.before(element("div", "", markdown(this.text.slice(this.done, whole))));
      this.done = whole;
    }
    this.tail.replaceChildren(markdown(this.text.slice(this.done)));
    this.node.dispatchEvent(new CustomEvent("grown", { bubbles: true }));
  }
}

/** Where the last block ends that nothing behind it can belong to. */
function lastEnd(text, from) {
  let end = from, at = from, mark = "";
  for (;;) {
    const line = text.indexOf("\n", at);
    if (line < 0) return end;
    const found = FENCE.exec(text.slice(at, line));
    if (found && !mark) mark = found[1];
    else if (mark && new RegExp(`^ {0,3}${mark[0]}{${mark.length},} *$`).test(text.slice(at, line))) mark = "";
    else if (!mark && !text.slice(at, line).trim() && /^[^\s\-*+\d>|]/.test(text.slice(line + 1, line + 2))) end = line + 1;
    at = line + 1;
  }
}

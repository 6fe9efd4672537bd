// The chat page: one conversation with an agent, kept in this tab, and taken up again after a reload.

import { element } from "./text.js";
import { follow, newKey, Refused, send } from "./events.js";
import { Turn } from "./turn.js";

const KEPT = "fractal chat";
const MOST_KEPT = 4_000_000;
const at = (id) => document.getElementById(id);
const agents = JSON.parse(document.querySelector("meta[name=fractal-agents]").content);

/** The conversation: what was asked, and the events of each answer. */
let kept = { agent: agents[0], turns: [] };
let current = null;  // the answer that is on its way

// ---- what is kept in the tab

function load() {
  try {
    const found = JSON.parse(sessionStorage.getItem(KEPT));
    if (Array.isArray(found?.turns) && agents.includes(found.agent)) kept = found;
  } catch { /* nothing that can be read */ }
}

let saving = 0;
function save() {
  saving ||= setTimeout(() => { saving = 0; saveNow(); }, 300);
}

function saveNow() {
  // An answer that is on its way is read again from the server, from its beginning.
  const turns = kept.turns.map(({ question, run, events, ended }) => ({ question, run: run.id ? { id: run.id } : run, events: ended ? events : [], ended }));
  for (;;) {
    const text = JSON.stringify({ agent: kept.agent, turns });
    try {
      if (text.length > MOST_KEPT) throw new Error("too long");
      sessionStorage.setItem(KEPT, text);
      return;
    } catch {
      if (!turns.length) return;
      turns.shift();  // the oldest is forgotten, here and not by the model
    }
  }
}

/** Pieces of one text are kept as one. */
function keep(events, event) {
  const last = events.at(-1);
  if (event.kind === "tool_call_delta") return;
  if (last && event.kind === last.kind && /^(text|reasoning)_delta$/.test(event.kind) && last.run_id === event.run_id) last.text += event.text;
  else events.push({ ...event });
}

// ---- turns

const history = () => kept.turns.findLast((each) => each.messages)?.messages ?? [];

function show(one) {
  // What is undefined is left out of the JSON.
  one.view = new Turn(one.question, (id, decision, given) => send("POST", `runs/${one.run.id}/approvals/${encodeURIComponent(id)}`, { decision, arguments: given }));
  at("empty").hidden = true;
  at("talk").append(one.view.node);
  for (const event of one.events) one.view.take(event);
  if (one.ended && !one.view.isOver) one.view.tell(one.ended.text, one.ended.isBad);
  one.view.draw();
  one.messages = one.view.result?.messages;
}

async function answer(one) {
  const stopper = new AbortController();
  current = { one, stopper };
  tell();
  try {
    await follow(one.run, {
      signal: stopper.signal,
      take: (event) => { keep(one.events, event); one.view.take(event); tell(); scroll(); save(); },
      lost: (wait) => tell(wait === null ? "" : `The connection is lost: the next try is in ${wait} s`),
    });
    one.ended = { text: "", isBad: false };
  } catch (error) {
    const isStopped = stopper.signal.aborted;
    one.ended = { text: isStopped ? "stopped" : error instanceof Refused && error.status === 404 ? "The server does not know this run any more" : error.message, isBad: !isStopped };
    one.view.tell(one.ended.text, one.ended.isBad);
  }
  one.messages = one.view.result?.messages;
  current = null;
  one.view.draw();
  saveNow();
  tell();
  scroll();
}

function ask(question) {
  const run = { key: newKey(), id: "", last: "", body: { input: question, messages: history(), ...(agents.length > 1 ? { agent: kept.agent } : {}) } };
  const one = { question, run, events: [], ended: null };
  kept.turns.push(one);
  show(one);
  saveNow();
  scroll(true);
  answer(one);
}

async function stop() {
  if (!current) return;
  const { one, stopper } = current;
  at("stop").disabled = true;
  tell("Stopping…");
  try {
    // The end comes as an event, when the run's tasks have ended.
    if (one.run.id) await send("DELETE", `runs/${one.run.id}`);
    else stopper.abort();
  } catch {
    stopper.abort();
  } finally {
    at("stop").disabled = false;
  }
}

function restart() {
  if (current) return;
  kept.turns = [];
  for (const each of document.querySelectorAll(".turn")) each.remove();
  at("empty").hidden = false;
  saveNow();
  at("question").focus();
}

// ---- what is seen

function tell(text = "") {
  const said = text || (current ? current.one.view.now || "…" : "");
  const state = at("state");
  if (state.textContent !== said) state.replaceChildren(element("span", "", said));
  at("send").hidden = Boolean(current);
  at("stop").hidden = !current;
  at("new").disabled = at("agent").disabled = Boolean(current);
  document.documentElement.dataset.busy = String(Boolean(current));
}

let isAtEnd = true;
function scroll(isWanted = false) {
  if (isAtEnd || isWanted) requestAnimationFrame(() => { at("talk").scrollTop = at("talk").scrollHeight; });
}

function fit() {
  const area = at("question");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

const THEMES = ["auto", "light", "dark"];
function theme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  at("theme").textContent = `Theme: ${name}`;
  try { localStorage.setItem("fractal theme", name); } catch { /* it is not kept */ }
}

function begin() {
  load();
  for (const name of agents) at("agent").append(Object.assign(element("option", "", name), { value: name }));
  at("agent").hidden = agents.length < 2;
  at("agent").value = kept.agent;
  at("title").replaceChildren(element("span", "", agents.length < 2 ? kept.agent : "Fractal"));
  document.title = agents.length < 2 ? kept.agent : "Fractal chat";
  let chosen = "auto";
  try { chosen = localStorage.getItem("fractal theme") ?? "auto"; } catch { /* as the system has it */ }
  theme(THEMES.includes(chosen) ? chosen : "auto");
  for (const one of kept.turns) show(one);
  tell();
  scroll(true);
  const last = kept.turns.at(-1);
  if (last && !last.ended) answer(last);
  fit();
  at("question").focus();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || current) return;
  at("question").value = "";
  fit();
  ask(question);
});
at("question").addEventListener("input", fit);
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", stop);
at("new").addEventListener("click", restart);
at("agent").addEventListener("change", () => { kept.agent = at("agent").value; restart(); });
at("theme").addEventListener("click", () => theme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % 3]));
at("talk").addEventListener("scroll", () => { isAtEnd = at("talk").scrollHeight - at("talk").scrollTop - at("talk").clientHeight < 60; });
at("talk").addEventListener("grown", () => scroll());
addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  else if (event.altKey && event.key.toLowerCase() === "n") restart();
  else if (event.key === "/" && document.activeElement !== at("question") && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    at("question").focus();
  }
});
addEventListener("pagehide", saveNow);

begin();

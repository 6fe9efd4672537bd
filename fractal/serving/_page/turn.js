// A question and what came of it, drawn from the events of its run.

import { Approval } from "./approval.js";
import { element, Growing, shown } from "./text.js";

const LONGEST = 20000;
const WORDS = {
  running: "runs", waits: "needs approval", ok: "ok", error: "failed", timeout: "timed out", cancelled: "cancelled",
  abandoned: "abandoned", skipped: "skipped", denied: "denied",
};

const cut = (text) => (text.length > LONGEST ? `${text.slice(0, LONGEST)}…` : text);
const seconds = (many) => (many < 10 ? `${many.toFixed(1)} s` : `${Math.round(many)} s`);
const brief = (value) => cut(typeof value === "object" && value ? Object.entries(value).map(([name, it]) => `${name}: ${typeof it === "string" ? it : JSON.stringify(it)}`).join(", ") : shown(value)).slice(0, 300);

/** A tool call, as a card that can be opened. */
class Card {
  constructor(name, args) {
    this.name = name;
    this.state = element("span", "badge running", WORDS.running);
    this.brief = element("span", "brief x");
    this.label = element("span", "name x", name);
    this.body = element("div", "body");
    this.node = element("details", "card", element("summary", "", this.label, this.brief, this.state), this.body);
    this.isOver = this.isDelegate = false;
    this.setArguments(args);
  }

  setArguments(args) {
    this.brief.textContent = "";
    this.brief.append(element("span", "", brief(args)));
    const node = element("div", "", element("h3", "", "Arguments"), element("pre", "args", cut(shown(args))));
    if (this.args) this.args.replaceWith(node);
    else this.body.append(node);
    this.args = node;
  }

  asDelegate(name) {
    this.isDelegate = true;
    this.node.classList.add("delegate");
    this.node.open = true;
    if (name) this.label.replaceChildren(element("span", "", name));
  }

  become(state, took) {
    for (const each of Object.keys(WORDS)) {
      this.state.classList.toggle(each, each === state);
      this.node.classList.toggle(each, each === state);
    }
    this.state.textContent = WORDS[state] ?? state;
    if (took !== undefined) this.state.textContent += ` · ${seconds(took)}`;
  }

  end(result) {
    this.isOver = true;
    this.askNoMore();
    this.become(result.outcome, result.elapsed);
    const value = result.error ?? result.content;
    if (this.isDelegate && result.error === null && this.body.querySelector(".inner .said")) return;  // it is seen there
    this.body.append(element("h3", "", result.error === null ? "Result" : "Error"), element("pre", "result", cut(shown(value))));
  }

  /** Ask whether the call may be made. */
  ask(question, answer) {
    this.become("waits");
    this.node.open = true;
    this.question = new Approval(question, (decision, given) => answer(question.approval_id, decision, given)).node;
    this.node.append(this.question);
  }

  askNoMore() {
    this.question?.remove();
    this.question = null;
  }
}

/** The part of a run in the page: its texts, thoughts and calls in the order in which they came. */
class Part {
  constructor(node, name) {
    this.node = node;
    this.name = name;
    this.cards = new Map();
    this.said = this.thought = null;
    this.number = 0;
  }

  put(node) {
    this.said = this.thought = null;
    this.node.append(node);
    return node;
  }

  text(piece) {
    if (!this.said) {
      this.said = new Growing();
      this.thought = null;
      this.node.append(this.said.node);
    }
    this.said.add(piece);
  }

  reasoning(piece) {
    if (!this.thought) {
      this.said = null;
      this.thought = element("div", "");
      this.node.append(element("details", "thought", element("summary", "", "Thoughts"), this.thought));
    }
    this.thought.append(element("span", "", piece));
  }

  /** The call of an id; endpoints may begin to count anew, so one that is over is not meant. */
  card(event) {
    let card = this.cards.get(event.call_id);
    if (!card || card.isOver) {
      card = new Card(event.tool_name, event.arguments);
      this.cards.set(event.call_id, card);
      this.put(card.node);
    }
    return card;
  }

  note(text, isBad = false) {
    this.put(element("p", isBad ? "note bad x" : "note x", text));
  }
}

/** Bars of time: requests to models, calls and delegates, side by side. */
class Times {
  constructor() {
    this.list = document.createElement("ol");
    this.node = element("details", "times", element("summary", "", "Timeline"), this.list);
    this.node.hidden = true;
    this.spans = [];
    this.open = new Map();
    this.from = this.to = null;
    this.waits = 0;
  }

  at(moment) {
    this.from ??= moment;
    this.to = Math.max(this.to ?? moment, moment);
    this.waits ||= setTimeout(() => this.draw(), 200);
  }

  begin(key, label, kind, moment, depth) {
    const span = { label, kind, from: moment, to: null, depth, row: null };
    this.spans.push(span);
    this.open.set(key, span);
  }

  end(key, moment, kind) {
    const span = this.open.get(key);
    if (!span) return;
    span.to = moment;
    if (kind && kind !== "ok") span.kind = kind;
    this.open.delete(key);
  }

  /** Call an open span by another name; whether there is one. */
  rename(key, label, kind) {
    const span = this.open.get(key);
    if (!span) return false;
    Object.assign(span, { label, kind });
    span.row?.remove();
    span.row = null;
    return true;
  }

  draw() {
    clearTimeout(this.waits);
    this.waits = 0;
    const all = Math.max(this.to - this.from, 0.001);
    this.node.hidden = !this.spans.length;
    for (const span of this.spans) {
      if (!span.row) {
        span.bar = element("i", "bar");
        span.took = element("span", "took");
        const label = element("span", "label x", `${"· ".repeat(Math.min(span.depth, 6))}${span.label}`);
        label.title = span.label;
        span.row = element("li", "", label, element("span", "track", span.bar), span.took);
        const next = this.spans.slice(this.spans.indexOf(span) + 1).find((each) => each.row);
        this.list.insertBefore(span.row, next?.row ?? null);
      }
      const to = span.to ?? this.to;
      span.bar.className = `bar ${span.kind}`;
      span.bar.style.left = `${(100 * (span.from - this.from)) / all}%`;
      span.bar.style.width = `${(100 * (to - span.from)) / all}%`;
      span.took.textContent = seconds(to - span.from) + (span.to === null ? "…" : "");
    }
  }
}

/** A turn of the conversation. */
export class Turn {
  /** `answer` sends an approval: it is called with the id of what is asked, the decision, and arguments if they were changed. */
  constructor(question, answer) {
    this.answer = answer;
    this.own = element("div", "answer");
    this.times = new Times();
    this.end = element("p", "end muted x");
    this.end.hidden = true;
    this.node = element("article", "turn", element("div", "asked x", question), this.own, this.end, this.times.node);
    this.parts = new Map();
    this.result = null;
    this.state = "";
    this.isOver = false;
    this.waiting = new Map();
  }

  get first() {
    return this.parts.values().next().value ?? this.part({ run_id: "", agent_name: "" });
  }

  /** What goes on, in a few words. */
  get now() {
    if (this.waiting.size) return `${[...this.waiting.values()].join(", ")} needs your approval`;
    return this.state;
  }

  part(event) {
    let part = this.parts.get(event.run_id);
    if (!part) {
      part = new Part(this.parts.size ? this.below(event) : this.own, event.agent_name);
      this.parts.set(event.run_id, part);
    }
    return part;
  }

  /** Where the part of a run below another is drawn: in the call that began it. */
  below(event) {
    const above = this.parts.get(event.parent_id) ?? this.first;
    const inner = element("div", "inner");
    const card = above.cards.get(event.call_id);
    if (card) {
      card.asDelegate(event.agent_name);
      card.body.append(inner);
    } else {
      above.put(inner);
      inner.append(element("p", "muted x", event.agent_name));
    }
    return inner;
  }

  take(event) {
    if (event.at) this.times.at(event.at);
    this[event.kind]?.(event, this.part(event));
  }

  // ---- one method for each kind of event

  run_started(event) {
    if (!event.parent_id) return;
    const call = `${event.parent_id} ${event.call_id}`;
    if (!this.times.rename(call, event.agent_name, "delegate")) this.times.begin(event.run_id, event.agent_name, "delegate", event.at, event.depth - 1);
  }

  delegate_finished(event) {
    this.times.end(event.run_id, event.at, event.success ? "ok" : "error");
  }

  model_requested(event, part) {
    part.said = part.thought = null;
    this.state = `${event.agent_name} thinks`;
    this.times.begin(`${event.run_id} model`, `${event.agent_name}: model`, "model", event.at, event.depth);
  }

  model_responded(event) {
    this.times.end(`${event.run_id} model`, event.at);
  }

  text_delta(event, part) {
    this.state = `${event.agent_name} writes`;
    part.text(event.text);
  }

  reasoning_delta(event, part) {
    part.reasoning(event.text);
  }

  tool_call_delta(event) {
    this.state = `${event.agent_name} calls ${event.tool_name}`;
  }

  tool_started(event, part) {
    const card = part.card(event);
    card.setArguments(event.arguments);
    if (!card.question) card.become("running");  // that it waits may be known before
    this.state = `${event.tool_name} runs`;
    this.times.begin(`${event.run_id} ${event.call_id}`, event.tool_name, "tool", event.at, event.depth);
  }

  tool_finished(event, part) {
    part.card(event).end(event.result);
    this.waiting.delete(`${event.run_id} ${event.call_id}`);
    this.times.end(`${event.run_id} ${event.call_id}`, event.at, event.result.outcome);
  }

  delegation_started(event, part) {
    part.cards.get(event.call_id)?.asDelegate(event.to_agent);
    this.state = `${event.to_agent} is asked`;
  }

  approval_requested(event, part) {
    part.card(event).ask(event, this.answer);
    this.waiting.set(`${event.run_id} ${event.call_id}`, event.tool_name);
  }

  approval_answered(event, part) {
    const card = part.card(event);
    card.askNoMore();
    card.setArguments(event.arguments);
    card.become(event.is_allowed ? "running" : "denied");
    this.waiting.delete(`${event.run_id} ${event.call_id}`);
  }

  retry_scheduled(event, part) {
    part.note(`The model did not answer: asked again in ${seconds(event.wait)}`);
  }

  limit_hit(event, part) {
    part.note(event.message);
  }

  events_skipped(event) {
    const part = this.first;
    part.note(`${event.skipped} events are no longer kept by the server; the text is whole`);
    if (event.text) part.text(event.text);
  }

  run_finished(event, part) {
    this.isOver = true;
    this.result = event.result;
    this.waiting.clear();
    this.state = "";
    for (const span of this.times.open.values()) span.to = this.times.to;
    this.times.open.clear();
    for (const each of this.parts.values()) {
      for (const card of each.cards.values()) if (!card.isOver) card.end({ outcome: "cancelled", error: null, content: "" });
    }
    if (event.result?.success) this.conclude(event.result.content, part);
    const usage = event.result?.usage;
    const facts = [event.state];
    if (event.result) facts.push(seconds(event.result.elapsed));
    if (usage) facts.push(`${usage.input_tokens + usage.output_tokens} tokens`);
    this.tell(event.problem && event.state !== "cancelled" ? `${event.problem.detail ?? event.state}` : facts.join(" · "), event.state === "failed");
    this.draw();
  }

  /** Show an answer that has not been written as text: an object, or what a validator has made of it. */
  conclude(content, part) {
    if (typeof content !== "string") part.put(element("pre", "result", shown(content)));
    else if ((part.said?.text ?? "").trim() !== content.trim()) {
      part.said = null;
      part.text(content);
    }
  }

  /** Say how it ended. */
  tell(text, isBad = false) {
    this.isOver = true;
    this.end.hidden = false;
    this.end.classList.toggle("bad", isBad);
    this.end.replaceChildren(element("span", "", text));
  }

  draw() {
    for (const part of this.parts.values()) part.said?.draw();
    this.times.draw();
  }
}

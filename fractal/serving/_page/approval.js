// The question whether a tool call may be made, with its arguments as they are or as somebody has changed them.

import { element, escaped } from "./text.js";

const MOST_ROWS = 14;

/** Whether a value comes out of the page as it came in: a number with more digits than a script keeps does not. */
const isExact = (value) => (typeof value === "number" ? Number.isSafeInteger(value) || (Number.isFinite(value) && !Number.isInteger(value))
  : typeof value !== "object" || value === null || Object.values(value).every(isExact));

function button(name, label, act) {
  const made = element("button", name, label);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

export class Approval {
  /** `answer` sends the decision: it is called with "allow" or "deny", and with the arguments if they were changed. */
  constructor(question, answer) {
    this.answer = answer;
    this.written = escaped(JSON.stringify(question.arguments ?? {}, null, 1));
    const say = element("p", "", question.description ? `${question.tool_name}: ${question.description}` : question.tool_name);
    this.area = this.textarea();
    this.field = element("label", "edit", element("span", "muted", "Arguments, as JSON"), this.area);
    this.fault = element("p", "bad");
    this.fault.setAttribute("role", "alert");
    this.field.hidden = this.fault.hidden = true;
    this.buttons = [
      button("allow", "Allow", () => this.decide("allow")),
      button("deny", "Deny", () => this.decide("deny")),
      button("change", "Edit", () => this.edit(this.field.hidden)),
    ];
    this.change = this.buttons[2];
    this.change.hidden = !isExact(question.arguments);
    this.node = element("div", "approval", say, this.field, this.fault, ...this.buttons);
  }

  textarea() {
    const area = element("textarea");
    area.spellcheck = false;
    area.addEventListener("input", () => this.say(""));
    area.addEventListener("keydown", (event) => {
      event.stopPropagation();  // the keys of the page are text here
      if (event.key === "Escape") this.edit(false);
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.decide("allow");
    });
    return area;
  }

  /** Show the arguments for editing, or take back what was changed. */
  edit(isOn) {
    this.field.hidden = !isOn;
    this.area.value = this.written;
    this.area.rows = Math.min(this.written.split("\n").length + 1, MOST_ROWS);
    this.change.textContent = isOn ? "Undo" : "Edit";
    this.say("");
    (isOn ? this.area : this.change).focus();
  }

  say(fault) {
    this.fault.hidden = !fault;
    this.fault.replaceChildren(element("span", "", fault));
    this.area.setAttribute("aria-invalid", Boolean(fault));
    if (!this.field.hidden) this.node.scrollIntoView({ block: "nearest" });  // the buttons below, too
  }

  /** The arguments, if they were changed. */
  changed() {
    if (this.field.hidden || this.area.value === this.written) return undefined;
    let given;
    try {
      given = JSON.parse(this.area.value);
    } catch (error) {
      throw new Error(`This is not JSON: ${error.message}`);
    }
    if (typeof given !== "object" || given === null || Array.isArray(given)) throw new Error("The arguments have to be an object: {…}");
    if (!isExact(given)) throw new Error("A number has more digits than can be kept here");
    return given;
  }

  async decide(decision) {
    let given;
    try {
      given = decision === "allow" ? this.changed() : undefined;
    } catch (error) {
      this.say(error.message);
      this.area.focus();
      return;
    }
    const all = [...this.buttons, this.area];
    for (const each of all) each.disabled = true;
    try {
      await this.answer(decision, given);
    } catch (error) {
      for (const each of all) each.disabled = false;
      this.say(error.message);
    }
  }
}

// Events of a run, read from the server as they come: a lost connection is taken up again where it was lost.

const TIRED = [300, 700, 1500, 3000, 5000];

/** What the server says when it does not answer with events. */
export class Refused extends Error {
  constructor(status, said) {
    super(said);
    this.status = status;
  }
}

/** A random name for a request, so that it can be sent again without being answered twice. */
export const newKey = () => [...crypto.getRandomValues(new Uint8Array(16))].map((it) => it.toString(16).padStart(2, "0")).join("");

/** Send JSON, or nothing; gives what comes back, if anything does. */
export async function send(method, path, body, headers = {}) {
  const given = body === undefined ? {} : { body: JSON.stringify(body) };
  const answer = await fetch(path, { method, headers: { "content-type": "application/json", ...headers }, ...given });
  if (!answer.ok) throw new Refused(answer.status, await said(answer));
  return answer;
}

async function said(answer) {
  try {
    const problem = await answer.json();
    return problem.detail || problem.title || `the server says ${answer.status}`;
  } catch {
    return `the server says ${answer.status}`;
  }
}

/**
 * Read the events of a run to its end.
 *
 * `run` has `key` and `body` of the request, and gets `id` and `last`, the id of the last event; it can be kept, and
 * read on with later. `take` is called with each event, `lost` with the seconds until the next try, or with null when
 * the connection is there again.
 */
export async function follow(run, { take, lost, signal }) {
  for (let tries = 0; ; ) {
    try {
      const answer = await open(run, signal);
      lost(null);
      for await (const { id, data } of frames(answer.body)) {
        tries = 0;
        if (id) {
          run.id = id.slice(0, id.lastIndexOf("."));
          run.last = id;
        }
        take(data);
        if (data.kind === "run_finished" && data.run_id === run.id) return;
      }
    } catch (error) {
      if (signal.aborted || (error instanceof Refused && error.status < 500 && ![408, 425, 429].includes(error.status))) throw error;
      if (error instanceof Refused && !run.id) throw error;  // it has not begun: that is the answer
    }
    if (signal.aborted) throw signal.reason;
    const wait = TIRED[Math.min(tries, TIRED.length - 1)];
    tries += 1;
    lost(wait / 1000);
    await pause(wait, signal);
  }
}

function open(run, signal) {
  const reading = { signal, headers: { accept: "text/event-stream" }, cache: "no-store" };
  if (run.id) {
    if (run.last) reading.headers["last-event-id"] = run.last;
    return fetch(`runs/${run.id}/stream`, reading).then(checked);
  }
  reading.headers["content-type"] = "application/json";
  reading.headers["idempotency-key"] = run.key;
  return fetch("runs/stream", { ...reading, method: "POST", body: JSON.stringify(run.body) }).then(checked);
}

async function checked(answer) {
  if (!answer.ok) throw new Refused(answer.status, await said(answer));
  return answer;
}

/** The server-sent events of a body. */
async function* frames(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const fields = { id: "", data: [] };
        for (const line of part.split(/\r?\n/)) {
          const found = /^(id|data): ?(.*)$/.exec(line);
          if (found?.[1] === "id") fields.id = found[2];
          else if (found) fields.data.push(found[2]);
        }
        if (fields.data.length) yield { id: fields.id, data: JSON.parse(fields.data.join("\n")) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Wait, or until the network is there again. */
function pause(milliseconds, signal) {
  return new Promise((done) => {
    const over = () => {
      clearTimeout(timer);
      removeEventListener("online", over);
      signal.removeEventListener("abort", over);
      done();
    };
    const timer = setTimeout(over, milliseconds);
    addEventListener("online", over);
    signal.addEventListener("abort", over);
  });
}

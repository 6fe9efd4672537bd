// A front end by AG-UI's own client: it asks, answers an interrupt and asks again, and tells what it has seen.
// Usage: node agui_client.mjs URL FILE_OF_THE_CLIENT

const [url, client] = process.argv.slice(2);
const { HttpAgent } = await import(client);

const agent = new HttpAgent({ url, threadId: "t" });
const turns = [];

async function run(parameters = {}) {
  const events = [];
  await agent.runAgent(parameters, { onEvent: ({ event }) => { events.push(event.type); } });
  turns.push({ events, interrupts: agent.pendingInterrupts.map(({ toolCallId, message }) => ({ toolCallId, message })) });
}

agent.messages = [{ id: "1", role: "user", content: "pay and look" }];
await run();
await run({ resume: agent.pendingInterrupts.map(({ id }) => ({ interruptId: id, status: "resolved", payload: { decision: "allow" } })) });
agent.messages = [...agent.messages, { id: "2", role: "user", content: "thanks" }];
await run();
console.log(JSON.stringify({ turns, said: agent.messages.map(({ role, content, subagentRunId }) => [role, content ?? "", Boolean(subagentRunId)]) }));

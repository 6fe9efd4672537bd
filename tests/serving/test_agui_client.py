"""AG-UI's own client, which checks the order of events itself, talks to our routes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from fractal import BaseAgent
from fractal.testing import answers
from tests.serving.test_agui import StartEndpoint, look, pay, served

CLIENT = Path(__file__).parents[2] / ".venv-agui-client/node_modules/@ag-ui/client/dist/index.mjs"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not here"),
    pytest.mark.skipif(
        not CLIENT.exists(),
        reason="AG-UI's client is not here: npm install --prefix .venv-agui-client @ag-ui/client@1",
    ),
]


def test_the_protocol_s_own_client_asks_approves_and_goes_on(endpoint: StartEndpoint):
    calls = [answers.call("delegate_to_below", {"query": "look"}), answers.call("pay", {"euros": 7})]
    one = endpoint(
        [
            answers.calls(*calls, text="Let me see."),
            answers.call("look", {"what": "x"}),
            answers.text("it is there", message_extra={"reasoning_content": "hm"}),
            "done",
            "you are welcome",
        ]
    )
    below = BaseAgent("Below", "b").add_tool(look)
    with served(BaseAgent("Guide", "g").add_tool(pay).register_delegate(below)) as client:
        command = ["node", str(Path(__file__).with_name("agui_client.mjs")), f"{client.url}/agui", CLIENT.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    heard = json.loads(done.stdout)
    first, second, third = heard["turns"]
    assert [each["message"] for each in first["interrupts"]] == ["May the agent call pay: Pay somebody."]
    assert first["events"][-1] == second["events"][-1] == third["events"][-1] == "RUN_FINISHED"
    assert {"SUBAGENT_STARTED", "SUBAGENT_FINISHED", "REASONING_MESSAGE_CONTENT"} <= {*first["events"]}
    assert second["interrupts"] == []
    texts = [text for role, text, is_below in heard["said"] if role == "assistant" and not is_below]
    assert texts == ["Let me see.", "done", "you are welcome"]
    last = one.requests[-1].body["messages"]
    assert [each["role"] for each in last] == ["system", "user", "assistant", "tool", "tool", "assistant", "user"]
    assert [each["content"] for each in last[3:5]] == ["it is there", "paid 7"]

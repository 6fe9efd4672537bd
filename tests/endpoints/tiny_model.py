"""Writes a language model of two megabytes that says what the tests want to hear, for servers that run GGUF files.

It has the shape of Llama with one layer. Each token is followed by a certain other one: embeddings are one-hot,
attention and feed-forward are zero, and the output matrix is the table of followers. A server does everything else as
with any model: template, tokens, sampling, grammars, the reading of tool calls, streaming. The template ends a prompt
with a cue, which is the token that the right words follow. It refuses what the templates of Mistral and Qwen refuse.

Needs the packages `gguf` and `numpy`, and nothing of the tests: `python tiny_model.py model.gguf`.
"""

from __future__ import annotations

import sys
from typing import Any

import gguf
import numpy as np

CONTEXT = 4096
END = "<|im_end|>"

# What follows a cue. No text may stand twice, since only the last token tells how it goes on.
SPEECHES: dict[str, list[str]] = {
    "<|say|>": ["It rains", " in", " Rome", "."],
    "<|look|>": ["<tool_", 'call>\n{"name": "weather", ', '"arguments": {"city": ', '"Rome"}}\n</', "tool_call>"],
    "<|both|>": [
        "<tool",
        '_call>\n{"name": "weather", "arguments": ',
        '{"city": "Rome"}}\n</tool_call>\n',
        "<tool_call>\n{",
        '"name": "weather", "arguments": {',
        '"city": "Paris"}}\n</tool',
        "_call>",
    ],
    "<|now|>": ["<too", 'l_call>\n{"name": "now", ', '"arguments": {', "}}\n</too", "l_call>"],
    "<|city|>": ['{"city": ', '"Rome", ', '"rains": ', "true}"],
    "<|final|>": [
        "<to",
        'ol_call>\n{"name": "final_answer", ',
        '"arguments": {"city": "Rome", ',
        '"rains": true}}\n</to',
        "ol_call>",
    ],
    "<|think|>": [
        "<thi",
        "nk>\nI have",
        " to look.",
        "\n</thi",
        "nk>\n\n",
        "<t",
        'ool_call>\n{"name": "weather", "arg',
        'uments": {"city": "Ro',
        'me"}}\n</t',
        "ool_call>",
    ],
    "<|story|>": ["Once", " upon", " a", " time", " upon"],  # upon a time upon a time …
}

TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call functions, whose signatures are here:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nReturn a JSON object for each call:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set before = messages[loop.index0 - 1] if loop.index0 else message %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('a system message has to be the first') }}
    {%- elif message.role == 'user' %}
        {%- if before.role == 'tool' %}
            {{- raise_exception('after a tool comes the assistant') }}
        {%- endif %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.reasoning_content %}
            {{- '\\n<think>\\n' + message.reasoning_content + '\\n</think>\\n' }}
        {%- elif message.tool_calls and before.role == 'user' and 'Think' in before.content %}
            {{- raise_exception('what was thought before the calls is missing') }}
        {%- endif %}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {%- set last = messages[-1] %}
    {%- set asked = last.content if last.role == 'user' else '' %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if tools and 'Look it up' in asked %}
        {{- '<|look|>' }}
    {%- elif tools and 'Look up both' in asked %}
        {{- '<|both|>' }}
    {%- elif tools and 'What time' in asked %}
        {{- '<|now|>' }}
    {%- elif tools and 'Think' in asked %}
        {{- '<|think|>' }}
    {%- elif 'Which city' in asked %}
        {%- set offered = (tools or []) | map(attribute='function.name') | list %}
        {{- '<|final|>' if 'final_answer' in offered else '<|city|>' }}
    {%- elif 'story' in asked %}
        {{- '<|story|>' }}
    {%- else %}
        {{- '<|say|>' }}
    {%- endif %}
{%- endif %}
"""


def main(path: str) -> None:
    """Write the model."""
    words = [*dict.fromkeys(word for speech in SPEECHES.values() for word in speech)]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "<|im_start|>",
        END,
        *SPEECHES,
        *words,
    ]
    writer = gguf.GGUFWriter(path, "llama")
    width = -(-len(tokens) // 32) * 32
    _write_shape(writer, width)
    _write_tokens(writer, tokens, words)
    for name, tensor in _tensors(tokens, width).items():
        writer.add_tensor(name, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: Any, width: int) -> None:
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(width // 32)
    writer.add_head_count_kv(width // 32)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _write_tokens(writer: Any, tokens: list[str], words: list[str]) -> None:
    kinds = [_kind_of(token, words) for token in tokens]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index(END))
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)


def _kind_of(token: str, words: list[str]) -> int:
    if token in words:
        return gguf.TokenType.USER_DEFINED
    if token == "<unk>":
        return gguf.TokenType.UNKNOWN
    return gguf.TokenType.BYTE if token.startswith("<0x") else gguf.TokenType.CONTROL


def _tensors(tokens: list[str], width: int) -> dict[str, Any]:
    vocabulary, inner = len(tokens), 32
    zero = np.zeros((width, width))
    return {
        "token_embd.weight": np.eye(vocabulary, width),
        "output.weight": _followers(tokens, width),
        "output_norm.weight": np.ones(width),
        "blk.0.attn_norm.weight": np.ones(width),
        "blk.0.attn_q.weight": zero,
        "blk.0.attn_k.weight": zero,
        "blk.0.attn_v.weight": zero,
        "blk.0.attn_output.weight": zero,
        "blk.0.ffn_norm.weight": np.ones(width),
        "blk.0.ffn_gate.weight": np.zeros((inner, width)),
        "blk.0.ffn_up.weight": np.zeros((inner, width)),
        "blk.0.ffn_down.weight": np.zeros((width, inner)),
    }


def _followers(tokens: list[str], width: int) -> Any:
    """A row for each token: how well it follows each other one. The norm makes a one-hot vector √width long."""
    table = np.zeros((len(tokens), width))
    ids = {token: number for number, token in enumerate(tokens)}
    table[ids[END]] += 1.0  # after all that nobody has said anything of
    for cue, speech in SPEECHES.items():
        for one, follower in zip([cue, *speech], [*speech, END], strict=True):
            if cue != "<|story|>" or follower != END:
                table[ids[follower], ids[one]] = 4.0
    return table


if __name__ == "__main__":
    main(sys.argv[1])

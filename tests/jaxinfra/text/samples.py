"""2,000 strings, 50 chats and four templates that the tokenizer and template tests share."""

import hashlib
import json
import random

_WORDS = [
    *("the", "model", "learns", "to", "predict", "next", "token", "don't", "it's", "WE'VE", "i'll"),
    *("they'd", "she'S", "'tis", "rock'n'roll", "naïve", "façade", "Schrödinger", "Straße", "ﬁ"),
    *("переводит", "слово", "ελληνικά", "कविता", "বাংলা", "ไทยคำ", "tiếng_Việt", "ſ", "İ", "ẞ"),
    *("日本語", "トークン", "中文", "분词", "한국어", "שלום", "עולם", "العربية", "مرحبا"),
    *("v\u0303\u0301", "q\u0323\u0307", "e\u0301te\u0301", "A\u030a", "\u1112\u1161\u11ab"),
]
_EMOJI = [
    *("\U0001f600", "\U0001f44d\U0001f3fd", "\u2764\ufe0f", "1\ufe0f\u20e3", "\U0001fae0"),
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",  # a family, joined by ZWJ
    "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f468\U0001f3ff\u200d\U0001f692",
    "\U0001f1eb\U0001f1f7\U0001f1ef\U0001f1f5",  # two flags
]
_SPACE = [
    *(" ", "  ", "   ", " " * 17, "\t", "\t\t", "\n", "\n\n", "\r\n", " \n ", "\x0b", "\x0c"),
    *("\x85", "\u00a0", "\u2009", "\u200b", "\u2028", "\u3000"),
]
_NUMBERS = [
    *("0", "7", "42", "1234", "3.14159", "-1e-10", "1,000,000", "0x1F", "2024-02-29"),
    *("192.168.0.1", "90071992547409931", "٣٤٥", "१२३", "Ⅷ", "½", "²", "①②"),
]
_CODE = [
    "def f(x: int) -> int:\n    return x**2  # square\n",
    "for(int i=0;i<n;++i){a[i]+=b[i]<<2;}",
    "SELECT * FROM t WHERE id = 'x''y';--",
    '{"a": [1, 2.5, null], "b\\n": "\\u00e9"}',
    '<div class="x">&amp;</div><!-- \u2713 -->',
    "\\begin{align} \\nabla\\cdot E &= \\rho/\\epsilon_0 \\\\ \\end{align}",
    "if __name__ == '__main__':\n\tmain(*args, **kwargs)\n",
    "0b1010 && ~mask || !(a^b) ?? c?.d ... === !== => :: ->",
]
_CONTROL = ["\x00", "\x01\x02", "\x1b[31m", "\x7f", "\ufeff", "\ufffd", "\u202e", "\U000e0041",
            "\uffff", "\U0010ffff", "\ue000"]  # fmt: skip
_SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<|begin_of_text|>",
            "<|eot_id|>", "<think>", "</think>", "<unk>", "<pad>", "<|im_start", "im_end|>",
            "<repo_name>", "<0x0A>", "▁", "Ġthe", "##ing"]  # fmt: skip
_KINDS = [_WORDS, _EMOJI, _SPACE, _NUMBERS, _CODE, _CONTROL, _SPECIAL]


def strings(count: int = 2000) -> list[str]:
    """`count` strings, the same everywhere: every sample alone, then mixtures, then code points."""
    found = ["", *(sample for kind in _KINDS for sample in kind)]
    rng = random.Random(0)
    while len(found) < count * 9 // 10:
        parts = []
        for _ in range(1 + int(rng.random() * 12)):
            kind = _KINDS[0] if rng.random() < 0.4 else _KINDS[int(rng.random() * len(_KINDS))]
            parts.append(kind[int(rng.random() * len(kind))])
            parts.append(" " if rng.random() < 0.5 else "")
        found.append("".join(parts))
    while len(found) < count:
        points = [int(rng.random() ** 3 * 0x110000) for _ in range(1 + int(rng.random() * 20))]
        found.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    return found[:count]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather at a place, e.g. "Genève" <now> & later',
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["place"],
            },
        },
    }
]


def chats() -> list[dict]:
    """50 keyword arguments of `render`: with and without system, tools and generation prompt."""
    texts = strings()
    made = []
    for i in range(50):
        messages = [{"role": "system", "content": texts[300 + i]}] if i % 3 == 0 else []
        for turn in range(1 + i % 4):
            messages.append({"role": "user", "content": texts[400 + 7 * i + turn]})
            messages.append({"role": "assistant", "content": texts[900 + 7 * i + turn].strip()})
        tools = TOOLS if i % 5 == 1 else None
        if tools:
            call = {"name": "weather", "arguments": {"place": "Zürich 🏔", "days": i}}
            messages[-1] = {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": call}],
            }
            messages.append({"role": "tool", "content": '{"sky": "<clear>"}'})
        elif i % 2:
            messages.pop()
        made.append({"messages": messages, "tools": tools, "add_generation_prompt": i % 7 != 0})
    return made


CHATML = """\
{%- if tools %}
<|im_start|>system
You can call: {{ tools | tojson }}<|im_end|>
{% endif %}
{% for message in messages %}
    {% if message.role not in ["system", "user", "assistant", "tool"] %}
        {{- raise_exception("unknown role " + message.role) }}
    {% endif %}
{{ "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>" }}
{% endfor %}
{% if add_generation_prompt %}
{{ "<|im_start|>assistant" }}
{% endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- set day = date_string if date_string is defined else "1 Jan 2025" %}
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + day + "\\n\\n" }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n" }}
    {%- endfor %}
{%- endif %}
{{- system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if "tool_calls" in message %}
        {%- for call in message.tool_calls %}
            {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
            {{- '{"name": "' ~ call.function.name ~ '", "parameters": ' }}
            {{- call.function.arguments | tojson ~ "}" ~ "<|eot_id|>" }}
        {%- endfor %}
        {%- continue %}
    {%- endif %}
    {%- set role = "ipython" if message.role == "tool" else message.role %}
    {{- "<|start_header_id|>" + role + "<|end_header_id|>\\n\\n" }}
    {%- generation %}
    {{- message["content"] | trim + "<|eot_id|>" }}
    {%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
QWEN = """\
{%- macro turn(role, text) -%}
    {{ "<|im_start|>" ~ role ~ "\\n" ~ text ~ "<|im_end|>\\n" }}
{%- endmacro %}
{%- set ns = namespace(last=-1, seen=0) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and ns.last < 0 %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- turn("system", "# Tools\\n<tools>\\n" ~ tools | map("tojson") | join("\\n") ~ "</tools>") }}
{%- endif %}
{%- for message in messages %}
    {%- set text = message.content if message.content is string else "" %}
    {%- if message.role == "assistant" and "</think>" in text %}
        {%- set text = text.split("</think>")[-1].lstrip("\\n") %}
    {%- endif %}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {%- set call = call.function %}
            {%- set text = text ~ '<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' %}
            {%- set text = text ~ call.arguments | tojson ~ "}\\n</tool_call>" %}
        {%- endfor %}
    {%- endif %}
    {%- if message.role == "tool" %}
        {%- set text = "<tool_response>\\n%s\\n</tool_response>" % text %}
    {%- endif %}
    {{- turn("user" if message.role == "tool" else message.role, text) }}
    {%- set ns.seen = ns.seen + 1 %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\\n\\n</think>\\n\\n" }}
    {%- endif %}
{%- endif %}
{#- {{ ns.seen }} turns, the last question at {{ ns.last }} #}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "qwen": QWEN}


def digest(value: object) -> str:
    """Eight hexadecimal digits that tell values of JSON types apart."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]

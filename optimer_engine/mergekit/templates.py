"""Chat templates: which text the output's tokenizer has. Templates are copied, never rendered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from optimer_engine.errors import CheckpointError, RecipeError

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{% set ns = namespace(system='') %}{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set ns.system = message['content'] ~ '\n\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ ' [INST] ' ~ ns.system ~ message['content'] ~ ' [/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' ~ message['content'] ~ eos_token }}{% endif %}{% endfor %}"
    ),
    "exaone": (
        "{% if messages[0]['role'] != 'system' %}{{ '[|system|][|endofturn|]\n' }}{% endif %}"
        "{% for message in messages %}{{ '[|' ~ message['role'] ~ '|]' ~ message['content'] }}"
        "{{ '\n' if message['role'] == 'user' else '[|endofturn|]\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[|assistant|]{% endif %}"
    ),
    "alpaca": (
        "{% set titles = {'user': '### Instruction:\n', 'assistant': '### Response:\n', "
        "'user_context': '### Input:\n'} %}{% for message in messages %}"
        "{{ titles.get(message['role'], '') ~ message['content'] | trim }}"
        "{{ '' if loop.last else '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}"
    ),
}
"""The formats that mergekit knows by name."""


def template_of(folder: Path) -> str | None:
    """The default chat template of the tokenizer in a folder, stripped; None without one.

    Raises:
        CheckpointError: when tokenizer_config.json is not readable.
    """
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8").strip() or None
    found = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        named = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}
        found = named.get("default")
    return found.strip() or None if isinstance(found, str) else None


def choose_template(asked: str, folders: Iterable[Path]) -> str | None:
    """The text for `chat_template: asked`; None keeps what the tokenizer has.

    "auto" is the template that most models have, among equals the one that stands first; a name in
    TEMPLATES is that format; anything else is the text itself.

    Raises:
        RecipeError: for a text that is no template.
    """
    if asked == "auto":
        found = [t for t in map(template_of, folders) if t is not None]
        return Counter(found).most_common(1)[0][0] if found else None
    if asked in TEMPLATES:
        return TEMPLATES[asked]
    if len(asked) < 20 or "{" not in asked:
        raise RecipeError(
            f"{asked!r} is neither auto, {', '.join(TEMPLATES)} nor a jinja template",
            where="chat_template",
        )
    return asked


def read_json(path: Path) -> dict:
    """A JSON object, or {} when there is no such file.

    Raises:
        CheckpointError: when it is not readable.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"is not readable JSON: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise CheckpointError("is not a JSON object", where=str(path))
    return data

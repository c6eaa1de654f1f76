"""Six chat templates in the styles of families of models, each with and without `{% generation %}`."""

from tests.support.families import byte_level

_CALLS = "{% for c in m.tool_calls or [] %}{{ '[CALL]' + (c.function | tojson) + '[/CALL]' }}{% endfor %}"
SAYS = "{{ m.content }}" + _CALLS
"""What an assistant says: a text, and calls."""

# `OPEN` and `SHUT` stand where the generated part begins and ends.
STYLES = {
    "ChatML": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}OPEN" + SAYS + "{{ '<|im_end|>' }}SHUT{{ '\\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "Llama 3": (
        "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\\n\\n' }}"
        "{% if m.role == 'assistant' %}OPEN{{ m.content | trim }}" + _CALLS + "{{ '<|eot|>' }}SHUT"
        "{% else %}{{ (m.content | trim) + '<|eot|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}"
    ),
    "Mistral": (
        "{{ '<s>' }}{% for m in messages %}{% if m.role == 'assistant' %}OPEN{{ ' ' }}" + SAYS + "{{ '</s>' }}SHUT"
        "{% elif m.role == 'tool' %}{{ '[RESULT]' + m.content + '[/RESULT]' }}"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "Gemma": (
        "{{ '<bos>' }}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{% if m.role == 'assistant' %}OPEN" + SAYS + "{{ '<end_of_turn>\\n' }}SHUT"
        "{% else %}{{ m.content + '<end_of_turn>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "Zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}"
        "{% if m.role == 'assistant' %}OPEN" + SAYS + "SHUT{{ '</s>\\n' }}"
        "{% else %}{{ m.content + '</s>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "Qwen": (
        "{% if tools %}{{ '<|im_start|>system\\nTools:\\n' }}"
        "{% for tool in tools %}{{ (tool | tojson) + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'tool' %}"
        "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
        "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
        "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
        "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}OPEN{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\\n' }}{% endif %}"
        "{{ '<tool_call>\\n' + (c.function | tojson) + '\\n</tool_call>' }}{% endfor %}"
        "{{ '<|im_end|>' }}SHUT{{ '\\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
ENDS = {
    "ChatML": "<|im_end|>",
    "Llama 3": "<|eot|>",
    "Mistral": "</s>",
    "Gemma": "<end_of_turn>",
    "Zephyr": "</s>",
    "Qwen": "<|im_end|>",
}
"""What ends a turn in each."""
_SPECIAL = ["<|im_start|>", "<|begin|>", "<|head|>", "<|/head|>", "<s>", "<bos>", "<start_of_turn>"]

# As Qwen 3 does: a last answer without a thought gets an empty one, and earlier ones lose theirs.
THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% if loop.last %}{{ m.content if '</think>' in m.content else '<think>\\n\\n</think>\\n\\n' + m.content }}"
    "{% else %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def template(style: str, tagged: bool) -> str:
    """The template of a style; `tagged`: it says itself what is generated."""
    opening, shutting = ("{% generation %}", "{% endgeneration %}") if tagged else ("", "")
    return STYLES[style].replace("OPEN", opening).replace("SHUT", shutting)


def tokenizer(chat_template: str, end: str):  # type: ignore[no-untyped-def]
    """A byte-level tokenizer with the marks of all styles."""
    special = [*_SPECIAL, *(["<|endoftext|>"] if end != "<|endoftext|>" else []), end]
    return byte_level(special, ["<think>", "</think>"], eos_token=end, template=chat_template)

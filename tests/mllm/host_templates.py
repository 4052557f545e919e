"""Chat templates in the shapes that hosts are published with: text only or with image parts, with and without a begin
token, with a default system turn, tools, rebound messages, reasoning, and roles that must alternate."""

SYSTEM_BY_DEFAULT = """\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system
You are small.<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
"""SmolLM2's and Qwen2's shape."""

BEGIN_AND_TOOLS = """\
  {{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{%- macro head(role) %}<|start|>{{ role }}<|end|>

{% endmacro %}
{{- head('system') + system_message }}
{%- for tool in tools or [] %}
    {{- tool | tojson(indent=1) }}
{%- endfor %}
{%- for document in documents or [] %}{{- document['title'] + ': ' + document['text'] }}{%- endfor %}
{{- '<|im_end|>' }}
{%- for message in messages %}
    {%- if message['content'] is mapping %}{{- raise_exception('no mappings') }}{%- endif %}
    {{- head(message['role']) + message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- head('assistant') }}
{%- endif %}
"""
"""Llama 3's shape."""

REASONING = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set said = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- set thought = '' %}
        {%- if '</think>' in message.content %}
            {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + said }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + said }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
"""Qwen3's shape."""

ALTERNATING = """\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"""
"""Mistral's shape: a begin token, nothing that opens an answer."""

WITHOUT_BEGIN = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
"""Zephyr's and TinyLlama's shape: no begin token, although the tokenizer adds one."""

IMAGES_FIRST = """\
{% for message in messages %}{{ message['role'].upper() + ': ' }}\
{% if message['role'] != 'assistant' %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}{% endif %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}\
{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}\
{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
"""LLaVA's shape; images of the assistant are left out."""

IMAGES_IN_PLACE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""Qwen-VL's, OneVision's and InternVL's shape, IMAGE their own string."""

OF_FAMILY = {
    "llama": BEGIN_AND_TOOLS,
    "qwen2": SYSTEM_BY_DEFAULT,
    "qwen3": REASONING,
    "llava": IMAGES_FIRST,
    "llava_next": IMAGES_FIRST,
    "llava_onevision": IMAGES_IN_PLACE.replace("IMAGE", "<image>"),
    "internvl": IMAGES_IN_PLACE.replace("IMAGE", "<IMG_CONTEXT>\\n"),
    "qwen2_5_vl": IMAGES_IN_PLACE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen3_vl": IMAGES_IN_PLACE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
}

"""chat_template.jinja: the official prompts, for transformers' apply_chat_template and for servers.

Where the official chat encodes a text on its own, SentencePiece puts a space before it; in one long text that space has
to be written. An answer at the end gets the token that ends it, as in training. A call may be metadata and content, as
in the official history, or one of OpenAI's tool_calls, which is written as glm_models.tools does.
"""

import keyword

from ..tools import TOOLS_SYSTEM

_GLM2 = """\
[gMASK]<sop>
{%- if tools %}
    {{- raise_exception('ChatGLM2 has no tools') }}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'user' if loop.index0 % 2 == 0 else 'assistant' %}
    {%- if message['role'] != role %}
        {{- raise_exception('a conversation of ChatGLM2 is user and assistant in turn, without a system message') }}
    {%- endif %}
    {%- if message['content'] is not string or message['tool_calls'] or message['tools'] or message['metadata'] %}
        {{- raise_exception('the content of a message must be text; ChatGLM2 has no tools') }}
    {%- endif %}
    {%- if role == 'user' %}
        {{- '[Round ' + ((loop.index0 / 2)|int + 1)|string + ']\\n\\n问：' + message['content'] + '\\n\\n' }}
    {%- else %}
        {%- if loop.last and add_generation_prompt %}
            {{- raise_exception('the last message must be the question that is to be answered') }}
        {%- endif %}
        {{- '答：' + (' ' if loop.last and message['content'] else '') + message['content'] }}
        {{- '</s>' if loop.last else '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '答：' }}
{%- endif %}
"""

_GLM3 = """\
{%- macro text(content) %}
    {{- ' ' + content if content else '' }}
{%- endmacro %}
{%- macro list_of(tools) %}
    {%- set found = namespace(tools=[]) %}
    {%- for tool in tools %}
        {%- set found.tools = found.tools + [tool['function'] if tool['function'] is mapping else tool] %}
    {%- endfor %}
    {{- found.tools|tojson(indent=4) }}
{%- endmacro %}
{%- macro block_of(arguments) %}
    {%- if '%r'|format('a') != "'a'" %}
        {{- raise_exception('this program cannot write tool_calls; send the text of the call with its metadata') }}
    {%- endif %}
    {%- if arguments is not mapping %}
        {{- raise_exception('the arguments of a call must be an object, not a text') }}
    {%- endif %}
    {%- set found = namespace(words=[]) %}
    {%- for key, value in arguments.items() %}
        {%- if key.isidentifier() and key not in KEYWORDS %}
            {%- set found.words = found.words + [key + '=' + '%r'|format(value)] %}
        {%- else %}
            {%- set found.words = found.words + ['**{' + '%r: %r'|format(key, value) + '}'] %}
        {%- endif %}
    {%- endfor %}
    {%- set words = found.words|join(', ')|replace('<|assistant|>', '\\\\x3c|assistant|>') %}
    {{- '```python\\ntool_call(' + words + ')\\n```' }}
{%- endmacro %}
[gMASK]<sop>
{%- if tools and messages[0]['role'] == 'system' and messages[0]['tools'] is defined %}
    {{- raise_exception('tools stand in the system message and beside the messages') }}
{%- endif %}
{%- if tools and messages[0]['role'] != 'system' %}
    {{- '<|system|>\\n TOOLS_SYSTEM\\n' + list_of(tools) }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message['content'] %}
    {%- set metadata = message['metadata'] or '' %}
    {%- set calls = message['tool_calls'] %}
    {%- if calls %}
        {%- if message['role'] != 'assistant' or content or metadata or calls|length > 1 %}
            {{- raise_exception('tool_calls: one call, in a message of the assistant that has no content') }}
        {%- endif %}
        {%- set call = calls[0]['function'] if calls[0]['function'] is mapping else calls[0] %}
        {%- set metadata = call['name'] %}
        {%- set content = block_of(call['arguments']) %}
    {%- elif content is not string %}
        {{- raise_exception('the content of a message must be text') }}
    {%- endif %}
    {%- if message['tools'] and message['role'] != 'system' %}
        {{- raise_exception('tools belong to the system message') }}
    {%- endif %}
    {%- set head = metadata + '\\n' %}
    {%- if message['role'] == 'system' %}
        {%- if message['tools'] is defined %}
            {%- set content = content + '\\n' + message['tools']|tojson(indent=4) %}
        {%- elif tools and loop.first %}
            {%- set content = content + '\\n' + list_of(tools) %}
        {%- endif %}
        {{- '<|system|>' + head + text(content) }}
    {%- elif message['role'] == 'user' %}
        {{- '<|user|>' + head + text(content) }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|assistant|>' + head + text(content) }}
        {%- if loop.last and not add_generation_prompt %}
            {{- '<|observation|>' if metadata else '</s>' }}
        {%- endif %}
    {%- elif message['role'] in ('observation', 'tool') %}
        {{- '<|observation|>' + head + text(content) }}
    {%- else %}
        {{- raise_exception('the roles of ChatGLM3 are system, user, assistant and observation (or tool)') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""

# what write_parameters does not write as key=value
_KEYWORDS = repr([*keyword.kwlist, "__debug__"])

TEMPLATES = {"glm2": _GLM2, "glm3": _GLM3.replace("TOOLS_SYSTEM", TOOLS_SYSTEM).replace("KEYWORDS", _KEYWORDS)}

"""chat_template.jinja: the official prompts, for transformers' apply_chat_template and for servers.

Where the official chat encodes a text on its own, SentencePiece puts a space before it; in one long text that space has
to be written. An answer at the end gets the token that ends it, as in training.
"""

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
        {{- '[Round ' + (loop.index0 // 2 + 1)|string + ']\\n\\n问：' + message['content'] + '\\n\\n' }}
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
[gMASK]<sop>
{%- if tools and messages[0]['role'] == 'system' and messages[0]['tools'] is defined %}
    {{- raise_exception('tools stand in the system message and beside the messages') }}
{%- endif %}
{%- if tools and messages[0]['role'] != 'system' %}
    {{- '<|system|>\\n TOOLS_SYSTEM\\n' + list_of(tools) }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message['content'] %}
    {%- if content is not string or message['tool_calls'] %}
        {{- raise_exception('the content of a message must be text; of a call the name is its metadata') }}
    {%- endif %}
    {%- if message['tools'] and message['role'] != 'system' %}
        {{- raise_exception('tools belong to the system message') }}
    {%- endif %}
    {%- set head = (message['metadata'] or '') + '\\n' %}
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
            {{- '<|observation|>' if message['metadata'] else '</s>' }}
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

TEMPLATES = {"glm2": _GLM2, "glm3": _GLM3.replace("TOOLS_SYSTEM", TOOLS_SYSTEM)}

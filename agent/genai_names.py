"""Every name of OpenTelemetry's GenAI conventions that we use, in one place: they still change.

From open-telemetry/semantic-conventions-genai (status: development), as of the package
opentelemetry-semantic-conventions 0.66b2. Ours, where the conventions have none yet, begin with
`jaxinfra.`.
"""

# Operations, which also begin the spans' names.
INVOKE_AGENT = "invoke_agent"
CHAT = "chat"
EXECUTE_TOOL = "execute_tool"
AWAIT_APPROVAL = "await_approval"

# Attributes.
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
CONVERSATION = "gen_ai.conversation.id"
AGENT = "gen_ai.agent.name"
REQUEST_MODEL = "gen_ai.request.model"
FINISH_REASONS = "gen_ai.response.finish_reasons"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
TOOL = "gen_ai.tool.name"
TOOL_TYPE = "gen_ai.tool.type"
TOOL_CALL = "gen_ai.tool.call.id"
TOOL_ARGUMENTS = "gen_ai.tool.call.arguments"
TOOL_RESULT = "gen_ai.tool.call.result"
INPUT_MESSAGES = "gen_ai.input.messages"
OUTPUT_MESSAGES = "gen_ai.output.messages"
TOKEN_TYPE = "gen_ai.token.type"
ERROR = "error.type"
COST = "jaxinfra.cost"
TAINTED = "jaxinfra.tainted"
END = "jaxinfra.end"
APPROVED = "jaxinfra.approved"

# Metrics, with their units.
OPERATION_DURATION = ("gen_ai.client.operation.duration", "s")
TOKEN_USAGE = ("gen_ai.client.token.usage", "{token}")

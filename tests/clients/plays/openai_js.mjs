// Runs npm `openai` against the server at the given URL; prints the results as JSON.
import OpenAI from 'openai'
import { hi, tool, schema, picture, outcome } from './facts.mjs'

const client = new OpenAI({ baseURL: process.argv[2] + '/v1', apiKey: 'unused', maxRetries: 0 })
const request = { model: 'tiny', messages: hi, max_tokens: 5, seed: 1 }

async function streamed() {
  let text = ''
  for await (const event of await client.chat.completions.create({ ...request, stream: true })) text += event.choices[0]?.delta.content ?? ''
  return text
}

async function cancelled() {
  const long = { model: 'big', messages: hi, seed: 1 }
  const stream = await client.chat.completions.create({ ...long, max_tokens: 3000, stream: true })
  let read = 0
  for await (const _ of stream) if (++read === 2) stream.controller.abort()
  const after = await client.chat.completions.create({ ...long, max_tokens: 2 })
  return read + after.usage.completion_tokens
}

const response_format = { type: 'json_schema', json_schema: { name: 'x', schema } }
const tools = await client.chat.completions.create({ ...request, model: 'toolish', tools: [tool], response_format, max_tokens: 200 })
const imageMessages = [{ role: 'user', content: [{ type: 'text', text: 'hi' }, { type: 'image_url', image_url: { url: 'data:image/png;base64,' + picture } }] }]
console.log(JSON.stringify({
  stream: await streamed(),
  once: (await client.chat.completions.create(request)).choices[0].message.content,
  text: (await client.completions.create({ model: 'tiny', prompt: 'hi', max_tokens: 3, seed: 1 })).choices[0].text,
  embed: (await client.embeddings.create({ model: 'embed', input: ['a', 'b'], encoding_format: 'float' })).data.map((item) => item.embedding.length),
  tools: tools.choices[0].message.tool_calls.map((call) => [call.function.name, JSON.parse(call.function.arguments)]),
  models: (await client.models.list()).data.map((model) => model.id).sort(),
  image: await outcome(() => client.chat.completions.create({ ...request, messages: imageMessages })),
  error: await outcome(() => client.chat.completions.create({ ...request, model: 'nope' })),
  responses: (await outcome(() => client.responses.create({ model: 'tiny', input: 'hi', max_output_tokens: 3 }))).slice(0, 2),
  cancel: await cancelled(),
}))

// Runs npm `ollama` against the server at the given URL; prints the results as JSON.
import { Ollama } from 'ollama'
import { hi, tool, schema, picture, outcome } from './facts.mjs'

const client = new Ollama({ host: process.argv[2] })
const options = { num_predict: 6, seed: 1 }

async function streamed() {
  let text = ''
  for await (const part of await client.chat({ model: 'tiny', messages: hi, options, stream: true })) text += part.message.content
  return text
}

async function cancelled() {
  const stream = await client.generate({ model: 'big', prompt: 'x', stream: true, options: { num_predict: 3000, seed: 1 } })
  let read = 0
  try {
    for await (const _ of stream) {
      if (++read < 2) continue
      stream.abort()
      break // or lines that had arrived already would be counted
    }
  } catch (error) {
    if (error.name !== 'AbortError') throw error
  }
  const after = await client.generate({ model: 'big', prompt: 'x', options: { num_predict: 2, seed: 1 } })
  return read + after.eval_count
}

const tools = await client.chat({ model: 'toolish', messages: hi, tools: [tool], format: schema, options: { num_predict: 200, seed: 1 } })
console.log(JSON.stringify({
  stream: await streamed(),
  once: (await client.chat({ model: 'tiny', messages: hi, options })).message.content,
  generate: (await client.generate({ model: 'tiny', prompt: 'hello', options })).response,
  embed: (await client.embed({ model: 'embed', input: ['a', 'b'] })).embeddings.map((vector) => vector.length),
  tools: tools.message.tool_calls.map((call) => [call.function.name, call.function.arguments]),
  models: (await client.list()).models.map((model) => model.name).sort(),
  loaded: (await client.ps()).models.map((model) => model.name).sort(),
  shown: (await client.show({ model: 'tiny' })).details.family,
  image: await outcome(() => client.generate({ model: 'tiny', prompt: 'hello', images: [picture], options })),
  error: await outcome(() => client.generate({ model: 'nope', prompt: 'x' })),
  cancel: await cancelled(),
}))

// Reads streams with heartbeats with the npm packages; prints the results as JSON.
import { Ollama } from 'ollama'
import OpenAI from 'openai'
import { hi } from './facts.mjs'

const url = process.argv[2]
const complaints = []
console.warn = (...parts) => complaints.push(parts.join(' '))

async function ollama(model) {
  let text = ''
  for await (const part of await new Ollama({ host: url }).chat({ model, messages: hi, stream: true })) text += part.message.content
  return text
}

async function openai(model) {
  const client = new OpenAI({ baseURL: url + '/v1', apiKey: 'x', maxRetries: 0 })
  let text = ''
  for await (const event of await client.chat.completions.create({ model, messages: hi, stream: true })) text += event.choices[0].delta.content
  return text
}

async function outcome(call, model) {
  try {
    return await call(model)
  } catch (error) {
    return 'raised ' + error.message
  }
}

console.log(JSON.stringify({
  ollama: [await outcome(ollama, 'works'), await outcome(ollama, 'fails')],
  openai: [await outcome(openai, 'works'), await outcome(openai, 'fails')],
  complaints,
}))

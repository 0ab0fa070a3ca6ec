// Streams of a server that keeps its clients waiting, read by the npm packages; prints what they saw as JSON.
import { Ollama } from 'ollama'
import OpenAI from 'openai'
import { hi } from './facts.mjs'

const url = process.argv[2]
const complaints = []
console.warn = (...words) => complaints.push(words.join(' '))

async function ollama(model) {
  let words = ''
  for await (const part of await new Ollama({ host: url }).chat({ model, messages: hi, stream: true })) words += part.message.content
  return words
}

async function openai(model) {
  const client = new OpenAI({ baseURL: url + '/v1', apiKey: 'x', maxRetries: 0 })
  let words = ''
  for await (const event of await client.chat.completions.create({ model, messages: hi, stream: true })) words += event.choices[0].delta.content
  return words
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

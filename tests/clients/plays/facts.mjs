// Shared test data of all plays; the same as in facts.py.
export const hi = [{ role: 'user', content: 'hi' }]
const parameters = { type: 'object', properties: { a: { type: 'integer' } }, required: ['a'] }
export const tool = { type: 'function', function: { name: 'add', description: 'adds', parameters } }
export const schema = {
  type: 'object',
  properties: {
    name: { const: 'add' },
    parameters: { type: 'object', properties: { a: { enum: [7] } }, required: ['a'] },
  },
  required: ['name', 'parameters'],
}
export const picture = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='

// Status and type of an error, or the text of the answer.
export async function outcome(call) {
  try {
    const answer = await call()
    return [200, answer.response ?? answer.choices?.[0].message.content ?? answer.object]
  } catch (error) {
    return [error.status_code ?? error.status, error.name, error.error?.message ?? error.error ?? error.message]
  }
}

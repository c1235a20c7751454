// Bytes: digests, hexadecimal digits, text.

/** What a visitor can read: one sentence that says what is refused or lacking, and what to do. */
export class Refusal extends Error {
  constructor(message) {
    super(message);
    this.name = 'Refusal';
  }
}

/** Text of bytes, or a refusal that names them. */
export function text(bytes, name = 'a name') {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch {
    throw new Refusal(`${name} is no text in UTF-8.`);
  }
}
export const utf8 = (string) => new TextEncoder().encode(string);
export const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');

/** Bytes of hexadecimal digits. */
export function unhex(digits) {
  if (typeof digits !== 'string' || !/^([0-9a-f]{2})*$/.test(digits)) throw new Refusal('these are no hexadecimal digits.');
  return Uint8Array.from(digits.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}

/** SHA-256 of bytes, in hexadecimal digits. */
export const sha256 = async (bytes) => hex(new Uint8Array(await crypto.subtle.digest('SHA-256', bytes)));

/** JSON of bytes, or a refusal that names them. */
export function json(bytes, name) {
  try {
    return JSON.parse(text(bytes));
  } catch {
    throw new Refusal(`${name} is no JSON.`);
  }
}

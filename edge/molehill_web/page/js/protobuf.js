// Protocol buffers, as far as a manifest and a graph need them: a reader that goes by a table of fields.
//
// A table has for every number [name, kind, repeated]; the kind is one of the words below, or the table of a message.
// What a table does not name is left out.

import { Refusal, text } from './bytes.js';

const DEFAULTS = { string: '', bytes: new Uint8Array(0), bool: false, uint: 0, int: 0, double: 0, float: 0 };
const WIDTHS = { double: 8, float: 4 };

/** Field after field of a message: its number, wire type, where it begins and ends, and its number or its bytes. */
export function* fields(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let at = 0;
  const varint = () => {
    let value = 0n;
    for (let shift = 0n; shift < 70n; shift += 7n) {
      if (at >= bytes.length) break;
      const byte = bytes[at++];
      value |= BigInt(byte & 127) << shift;
      if (byte < 128) return BigInt.asUintN(64, value);
    }
    throw new Refusal('a message is cut or damaged.');
  };
  while (at < bytes.length) {
    const begin = at;
    const key = Number(varint());
    const [number, wire] = [Math.floor(key / 8), key & 7];
    let value;
    if (wire === 0) value = varint();
    else {
      const length = wire === 1 ? 8 : wire === 5 ? 4 : wire === 2 ? Number(varint()) : NaN;
      if (!(at + length <= bytes.length)) throw new Refusal('a message is cut or damaged.');
      value = wire === 2 ? bytes.subarray(at, at + length) : new DataView(view.buffer, view.byteOffset + at, length);
      at += length;
    }
    yield { number, wire, value, begin, end: at };
  }
}

/** The message that bytes are, as an object; numbers of 64 bits become plain ones and must fit. */
export function read(table, bytes) {
  const found = {};
  for (const [name, kind, repeated] of Object.values(table)) {
    found[name] = repeated ? [] : typeof kind === 'string' ? DEFAULTS[kind] : null;
  }
  for (const { number, wire, value } of fields(bytes)) {
    const known = table[number];
    if (!known) continue;
    const [name, kind, repeated] = known;
    const values = repeated && wire === 2 && !(kind in { string: 1, bytes: 1 }) && typeof kind === 'string'
      ? packed(kind, value)
      : [one(kind, value, wire)];
    if (repeated) found[name].push(...values);
    else found[name] = values.at(-1);
  }
  return found;
}

function one(kind, value, wire) {
  const wanted = typeof kind !== 'string' || kind === 'string' || kind === 'bytes' ? 2 : { double: 1, float: 5 }[kind] ?? 0;
  if (wire !== wanted) throw new Refusal('a message is damaged: a field is of another kind.');
  if (typeof kind !== 'string') return read(kind, value);
  if (kind === 'string') return text(value);
  if (kind === 'bytes') return value;
  if (kind === 'double') return value.getFloat64(0, true);
  if (kind === 'float') return value.getFloat32(0, true);
  if (kind === 'bool') return value !== 0n;
  const number = Number(kind === 'int' ? BigInt.asIntN(64, value) : value);
  if (!Number.isSafeInteger(number)) throw new Refusal('a message has a number that is too large.');
  return number;
}

/** The numbers of a packed field. */
function packed(kind, bytes) {
  const width = WIDTHS[kind];
  if (!width) {
    // The numbers follow each other without keys: each is given one, so that one reader serves both.
    const keyed = [];
    for (let at = 0; at < bytes.length; ) {
      keyed.push(8);
      do keyed.push(bytes[at]);
      while (bytes[at++] >= 128 && at < bytes.length);
    }
    return Array.from(fields(Uint8Array.from(keyed)), (field) => one(kind, field.value, 0));
  }
  if (bytes.length % width) throw new Refusal('a message is cut or damaged.');
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const get = kind === 'double' ? view.getFloat64 : view.getFloat32;
  return Array.from({ length: bytes.length / width }, (_, i) => get.call(view, i * width, true));
}

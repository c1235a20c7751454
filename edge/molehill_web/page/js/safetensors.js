// Files of tensors: read from bytes, and written. https://github.com/huggingface/safetensors

import { Refusal, json, utf8 } from './bytes.js';

const KINDS = { F32: Float32Array, U8: Uint8Array, BOOL: Uint8Array };
const MAX_HEADER = 4 << 20;

/** The tensors of a file, {data, shape} by name, and its metadata. */
export function readTensors(bytes, name) {
  const damaged = new Refusal(`${name} is damaged, or no file of tensors.`);
  if (bytes.length < 8) throw damaged;
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset, 8).getBigUint64(0, true));
  if (!(length <= MAX_HEADER && 8 + length <= bytes.length)) throw damaged;
  const header = json(bytes.subarray(8, 8 + length), name);
  if (header === null || typeof header !== 'object') throw damaged;
  const { __metadata__: metadata, ...listed } = header;
  const tensors = new Map();
  for (const [key, about] of Object.entries(listed)) {
    const Kind = KINDS[about?.dtype];
    const [begin, end] = about?.data_offsets ?? [];
    const size = (Array.isArray(about?.shape) ? about.shape : [NaN]).reduce((product, each) => product * each, 1);
    if (!Kind || !(begin >= 0) || !(8 + length + end <= bytes.length) || end - begin !== size * Kind.BYTES_PER_ELEMENT) throw damaged;
    tensors.set(key, { data: new Kind(bytes.slice(8 + length + begin, 8 + length + end).buffer), shape: about.shape });
  }
  return { tensors, metadata: metadata ?? {} };
}

/** The bytes of a file of tensors ([name, {data, shape}]). */
export function writeTensors(tensors, metadata) {
  const header = { __metadata__: metadata };
  let at = 0;
  for (const [name, { data, shape }] of tensors) {
    const dtype = data instanceof Float32Array ? 'F32' : 'U8';
    header[name] = { dtype, shape, data_offsets: [at, (at += data.byteLength)] };
  }
  let said = utf8(JSON.stringify(header));
  said = utf8(JSON.stringify(header) + ' '.repeat((8 - (said.length % 8)) % 8));
  const whole = new Uint8Array(8 + said.length + at);
  new DataView(whole.buffer).setBigUint64(0, BigInt(said.length), true);
  whole.set(said, 8);
  at = 8 + said.length;
  for (const [, { data }] of tensors) {
    whole.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
    at += data.byteLength;
  }
  return whole;
}

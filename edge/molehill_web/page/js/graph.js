// An ONNX graph whose gate is to be given from outside.
//
// Gates, biases and masks are graph inputs with a default, and so is the position of the first logits. onnxruntime-web
// takes no value for such an input, so the defaults leave the graph here, and all of them are given at every call.

import { text } from './bytes.js';
import { fields } from './protobuf.js';

const [GRAPH, INITIALIZER, NAME] = [7, 5, 8]; // ModelProto.graph, GraphProto.initializer, TensorProto.name

/** The bytes of a model without the initializers of these names. */
export function withoutDefaults(model, names) {
  const drop = new Set(names);
  return rewritten(model, GRAPH, (graph) => rewritten(graph, INITIALIZER, (tensor) => {
    for (const { number, value } of fields(tensor)) if (number === NAME && drop.has(text(value))) return null;
    return tensor;
  }));
}

/** A message with one of its fields changed, or left out where the change is null. */
function rewritten(bytes, wanted, change) {
  const parts = [];
  for (const { number, value, begin, end } of fields(bytes)) {
    if (number !== wanted) {
      parts.push(bytes.subarray(begin, end));
      continue;
    }
    const made = change(value);
    if (made) parts.push(Uint8Array.from([wanted * 8 + 2, ...varint(made.length)]), made);
  }
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

function varint(number) {
  const bytes = [];
  for (; number > 127; number = Math.floor(number / 128)) bytes.push((number & 127) | 128);
  return [...bytes, number];
}

export const BIAS = 'router_bias';
export const MASK = 'expert_mask';
export const LOGITS_FROM = 'logits_from'; // graphs of earlier versions lack it

/** The names of the inputs that a gate gives. */
export const gateInputs = (manifest) => [
  ...manifest.gate.map((tensor) => tensor.name),
  ...(manifest.routers.length ? [BIAS, MASK] : []),
];

// A bundle that is open: its graph in onnxruntime-web, its tokenizer, and the gate in use.

import { Refusal, json } from './bytes.js';
import { allowed, readGate } from './gates.js';
import { BIAS, LOGITS_FROM, MASK, gateInputs, withoutDefaults } from './graph.js';
import { isCausal } from './manifest.js';
import { Tokens } from './tokens.js';

const OWN = new Set(['model.onnx', 'tokenizer.json', 'tokenizer_config.json', 'genai_config.json']);

/** An open bundle. Calls follow each other: the graph serves one at a time. */
export class Engine {
  /**
   * @param {object} runtime  the module of onnxruntime-web
   * @param {{manifest, files: Map}} bundle  every file checked
   * @param {{providers: string[], Tokenizer}} how
   */
  static async open(runtime, { manifest, files }, { providers, Tokenizer }) {
    const tokens = new Tokens(Tokenizer, json(files.get('tokenizer.json'), 'tokenizer.json'));
    const gate = manifest.gate.length ? readGate(files.get('gate.safetensors'), manifest, 'gate.safetensors') : empty(manifest);
    const externalData = [];
    for (const [path, data] of files) if (!OWN.has(path) && !path.startsWith('gates/')) externalData.push({ path, data });
    const inputs = gateInputs(manifest);
    const graph = withoutDefaults(files.get('model.onnx'), [...inputs, LOGITS_FROM]);
    let session;
    try {
      session = await runtime.InferenceSession.create(graph, { executionProviders: providers, externalData, logSeverityLevel: 4 });
    } catch (error) {
      throw new Refusal(`this browser cannot open the graph: ${first(error)}`);
    }
    const lacking = inputs.find((name) => !session.inputNames.includes(name));
    if (lacking) throw new Refusal(`the graph lacks ${lacking}: export the bundle again.`);
    return new Engine(runtime, session, manifest, tokens, gate);
  }

  constructor(runtime, session, manifest, tokens, gate) {
    Object.assign(this, { runtime, session, manifest, tokens, default: gate });
    this.causal = isCausal(manifest);
    this.line = Promise.resolve();
    this.use(gate);
  }

  /** Use a gate from the next call on. */
  use(gate) {
    this.fed = this.feeds(gate);
    this.gate = gate;
    this.changes = (this.changes ?? 0) + 1; // what was computed with another is worth nothing
  }

  /** The inputs of the graph that a gate gives. */
  feeds(gate) {
    const { Tensor } = this.runtime;
    const made = {};
    for (const [name, { data, shape }] of gate.tensors) made[name] = new Tensor('float32', data, shape);
    if (this.manifest.routers.length) {
      made[BIAS] = new Tensor('float32', gate.bias, [gate.bias.length]);
      made[MASK] = new Tensor('bool', allowed(gate, this.manifest), [gate.mask.length]);
    }
    return made;
  }

  /** Outputs of the graph for the tokens of one text, after `past` tokens that a cache holds; logits from a position on. */
  run(ids, outputs, { past = 0, cache = {}, feeds = this.fed, from = -1 } = {}) {
    const { Tensor } = this.runtime;
    const inputs = {
      ...feeds,
      ...cache,
      input_ids: new Tensor('int64', BigInt64Array.from(ids, BigInt), [1, ids.length]),
      attention_mask: new Tensor('int64', new BigInt64Array(past + ids.length).fill(1n), [1, past + ids.length]),
    };
    if (this.session.inputNames.includes(LOGITS_FROM)) inputs[LOGITS_FROM] = new Tensor('int64', [BigInt(from)], [1]);
    const turn = this.line.then(() => this.session.run(inputs, outputs));
    this.line = turn.catch(() => {});
    return turn.catch((error) => {
      throw new Refusal(`this browser cannot compute it: ${first(error)}`);
    });
  }

  /** A cache that holds nothing: keys and values of every layer. */
  noCache() {
    const { layers, heads, headDim } = this.manifest.task.generation;
    const { Tensor } = this.runtime;
    const made = {};
    for (let i = 0; i < layers; i++) {
      for (const part of ['key', 'value']) {
        made[`past_key_values.${i}.${part}`] = new Tensor('float32', new Float32Array(0), [1, heads, 0, headDim]);
      }
    }
    return made;
  }

  /** Logits of the class, or after the last token, of a text's ids. */
  async logits(ids, feeds = this.fed) {
    const { logits } = await this.run(ids, ['logits'], { feeds, cache: this.causal ? this.noCache() : {} });
    return logits.data.slice(-logits.dims.at(-1));
  }

  /** The same for a causal LM as answers are written: the last token after a cache that holds the others. */
  async logitsAfterCache(ids, feeds = this.fed) {
    const { logits: _, ...present } = await this.run(ids.slice(0, -1), this.session.outputNames.filter((name) => !name.startsWith('route.')), { feeds, cache: this.noCache() });
    const cache = Object.fromEntries(Object.entries(present).map(([name, value]) => [name.replace('present', 'past_key_values'), value]));
    const { logits } = await this.run(ids.slice(-1), ['logits'], { past: ids.length - 1, cache, feeds });
    return logits.data.slice(-logits.dims.at(-1));
  }

  close() {
    return this.session.release();
  }
}

/** A gate of nothing. */
const empty = (manifest) => ({
  name: '', tensors: new Map(), bias: new Float32Array(manifest.numbers.length), mask: new Uint8Array(manifest.numbers.length).fill(1),
});

const first = (error) => String(error?.message ?? error).split('\n')[0].slice(0, 200);

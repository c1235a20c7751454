// The texts that a causal LM reads: by its chat template or in Alpaca's format, as molehill_edge/prompts.py makes them.

import { Refusal } from './bytes.js';

const HEADINGS = { system: 'Input', tool: 'Input', user: 'Instruction', assistant: 'Response' };
const INTRO = 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n';
const LONGEST = 4 << 20; // characters that a chat template may write
const MARK = '<the answer>';

export class Prompts {
  /** @param {Function} Template  of @huggingface/jinja */
  constructor(generation, Template) {
    this.special = !generation.template; // a template writes its own special tokens
    this.names = { bos_token: generation.bosToken, eos_token: generation.eosToken };
    if (!generation.template) return;
    try {
      this.template = new Template(generation.chatTemplate);
    } catch (error) {
      throw new Refusal(`this page cannot render the bundle's chat template: ${String(error?.message ?? error).slice(0, 200)}`);
    }
  }

  /** The text of a conversation ({role, content}) up to where the assistant begins to answer. */
  beforeAnswer(messages) {
    if (!this.template) return alpaca(messages);
    const turns = messages.map(({ role, content }) => ({ role, content: content.trim() }));
    try {
      const answered = [...turns, { role: 'assistant', content: MARK }];
      const frame = this.#frame(answered.map(({ role }) => role));
      const shown = answered.map(({ content }, i) => frame[i] + content).join('');
      if (shown + frame.at(-1) === this.#render(answered, false)) return shown.slice(0, -MARK.length);
      return this.#render(turns, true); // the template edits earlier turns
    } catch (error) {
      if (error instanceof Refusal) throw error;
      throw new Refusal(`its chat template refuses the conversation: ${String(error?.message ?? error).slice(0, 200)}`);
    }
  }

  /** What the template writes before, between and after messages of these roles. */
  #frame(roles) {
    const marks = roles.map((_, i) => `<mark ${i} of ${roles.length}>`);
    let rest = this.#render(roles.map((role, i) => ({ role, content: marks[i] })), false);
    const frame = marks.map((mark) => {
      const at = rest.indexOf(mark);
      const before = at < 0 ? rest : rest.slice(0, at);
      rest = at < 0 ? '' : rest.slice(at + mark.length);
      return before;
    });
    return [...frame, rest];
  }

  #render(messages, prompt) {
    const text = this.template.render({
      messages, tools: null, documents: null, add_generation_prompt: prompt, ...this.names,
    });
    if (text.length > LONGEST) throw new Refusal('its chat template writes too much: give a shorter text.');
    return text;
  }
}

function alpaca(messages) {
  const turns = messages.map(({ role, content }) => {
    if (!HEADINGS[role]) throw new Refusal(`unknown role ${role}.`);
    return `### ${HEADINGS[role]}:\n${content.trim()}\n\n`;
  });
  return `${INTRO}${turns.join('')}### ${HEADINGS.assistant}:\n`;
}

// What the page makes of conversations and texts: reads {prompts, tokenizers} as JSON, writes what came of them.

import { readFileSync } from 'node:fs';

const [, , page, vendor] = process.argv;
const { Prompts } = await import(new URL('prompts.js', page));
const { Tokens } = await import(new URL('tokens.js', page));
const { Template } = await import(new URL('jinja/index.mjs', vendor));
const { Tokenizer } = await import(new URL('tokenizers/tokenizers.min.mjs', vendor));

const asked = JSON.parse(readFileSync(0));
const attempt = (make) => {
  try {
    return { came: make() };
  } catch (error) {
    if (error.name !== 'Refusal') throw error;
    return { refused: error.message };
  }
};

const prompts = asked.prompts.map(({ generation, turns }) => attempt(() => new Prompts(generation, Template).beforeAnswer(turns)));
const tokens = asked.tokenizers.map(({ about, texts, most }) => attempt(() => {
  const made = new Tokens(Tokenizer, about);
  return texts.map((text) => {
    const { ids, cut } = made.whole(text, most);
    return { ids, cut, begun: [made.begun(text, true), made.begun(text, false)], text: made.decode(ids) };
  });
}));
process.stdout.write(JSON.stringify({ prompts, tokens }));

// The card for conversations with a causal LM.

import { Refusal } from '../bytes.js';
import { routes } from '../classify.js';
import { Chat } from '../generate.js';
import { routeView } from './ask.js';
import { attempt, card, el } from './dom.js';

/** The number in a field; undefined when it is empty. */
function number(field, name) {
  if (!field.value && !field.validity.badInput) return undefined;
  if (!field.checkValidity()) throw new Refusal(`${name}: a ${field.step === 'any' ? '' : 'whole '}number from ${field.min} to ${field.max}.`);
  return field.valueAsNumber;
}

export function talkCard(app, prompts) {
  const { manifest } = app.engine;
  let chat = new Chat(app.engine, prompts);
  let ending = null;
  const talk = el('div', { id: 'talk', ariaLive: 'polite' });
  const text = el('textarea', { id: 'text', ariaLabel: 'Message', placeholder: 'Say something' });
  const send = el('button', { id: 'send', type: 'submit' }, 'Send');
  const stop = el('button', { id: 'stop', type: 'button', className: 'plain', hidden: true, onclick: () => ending?.abort() }, 'Stop');
  const system = el('input', { type: 'text', ariaLabel: 'What the model is told first', placeholder: 'What the model is told first' });
  const temperature = el('input', { id: 'temperature', type: 'number', min: 0, max: 2, step: 'any', value: 0 });
  const most = el('input', { id: 'most', type: 'number', min: 1, max: manifest.task.maxLength, value: Math.min(256, manifest.task.maxLength) });
  const said = el('div');
  const fresh = () => {
    ending?.abort();
    chat = new Chat(app.engine, prompts);
    talk.replaceChildren();
    said.replaceChildren();
  };
  const say = (event) => {
    event?.preventDefault();
    const content = text.value.trim();
    if (!content || ending) return undefined;
    return attempt(said, send, async () => {
      const how = { system: system.value.trim(), temperature: number(temperature, 'Temperature'), maxNewTokens: number(most, 'Longest answer') };
      const turn = el('div', { className: 'turn assistant' });
      const mine = el('div', { className: 'turn user' }, content);
      talk.append(mine, turn);
      text.value = '';
      ending = new AbortController();
      stop.hidden = false;
      const begin = performance.now();
      try {
        for await (const piece of chat.say(content, how, ending.signal)) {
          turn.textContent += piece;
          talk.scrollTop = talk.scrollHeight;
        }
      } catch (error) {
        if (!turn.textContent) {
          mine.remove();
          turn.remove();
          text.value = content;
        }
        throw error;
      } finally {
        [ending, stop.hidden] = [null, true];
      }
      if (!turn.isConnected) return; // a new conversation has begun meanwhile
      const ids = app.engine.tokens.begun(content, prompts.special).slice(0, manifest.task.maxLength);
      const seconds = (performance.now() - begin) / 1000;
      said.replaceChildren(el('p', { className: 'dim' }, `${seconds.toFixed(1)} s, gate ${app.engine.gate.name || 'none'}`), routeView(manifest, await routes(app.engine, ids)) ?? '');
    });
  };
  text.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && !event.shiftKey) say(event);
  });
  return card('Chat', 'first', talk,
    el('form', { onsubmit: say }, text, el('div', { className: 'row' }, send, stop, el('button', { id: 'fresh', type: 'button', className: 'plain', onclick: fresh }, 'New conversation'))),
    el('details', {}, el('summary', {}, 'How it answers'), system,
      el('div', { className: 'row' }, el('label', { className: 'check' }, 'Temperature', temperature), el('label', { className: 'check' }, 'Longest answer', most))),
    said);
}

// Elements of the page, made from data; nothing is ever read as HTML.

import { Refusal } from '../bytes.js';

/** An element with properties, handlers (onclick) and children. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith('on')) made.addEventListener(name.slice(2), value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

export const card = (title, className, ...children) => el('section', { className: `card ${className}` }, el('h2', {}, title), ...children);
export const percent = (share) => `${(100 * share).toFixed(1)}%`;
export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

/** Shares as bars: [[name, share]]. */
export function bars(shares, best = null) {
  const rows = shares.map(([name, share], i) => {
    const className = i === best ? 'best' : '';
    return [el('span', { className }, name), el('meter', { value: share, max: 1, ariaLabel: `${name} ${percent(share)}` }), el('span', { className: `number ${className}` }, percent(share))];
  });
  return el('div', { className: 'bars' }, ...rows);
}

/** A sentence for the visitor, in a place that says it aloud. */
export function tell(place, sentence, bad = false) {
  place.replaceChildren(el('p', { className: bad ? 'notice bad' : 'notice', role: bad ? 'alert' : 'status' }, sentence));
}

/** Run what a visitor asked for; what is refused is said, and anything else is an error of the page. */
export async function attempt(place, button, work) {
  if (button) button.disabled = true;
  try {
    place.replaceChildren();
    return await work();
  } catch (error) {
    tell(place, error instanceof Refusal ? error.message : `This page fails: ${error?.message ?? error}`, true);
    if (!(error instanceof Refusal)) console.error(error);
  } finally {
    if (button) button.disabled = false;
  }
  return undefined;
}

/** Let the visitor save bytes as a file. */
export function save(name, bytes) {
  const url = URL.createObjectURL(new Blob([bytes]));
  el('a', { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** A button that reads a file. */
export function opener(label, accept, read) {
  const input = el('input', { type: 'file', accept, onchange: async () => {
    const [file] = input.files;
    if (file) await read(new Uint8Array(await file.arrayBuffer()), file.name);
    input.value = '';
  } });
  return el('label', { className: 'button' }, label, input);
}

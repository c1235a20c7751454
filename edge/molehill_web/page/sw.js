// Keeps the page itself, whole and as it was written, so that it opens without a network; lets nothing go elsewhere.

importScripts('shell.js');

const SCOPE = new URL(self.registration.scope);
const OURS = `molehill page ${SCOPE.pathname} `;
const NAME = OURS + SHELL.digest;
const known = (path) => SHELL.files[path] ?? SHELL.lazy[path];

/** A file of the page from the network, refused when it is another than was written. */
async function load(cache, path) {
  const response = await fetch(new URL(path, SCOPE), { cache: 'no-cache', credentials: 'omit' });
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  const bytes = await response.arrayBuffer();
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
  if (Array.from(digest, (byte) => byte.toString(16).padStart(2, '0')).join('') !== known(path)) {
    throw new Error(`${path} is another file than the page was written with`);
  }
  const made = new Response(bytes, {
    headers: {
      'content-type': response.headers.get('content-type') ?? 'application/octet-stream',
      // Alone in its process, a page may use several threads.
      'cross-origin-opener-policy': 'same-origin',
      'cross-origin-embedder-policy': 'require-corp',
      'cross-origin-resource-policy': 'same-origin',
    },
  });
  await cache.put(new URL(path, SCOPE), made.clone());
  return made;
}

async function serve(path) {
  const cache = await caches.open(NAME);
  return (await cache.match(new URL(path, SCOPE))) ?? load(cache, path);
}

self.addEventListener('install', (event) => event.waitUntil((async () => {
  const cache = await caches.open(NAME);
  await Promise.all(Object.keys(SHELL.files).map((path) => load(cache, path)));
  await self.skipWaiting();
})()));

self.addEventListener('activate', (event) => event.waitUntil((async () => {
  for (const name of await caches.keys()) if (name.startsWith(OURS) && name !== NAME) await caches.delete(name);
  await self.clients.claim();
})()));

self.addEventListener('fetch', (event) => {
  const url = new URL(event.request.url);
  if (url.origin !== SCOPE.origin) {
    event.respondWith(Response.error());
    return;
  }
  if (!url.pathname.startsWith(SCOPE.pathname) || event.request.method !== 'GET') return;
  const path = url.pathname.slice(SCOPE.pathname.length) || 'index.html';
  if (known(path)) event.respondWith(serve(path));
});

// Keeps the site for use offline, and adds the headers that threads need on hosts that cannot set headers.

// `vit-edge bundle --web` writes the name and the files.
const CACHE = '__CACHE__';
const FILES = __FILES__;
const HEADERS = {
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Embedder-Policy': 'require-corp',
  'Cross-Origin-Resource-Policy': 'same-origin',
};

self.addEventListener('install', (event) => event.waitUntil(install()));
self.addEventListener('activate', (event) => event.waitUntil(activate()));
self.addEventListener('fetch', (event) => {
  const isOurs = event.request.method === 'GET' && event.request.url.startsWith(self.registration.scope);
  if (isOurs) event.respondWith(respond(event.request));
});

async function install() {
  const cache = await caches.open(CACHE);
  await cache.addAll(FILES.map((file) => new Request(file, { cache: 'no-cache' })));
  await self.skipWaiting();
}

/** Remove the caches of earlier bundles of this site. */
async function activate() {
  const scope = self.registration.scope;
  const old = (await caches.keys()).filter((name) => name.startsWith('vit-edge-') && name !== CACHE);
  await Promise.all(old.map(async (name) => ((await caches.open(name)).match(scope) ? caches.delete(name) : null)));
  await self.clients.claim();
}

async function respond(request) {
  const cache = await caches.open(CACHE);
  const kept = await cache.match(request, { ignoreSearch: true });
  const found = kept ?? (await fetch(request));
  if (!kept && found.ok && found.type === 'basic') await cache.put(request, found.clone());
  const headers = new Headers(found.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(found.body, { status: found.status, statusText: found.statusText, headers });
}

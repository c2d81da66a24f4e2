// The model file: its seal, its hash, and the manifest inside, as docs/model-file.md of vit-edge has them.

import { VitEdgeError } from './errors.mjs';

const SCHEMA = 1;
// The file ends in one more serialized ModelProto (field 14: the property `vit_edge.seal`), the SHA-256 of all before it.
const SEAL_PREFIX = new Uint8Array([0x72, 0x51, 0x0a, 0x0d, ...new TextEncoder().encode('vit_edge.seal'), 0x12, 0x40]);
const SEAL_BYTES = SEAL_PREFIX.length + 64;

/** Return the manifest in the bytes of a model file; throws not-trusted if they are not those that were sealed. */
export async function openModel(bytes, { sha256, manifest: [start, length] }) {
  await checkSeal(bytes, sha256);
  const manifest = JSON.parse(new TextDecoder().decode(bytes.subarray(start, start + length)));
  if (manifest.schema !== SCHEMA) {
    const reason = `the manifest has schema ${manifest.schema}; this page reads ${SCHEMA}`;
    throw new VitEdgeError('not-trusted', 'cannot use the model file', { reason, remedy: 'bundle it again' });
  }
  return manifest;
}

async function checkSeal(bytes, sha256) {
  const tail = bytes.subarray(-SEAL_BYTES);
  if (!SEAL_PREFIX.every((value, at) => tail[at] === value)) throw distrust('the seal of the file is missing');
  const digest = new TextDecoder().decode(tail.subarray(SEAL_PREFIX.length));
  if ((await sha256Hex(bytes.subarray(0, -SEAL_BYTES))) !== digest) {
    throw distrust('the bytes of the file are not those that were sealed: it was changed or damaged');
  }
  if ((await sha256Hex(bytes)) !== sha256) throw distrust('the file is not the one that this page was made for');
}

function distrust(reason) {
  return new VitEdgeError('not-trusted', 'will not load the model file', { reason, remedy: 'copy the site again' });
}

/** Return the SHA-256 of bytes as hexadecimal text. */
export async function sha256Hex(bytes) {
  if (!globalThis.crypto?.subtle) {
    const reason = 'the page is not in a secure context, so nothing can be checked';
    throw new VitEdgeError('unavailable', 'cannot load', { reason, remedy: 'serve it over https, or from localhost' });
  }
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
  return Array.from(digest, (value) => value.toString(16).padStart(2, '0')).join('');
}

/** Return the SHA-256 of pixels [height, width, 3] and their shape: vit_edge.image.pixel_hash. */
export async function pixelHash(pixels, height, width) {
  const shape = new TextEncoder().encode(`(${height}, ${width}, 3)`);
  const whole = new Uint8Array(shape.length + pixels.length);
  whole.set(shape);
  whole.set(pixels, shape.length);
  return sha256Hex(whole);
}

/** Return the bytes of base64 text. */
export function fromBase64(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

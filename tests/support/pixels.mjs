// Reads commands as JSON lines and writes one JSON line each: what the parts of vit-edge.mjs give in Node.js.
//
//     node pixels.mjs FOLDER_OF_PARTS < commands

import { createInterface } from 'node:readline';
import { pathToFileURL } from 'node:url';

const part = (name) => import(pathToFileURL(`${process.argv[2]}/${name}.mjs`).href);
const { readImageFile } = await part('image-file');
const { compositeOnWhite, fit, normalised, upright } = await part('pixels');
const { compare, mosaic, recorded } = await part('golden');
const { openModel } = await part('model-file');

const bytes = (text) => new Uint8Array(Buffer.from(text, 'base64'));
const text = (values) => Buffer.from(values.buffer, values.byteOffset, values.byteLength).toString('base64');

const COMMANDS = {
  fit: ({ data, width, height, preprocessing, order }) => text(fit({ data: bytes(data), width, height }, preprocessing, order)),
  normalised: ({ data, preprocessing }) => text(normalised(bytes(data), preprocessing)),
  upright({ data, width, height, orientation }) {
    const turned = upright({ data: bytes(data), width, height }, orientation);
    return { ...turned, data: text(turned.data) };
  },
  composite({ data }) {
    const rgb = new Uint8Array((bytes(data).length / 4) * 3);
    compositeOnWhite(bytes(data), rgb, 0);
    return text(rgb);
  },
  async image({ data }) {
    const { kind, width, height, orientation, parts } = await readImageFile(bytes(data));
    return { kind, width, height, orientation, data: Buffer.concat(parts).toString('base64') };
  },
  mosaic: ({ seed, height, width }) => text(mosaic(seed, height, width)),
  async model({ data, about }) {
    const manifest = await openModel(bytes(data), about);
    const { expected, tolerance } = recorded(manifest);
    return { name: manifest.name, sqnr: compare(expected, expected, tolerance) === Infinity };
  },
  compare: ({ expected, found, tolerance }) => compare(expected, found, tolerance),
};

for await (const line of createInterface({ input: process.stdin })) {
  const { command, ...options } = JSON.parse(line);
  try {
    console.log(JSON.stringify({ result: await COMMANDS[command](options) }));
  } catch (error) {
    console.log(JSON.stringify({ code: error.code ?? 'crash', message: error.message }));
  }
}

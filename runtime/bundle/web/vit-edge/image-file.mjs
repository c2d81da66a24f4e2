// From the bytes of a JPEG, PNG or WebP file: its kind, its size, its EXIF orientation, and the same file without metadata.
//
// Browsers turn images and convert colors by metadata, each in its own way, and Pillow does neither. So the decoder of
// the browser gets only what makes pixels, and the turn is done in pixels.mjs.

import { imageRejected } from './errors.mjs';

// As vit_edge.image.Limits and the bounds next to it.
const MOST = { pixels: 50_000_000, side: 30_000, bytes: 100 * 2 ** 20, aspect: 20 };
const LEAST_SIDE = 8;
const PNG_SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const ORIENTATION_TAG = 0x0112;

/** Return {type, kind, width, height, orientation, parts}; `parts` are the bytes to decode. Throws image-rejected. */
export async function readImageFile(bytes) {
  if (bytes.length > MOST.bytes) throw imageRejected(`the file has ${bytes.length} bytes; at most ${MOST.bytes} are read`);
  const found = await readerOf(bytes)(bytes);
  checkSize(found);
  return { ...found, orientation: await orientationOf(found) };
}

function readerOf(bytes) {
  if (bytes[0] === 0xff && bytes[1] === 0xd8) return readJpeg;
  if (PNG_SIGNATURE.every((value, at) => bytes[at] === value)) return readPng;
  if (text(bytes, 0, 4) === 'RIFF' && text(bytes, 8, 4) === 'WEBP') return readWebp;
  throw imageRejected('the file is not a JPEG, PNG or WebP image');
}

function checkSize({ width, height }) {
  const [long, short] = [Math.max(width, height), Math.min(width, height)];
  const size = `the image has ${width} x ${height} pixels`;
  if (long > MOST.side || width * height > MOST.pixels) {
    throw imageRejected(`${size}; at most ${MOST.pixels} pixels and ${MOST.side} a side are decoded`, 'scale it down first');
  }
  if (short < LEAST_SIDE || long > MOST.aspect * short) {
    const limit = `at least ${LEAST_SIDE} a side and an aspect ratio of at most ${MOST.aspect} are read`;
    throw imageRejected(`${size}; ${limit}`, 'leave it out');
  }
}

/** Keep what decodes pixels: the frame, tables, scans, and the markers of JFIF (APP0) and Adobe (APP14). */
function readJpeg(bytes) {
  const kept = [bytes.subarray(0, 2)];
  const found = { type: 'image/jpeg', parts: kept, metadata: { exif: [], xmp: null } };
  let at = 2;
  while (at + 4 <= bytes.length) {
    if (bytes[at] !== 0xff) throw damaged('a marker of the JPEG file is missing');
    const marker = bytes[at + 1];
    if (marker === 0xff) {
      at += 1; // a fill byte
      continue;
    }
    if (marker === 0xda) break;
    const end = at + 2 + number(bytes, at + 2, 2);
    if (end > bytes.length) throw damaged('the file is cut short');
    const segment = bytes.subarray(at + 4, end);
    if (isFrame(marker)) Object.assign(found, readFrame(segment));
    readApplication(marker, segment, found.metadata);
    if (!isMetadata(marker)) kept.push(bytes.subarray(at, end));
    at = end;
  }
  if (!found.kind || bytes[at + 1] !== 0xda || !hasEnd(bytes, at)) throw damaged('the file is cut short');
  kept.push(bytes.subarray(at));
  found.metadata.exif = found.metadata.exif.length ? joined(found.metadata.exif) : null;
  return found;
}

const isFrame = (marker) => marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker);
const isMetadata = (marker) => (marker > 0xe0 && marker <= 0xef && marker !== 0xee) || marker === 0xfe;

function readFrame(segment) {
  const kind = { 1: 'gray JPEG', 3: 'color JPEG', 4: 'CMYK JPEG' }[segment[5]];
  if (!kind || segment[0] !== 8) throw imageRejected(`the JPEG file has ${segment[5]} channels of ${segment[0]} bits`);
  return { kind, height: number(segment, 1, 2), width: number(segment, 3, 2) };
}

function readApplication(marker, segment, metadata) {
  const xmp = 'http://ns.adobe.com/xap/1.0/\0';
  if (marker !== 0xe1) return;
  if (text(segment, 0, 6) === 'Exif\0\0') metadata.exif.push(segment.subarray(6));
  else if (text(segment, 0, xmp.length) === xmp) metadata.xmp = segment.subarray(xmp.length);
}

/** Return whether the end marker follows the start of a scan: browsers draw what there is of a file cut short. */
function hasEnd(bytes, from) {
  for (let at = bytes.indexOf(0xff, from); at >= 0; at = bytes.indexOf(0xff, at + 1)) {
    if (bytes[at + 1] === 0xd9) return true;
  }
  return false;
}

const PNG_COLORS = { 0: 'gray PNG', 2: 'color PNG', 3: 'palette PNG', 4: 'gray PNG with alpha', 6: 'color PNG with alpha' };

/** Keep header, palette, transparency, pixels and end. */
async function readPng(bytes) {
  const kept = [bytes.subarray(0, 8)];
  const found = { type: 'image/png', parts: kept, metadata: { exif: null, xmp: null, profile: null } };
  let [at, name] = [8, ''];
  for (; name !== 'IEND'; at += 12 + number(bytes, at, 4)) {
    const length = at + 12 <= bytes.length ? number(bytes, at, 4) : Infinity;
    if (at + 12 + length > bytes.length) throw damaged('the file is cut short');
    name = text(bytes, at + 4, 4);
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (name === 'IHDR') Object.assign(found, readPngHeader(data));
    if (name === 'tRNS' && !found.kind?.endsWith('with alpha')) found.kind += ' with alpha';
    if (['IHDR', 'PLTE', 'tRNS', 'IDAT', 'IEND'].includes(name)) kept.push(bytes.subarray(at, at + 12 + length));
    else await readPngMetadata(name, data, found.metadata);
  }
  if (!found.width) throw damaged('the header of the PNG file is missing');
  return found;
}

function readPngHeader(data) {
  const color = PNG_COLORS[data[9]];
  if (!color) throw damaged(`the PNG file has color type ${data[9]}`);
  return { width: number(data, 0, 4), height: number(data, 4, 4), kind: data[8] === 16 ? `16-bit ${color}` : color };
}

async function readPngMetadata(name, data, metadata) {
  if (name === 'eXIf') metadata.exif = data;
  if (!['tEXt', 'zTXt', 'iTXt'].includes(name)) return;
  const end = data.indexOf(0);
  const key = text(data, 0, end);
  if (key === 'XML:com.adobe.xmp' && name === 'iTXt') metadata.xmp = await internationalText(data, end);
  // ImageMagick writes EXIF as hexadecimal text.
  if (key === 'Raw profile type exif' && name !== 'iTXt') {
    const profile = name === 'zTXt' ? await inflated(data.subarray(end + 2)) : data.subarray(end + 1);
    const digits = text(profile, 0, profile.length).split('\n').slice(3).join('').replace(/\s/g, '');
    metadata.profile = Uint8Array.from(digits.match(/../g) ?? [], (pair) => parseInt(pair, 16));
  }
}

async function internationalText(data, end) {
  const isPacked = data[end + 1] === 1;
  const language = data.indexOf(0, end + 3);
  const value = data.subarray(data.indexOf(0, language + 1) + 1);
  return isPacked ? inflated(value) : value;
}

async function inflated(data) {
  const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream('deflate'));
  try {
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    throw damaged('compressed text in the PNG file cannot be read');
  }
}

/** Keep every chunk but EXIF, XMP and the color profile, and correct the flags and the length. */
function readWebp(bytes) {
  const end = 8 + littleEndian(bytes, 4, 4);
  if (end > bytes.length) throw damaged('the file is cut short');
  const found = { type: 'image/webp', parts: [], metadata: { exif: null, xmp: null } };
  const flags = { isAnimated: false, hasAlpha: false, isLossless: false };
  for (let at = 12; at + 8 <= end; ) {
    const [name, length] = [text(bytes, at, 4), littleEndian(bytes, at + 4, 4)];
    const next = at + 8 + length + (length % 2);
    if (at + 8 + length > end) throw damaged('the file is cut short');
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (name === 'EXIF') found.metadata.exif = withoutPrefix(data);
    else if (name === 'XMP ') found.metadata.xmp = data;
    else if (name !== 'ICCP') found.parts.push(readWebpChunk(name, data, bytes.slice(at, next), found, flags));
    at = next;
  }
  if (!found.width) throw damaged('the WebP file has no image');
  const length = found.parts.reduce((sum, part) => sum + part.length, 4);
  found.parts.unshift(new Uint8Array([...bytes.subarray(0, 4), ...[0, 8, 16, 24].map((bits) => (length >> bits) & 255), ...bytes.subarray(8, 12)]));
  const alpha = flags.hasAlpha ? ' with alpha' : '';
  found.kind = `${flags.isAnimated ? 'animated' : flags.isLossless ? 'lossless' : 'lossy'} WebP${alpha}`;
  return found;
}

/** Take size and kind of one chunk; returns the chunk, in VP8X without the flags of what was left out. */
function readWebpChunk(name, data, chunk, found, flags) {
  if (name === 'VP8X') {
    flags.isAnimated = Boolean(data[0] & 0x02);
    flags.hasAlpha ||= Boolean(data[0] & 0x10);
    Object.assign(found, { width: 1 + littleEndian(data, 4, 3), height: 1 + littleEndian(data, 7, 3) });
    chunk[8] &= ~(0x20 | 0x08 | 0x04);
  } else if (name === 'VP8L') {
    const bits = littleEndian(data, 1, 4);
    flags.isLossless = true;
    flags.hasAlpha ||= Boolean((bits >>> 28) & 1);
    found.width ??= 1 + (bits & 0x3fff);
    found.height ??= 1 + ((bits >>> 14) & 0x3fff);
  } else if (name === 'VP8 ') {
    found.width ??= littleEndian(data, 6, 2) & 0x3fff;
    found.height ??= littleEndian(data, 8, 2) & 0x3fff;
  }
  return chunk;
}

const withoutPrefix = (data) => (text(data, 0, 6) === 'Exif\0\0' ? data.subarray(6) : data);

/** Return 1 to 8, by EXIF, else by XMP, as Pillow's getexif() finds it. */
async function orientationOf({ type, metadata: { exif, xmp, profile } }) {
  const source = exif ?? (profile ? withoutPrefix(profile) : null);
  const found = source?.length ? readOrientation(source, type) : null;
  if (found !== null) return found >= 2 && found <= 8 ? found : 1;
  const match = xmp && /tiff:Orientation(?:="|>)([0-9])/.exec(text(xmp, 0, xmp.length));
  return match && match[1] >= 2 && match[1] <= 8 ? Number(match[1]) : 1;
}

/** Return the value of the tag in the first directory of a TIFF header, or null. */
function readOrientation(exif, type) {
  const order = text(exif, 0, 2);
  const isTiff = order === 'II' || order === 'MM';
  if (!isTiff && type === 'image/jpeg') return null; // in a JPEG file Pillow ignores such data
  if (!isTiff) throw damaged('the EXIF data cannot be read');
  const read = order === 'II' ? littleEndian : number;
  const directory = read(exif, 4, 4);
  const count = read(exif, directory, 2);
  for (let entry = directory + 2, left = count; left > 0 && entry + 12 <= exif.length; entry += 12, left -= 1) {
    if (read(exif, entry, 2) !== ORIENTATION_TAG) continue;
    const bytes = { 1: 1, 3: 2, 4: 4 }[read(exif, entry + 2, 2)];
    return bytes ? read(exif, entry + 8, bytes) : null;
  }
  return null;
}

const damaged = (reason) => imageRejected(`the image is damaged or incomplete (${reason})`, 'copy or export it again');

function number(bytes, at, length) {
  let value = 0;
  for (let i = 0; i < length; i += 1) value = value * 256 + (bytes[at + i] ?? 0);
  return value;
}

function littleEndian(bytes, at, length) {
  let value = 0;
  for (let i = length - 1; i >= 0; i -= 1) value = value * 256 + (bytes[at + i] ?? 0);
  return value;
}

/** Return bytes as text, one character a byte. */
function text(bytes, at, length) {
  return new TextDecoder('latin1').decode(bytes.subarray(at, at + length));
}

function joined(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.reduce((at, part) => (whole.set(part, at), at + part.length), 0);
  return whole;
}
